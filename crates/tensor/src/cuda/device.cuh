// What all kernels share: types, 16-byte accesses, reductions, and wrappers of PTX. Put in front of every source; built
// by NVRTC for a device, or as C++ after emulator.h.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 ALL_LANES = 0xffffffffu;

#ifndef EMULATED
#define INFINITY __uint_as_float(0x7f800000u)
#endif

struct bf16 {
    u16 bits;
};

// The type of activations and weights: one build of a module for each.
#ifdef ELEMENT_BF16
typedef bf16 element;
#else
typedef float element;
#endif

#ifdef EMULATED
#define SHARED(name) unsigned char *name = emu::shared
#else
#define SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Two floats rounded to bf16 (to nearest, ties to even), the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifdef EMULATED
    u32 halves[2];
    float values[2] = {low, high};
    for (int i = 0; i < 2; i++) {
        u32 bits = __float_as_uint(values[i]);
        bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        halves[i] = is_nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    }
    return halves[0] | halves[1] << 16;
#else
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return bf16{(u16)pack_bf16(x, 0.0f)}; }

// Elements of a type in 16 bytes.
template <class T> struct Width;
template <> struct Width<float> { static constexpr int value = 4; };
template <> struct Width<bf16> { static constexpr int value = 8; };
constexpr int WIDTH = Width<element>::value;

__device__ __forceinline__ void load16(const float *from, float (&to)[4]) {
    uint4 bits = *reinterpret_cast<const uint4 *>(from);
    to[0] = __uint_as_float(bits.x);
    to[1] = __uint_as_float(bits.y);
    to[2] = __uint_as_float(bits.z);
    to[3] = __uint_as_float(bits.w);
}
__device__ __forceinline__ void load16(const bf16 *from, float (&to)[8]) {
    uint4 bits = *reinterpret_cast<const uint4 *>(from);
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void store16(float *to, const float (&from)[4]) {
    *reinterpret_cast<uint4 *>(to) = uint4{__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                                           __float_as_uint(from[3])};
}
__device__ __forceinline__ void store16(bf16 *to, const float (&from)[8]) {
    *reinterpret_cast<uint4 *>(to) = uint4{pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3]),
                                           pack_bf16(from[4], from[5]), pack_bf16(from[6], from[7])};
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}
__device__ __forceinline__ u64 warp_sum(u64 x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(ALL_LANES, x, i);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, i));
    return x;
}

// Sum over a block of up to 1,024 threads in one dimension, for all of them; `scratch` has a T for each warp. The order
// of additions depends on the number of threads only.
template <class T> __device__ __forceinline__ T block_sum(T x, T *scratch) {
    x = warp_sum(x);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : T(0));
}
__device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : scratch[0]);
}

// Philox 4x32-10, as in rng.rs.
__device__ __forceinline__ void philox(u32 (&counter)[4], u32 key0, u32 key1) {
#pragma unroll
    for (int i = 0; i < 10; i++) {
        u32 high_a = __umulhi(0xD2511F53u, counter[0]), low_a = 0xD2511F53u * counter[0];
        u32 high_b = __umulhi(0xCD9E8D57u, counter[2]), low_b = 0xCD9E8D57u * counter[2];
        counter[0] = high_b ^ counter[1] ^ key0;
        counter[1] = low_b;
        counter[2] = high_a ^ counter[3] ^ key1;
        counter[3] = low_a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}
