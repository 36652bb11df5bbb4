// Gradient of the embedding; contract in ops/embedding.rs.

// Row groups[3b] of d_table (f32) += the rows of d_x that `order` lists from groups[3b + 1] to groups[3b + 2], in that
// order: one block for each token that occurs, so that sums have one order.
extern "C" __global__ void embedding_gradient(const element *__restrict__ d_x, const u32 *__restrict__ groups,
                                              const u32 *__restrict__ order, float *__restrict__ d_table, u32 d) {
    const u32 *group = groups + 3 * blockIdx.x;
    for (u32 i = threadIdx.x; i < d; i += blockDim.x) {
        float sum = d_table[(u64)group[0] * d + i];
        for (u32 j = group[1]; j < group[2]; j++) sum += to_float(d_x[(u64)order[j] * d + i]);
        d_table[(u64)group[0] * d + i] = sum;
    }
}
