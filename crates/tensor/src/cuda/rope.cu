// Rotary position embedding; contract in ops/rope.rs.

// Cosines and sines [tokens, half] of position * frequency, the angle rounded to f32 first.
extern "C" __global__ void rope_angles(const u32 *__restrict__ positions, const float *__restrict__ frequencies,
                                       float *__restrict__ cosines, float *__restrict__ sines, u32 tokens, u32 half) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens * half) return;
    float angle = (float)positions[i / half] * frequencies[i % half];
    cosines[i] = cosf(angle);
    sines[i] = sinf(angle);
}

// Rotates every head of x [tokens, heads, 2 * half] in place. A thread takes `pack` pairs: WIDTH where that divides
// half a head, else 1.
extern "C" __global__ void rope_rotate(element *__restrict__ x, const float *__restrict__ cosines,
                                       const float *__restrict__ sines, float direction, u32 tokens, u32 heads, u32 half,
                                       u32 pack) {
    u32 parts = half / pack;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)tokens * heads * parts) return;
    u32 part = i % parts * pack;
    u64 head = i / parts, token = head / heads;
    element *at = x + head * 2 * half + part;
    if (pack == 1) {
        float c = cosines[token * half + part], s = sines[token * half + part] * direction;
        float a = to_float(at[0]), b = to_float(at[half]);
        at[0] = from_float<element>(a * c - b * s);
        at[half] = from_float<element>(b * c + a * s);
        return;
    }
    float a[WIDTH], b[WIDTH];
    load16(at, a);
    load16(at + half, b);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        float c = cosines[token * half + part + j], s = sines[token * half + part + j] * direction;
        float first = a[j] * c - b[j] * s;
        b[j] = b[j] * c + a[j] * s;
        a[j] = first;
    }
    store16(at, a);
    store16(at + half, b);
}
