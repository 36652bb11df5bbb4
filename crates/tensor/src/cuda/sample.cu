// Choosing tokens from rows of logits [rows, vocab] (f32). What is added up is counts and weights in fixed point:
// integers, so that the order of additions does not matter.

// Divides or multiplies the logits of ids that occurred before; `entries` [n, 2] has row and id, none twice.
extern "C" __global__ void penalise(float *__restrict__ logits, const u32 *__restrict__ entries,
                                    const float *__restrict__ penalties, u32 n, u32 vocab) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 row = entries[2 * i];
    float *logit = logits + (u64)row * vocab + entries[2 * i + 1];
    *logit = *logit > 0.0f ? *logit / penalties[row] : *logit * penalties[row];
}

// Index of the largest of each row's logits [rows, vocab] (f32), the first where several are.
extern "C" __global__ void argmax(const float *__restrict__ logits, u32 *__restrict__ index, u32 vocab) {
    SHARED(memory);
    float *values = (float *)memory;
    u32 *indices = (u32 *)(values + blockDim.x);
    const float *row = logits + (u64)blockIdx.x * vocab;
    float best = -INFINITY;
    u32 at = 0xffffffffu;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
        if (row[i] > best || at == 0xffffffffu) {
            best = row[i];
            at = i;
        }
    }
    values[threadIdx.x] = best;
    indices[threadIdx.x] = at;
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            u32 other = threadIdx.x + half;
            float theirs = values[other], mine = values[threadIdx.x];
            if (theirs > mine || (theirs == mine && indices[other] < indices[threadIdx.x])) {
                values[threadIdx.x] = theirs;
                indices[threadIdx.x] = indices[other];
            }
        }
    }
    if (threadIdx.x == 0) index[blockIdx.x] = indices[0];
}

// How a row's token is drawn, as in sample.rs.
struct Draw {
    float temperature, top_p, min_p;
    u32 top_k; // 0: all
    double uniform;
};

// The largest weight: that of the most likely token.
constexpr float ONE = 1099511627776.0f; // 2^40

// Numbers in the order of floats; NaN before all.
__device__ __forceinline__ u32 order(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Weight of a token, relative to that of the most likely one.
__device__ __forceinline__ u64 weight(float x, float largest) {
    float p = expf(x - largest);
    return p > 0.0f ? (u64)(p * ONE) : 0;
}

// Of a row: the tokens that may be drawn, in any order.
struct Candidates {
    const float *logits;
    const u32 *ids;
    u32 count;
    float temperature, largest;
    u64 *scratch;

    __device__ float value(u32 i) const { return logits[ids[i]] / temperature; }

    // Weight (or number, with `counts`) of those whose key is at least `key`.
    __device__ u64 sum_from(u32 key, bool counts) const {
        u64 sum = 0;
        for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
            float x = value(i);
            if (order(x) >= key) sum += counts ? 1 : weight(x, largest);
        }
        return block_sum(sum, scratch);
    }

    // The first candidates, in the order of falling logits and then rising ids, that together reach `target`: key of
    // the last of them, and which of those with this key it is, from 1 on. Returns the weight of all of them.
    __device__ u64 prefix(u64 target, bool counts, u32 &key, u64 &equals) const {
        key = 0;
        for (int bit = 31; bit >= 0; bit--) {
            u32 higher = key | 1u << bit;
            if (sum_from(higher, counts) >= target) key = higher;
        }
        u64 above = key == 0xffffffffu ? 0 : sum_from(key + 1, counts), own = weight(unordered(key), largest);
        u64 each = counts ? 1 : own;
        equals = each == 0 ? 1 : (target - above + each - 1) / each;
        return (counts ? (key == 0xffffffffu ? 0 : sum_from(key + 1, false)) : above) + equals * own;
    }

    // The id of the candidate number `nth`, from 1 on, of those with `key`.
    __device__ u32 id(u32 key, u64 nth, u32 vocab) const {
        u32 id = 0;
        for (int bit = 31; bit >= 0; bit--) {
            u32 higher = id | 1u << bit;
            if (higher >= vocab) continue;
            u64 before = 0;
            for (u32 i = threadIdx.x; i < count; i += blockDim.x) before += ids[i] < higher && order(value(i)) == key;
            if (block_sum(before, scratch) < nth) id = higher;
        }
        return id;
    }
};

// A token of each row, drawn as its `draws` says; `ids` [rows, vocab] is for the candidates. A block takes a row.
extern "C" __global__ void __launch_bounds__(1024)
sample(const float *__restrict__ logits, const Draw *__restrict__ draws, u32 *__restrict__ ids, u32 *__restrict__ index,
       u32 vocab) {
    SHARED(memory);
    u64 *scratch = (u64 *)memory;       // [32]
    u32 *count = (u32 *)(scratch + 32); // [1]
    const float *row = logits + (u64)blockIdx.x * vocab;
    u32 *mine = ids + (u64)blockIdx.x * vocab;
    Draw draw = draws[blockIdx.x];
    float best = -INFINITY;
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) best = fmaxf(best, row[i] / draw.temperature);
    if (threadIdx.x == 0) *count = 0;
    float largest = block_max(best, (float *)scratch);
    // A key that at least top_k tokens reach and few others do: the top_k-th of the largest of the threads. Without
    // top_k, what is so unlikely that its weight is 0 is left out.
    u32 floor = 0;
    if (draw.top_k == 0 || draw.top_k >= vocab) {
        floor = order(largest - 28.0f);
    } else if (draw.top_k <= blockDim.x) {
        for (int bit = 31; bit >= 0; bit--) {
            u32 higher = floor | 1u << bit;
            if (block_sum((u64)(order(best) >= higher), scratch) >= draw.top_k) floor = higher;
        }
    }
    for (u32 i = threadIdx.x; i < vocab; i += blockDim.x) {
        if (order(row[i] / draw.temperature) >= floor) mine[atomicAdd(count, 1u)] = i;
    }
    __syncthreads();
    Candidates all{row, mine, *count, draw.temperature, largest, scratch};
    u32 key;
    u64 equals, total;
    if (draw.top_k > 0 && draw.top_k < all.count) {
        total = all.prefix(draw.top_k, true, key, equals);
    } else {
        total = all.sum_from(0, false);
    }
    if (draw.top_p < 1.0f) {
        u64 target = (u64)ceil((double)draw.top_p * (double)total);
        total = all.prefix(min(max(target, (u64)1), total), false, key, equals);
    }
    if (draw.min_p > 0.0f) {
        u64 likely = 0;
        for (u32 i = threadIdx.x; i < all.count; i += blockDim.x) {
            float x = all.value(i);
            if (expf(x - all.largest) >= draw.min_p) likely += weight(x, all.largest);
        }
        total = min(total, block_sum(likely, scratch));
    }
    u64 target = (u64)(draw.uniform * (double)total) + 1;
    all.prefix(min(target, total), false, key, equals);
    u32 id = all.id(key, equals, vocab);
    if (threadIdx.x == 0) index[blockIdx.x] = id;
}
