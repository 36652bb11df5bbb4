// Norm of gradients; contract in ops/grad_norm.rs.

// One partial sum of squares per block.
extern "C" __global__ void sum_of_squares(const float *__restrict__ x, double *__restrict__ parts, u64 n) {
    SHARED(memory);
    double sum = 0.0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        sum += (double)x[i] * x[i];
    }
    sum = block_sum(sum, (double *)memory);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
