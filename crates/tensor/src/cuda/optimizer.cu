// AdamW and the gradient norm; contracts in ops/adamw.rs, ops/adamw_8bit.rs, ops/grad_norm.rs.

struct Factors {
    float beta1, beta2, rest1, rest2, decay, rate, root, epsilon, grad_scale;
};

__device__ __forceinline__ float updated(float value, float grad, float &m, float &v, const Factors &f) {
    float g = grad * f.grad_scale;
    m = f.beta1 * m + f.rest1 * g;
    v = f.beta2 * v + f.rest2 * (g * g);
    return value * f.decay - f.rate * m / (sqrtf(v) * f.root + f.epsilon);
}

// A weight: f32, or bf16 with what rounding left in `low`. The bits of the f32 are those of the bf16 (rounded half up) times
// 65,536 plus the signed low half, so that nothing is lost.
__device__ __forceinline__ float load_weight(const float *value, const u16 *, u64 i) { return value[i]; }
__device__ __forceinline__ float load_weight(const bf16 *value, const u16 *low, u64 i) {
    return __uint_as_float(((u32)value[i].bits << 16) + (u32)(int)(short)low[i]);
}
__device__ __forceinline__ void store_weight(float *value, u16 *, u64 i, float x) { value[i] = x; }
__device__ __forceinline__ void store_weight(bf16 *value, u16 *low, u64 i, float x) {
    u32 bits = __float_as_uint(x), high = (bits + 0x8000u) >> 16;
    value[i].bits = (u16)high;
    low[i] = (u16)(bits - (high << 16));
}

#define FACTORS                                                                                                          \
    float beta1, float beta2, float rest1, float rest2, float decay, float rate, float root, float epsilon, float grad_scale
#define GIVEN_FACTORS                                                                                                    \
    Factors { beta1, beta2, rest1, rest2, decay, rate, root, epsilon, grad_scale }

extern "C" __global__ void adamw(element *__restrict__ value, u16 *__restrict__ low, const float *__restrict__ grad,
                                 float *__restrict__ m, float *__restrict__ v, u64 n, FACTORS) {
    Factors f = GIVEN_FACTORS;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        float first = m[i], second = v[i];
        store_weight(value, low, i, updated(load_weight(value, low, i), grad[i], first, second, f));
        m[i] = first;
        v[i] = second;
    }
}

// The code of a magnitude from 0 to 1: the first whose end is not below it.
__device__ __forceinline__ u32 nearest(const float *ends, float x) {
    u32 code = 0;
#pragma unroll
    for (u32 step = 128; step > 0; step >>= 1) {
        if (x > ends[code + step - 1]) code += step;
    }
    return code;
}

// Moments of 8 bits: a block of 256 threads takes the 256 elements that share a scale. `tables`: levels and ends of the signed
// code, then of the unsigned one, 256 each. r is the root of the second moment.
extern "C" __global__ void adamw_8bit(element *__restrict__ value, u16 *__restrict__ low, const float *__restrict__ grad,
                                      u8 *__restrict__ m_codes, float *__restrict__ m_scales, u8 *__restrict__ r_codes,
                                      float *__restrict__ r_scales, const float *__restrict__ tables, u64 n, FACTORS) {
    SHARED(memory);
    float *table = (float *)memory, *scratch = table + 1024;
    for (u32 i = threadIdx.x; i < 1024; i += blockDim.x) table[i] = tables[i];
    __syncthreads();
    Factors f = GIVEN_FACTORS;
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    float m = 0.0f, r = 0.0f;
    if (i < n) {
        u32 code = m_codes[i];
        m = table[code & 127] * m_scales[blockIdx.x];
        if (code & 128) m = -m;
        r = table[512 + r_codes[i]] * r_scales[blockIdx.x];
        float v = r * r;
        store_weight(value, low, i, updated(load_weight(value, low, i), grad[i], m, v, f));
        r = sqrtf(v);
    }
    float m_scale = block_max(fabsf(m), scratch), r_scale = block_max(r, scratch);
    if (i < n) {
        // Rounding may carry a quotient past 1, where the tables end. A root that is not 0 is not stored as 0.
        u32 magnitude = m_scale > 0.0f ? nearest(table + 256, fminf(fabsf(m) / m_scale, 1.0f)) : 0;
        m_codes[i] = (u8)(m_scale > 0.0f ? magnitude | (__float_as_uint(m) >> 24 & 128) : 0);
        u32 root_code = r_scale > 0.0f ? nearest(table + 768, fminf(r / r_scale, 1.0f)) : 0;
        r_codes[i] = (u8)(root_code == 0 && r > 0.0f ? 1 : root_code);
    }
    if (threadIdx.x == 0) {
        m_scales[blockIdx.x] = m_scale;
        r_scales[blockIdx.x] = r_scale;
    }
}

// One partial sum of squares a block.
extern "C" __global__ void sum_of_squares(const float *__restrict__ x, double *__restrict__ parts, u64 n) {
    SHARED(memory);
    double sum = 0.0;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        sum += (double)x[i] * x[i];
    }
    sum = block_sum(sum, (double *)memory);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
