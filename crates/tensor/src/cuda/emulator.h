// What a kernel of this folder needs to run as C++ on the CPU: grid, block, shared memory, barriers, warp exchanges and
// the wrappers that `device.cuh` puts around PTX. Each thread of a block is a fiber that runs until it must wait.
//
// Stricter than a device: a barrier that a finished thread misses, lanes of a warp that meet in different operations,
// and writes past the end of the shared memory that was asked for are errors.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __constant__ const
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

namespace emu {

struct Dim { unsigned x, y, z; };
constexpr unsigned MAX_THREADS = 1024, STACK = 128 * 1024, EXCHANGE = 48;
constexpr unsigned char GUARD = 0xA5;

enum State : int { READY, AT_BARRIER, AT_WARP, DONE };

#if defined(__x86_64__)
struct Context { void *sp; };
// Saves what a call must preserve, changes stacks, and returns on the other one.
extern "C" void emu_switch(Context *from, Context *to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
#endif

struct Fiber {
#if defined(__x86_64__)
    Context context;
#else
    ucontext_t context;
#endif
    Dim thread;
    State state;
    int operation;
    unsigned exchanges;
};

struct Warp { alignas(16) unsigned char slots[2][32][EXCHANGE]; };

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
#if defined(__x86_64__)
static Context scheduler;
#else
static ucontext_t scheduler;
#endif
static unsigned char *stacks;
static Fiber *current;
static Dim grid, block, place;
static void (*entry)(void **);
static void **arguments;
static unsigned char *shared;
static char *message;
static size_t message_size;

inline void fail(const char *what) {
    if (!message[0]) {
        snprintf(message, message_size, "%s (block %u,%u,%u, thread %u,%u,%u)", what, place.x, place.y, place.z,
                 current->thread.x, current->thread.y, current->thread.z);
    }
}

inline void leave() {
    Fiber *self = current;
#if defined(__x86_64__)
    emu_switch(&self->context, &scheduler);
#else
    swapcontext(&self->context, &scheduler);
#endif
}

inline void start() {
    entry(arguments);
    current->state = DONE;
    leave();
    abort();
}

inline void wait(State state, int operation) {
    current->state = state;
    current->operation = operation;
    leave();
}

inline unsigned linear_thread() {
    return current->thread.x + block.x * (current->thread.y + block.y * current->thread.z);
}

// Every lane of the warp gives `mine` and gets the table of what all lanes gave.
template <class T> inline const unsigned char (*exchange(const T &mine, int operation))[EXCHANGE] {
    static_assert(sizeof(T) <= EXCHANGE, "one slot a lane");
    unsigned thread = linear_thread();
    // Two tables: a lane may be one exchange ahead of those that still read.
    auto slots = warps[thread / 32].slots[current->exchanges++ & 1];
    memcpy(slots[thread % 32], &mine, sizeof(T));
    wait(AT_WARP, operation);
    return slots;
}

template <class T> inline T given(const unsigned char (*slots)[EXCHANGE], unsigned lane) {
    T value;
    memcpy(&value, slots[lane % 32], sizeof(T));
    return value;
}

inline void begin(Fiber &fiber, unsigned i) {
    fiber.state = READY;
    fiber.exchanges = 0;
    unsigned char *top = stacks + size_t(i + 1) * STACK;
#if defined(__x86_64__)
    void **sp = (void **)top;
    *--sp = nullptr;
    *--sp = (void *)start; // where the first switch returns to, with the stack as after a call
    for (int r = 0; r < 6; r++) *--sp = nullptr;
    fiber.context.sp = sp;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = top - STACK;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, (void (*)())start, 0);
#endif
}

inline void resume(Fiber &fiber) {
    current = &fiber;
#if defined(__x86_64__)
    emu_switch(&scheduler, &fiber.context);
#else
    swapcontext(&scheduler, &fiber.context);
#endif
}

// Runs the lanes of a warp until each is done or waits for the block.
inline void run_warp(unsigned first) {
    for (;;) {
        unsigned waiting = 0, done = 0;
        for (unsigned i = first; i < first + 32; i++) {
            if (fibers[i].state == READY) resume(fibers[i]);
            if (message[0]) return;
            waiting += fibers[i].state == AT_WARP;
            done += fibers[i].state == DONE;
        }
        if (!waiting) return;
        if (waiting != 32) return fail(done ? "a lane has ended while its warp exchanges" : "lanes of a warp diverge");
        for (unsigned i = first; i < first + 32; i++) {
            if (fibers[i].operation != fibers[first].operation) return fail("lanes of a warp meet in different operations");
            fibers[i].state = READY;
        }
    }
}

inline void run_block(size_t shared_bytes) {
    unsigned threads = block.x * block.y * block.z;
    // What shared memory holds at first is not defined: NaN in every format.
    memset(shared, 0xFF, shared_bytes);
    memset(shared + shared_bytes, GUARD, 64);
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        begin(fibers[i], i);
    }
    for (;;) {
        unsigned waiting = 0;
        for (unsigned first = 0; first < threads; first += 32) {
            run_warp(first);
            if (message[0]) return;
        }
        for (unsigned i = 0; i < threads; i++) waiting += fibers[i].state == AT_BARRIER;
        if (!waiting) break;
        if (waiting != threads) return fail("a thread has ended before a barrier that others wait at");
        for (unsigned i = 0; i < threads; i++) fibers[i].state = READY;
    }
    for (unsigned i = 0; i < 64; i++) {
        if (shared[shared_bytes + i] != GUARD) return fail("shared memory was written past its end");
    }
}

template <auto Kernel> struct Invoke;
template <class... A, void (*Kernel)(A...)> struct Invoke<Kernel> {
    template <size_t... I> static void with(void **args, std::integer_sequence<size_t, I...>) {
        Kernel(*(A *)args[I]...);
    }
    static void call(void **args) { with(args, std::make_integer_sequence<size_t, sizeof...(A)>()); }
    static constexpr unsigned count = sizeof...(A);
};

struct Entry { const char *name; void (*call)(void **); unsigned num_arguments; };

} // namespace emu

#define threadIdx (emu::current->thread)
#define blockIdx (emu::place)
#define blockDim (emu::block)
#define gridDim (emu::grid)
#define __syncthreads() emu::wait(emu::AT_BARRIER, 0)
#define __syncwarp() emu::wait(emu::AT_WARP, 0)

template <class T> inline T __shfl_xor_sync(unsigned, T value, int other) {
    return emu::given<T>(emu::exchange(value, 1), (emu::linear_thread() % 32) ^ other);
}
template <class T> inline T __shfl_sync(unsigned, T value, int lane) {
    return emu::given<T>(emu::exchange(value, 2), lane);
}
template <class T> inline T atomicAdd(T *where, T value) {
    T before = *where;
    *where = before + value;
    return before;
}
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class A> inline A min(A a, A b) { return b < a ? b : a; }
template <class A> inline A max(A a, A b) { return a < b ? b : a; }

// Runs one kernel over its grid; leaves an empty message when all went well.
static void emu_run(const emu::Entry *entries, unsigned count, const char *name, const unsigned *grid,
                    const unsigned *block, size_t shared_bytes, void **args, unsigned num_args, char *message, size_t size) {
    using namespace emu;
    emu::message = message;
    emu::message_size = size;
    message[0] = 0;
    unsigned threads = block[0] * block[1] * block[2];
    if (threads == 0 || threads > MAX_THREADS || threads % 32) {
        snprintf(message, size, "%s: %u threads in a block", name, threads);
        return;
    }
    const Entry *found = nullptr;
    for (unsigned i = 0; i < count; i++) if (!strcmp(entries[i].name, name)) found = entries + i;
    if (!found || found->num_arguments != num_args) {
        snprintf(message, size, "%s: no such kernel, or %u arguments where it has %u", name, num_args,
                 found ? found->num_arguments : 0);
        return;
    }
    if (!stacks) stacks = (unsigned char *)aligned_alloc(64, size_t(MAX_THREADS) * STACK);
    shared = (unsigned char *)aligned_alloc(128, (shared_bytes + 64 + 127) / 128 * 128);
    emu::grid = {grid[0], grid[1], grid[2]};
    emu::block = {block[0], block[1], block[2]};
    entry = found->call;
    arguments = args;
    for (unsigned z = 0; z < grid[2] && !message[0]; z++)
        for (unsigned y = 0; y < grid[1] && !message[0]; y++)
            for (unsigned x = 0; x < grid[0] && !message[0]; x++) {
                place = {x, y, z};
                run_block(shared_bytes);
            }
    free(shared);
}
