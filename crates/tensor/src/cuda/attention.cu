// Causal attention over packed documents on tensor cores; contract in ops/attention.rs. After Dao, "FlashAttention-2"
// (2023): scores live in registers only, and the backward pass recomputes them from the kept sums of exponentials. The
// gradients of keys and of queries are two kernels, each with one owner for every output, so that nothing is added
// atomically and the results are the same every time.
//
// Tiles are rows of a table that the launcher makes. 4 warps of 16 rows each. Shared rows are 16 bytes longer than a
// head, so that the eight rows of a matrix lie in different banks.

constexpr int D = HEAD_DIM, STRIDE = D + 8, THREADS = 128, TILE = 64;
// Queries that the gradient of keys takes at a time: fewer where a head needs many registers, and on Blackwell, for
// which the compiler keeps more of them. The launcher gives room for the most.
#if !defined(EMULATED) && __CUDA_ARCH__ >= 1000
constexpr int TILE_Q = D > 96 ? 16 : D > 64 ? 32 : 64;
#else
constexpr int TILE_Q = D > 64 ? 32 : 64;
#endif
constexpr float LOG2E = 1.4426950408889634f;
static_assert(D % 16 == 0 && D <= 128, "whole matrices");

// `count` of ROWS rows of one head from global to shared memory; the rest are zeros.
template <int ROWS> __device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *from, u32 stride, u32 count) {
    constexpr int PACKS = D / 8;
#pragma unroll
    for (u32 i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
        u32 row = i / PACKS, col = i % PACKS * 8;
        copy_async(tile + row * STRIDE + col, from + (u64)(row < count ? row : 0) * stride + col, row < count);
    }
}

// Where a lane points for the left operand, rows [16] of columns [16]; for a right operand that is stored transposed
// ([n, k]), and for one that is stored as it is used ([k, n]).
__device__ __forceinline__ const bf16 *left_row(const bf16 *tile) {
    u32 lane = threadIdx.x % 32;
    return tile + (lane % 8 + lane / 8 % 2 * 8) * STRIDE + lane / 16 * 8;
}
__device__ __forceinline__ const bf16 *right_row(const bf16 *tile) {
    u32 lane = threadIdx.x % 32;
    return tile + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
}

// scores [16, 8 * N] = left [16, D] * right [8 * N, D] transposed; both in shared memory.
template <int N> __device__ __forceinline__ void scores_of(float (&scores)[N][4], const bf16 *left, const bf16 *right) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) scores[n][e] = 0.0f;
    const bf16 *a_row = left_row(left), *b_row = right_row(right);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 a[4];
        ldmatrix(a, a_row + 16 * k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix(b, b_row + n * 8 * STRIDE + 16 * k);
            mma(scores[n], a, b[0], b[1]);
            mma(scores[n + 1], a, b[2], b[3]);
        }
    }
}

// sums [16, D] += weights [16, 8 * N] (rounded to bf16) * right [8 * N, D] in shared memory.
template <int N>
__device__ __forceinline__ void add_product(float (&sums)[D / 8][4], const float (&weights)[N][4], const bf16 *right) {
    const bf16 *b_row = left_row(right);
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 a[4] = {pack_bf16(weights[2 * k][0], weights[2 * k][1]), pack_bf16(weights[2 * k][2], weights[2 * k][3]),
                    pack_bf16(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                    pack_bf16(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 b[4];
            ldmatrix_transposed(b, b_row + k * 16 * STRIDE + 8 * n);
            mma(sums[n], a, b[0], b[1]);
            mma(sums[n + 1], a, b[2], b[3]);
        }
    }
}

// Rows of `sums` times a factor each to global memory, those below `count`. `to` is the first row of the warp's 16.
__device__ __forceinline__ void store_rows(bf16 *to, u32 stride, const float (&sums)[D / 8][4], const float (&factors)[2],
                                           u32 count) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = lane / 4 + 8 * half;
        if (row >= count) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            u32 pair = pack_bf16(sums[n][2 * half] * factors[half], sums[n][2 * half + 1] * factors[half]);
            *reinterpret_cast<u32 *>(to + (u64)row * stride + 8 * n + lane % 4 * 2) = pair;
        }
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Rows of a tile that belong to this warp.
__device__ __forceinline__ u32 rows_of_warp(u32 count) {
    u32 first = threadIdx.x / 32 * 16;
    return count > first ? count - first : 0;
}

// A row of `tiles` is: first query, queries (up to TILE), first key, keys that the first query sees. A query sees one
// more than the one before. `lse` [queries, heads].
extern "C" __global__ void __launch_bounds__(THREADS)
attention_forward(const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v,
                  const u32 *__restrict__ tiles, bf16 *__restrict__ o, float *__restrict__ lse, u32 heads, u32 kv_heads,
                  u32 head_dim, float scale) {
    SHARED(memory);
    bf16 *q_tile = (bf16 *)memory, *k_tiles = q_tile + TILE * STRIDE, *v_tiles = k_tiles + 2 * TILE * STRIDE;
    const u32 *tile = tiles + 4 * blockIdx.x;
    u32 first = tile[0], count = tile[1], visible = tile[3], num_keys = visible + count - 1;
    u32 head = blockIdx.y, kv_head = head / (heads / kv_heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    k += ((u64)tile[2] * kv_heads + kv_head) * D;
    v += ((u64)tile[2] * kv_heads + kv_head) * D;
    auto load_keys = [&](u32 block) {
        u64 at = (u64)block * TILE * kv_heads * D;
        load_tile<TILE>(k_tiles + block % 2 * TILE * STRIDE, k + at, kv_heads * D, num_keys - block * TILE);
        load_tile<TILE>(v_tiles + block % 2 * TILE * STRIDE, v + at, kv_heads * D, num_keys - block * TILE);
        commit_copies();
    };
    load_tile<TILE>(q_tile, q + ((u64)first * heads + head) * D, heads * D, count);
    load_keys(0);

    float sums[D / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, totals[2] = {0.0f, 0.0f};
    float scale2 = scale * LOG2E;
    u32 blocks = (num_keys + TILE - 1) / TILE;
    for (u32 block = 0; block < blocks; block++) {
        if (block + 1 < blocks) {
            load_keys(block + 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        float scores[TILE / 8][4];
        scores_of(scores, q_tile + warp * 16 * STRIDE, k_tiles + block % 2 * TILE * STRIDE);
        if ((block + 1) * TILE > visible + warp * 16) {
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 key = block * TILE + 8 * n + lane % 4 * 2 + e % 2, row = warp * 16 + lane / 4 + e / 2 * 8;
                    if (key >= visible + row) scores[n][e] = -INFINITY;
                }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = largest[half];
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) m = fmaxf(m, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            m = quad_max(m);
            // The first block shows every row a key, so that m is finite from then on.
            float rescale = exp2f((largest[half] - m) * scale2), total = 0.0f;
            largest[half] = m;
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    scores[n][e] = exp2f((scores[n][e] - m) * scale2);
                    total += scores[n][e];
                }
            totals[half] = totals[half] * rescale + total;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) sums[n][e] *= rescale;
        }
        add_product(sums, scores, v_tiles + block % 2 * TILE * STRIDE);
        __syncthreads();
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = quad_sum(totals[half]);
        u32 row = warp * 16 + lane / 4 + 8 * half;
        factors[half] = 1.0f / total;
        if (lane % 4 == 0 && row < count) lse[(u64)(first + row) * heads + head] = largest[half] * scale + logf(total);
    }
    store_rows(o + ((u64)(first + warp * 16) * heads + head) * D, heads * D, sums, factors, rows_of_warp(count));
}

// delta [rows] = sum of o * d_o over a head: a warp per row of [rows, D].
extern "C" __global__ void attention_delta(const bf16 *__restrict__ o, const bf16 *__restrict__ d_o,
                                           float *__restrict__ delta, u32 rows, u32 head_dim) {
    u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float sum = 0.0f;
    for (u32 i = lane * 2; i < D; i += 64) {
        u64 at = (u64)row * D + i;
        sum += to_float(o[at]) * to_float(d_o[at]) + to_float(o[at + 1]) * to_float(d_o[at + 1]);
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

// Gradients of a tile of keys and values: a row of `tiles` is first key, keys (up to TILE), end of the document. Rows
// of queries are those of keys.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_keys(const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v,
                        const float *__restrict__ lse, const float *__restrict__ delta, const bf16 *__restrict__ d_o,
                        const u32 *__restrict__ tiles, bf16 *__restrict__ d_k, bf16 *__restrict__ d_v, u32 heads,
                        u32 kv_heads, u32 head_dim, float scale) {
    SHARED(memory);
    bf16 *k_tile = (bf16 *)memory, *v_tile = k_tile + TILE * STRIDE;
    bf16 *q_tile = v_tile + TILE * STRIDE, *d_o_tile = q_tile + TILE_Q * STRIDE;
    float *lse_tile = (float *)(d_o_tile + TILE_Q * STRIDE), *delta_tile = lse_tile + TILE_Q;
    const u32 *tile = tiles + 4 * blockIdx.x;
    u32 first = tile[0], count = tile[1], end = tile[2];
    u32 kv_head = blockIdx.y, group = heads / kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 at = ((u64)first * kv_heads + kv_head) * D;
    load_tile<TILE>(k_tile, k + at, kv_heads * D, count);
    load_tile<TILE>(v_tile, v + at, kv_heads * D, count);

    float d_k_sums[D / 8][4] = {}, d_v_sums[D / 8][4] = {};
    float scale2 = scale * LOG2E;
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (u32 query = first; query < end; query += TILE_Q) {
            u64 from = ((u64)query * heads + head) * D;
            load_tile<TILE_Q>(q_tile, q + from, heads * D, end - query);
            load_tile<TILE_Q>(d_o_tile, d_o + from, heads * D, end - query);
            commit_copies();
            if (threadIdx.x < TILE_Q && query + threadIdx.x < end) {
                u64 row = (u64)(query + threadIdx.x) * heads + head;
                lse_tile[threadIdx.x] = lse[row] * LOG2E;
                delta_tile[threadIdx.x] = delta[row];
            }
            wait_copies<0>();
            __syncthreads();
            float p[TILE_Q / 8][4], d_p[TILE_Q / 8][4];
            scores_of(p, k_tile + warp * 16 * STRIDE, q_tile);
            scores_of(d_p, v_tile + warp * 16 * STRIDE, d_o_tile);
#pragma unroll
            for (int n = 0; n < TILE_Q / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 key = first + warp * 16 + lane / 4 + e / 2 * 8, column = 8 * n + lane % 4 * 2 + e % 2;
                    bool seen = query + column < end && key <= query + column;
                    float weight = seen ? exp2f(p[n][e] * scale2 - lse_tile[column]) : 0.0f;
                    d_p[n][e] = seen ? weight * (d_p[n][e] - delta_tile[column]) : 0.0f;
                    p[n][e] = weight;
                }
            add_product(d_v_sums, p, d_o_tile);
            add_product(d_k_sums, d_p, q_tile);
            __syncthreads();
        }
    }
    float factors[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
    at += (u64)warp * 16 * kv_heads * D;
    store_rows(d_k + at, kv_heads * D, d_k_sums, factors, rows_of_warp(count));
    store_rows(d_v + at, kv_heads * D, d_v_sums, ones, rows_of_warp(count));
}

// Gradients of a tile of queries; `tiles` as in attention_forward.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_queries(const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v,
                           const float *__restrict__ lse, const float *__restrict__ delta, const bf16 *__restrict__ d_o,
                           const u32 *__restrict__ tiles, bf16 *__restrict__ d_q, u32 heads, u32 kv_heads, u32 head_dim,
                           float scale) {
    SHARED(memory);
    bf16 *q_tile = (bf16 *)memory, *d_o_tile = q_tile + TILE * STRIDE;
    bf16 *k_tile = d_o_tile + TILE * STRIDE, *v_tile = k_tile + TILE * STRIDE;
    const u32 *tile = tiles + 4 * blockIdx.x;
    u32 first = tile[0], count = tile[1], visible = tile[3], num_keys = visible + count - 1;
    u32 head = blockIdx.y, kv_head = head / (heads / kv_heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64 at = ((u64)first * heads + head) * D;
    load_tile<TILE>(q_tile, q + at, heads * D, count);
    load_tile<TILE>(d_o_tile, d_o + at, heads * D, count);
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 row = warp * 16 + lane / 4 + 8 * half;
        u64 index = (u64)(first + (row < count ? row : 0)) * heads + head;
        row_lse[half] = lse[index] * LOG2E;
        row_delta[half] = delta[index];
    }
    float sums[D / 8][4] = {}, scale2 = scale * LOG2E;
    for (u32 begin = 0; begin < num_keys; begin += TILE) {
        u64 from = ((u64)(tile[2] + begin) * kv_heads + kv_head) * D;
        load_tile<TILE>(k_tile, k + from, kv_heads * D, num_keys - begin);
        load_tile<TILE>(v_tile, v + from, kv_heads * D, num_keys - begin);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        // Half a tile of keys at a time, for the registers.
#pragma unroll
        for (int part = 0; part < TILE; part += 32) {
            float p[4][4], d_p[4][4];
            scores_of(p, q_tile + warp * 16 * STRIDE, k_tile + part * STRIDE);
            scores_of(d_p, d_o_tile + warp * 16 * STRIDE, v_tile + part * STRIDE);
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    u32 key = begin + part + 8 * n + lane % 4 * 2 + e % 2, row = warp * 16 + lane / 4 + e / 2 * 8;
                    bool seen = row < count && key < visible + row;
                    float weight = seen ? exp2f(p[n][e] * scale2 - row_lse[e / 2]) : 0.0f;
                    d_p[n][e] = seen ? weight * (d_p[n][e] - row_delta[e / 2]) : 0.0f;
                }
            add_product(sums, d_p, k_tile + part * STRIDE);
        }
        __syncthreads();
    }
    float factors[2] = {scale, scale};
    store_rows(d_q + at + (u64)warp * 16 * heads * D, heads * D, sums, factors, rows_of_warp(count));
}
