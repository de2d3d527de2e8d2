// In the place of the kernels' own `lanes.cuh`.

#pragma once

#include "pairs.cuh"

inline float power_of_two(float x) { return std::exp2(x); }

inline float fast_tanh(float x) { return std::tanh(x); }

template <int BYTES>
void load_words(u32 *words, const u8 *at) {
    if ((u64)at % BYTES)
        std::abort();  // as a GPU would
    std::memcpy(words, at, BYTES);
}

inline u32 from_lane(u32 value, int lane) {
    Warp &warp = own_warp();
    warp.word[threadIdx.x % LANES] = value;
    warp.barrier.arrive_and_wait();
    u32 result = warp.word[lane % LANES];
    warp.barrier.arrive_and_wait();
    return result;
}

inline float from_lane(float value, int lane) { return __uint_as_float(from_lane(bits_as<u32>(value), lane)); }

inline float from_other(float value, int mask) { return from_lane(value, threadIdx.x % LANES ^ mask); }

inline bool any_lane(bool value) {
    bool found = false;
    for (int lane = 0; lane < LANES; lane++)
        found |= from_lane((u32)value, lane) != 0;
    return found;
}

inline u32 transposed(u32 fragment) {
    int row = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
    u32 low = from_lane(fragment, 2 * t * 4 + row / 2), high = from_lane(fragment, (2 * t + 1) * 4 + row / 2);
    int shift = row % 2 * 16;
    return (low >> shift & 0xffff) | (high >> shift & 0xffff) << 16;
}
