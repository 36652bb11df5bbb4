// Blocks of GGUF files and NF4: dequantised to elements, or multiplied as they are; formats in quant.rs and nf4.rs. A
// thread dequantises 8 elements that follow each other.

__device__ __forceinline__ float half_at(const u8 *p) {
    u32 bits = p[0] | (u32)p[1] << 8, sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 0) {
        float x = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -x : x;
    }
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Scale (0 to 63) and minimum of sub-block `i` of the 12 bytes that Q4_K and Q5_K share.
__device__ __forceinline__ void scale_min(const u8 *s, u32 i, u32 &scale, u32 &minimum) {
    if (i < 4) {
        scale = s[i] & 63;
        minimum = s[i + 4] & 63;
    } else {
        scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
        minimum = s[i + 4] >> 4 | (s[i] >> 6) << 4;
    }
}

// Elements `at` to `at` + 7 of a block of the type that GGUF numbers `kind`.
__device__ __forceinline__ void decode8(u32 kind, const u8 *b, u32 at, float (&y)[8]) {
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        u32 i = at + j;
        switch (kind) {
        case 0: { // F32
            const u8 *p = b + 4 * i;
            y[j] = __uint_as_float(p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24);
            break;
        }
        case 1: // F16
            y[j] = half_at(b + 2 * i);
            break;
        case 30: // BF16
            y[j] = __uint_as_float((b[2 * i] | (u32)b[2 * i + 1] << 8) << 16);
            break;
        case 2: { // Q4_0
            u32 q = i < 16 ? b[2 + i] & 15 : b[2 + i - 16] >> 4;
            y[j] = half_at(b) * (float)((int)q - 8);
            break;
        }
        case 3: { // Q4_1
            u32 q = i < 16 ? b[4 + i] & 15 : b[4 + i - 16] >> 4;
            y[j] = half_at(b) * (float)q + half_at(b + 2);
            break;
        }
        case 6: { // Q5_0
            u32 q = (i < 16 ? b[6 + i] & 15 : b[6 + i - 16] >> 4) | (b[2 + i / 8] >> i % 8 & 1) << 4;
            y[j] = half_at(b) * (float)((int)q - 16);
            break;
        }
        case 7: { // Q5_1
            u32 q = (i < 16 ? b[8 + i] & 15 : b[8 + i - 16] >> 4) | (b[4 + i / 8] >> i % 8 & 1) << 4;
            y[j] = half_at(b) * (float)q + half_at(b + 2);
            break;
        }
        case 8: // Q8_0
            y[j] = half_at(b) * (float)(signed char)b[2 + i];
            break;
        case 10: { // Q2_K
            u32 q = b[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, s = b[i / 16];
            y[j] = half_at(b + 80) * (float)(s & 15) * (float)q - half_at(b + 82) * (float)(s >> 4);
            break;
        }
        case 11: { // Q3_K
            u32 low = b[32 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, high = b[i % 32] >> i / 32 & 1;
            const u8 *s = b + 96;
            u32 g = i / 16, four = g < 8 ? s[g] & 15 : s[g - 8] >> 4, two = s[8 + g % 4] >> g / 4 * 2 & 3;
            float scale = half_at(b + 108) * (float)((int)(four | two << 4) - 32);
            y[j] = scale * (float)((int)low - (high ? 0 : 4));
            break;
        }
        case 12: { // Q4_K
            u32 scale, minimum, q = b[16 + i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
            scale_min(b + 4, i / 32, scale, minimum);
            y[j] = half_at(b) * (float)scale * (float)q - half_at(b + 2) * (float)minimum;
            break;
        }
        case 13: { // Q5_K
            u32 scale, minimum, q = b[48 + i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
            q |= (b[16 + i % 32] >> i / 32 & 1) << 4;
            scale_min(b + 4, i / 32, scale, minimum);
            y[j] = half_at(b) * (float)scale * (float)q - half_at(b + 2) * (float)minimum;
            break;
        }
        case 14: { // Q6_K
            u32 part = i / 128, r = i % 128, l = r % 32, quarter = r / 32;
            u32 low = b[part * 64 + l + quarter % 2 * 32] >> quarter / 2 * 4 & 15;
            u32 high = b[128 + part * 32 + l] >> quarter * 2 & 3;
            float scale = half_at(b + 208) * (float)(signed char)b[192 + i / 16];
            y[j] = scale * (float)((int)(low | high << 4) - 32);
            break;
        }
        }
    }
}

// A matrix of blocks [rows, cols]; rows of q and k in GGUF files are interleaved by head (`half_head` > 0 is half of a
// head's rows).
struct Blocks {
    const u8 *bytes;
    u32 kind, block_len, block_bytes, cols, half_head;

    // 8 elements of `row` from `column` on.
    __device__ __forceinline__ void decode(u32 row, u32 column, float (&y)[8]) const {
        if (half_head > 0) {
            u32 within = row % (2 * half_head);
            row = row - within + within % half_head * 2 + within / half_head;
        }
        const u8 *block = bytes + ((u64)row * (cols / block_len) + column / block_len) * block_bytes;
        decode8(kind, block, column % block_len, y);
    }
};

// NF4 with absolute maxima of blocks of 64, plain (`groups` null) or rounded to a table of 256 in groups of 256.
struct Nf4 {
    const u8 *packed;
    const float *code, *maxima;
    const u8 *codes;
    const float *table, *groups;
    float offset;
    u32 cols;

    __device__ __forceinline__ void decode(u32 row, u32 column, float (&y)[8]) const {
        u64 at = (u64)row * cols + column, block = at / 64;
        float scale = groups ? table[codes[block]] * groups[block / 256] + offset : maxima[block];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            u32 byte = packed[(at + j) / 2], nibble = (at + j) % 2 ? byte & 15 : byte >> 4;
            y[j] = code[nibble] * scale;
        }
    }
};

// `rows` rows from `first` on, [rows, cols]; with an `index`, its rows instead.
template <class Matrix>
__device__ __forceinline__ void dequantize(const Matrix &matrix, const u32 *index, element *y, u32 first, u32 rows) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= (u64)rows * matrix.cols) return;
    u32 row = i / matrix.cols;
    float values[8];
    matrix.decode(index ? index[row] : first + row, i % matrix.cols, values);
    for (int j = 0; j < 8; j++) y[i + j] = from_float<element>(values[j]);
}

constexpr int MOST_ROWS = 8;

// y [m, rows] = or += alpha x [m, cols] wT for up to MOST_ROWS rows of x: a warp takes a row of the matrix, so that its
// bytes are read once and the dequantised row is never written. `y` is f32 with `as_float`.
template <class Matrix>
__device__ __forceinline__ void multiply(const Matrix &matrix, const element *x, void *y, u32 rows, u32 m, u32 x_stride,
                                         u32 y_stride, float alpha, u32 accumulate, u32 as_float) {
    u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float sums[MOST_ROWS];
#pragma unroll
    for (int t = 0; t < MOST_ROWS; t++) sums[t] = 0.0f;
    for (u32 column = lane * 8; column < matrix.cols; column += 256) {
        float w[8];
        matrix.decode(row, column, w);
#pragma unroll
        for (int t = 0; t < MOST_ROWS; t++) {
            if (t >= m) break;
            float values[WIDTH];
#pragma unroll
            for (int part = 0; part < 8 / WIDTH; part++) {
                load16(x + (u64)t * x_stride + column + part * WIDTH, values);
#pragma unroll
                for (int j = 0; j < WIDTH; j++) sums[t] += w[part * WIDTH + j] * values[j];
            }
        }
    }
#pragma unroll
    for (int t = 0; t < MOST_ROWS; t++) {
        if (t >= m) break;
        float sum = alpha * warp_sum(sums[t]);
        u64 at = (u64)t * y_stride + row;
        if (lane > 0) continue;
        if (as_float) {
            float *out = (float *)y + at;
            *out = accumulate ? *out + sum : sum;
        } else {
            element *out = (element *)y + at;
            *out = from_float<element>(accumulate ? to_float(*out) + sum : sum);
        }
    }
}

extern "C" __global__ void dequantize_blocks(const u8 *__restrict__ blocks, u32 kind, u32 block_len, u32 block_bytes,
                                             u32 cols, u32 half_head, const u32 *__restrict__ index,
                                             element *__restrict__ y, u32 first, u32 rows) {
    dequantize(Blocks{blocks, kind, block_len, block_bytes, cols, half_head}, index, y, first, rows);
}

extern "C" __global__ void dequantize_nf4(const u8 *__restrict__ packed, const float *__restrict__ code,
                                          const float *__restrict__ maxima, const u8 *__restrict__ codes,
                                          const float *__restrict__ table, const float *__restrict__ groups, float offset,
                                          u32 cols, const u32 *__restrict__ index, element *__restrict__ y, u32 first,
                                          u32 rows) {
    dequantize(Nf4{packed, code, maxima, codes, table, groups, offset, cols}, index, y, first, rows);
}

extern "C" __global__ void multiply_blocks(const u8 *__restrict__ blocks, u32 kind, u32 block_len, u32 block_bytes,
                                           u32 cols, u32 half_head, const element *__restrict__ x, void *__restrict__ y,
                                           u32 rows, u32 m, u32 x_stride, u32 y_stride, float alpha, u32 accumulate,
                                           u32 as_float) {
    Blocks matrix{blocks, kind, block_len, block_bytes, cols, half_head};
    multiply(matrix, x, y, rows, m, x_stride, y_stride, alpha, accumulate, as_float);
}

extern "C" __global__ void multiply_nf4(const u8 *__restrict__ packed, const float *__restrict__ code,
                                        const float *__restrict__ maxima, const u8 *__restrict__ codes,
                                        const float *__restrict__ table, const float *__restrict__ groups, float offset,
                                        u32 cols, const element *__restrict__ x, void *__restrict__ y, u32 rows, u32 m,
                                        u32 x_stride, u32 y_stride, float alpha, u32 accumulate, u32 as_float) {
    Nf4 matrix{packed, code, maxima, codes, table, groups, offset, cols};
    multiply(matrix, x, y, rows, m, x_stride, y_stride, alpha, accumulate, as_float);
}
