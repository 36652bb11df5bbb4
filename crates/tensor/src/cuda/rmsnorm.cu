// RMSNorm; contract in ops/rmsnorm.rs. One block per row; d is a multiple of WIDTH.

extern "C" __global__ void rmsnorm_forward(const element *__restrict__ x, const element *__restrict__ weight, float eps,
                                           element *__restrict__ y, float *__restrict__ rstd, u32 d) {
    SHARED(scratch);
    const element *row = x + (u64)blockIdx.x * d;
    float sum = 0.0f, values[WIDTH], w[WIDTH];
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        load16(row + i, values);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum += values[j] * values[j];
    }
    sum = block_sum(sum, (float *)scratch);
    float r = 1.0f / sqrtf(sum / (float)d + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        load16(row + i, values);
        load16(weight + i, w);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) values[j] = values[j] * r * w[j];
        store16(y + (u64)blockIdx.x * d + i, values);
    }
}

extern "C" __global__ void rmsnorm_apply(const element *__restrict__ x, const element *__restrict__ weight,
                                         const float *__restrict__ rstd, element *__restrict__ y, u32 d) {
    float values[WIDTH], w[WIDTH], r = rstd[blockIdx.x];
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        load16(x + (u64)blockIdx.x * d + i, values);
        load16(weight + i, w);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) values[j] = values[j] * r * w[j];
        store16(y + (u64)blockIdx.x * d + i, values);
    }
}

// d_x += the gradient through the norm.
extern "C" __global__ void rmsnorm_backward(const element *__restrict__ x, const element *__restrict__ weight,
                                            const float *__restrict__ rstd, const element *__restrict__ d_y,
                                            element *__restrict__ d_x, u32 d) {
    SHARED(scratch);
    u64 row = (u64)blockIdx.x * d;
    float sum = 0.0f, values[WIDTH], w[WIDTH], g[WIDTH], old[WIDTH], r = rstd[blockIdx.x];
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        load16(x + row + i, values);
        load16(weight + i, w);
        load16(d_y + row + i, g);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum += g[j] * w[j] * values[j];
    }
    float mean = block_sum(sum, (float *)scratch) * r * r / (float)d;
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        load16(x + row + i, values);
        load16(weight + i, w);
        load16(d_y + row + i, g);
        load16(d_x + row + i, old);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) old[j] += r * (g[j] * w[j] - values[j] * mean);
        store16(d_x + row + i, old);
    }
}

// d_weight [d] (f32) += column sums of d_y * x * rstd. A block takes 32 columns; its warps share the rows, and their
// sums are added in order.
extern "C" __global__ void rmsnorm_weight_gradient(const element *__restrict__ x, const float *__restrict__ rstd,
                                                   const element *__restrict__ d_y, float *__restrict__ d_weight,
                                                   u32 rows, u32 d) {
    SHARED(scratch);
    float *sums = (float *)scratch;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < d) {
        for (u32 row = warp; row < rows; row += warps) {
            u64 at = (u64)row * d + column;
            sum += to_float(d_y[at]) * to_float(x[at]) * rstd[row];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < d) {
        for (u32 other = 1; other < warps; other++) sum += sums[other * 32 + lane];
        d_weight[column] += sum;
    }
}
