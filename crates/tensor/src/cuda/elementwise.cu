// Operations that take elements (or rows) one by one.

#define EACH_PACK(n)                                                                                                     \
    for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH; i < (n); i += (u64)gridDim.x * blockDim.x * WIDTH)

// What is left behind the last whole pack is taken one by one; `n` elements in all.
#define IS_WHOLE(i, n) ((i) + WIDTH <= (n))

__device__ __forceinline__ void load_some(const element *from, u64 i, u64 n, float (&to)[WIDTH]) {
    if (IS_WHOLE(i, n)) return load16(from + i, to);
    for (int j = 0; j < WIDTH; j++) to[j] = i + j < n ? to_float(from[i + j]) : 0.0f;
}
__device__ __forceinline__ void store_some(element *to, u64 i, u64 n, const float (&from)[WIDTH]) {
    if (IS_WHOLE(i, n)) return store16(to + i, from);
    for (int j = 0; j < WIDTH; j++) if (i + j < n) to[i + j] = from_float<element>(from[j]);
}

// SwiGLU; contract in ops/swiglu.rs.
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

// y [rows, d] = rows `index` of x; with `scatter`, rows `index` of y = x. A block takes one row.
extern "C" __global__ void rows_gather(const element *__restrict__ x, const u32 *__restrict__ index, element *__restrict__ y,
                                       u32 d, u32 scatter) {
    u64 there = (u64)index[blockIdx.x] * d, here = (u64)blockIdx.x * d;
    const element *from = x + (scatter ? here : there);
    element *to = y + (scatter ? there : here);
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        *reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(from + i);
    }
}

// Row to[i] of y = row from[i] of x, both [.., d]. A block takes one row.
extern "C" __global__ void copy_rows(const element *__restrict__ x, const u32 *__restrict__ from, element *__restrict__ y,
                                     const u32 *__restrict__ to, u32 d) {
    const element *source = x + (u64)from[blockIdx.x] * d;
    element *target = y + (u64)to[blockIdx.x] * d;
    for (u32 i = threadIdx.x * WIDTH; i < d; i += blockDim.x * WIDTH) {
        *reinterpret_cast<uint4 *>(target + i) = *reinterpret_cast<const uint4 *>(source + i);
    }
}

// Row groups[3b] of d_table (f32) += the rows of d_x that `order` lists from groups[3b + 1] to groups[3b + 2], in that order:
// one block for each token that occurs, so that sums have one order.
extern "C" __global__ void embedding_gradient(const element *__restrict__ d_x, const u32 *__restrict__ groups,
                                              const u32 *__restrict__ order, float *__restrict__ d_table, u32 d) {
    const u32 *group = groups + 3 * blockIdx.x;
    for (u32 i = threadIdx.x; i < d; i += blockDim.x) {
        float sum = d_table[(u64)group[0] * d + i];
        for (u32 j = group[1]; j < group[2]; j++) sum += to_float(d_x[(u64)order[j] * d + i]);
        d_table[(u64)group[0] * d + i] = sum;
    }
}

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

// Inverted dropout of rows; contract in ops/dropout.rs. A thread takes four elements, which share a random block.
extern "C" __global__ void dropout(const element *__restrict__ x, element *__restrict__ y, u32 rows, u32 d, u32 threshold,
                                   float keep, u32 key0, u32 key1, u32 stream0, u32 stream1, u64 first_row, u32 add) {
    u32 parts = (d + 3) / 4;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)rows * parts) return;
    u64 row = i / parts, number = (first_row + row) * parts + i % parts;
    u32 words[4] = {(u32)number, (u32)(number >> 32), stream0, stream1};
    philox(words, key0, key1);
    for (u32 j = 0; j < 4; j++) {
        u32 column = i % parts * 4 + j;
        if (column >= d) break;
        u64 at = row * d + column;
        float value = to_float(x[at]) * (words[j] < threshold ? 0.0f : keep);
        y[at] = from_float<element>(add ? to_float(y[at]) + value : value);
    }
}
