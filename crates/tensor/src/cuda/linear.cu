// Bias of linear layers; contract in ops/linear.rs.

// Adds bias [d] to every row of y [rows, d].
extern "C" __global__ void add_bias(const element *__restrict__ bias, element *__restrict__ y, u64 n, u32 d) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<element>(to_float(y[i]) + to_float(bias[i % d]));
}

// sums [d] (f32) += column sums of x [rows, d]; as rmsnorm_weight_gradient.
extern "C" __global__ void column_sums(const element *__restrict__ x, float *__restrict__ sums, u32 rows, u32 d) {
    SHARED(scratch);
    float *parts = (float *)scratch;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < d) {
        for (u32 row = warp; row < rows; row += warps) sum += to_float(x[(u64)row * d + column]);
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < d) {
        for (u32 other = 1; other < warps; other++) sum += parts[other * 32 + lane];
        sums[column] += sum;
    }
}
