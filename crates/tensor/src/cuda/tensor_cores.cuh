// Matrix instructions of Ampere and later, and what each lane sees of them for the emulator.

// d [16, 8] += a [16, 16] * b [16, 8], bf16 in, f32 out. With g = lane / 4 and t = lane % 4 a lane holds
// a: rows g and g + 8 of columns 2t, 2t+1, then of columns 2t+8, 2t+9; b: rows 2t, 2t+1 and 2t+8, 2t+9 of column g;
// d: columns 2t, 2t+1 of row g, then of row g + 8.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 b0, const u32 b1) {
#ifdef EMULATED
    struct Held { u32 a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    auto slots = emu::exchange(mine, 10);
    auto half = [](u32 word, int odd) { return __uint_as_float(odd ? word & 0xffff0000u : word << 16); };
    int lane = emu::linear_thread() % 32;
    for (int e = 0; e < 4; e++) {
        int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            Held of_a = emu::given<Held>(slots, row % 8 * 4 + k % 8 / 2), of_b = emu::given<Held>(slots, col * 4 + k % 8 / 2);
            d[e] += half(of_a.a[row / 8 + k / 8 * 2], k % 2) * half(of_b.b[k / 8], k % 2);
        }
    }
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

#ifdef EMULATED
// Lanes 8i to 8i + 7 point at the rows of 8 by 8 matrix i. A row is read when its lane arrives, as the instruction
// does.
inline void load_matrices(u32 (&r)[4], const bf16 *row, bool transposed) {
    struct Row { u16 x[8]; } mine;
    memcpy(&mine, row, 16);
    auto slots = emu::exchange(mine, 11 + transposed);
    int lane = emu::linear_thread() % 32;
    for (int i = 0; i < 4; i++) {
        u32 word = 0;
        for (int half = 0; half < 2; half++) {
            int row = lane / 4, col = lane % 4 * 2 + half;
            Row from = emu::given<Row>(slots, 8 * i + (transposed ? col : row));
            word |= (u32)from.x[transposed ? row : col] << 16 * half;
        }
        r[i] = word;
    }
}
#endif

// Four 8 by 8 matrices from shared memory: lane 8i + j points at row j of matrix i. A lane gets elements 2t and 2t + 1
// of row g of each.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const bf16 *row) {
#ifdef EMULATED
    load_matrices(r, row, false);
#else
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// As ldmatrix, of the transposed matrices.
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], const bf16 *row) {
#ifdef EMULATED
    load_matrices(r, row, true);
#else
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// 16 bytes from global to shared memory asynchronously; zeros instead when `valid` is false.
__device__ __forceinline__ void copy_async(bf16 *to, const bf16 *from, bool valid) {
#ifdef EMULATED
    if (valid) memcpy(to, from, 16); else memset(to, 0, 16);
#else
    u32 address = (u32)__cvta_generic_to_shared(to), bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifndef EMULATED
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `N` of this thread's latest groups of copies are under way.
template <int N> __device__ __forceinline__ void wait_copies() {
#ifndef EMULATED
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
