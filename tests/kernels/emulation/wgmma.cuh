// In the place of what `_hopper.wgmma_header` writes: 64 x 16 by 16 x 256 numbers, added to a warpgroup's sums.

#pragma once

#include "hopper.cuh"

inline void multiply(float *sum, u64 a, u64 b) {
    products.back().push_back([=] {
        int lane = threadIdx.x % LANES, row = threadIdx.x % 128 / LANES * 16 + lane / 4;
        float left[2][16];
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++)
                left[half][k] = number_of(row_of(a, row + half * 8), k);
        for (int i = 0; i < 64; i++) {
            const u16 *right = row_of(b, i / 2 * 8 + lane % 4 * 2 + i % 2);
            float total[2] = {0, 0};
            for (int k = 0; k < 16; k++) {
                float factor = number_of(right, k);
                total[0] += left[0][k] * factor, total[1] += left[1][k] * factor;
            }
            for (int half = 0; half < 2; half++)
                sum[i / 2 * 4 + half * 2 + i % 2] += total[half];
        }
    });
}
