// SwiGLU; contract in ops/swiglu.rs.

#define EACH_PACK(n)                                                                                                     \
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH; i < (n); i += (u64)gridDim.x * blockDim.x * WIDTH)

// What is left after the last whole pack is taken one by one; `n` elements in all.
#define IS_WHOLE(i, n) ((i) + WIDTH <= (n))

__device__ __forceinline__ void load_some(const element *from, u64 i, u64 n, float (&to)[WIDTH]) {
    if (IS_WHOLE(i, n)) return load16(from + i, to);
    for (int j = 0; j < WIDTH; j++) to[j] = i + j < n ? to_float(from[i + j]) : 0.0f;
}
__device__ __forceinline__ void store_some(element *to, u64 i, u64 n, const float (&from)[WIDTH]) {
    if (IS_WHOLE(i, n)) return store16(to + i, from);
    for (int j = 0; j < WIDTH; j++) if (i + j < n) to[i + j] = from_float<element>(from[j]);
}

extern "C" __global__ void swiglu_forward(const element *__restrict__ gate, const element *__restrict__ up,
                                          element *__restrict__ y, u64 n) {
    float g[WIDTH], u[WIDTH];
    EACH_PACK(n) {
        load_some(gate, i, n, g);
        load_some(up, i, n, u);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) g[j] = g[j] / (1.0f + expf(-g[j])) * u[j];
        store_some(y, i, n, g);
    }
}

// gate and up become their gradients.
extern "C" __global__ void swiglu_backward(element *__restrict__ gate, element *__restrict__ up,
                                           const element *__restrict__ d_y, u64 n) {
    float g[WIDTH], u[WIDTH], d[WIDTH];
    EACH_PACK(n) {
        load_some(gate, i, n, g);
        load_some(up, i, n, u);
        load_some(d_y, i, n, d);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            float sigmoid = 1.0f / (1.0f + expf(-g[j])), silu = g[j] * sigmoid;
            g[j] = d[j] * u[j] * (sigmoid + silu * (1.0f - sigmoid));
            u[j] = d[j] * silu;
        }
        store_some(gate, i, n, g);
        store_some(up, i, n, u);
    }
}
