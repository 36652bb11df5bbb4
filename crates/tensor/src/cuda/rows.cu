// Rows by their numbers; contract in ops/rows.rs.

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
