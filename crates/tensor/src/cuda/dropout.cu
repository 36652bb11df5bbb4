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
