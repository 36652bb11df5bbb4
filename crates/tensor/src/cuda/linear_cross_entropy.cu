// Softmax cross-entropy over rows of logits; contract in ops/linear_cross_entropy.rs. One block per row.

// loss [rows], and unless d_logits is null the gradient times `scale` and the row's weight (1 where `weights` [rows] is
// null) in the place of the logits: d_logits [rows, vocab] begins where they do, and each of its rows where that of the
// logits does.
extern "C" __global__ void __launch_bounds__(1024)
cross_entropy(const float *logits, const u32 *__restrict__ targets, float smoothing, float scale,
              const float *__restrict__ weights, element *d_logits, float *__restrict__ loss, u32 vocab) {
    SHARED(memory);
    float *scratch = (float *)memory;
    const float *row = logits + (u64)blockIdx.x * vocab;
    u32 target = targets[blockIdx.x];
    float target_logit = row[target];
    // Each thread keeps the largest logit it has seen and its sums relative to that.
    float largest = -INFINITY, sum = 0.0f, plain = 0.0f;
    auto take = [&](float x) {
        if (x > largest) {
            sum *= expf(largest - x);
            largest = x;
        }
        sum += expf(x - largest);
        plain += x;
    };
    // Rows begin on 16 bytes only when they are whole packs.
    u32 whole = vocab % 4 ? 0 : vocab;
    for (u32 i = threadIdx.x * 4; i < whole; i += blockDim.x * 4) {
        float values[4];
        load16(row + i, values);
#pragma unroll
        for (int j = 0; j < 4; j++) take(values[j]);
    }
    for (u32 i = whole + threadIdx.x; i < vocab; i += blockDim.x) take(row[i]);
    float top = block_max(largest, scratch);
    // A thread without logits has 0 times a factor that is 0 too, not NaN.
    sum = block_sum(largest == -INFINITY ? 0.0f : sum * expf(largest - top), scratch);
    plain = block_sum(plain, scratch);
    float log_sum = logf(sum) + top;
    if (threadIdx.x == 0) {
        float smooth = smoothing > 0.0f ? log_sum - plain / (float)vocab : 0.0f;
        loss[blockIdx.x] = (1.0f - smoothing) * (log_sum - target_logit) + smoothing * smooth;
    }
    if (!d_logits) return;
    if (weights) scale *= weights[blockIdx.x];
    element *d_row = d_logits + (u64)blockIdx.x * vocab * (sizeof(float) / sizeof(element));
    float factor = scale / sum, uniform = scale * smoothing / (float)vocab, at_target = scale * (1.0f - smoothing);
    for (u32 first = 0; first < vocab; first += blockDim.x) {
        u32 i = first + threadIdx.x;
        float gradient = i < vocab ? expf(row[i] - top) * factor - uniform : 0.0f;
        // What is written lies before the logits that come next, but among those that other threads read just now.
        __syncthreads();
        if (i < vocab) d_row[i] = from_float<element>(i == target ? gradient - at_target : gradient);
    }
}

// Columns `ids` [n] of x, whose rows lie `stride` elements apart: y [rows, width], of whose rows the first n elements
// are written.
extern "C" __global__ void head_columns(const element *__restrict__ x, u64 stride, const u32 *__restrict__ ids,
                                        element *__restrict__ y, u32 rows, u32 n, u32 width) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (u64)rows * n) return;
    y[i / n * width + i % n] = x[i / n * stride + ids[i % n]];
}
