// The update of one weight by AdamW, and weights as they are stored.

struct Factors {
    float beta1, beta2, rest1, rest2, decay, rate, root, epsilon, grad_scale;
};

__device__ __forceinline__ float updated(float value, float grad, float &m, float &v, const Factors &f) {
    float g = grad * f.grad_scale;
    m = f.beta1 * m + f.rest1 * g;
    v = f.beta2 * v + f.rest2 * (g * g);
    return value * f.decay - f.rate * m / (sqrtf(v) * f.root + f.epsilon);
}

// A weight: f32, or bf16 with what rounding left in `residual`. The bits of the f32 are those of the bf16 (rounded half
// up) times 65,536 plus the signed residual, so that nothing is lost.
__device__ __forceinline__ float load_weight(const float *value, const u16 *, u64 i) { return value[i]; }
__device__ __forceinline__ float load_weight(const bf16 *value, const u16 *residual, u64 i) {
    return __uint_as_float(((u32)value[i].bits << 16) + (u32)(int)(short)residual[i]);
}
__device__ __forceinline__ void store_weight(float *value, u16 *, u64 i, float x) { value[i] = x; }
__device__ __forceinline__ void store_weight(bf16 *value, u16 *residual, u64 i, float x) {
    u32 bits = __float_as_uint(x), high = (bits + 0x8000u) >> 16;
    value[i].bits = (u16)high;
    residual[i] = (u16)(bits - (high << 16));
}

#define FACTORS                                                                                                          \
    float beta1, float beta2, float rest1, float rest2, float decay, float rate, float root, float epsilon, float grad_scale
#define GIVEN_FACTORS                                                                                                    \
    Factors { beta1, beta2, rest1, rest2, decay, rate, root, epsilon, grad_scale }

