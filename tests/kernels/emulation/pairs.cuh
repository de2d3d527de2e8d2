// What CUDA C++ has that C++ has not, for kernels that are compiled for the CPU: a thread for each CUDA thread, and
// barriers where the lanes of a warp act together. In the place of the kernels' own `pairs.cuh`.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::max;
using std::min;

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 32
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

struct Index {
    int x = 0, y = 0, z = 0;
};

struct Warp {
    std::barrier<> barrier{LANES};
    u32 a[LANES][4], b[LANES][2], word[LANES];
};

static thread_local Index threadIdx, blockIdx;
static std::vector<std::unique_ptr<Warp>> warps;
static thread_local int first_warp = 0;  // of the block
static thread_local std::barrier<> *own_barrier;

inline Warp &own_warp() { return *warps[first_warp + threadIdx.x / LANES]; }

inline void __syncthreads() { own_barrier->arrive_and_wait(); }

template <class T>
T __ldg(const T *pointer) {
    return *pointer;
}

template <class To, class From>
To bits_as(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from));
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline float __uint_as_float(u32 x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }

// ---- 16-bit numbers --------------------------------------------------------------------------------------------------

inline float half_to_float(u32 half) { return _cvtsh_ss((u16)half); }

#if BFLOAT
#define MAGIC 0x43004300u
inline float widen(u32 half) { return __uint_as_float(half << 16); }
inline u16 rounded(float x) {
    u32 word = bits_as<u32>(x);
    return (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
#else
#define MAGIC 0x64006400u
inline float widen(u32 half) { return half_to_float(half); }
inline u16 rounded(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#endif

inline u32 narrow(float low, float high) { return rounded(low) | (u32)rounded(high) << 16; }
inline float low_half(u32 pair) { return widen(pair & 0xffff); }
inline float high_half(u32 pair) { return widen(pair >> 16); }
inline u32 subtract(u32 a, u32 b) { return narrow(low_half(a) - low_half(b), high_half(a) - high_half(b)); }
inline u32 fused_multiply_add(u32 a, u32 b, u32 c) {
    return narrow(low_half(a) * low_half(b) + low_half(c), high_half(a) * high_half(b) + high_half(c));
}

template <u32 MASK>
u32 with_magic(u32 word) {
    return (word & MASK) | MAGIC;
}

template <u32 SELECTOR>
u32 bytes(u32 a, u32 b) {
    u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++)
        result |= (u32)(both >> (8 * (SELECTOR >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}

// ---- Tensor cores ----------------------------------------------------------------------------------------------------

inline void mma(float d[4], const u32 a[4], u32 b0, u32 b1) {
    Warp &warp = own_warp();
    int lane = threadIdx.x % LANES;
    std::copy(a, a + 4, warp.a[lane]);
    warp.b[lane][0] = b0, warp.b[lane][1] = b1;
    warp.barrier.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k += 2) {
            int t = k % 8 / 2, upper = k / 8;
            u32 left = warp.a[row * 4 + t][half + 2 * upper], right = warp.b[column * 4 + t][upper];
            sum += low_half(left) * low_half(right) + high_half(left) * high_half(right);
        }
        d[i] += sum;
    }
    warp.barrier.arrive_and_wait();
}
