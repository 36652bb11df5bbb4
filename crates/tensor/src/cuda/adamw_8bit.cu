// AdamW with moments of 8 bits; contract in ops/adamw_8bit.rs.

// The code of a magnitude from 0 to 1: the first whose end is not below it.
__device__ __forceinline__ u32 nearest(const float *ends, float x) {
    u32 code = 0;
#pragma unroll
    for (u32 step = 128; step > 0; step >>= 1) {
        if (x > ends[code + step - 1]) code += step;
    }
    return code;
}

// Moments of 8 bits: a block of 256 threads takes the 256 elements that share a scale. `tables`: levels and ends of the
// signed code, then of the unsigned one, 256 each. r is the root of the second moment.
extern "C" __global__ void adamw_8bit(element *__restrict__ value, u16 *__restrict__ residual, const float *__restrict__ grad,
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
        store_weight(value, residual, i, updated(load_weight(value, residual, i), grad[i], m, v, f));
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
