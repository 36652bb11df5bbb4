// Attention in f32, for exact comparisons: the same tables and parameters as attention.cu, plain loops. A warp takes
// one row after the other; its lanes share keys (or queries) for scores and elements of the head for sums. Heads of up
// to 256.

constexpr int TILE = 64, MAX_PARTS = 8;

__device__ __forceinline__ float dot(const float *a, const float *b, u32 d) {
    float sum = 0.0f;
    for (u32 i = 0; i < d; i++) sum += a[i] * b[i];
    return sum;
}

// sums += weight of each lane times the row that the lane's index stands for.
__device__ __forceinline__ void add_rows(float (&sums)[MAX_PARTS], float weight, const float *rows, u64 stride, u32 count,
                                         u32 d) {
    u32 lane = threadIdx.x % 32;
    for (u32 j = 0; j < count; j++) {
        float w = __shfl_sync(ALL_LANES, weight, j);
#pragma unroll
        for (int part = 0; part < MAX_PARTS; part++) {
            if (part * 32 + lane < d) sums[part] += w * rows[j * stride + part * 32 + lane];
        }
    }
}

__device__ __forceinline__ void store_sums(float *to, const float (&sums)[MAX_PARTS], float factor, u32 d) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < MAX_PARTS; part++) {
        if (part * 32 + lane < d) to[part * 32 + lane] = sums[part] * factor;
    }
}

extern "C" __global__ void attention_forward(const float *__restrict__ q, const float *__restrict__ k,
                                             const float *__restrict__ v, const u32 *__restrict__ tiles,
                                             float *__restrict__ o, float *__restrict__ lse, u32 heads, u32 kv_heads, u32 d,
                                             float scale) {
    const u32 *tile = tiles + 4 * blockIdx.x;
    u32 head = blockIdx.y, kv_head = head / (heads / kv_heads), lane = threadIdx.x % 32;
    u64 stride = (u64)kv_heads * d;
    for (u32 i = threadIdx.x / 32; i < tile[1]; i += blockDim.x / 32) {
        u32 row = tile[0] + i, seen = tile[3] + i;
        const float *query = q + ((u64)row * heads + head) * d;
        float sums[MAX_PARTS] = {}, largest = -INFINITY, total = 0.0f;
        for (u32 begin = 0; begin < seen; begin += 32) {
            u32 count = min(32u, seen - begin);
            u64 at = (u64)(tile[2] + begin) * stride + kv_head * d;
            float score = lane < count ? dot(query, k + at + lane * stride, d) * scale : -INFINITY;
            float m = fmaxf(largest, warp_max(score)), rescale = expf(largest - m), p = expf(score - m);
            largest = m;
            total = total * rescale + warp_sum(p);
#pragma unroll
            for (int part = 0; part < MAX_PARTS; part++) sums[part] *= rescale;
            add_rows(sums, p, v + at, stride, count, d);
        }
        if (lane == 0) lse[(u64)row * heads + head] = largest + logf(total);
        store_sums(o + ((u64)row * heads + head) * d, sums, 1.0f / total, d);
    }
}

extern "C" __global__ void attention_delta(const float *__restrict__ o, const float *__restrict__ d_o,
                                           float *__restrict__ delta, u32 rows, u32 d) {
    u32 row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float sum = 0.0f;
    for (u32 i = lane; i < d; i += 32) sum += o[(u64)row * d + i] * d_o[(u64)row * d + i];
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

extern "C" __global__ void attention_backward_keys(const float *__restrict__ q, const float *__restrict__ k,
                                                   const float *__restrict__ v, const float *__restrict__ lse,
                                                   const float *__restrict__ delta, const float *__restrict__ d_o,
                                                   const u32 *__restrict__ tiles, float *__restrict__ d_k,
                                                   float *__restrict__ d_v, u32 heads, u32 kv_heads, u32 d, float scale) {
    const u32 *tile = tiles + 4 * blockIdx.x;
    u32 kv_head = blockIdx.y, group = heads / kv_heads, lane = threadIdx.x % 32;
    u64 stride = (u64)heads * d;
    for (u32 i = threadIdx.x / 32; i < tile[1]; i += blockDim.x / 32) {
        u32 key = tile[0] + i;
        u64 row = ((u64)key * kv_heads + kv_head) * d;
        float d_k_sums[MAX_PARTS] = {}, d_v_sums[MAX_PARTS] = {};
        for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
            for (u32 begin = key; begin < tile[2]; begin += 32) {
                u32 count = min(32u, tile[2] - begin);
                u64 at = (u64)begin * stride + head * d;
                float p = 0.0f, d_s = 0.0f;
                if (lane < count) {
                    u64 index = (u64)(begin + lane) * heads + head;
                    p = expf(dot(q + at + lane * stride, k + row, d) * scale - lse[index]);
                    d_s = p * (dot(d_o + at + lane * stride, v + row, d) - delta[index]);
                }
                add_rows(d_v_sums, p, d_o + at, stride, count, d);
                add_rows(d_k_sums, d_s, q + at, stride, count, d);
            }
        }
        store_sums(d_k + row, d_k_sums, scale, d);
        store_sums(d_v + row, d_v_sums, 1.0f, d);
    }
}

extern "C" __global__ void attention_backward_queries(const float *__restrict__ q, const float *__restrict__ k,
                                                      const float *__restrict__ v, const float *__restrict__ lse,
                                                      const float *__restrict__ delta, const float *__restrict__ d_o,
                                                      const u32 *__restrict__ tiles, float *__restrict__ d_q, u32 heads,
                                                      u32 kv_heads, u32 d, float scale) {
    const u32 *tile = tiles + 4 * blockIdx.x;
    u32 head = blockIdx.y, kv_head = head / (heads / kv_heads), lane = threadIdx.x % 32;
    u64 stride = (u64)kv_heads * d;
    for (u32 i = threadIdx.x / 32; i < tile[1]; i += blockDim.x / 32) {
        u32 row = tile[0] + i, seen = tile[3] + i;
        u64 index = (u64)row * heads + head, own = index * d;
        float sums[MAX_PARTS] = {};
        for (u32 begin = 0; begin < seen; begin += 32) {
            u32 count = min(32u, seen - begin);
            u64 at = (u64)(tile[2] + begin) * stride + kv_head * d;
            float d_s = 0.0f;
            if (lane < count) {
                float p = expf(dot(q + own, k + at + lane * stride, d) * scale - lse[index]);
                d_s = p * (dot(d_o + own, v + at + lane * stride, d) - delta[index]);
            }
            add_rows(sums, d_s, k + at, stride, count, d);
        }
        store_sums(d_q + own, sums, scale, d);
    }
}
