// AdamW; contract in ops/adamw.rs.

extern "C" __global__ void adamw(element *__restrict__ value, u16 *__restrict__ residual, const float *__restrict__ grad,
                                 float *__restrict__ m, float *__restrict__ v, u64 n, FACTORS) {
    Factors f = GIVEN_FACTORS;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        float first = m[i], second = v[i];
        store_weight(value, residual, i, updated(load_weight(value, residual, i), grad[i], first, second, f));
        m[i] = first;
        v[i] = second;
    }
}
