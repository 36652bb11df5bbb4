// Attention of a few new queries of one or several sequences over cached keys and values [rows, kv_heads, d]: the keys
// of a query are divided among blocks, whose results are joined. A warp takes one key after the other for all query
// heads that share it, so that every key and value is read once.

constexpr int MAX_GROUP = 8, MAX_PARTS = 4;

// Partial results of `chunk` keys for query row blockIdx.z, key/value head blockIdx.y: for every head of the group the
// largest score, the sum of exponentials and the sum of values, one after the other in `parts` [rows, heads, chunks, d
// + 2]. `table` has for each query the row of its first key and how many keys it sees; a block after the last of them
// writes an empty part.
extern "C" __global__ void __launch_bounds__(128)
attention_decode(const element *__restrict__ q, const element *__restrict__ k, const element *__restrict__ v,
                 const u32 *__restrict__ table, float *__restrict__ parts, u32 chunk, u32 heads, u32 kv_heads, u32 d, float scale) {
    SHARED(memory);
    float *shared = (float *)memory; // [warps, group, d + 2]
    u32 row = blockIdx.z, kv_head = blockIdx.y, group = heads / kv_heads, first = table[2 * row], seen = table[2 * row + 1];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float query[MAX_GROUP][MAX_PARTS], sums[MAX_GROUP][MAX_PARTS], largest[MAX_GROUP], totals[MAX_GROUP];
#pragma unroll
    for (int g = 0; g < MAX_GROUP; g++) {
        largest[g] = -INFINITY;
        totals[g] = 0.0f;
#pragma unroll
        for (int p = 0; p < MAX_PARTS; p++) {
            u32 i = p * 32 + lane;
            query[g][p] = g < group && i < d ? to_float(q[((u64)row * heads + kv_head * group + g) * d + i]) * scale : 0.0f;
            sums[g][p] = 0.0f;
        }
    }
    u32 end = min(seen, (blockIdx.x + 1) * chunk);
    for (u32 key = blockIdx.x * chunk + warp; key < end; key += warps) {
        u64 at = ((u64)(first + key) * kv_heads + kv_head) * d;
        float keys[MAX_PARTS], values[MAX_PARTS];
#pragma unroll
        for (int p = 0; p < MAX_PARTS; p++) {
            u32 i = p * 32 + lane;
            keys[p] = i < d ? to_float(k[at + i]) : 0.0f;
            values[p] = i < d ? to_float(v[at + i]) : 0.0f;
        }
#pragma unroll
        for (int g = 0; g < MAX_GROUP; g++) {
            if (g >= group) break;
            float score = 0.0f;
#pragma unroll
            for (int p = 0; p < MAX_PARTS; p++) score += query[g][p] * keys[p];
            score = warp_sum(score);
            float m = fmaxf(largest[g], score), rescale = expf(largest[g] - m), weight = expf(score - m);
            largest[g] = m;
            totals[g] = totals[g] * rescale + weight;
#pragma unroll
            for (int p = 0; p < MAX_PARTS; p++) sums[g][p] = sums[g][p] * rescale + weight * values[p];
        }
    }
#pragma unroll
    for (int g = 0; g < MAX_GROUP; g++) {
        if (g >= group) break;
        float *mine = shared + (warp * group + g) * (d + 2);
        if (lane == 0) {
            mine[0] = largest[g];
            mine[1] = totals[g];
        }
#pragma unroll
        for (int p = 0; p < MAX_PARTS; p++) if (p * 32 + lane < d) mine[2 + p * 32 + lane] = sums[g][p];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < group * d; i += blockDim.x) {
        u32 g = i / d, column = i % d;
        float m = -INFINITY, total = 0.0f, sum = 0.0f;
        for (u32 w = 0; w < warps; w++) m = fmaxf(m, shared[(w * group + g) * (d + 2)]);
        for (u32 w = 0; w < warps; w++) {
            const float *part = shared + (w * group + g) * (d + 2);
            float factor = m == -INFINITY ? 0.0f : expf(part[0] - m);
            total += factor * part[1];
            sum += factor * part[2 + column];
        }
        float *out = parts + (((u64)row * heads + kv_head * group + g) * gridDim.x + blockIdx.x) * (d + 2);
        out[2 + column] = sum;
        if (column == 0) {
            out[0] = m;
            out[1] = total;
        }
    }
}

// o [rows, heads, d] from the parts of all chunks. A block takes one head of one row.
extern "C" __global__ void attention_join(const float *__restrict__ parts, element *__restrict__ o, u32 chunks, u32 d) {
    const float *first = parts + (u64)blockIdx.x * chunks * (d + 2);
    float m = -INFINITY;
    for (u32 c = 0; c < chunks; c++) m = fmaxf(m, first[(u64)c * (d + 2)]);
    for (u32 i = threadIdx.x; i < d; i += blockDim.x) {
        float total = 0.0f, sum = 0.0f;
        for (u32 c = 0; c < chunks; c++) {
            const float *part = first + (u64)c * (d + 2);
            float factor = expf(part[0] - m);
            total += factor * part[1];
            sum += factor * part[2 + i];
        }
        o[(u64)blockIdx.x * d + i] = from_float<element>(sum / total);
    }
}
