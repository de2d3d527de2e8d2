// What a lane does by itself that C++ has no words for, and what the lanes of a warp do together.

#pragma once

#include "pairs.cuh"

__device__ inline float power_of_two(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// With a relative error of 2^-11.
__device__ inline float fast_tanh(float x) {
    float d;
    asm("tanh.approx.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

template <int BYTES>
__device__ inline void load_words(u32 *words, const u8 *at) {
    if (BYTES == 16)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "l"(at));
    else if (BYTES == 8)
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(at));
    else
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(at));
}

// A matrix of 8 x 8 numbers of 16 bits, turned over; four lanes have two numbers each of a row.
__device__ inline u32 transposed(u32 fragment) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(fragment));
    return d;
}

__device__ inline float half_to_float(u32 half) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((u16)half));
    return d;
}

__device__ inline float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

__device__ inline u32 from_lane(u32 value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

__device__ inline float from_other(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

__device__ inline bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }
