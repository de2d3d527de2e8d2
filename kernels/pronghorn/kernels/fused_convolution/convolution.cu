// A 3 x 3 convolution of images whose pixels' channels lie side by side, and what follows it: a bias, and an activation
// or an RMS norm over channels, and a sum.
//
// A block has 16 x 8 pixels and 256 channels of the result. Two warpgroups multiply, of 8 rows of pixels each; a third
// asks the copy engine for what they need. 64 channels of the pixels and of those around them are read once for all
// nine places of the window: an operand of wgmma is a part of them, moved by the place. The weights of one place and 64
// channels are a stage of a ring. One warpgroup runs ahead of the other by some stages, so that while one has its sums
// in hand, the tensor cores have the other's work.
//
// A cluster has two such places, which share weights: each block reads a half and gives it to the other too. A norm
// over 512 channels takes two turns: what the first one sums up is kept in the L2 cache until the second one has its
// squares; then the warps beside the one that asks for copies finish it, while the tensor cores have the next pixels.
//
// Macros: BFLOAT; CHANNELS, of x, a multiple of 64; OUTPUTS, 256 or 512; ACTIVATION; BIASED, NORMED, ADDED: 0 or 1.

#include "hopper.cuh"
#include "lanes.cuh"
#include "wgmma.cuh"  // multiply(float sum[128], u64 x, u64 weight)

#define RELU 1  // of ACTIVATION; 0 is none
#define SILU 2

#define CHUNK 64  // channels of a row of an operand
#define COLUMNS 256
#define PARTS (OUTPUTS / COLUMNS)
#define TURNS (NORMED ? PARTS : 1)  // that a block takes for its pixels
#define CLUSTER 2
#define HEIGHT 16
#define WIDTH 8
#define AROUND (WIDTH + 2)  // of a row of pixels with those around
#define X_BYTES ((HEIGHT + 2) * AROUND * ROW_BYTES)
#define X_PLACE ((X_BYTES + 1023) / 1024 * 1024)
#define WEIGHT_BYTES (COLUMNS * ROW_BYTES)
#define X_SLOTS 2
#define STAGES 5
#define CHUNKS (CHANNELS / CHUNK)
#define LEAD 4  // stages that one warpgroup is ahead
#define THREADS 384
#define WARPS 8  // that multiply
#define KEPT (COLUMNS / 8)  // times four sums, of a thread
#define FINISHERS (THREADS - (WARPS + 1) * LANES)
#define AHEAD 1  // barrier at which one warpgroup waits for the other
#define READY 2  // barriers of the two warpgroups: their sums are kept, and
#define FREE 4   // finished
#if TURNS == 2  // registers of a thread that multiplies, and of another
#define MOST_REGISTERS 224
#define FEW_REGISTERS 56
#else
#define MOST_REGISTERS 232
#define FEW_REGISTERS 40
#endif

// Counted by who fills and by who empties: which of a ring is next, and how often it went around.
struct Place {
    int slot = 0, turn = 0;
    __device__ inline void go_on(int slots) {
        if (++slot == slots)
            slot = 0, turn ^= 1;
    }
};

// Rows of 128 bytes in groups of eight, WIDTH pixels of one row of the image: the next row is AROUND pixels away.
__device__ inline u64 pixels(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(AROUND * ROW_BYTES >> 4) << 32 | 1ull << 62;
}

struct Eight {
    float value[8];
};

__device__ inline Eight eight(const float *from) {
    float4 low = *(const float4 *)from, high = *(const float4 *)(from + 4);
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// Where a thread's sums have result j of the eight adjacent ones that it has of 32, in the upper or lower row.
__device__ constexpr int at_of(int i, int below, int j) { return 4 * (4 * i + j / 2) + 2 * below + j % 2; }

__device__ inline Eight eight_of(const float *sum, int i, int below) {
    Eight eight;
#pragma unroll
    for (int j = 0; j < 8; j++)
        eight.value[j] = sum[at_of(i, below, j)];
    return eight;
}

__device__ inline uint4 load(const u16 *from, bool valid) {
    return valid ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
}

__device__ inline float active(float x) {
#if ACTIVATION == RELU
    return fmaxf(x, 0);
#elif ACTIVATION == SILU
    float half = 0.5f * x;
    return fmaf(half, fast_tanh(half), half);
#else
    return x;
#endif
}

// Eight adjacent results of a pixel, from their sums.
__device__ inline uint4 finish(
    const Eight &sums, float ratio, const float *norm_weights, const float *norm_biases, uint4 added) {
    u32 word[4] = {added.x, added.y, added.z, added.w};
#if NORMED
    Eight scale = eight(norm_weights), shift = eight(norm_biases);
#endif
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        float a = sums.value[j], b = sums.value[j + 1];
#if NORMED
        a = fmaf(a * ratio, scale.value[j], shift.value[j]);
        b = fmaf(b * ratio, scale.value[j + 1], shift.value[j + 1]);
#endif
#if ADDED
        a += widen(word[j / 2] & 0xffff), b += widen(word[j / 2] >> 16);
#endif
        word[j / 2] = narrow(active(a), active(b));
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) void run(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map, const u16 *bias,
    const u16 *norm_weight, const u16 *norm_bias, int norm_biased, const u16 *residual, float4 *kept, u16 *out,
    int images, int height, int width, float eps) {
    extern __shared__ u8 memory[];
    __shared__ alignas(16) float biases[OUTPUTS], norm_weights[OUTPUTS], norm_biases[OUTPUTS];
    __shared__ float ratios[2][64];  // of a warpgroup's pixels
    __shared__ alignas(8) u64 barrier_memory[2 * X_SLOTS + 2 * STAGES];
    u32 x_at = (shared_address(memory) + 1023) & ~1023u, weight_at = x_at + X_SLOTS * X_PLACE;
    u32 x_full = shared_address(barrier_memory), x_empty = x_full + X_SLOTS * 8;
    u32 weight_full = x_empty + X_SLOTS * 8, weight_empty = weight_full + STAGES * 8;
    int rank = rank_in_cluster(), thread = threadIdx.x;
    int across = (width + WIDTH - 1) / WIDTH, down = (height + HEIGHT - 1) / HEIGHT;
    int items = (images * down * across + 1) / 2 * (PARTS / TURNS), clusters = gridDim.x / CLUSTER;

    if (thread == 0) {
        for (int i = 0; i < X_SLOTS; i++)
            init_barrier(x_full + i * 8, 1), init_barrier(x_empty + i * 8, WARPS);
        for (int i = 0; i < STAGES; i++)
            init_barrier(weight_full + i * 8, 1), init_barrier(weight_empty + i * 8, CLUSTER * WARPS);
        publish_barriers();
    }
    for (int column = thread; column < OUTPUTS; column += THREADS) {
        biases[column] = BIASED ? widen(bias[column]) : 0;
        norm_weights[column] = NORMED ? widen(norm_weight[column]) : 1;
        norm_biases[column] = NORMED && norm_biased ? widen(norm_bias[column]) : 0;
    }
    __syncthreads();
    arrive_in_cluster();
    wait_for_cluster();

    kept += blockIdx.x * (KEPT * WARPS * LANES);
    if (thread >= WARPS * LANES) {
        give_registers_back<FEW_REGISTERS>();
        if (thread == WARPS * LANES) {
            prefetch_map(x_map), prefetch_map(weight_map);
            Place x_place, weight_place;
            for (int item = blockIdx.x / CLUSTER; item < items; item += clusters) {
                int tile = item / (PARTS / TURNS) * 2 + rank, first = item % (PARTS / TURNS);
                int x = tile % across * WIDTH, y = tile / across % down * HEIGHT, image = tile / (across * down);
                for (int part = first; part < first + TURNS; part++) {
                    for (int chunk = 0; chunk < CHUNKS; chunk++) {
                        u32 full = x_full + x_place.slot * 8;
                        wait_barrier(x_empty + x_place.slot * 8, x_place.turn ^ 1);
                        expect_bytes(full, X_BYTES);
                        copy_box(x_at + x_place.slot * X_PLACE, x_map, chunk * CHUNK, x - 1, y - 1, image, full);
                        x_place.go_on(X_SLOTS);
#pragma unroll 1
                        for (int tap = 0; tap < 9; tap++) {
                            full = weight_full + weight_place.slot * 8;
                            wait_barrier(weight_empty + weight_place.slot * 8, weight_place.turn ^ 1);
                            expect_bytes(full, WEIGHT_BYTES);
                            // Of 128 results, 32 adjacent ones are four groups of eight. They come in the order that
                            // puts eight adjacent ones into the registers of one thread: pair 0 of each group, pair 1
                            // of each, and so on.
                            copy_box_to_blocks(
                                weight_at + weight_place.slot * WEIGHT_BYTES + rank * (WEIGHT_BYTES / 2), weight_map,
                                tap * CHANNELS + chunk * CHUNK, 0, 0, 0, (part * COLUMNS + rank * (COLUMNS / 2)) / 32,
                                full, (1 << CLUSTER) - 1);
                            weight_place.go_on(STAGES);
                        }
                    }
                }
            }
        }
#if TURNS == 2
        if (thread >= (WARPS + 1) * LANES) {
            for (int item = blockIdx.x / CLUSTER; item < items; item += clusters) {
                int tile = item * 2 + rank, image = tile / (across * down);
                int x = tile % across * WIDTH, y = tile / across % down * HEIGHT;
                for (int group = 0; group < 2; group++)
                    arrive_at_named<128 + FINISHERS>(FREE + group);
                for (int group = 0; group < 2; group++) {
                    wait_at_named<128 + FINISHERS>(READY + group);
#pragma unroll 1
                    for (int unit = thread - (WARPS + 1) * LANES; unit < 128 * (COLUMNS / 16); unit += FINISHERS) {
                        // As a thread had them: eight of 32 results of its upper or lower row.
                        int of = unit % 128, i = unit / 256, below = unit / 128 % 2;
                        const float4 *from = kept + unit / 128 * 2 * (WARPS * LANES) + group * 128 + of;
                        float4 low = __ldcg(from), high = __ldcg(from + WARPS * LANES);
                        int row = y + group * 8 + of / LANES * 2 + below, column = i * 32 + of % 4 * 8;
                        bool valid = image < images && row < height && x + of % LANES / 4 < width;
                        u64 at = (((u64)image * height + row) * width + x + of % LANES / 4) * OUTPUTS + column;
                        uint4 added = make_uint4(0, 0, 0, 0);
#if ADDED
                        added = load(residual + at, valid);
#endif
                        added = finish(
                            {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}},
                            ratios[group][of / LANES * 16 + below * 8 + of % LANES / 4], norm_weights + column,
                            norm_biases + column, added);
                        if (valid)
                            *(uint4 *)(out + at) = added;
                    }
                }
            }
        }
#endif
    } else {
        take_registers<MOST_REGISTERS>();
        int group = thread / 128, warp = thread % 128 / LANES, lane = thread % LANES, quad = lane % 4;
        Place x_place, weight_place;
        float sum[COLUMNS / 2];
        for (int item = blockIdx.x / CLUSTER; item < items; item += clusters) {
            int tile = item / (PARTS / TURNS) * 2 + rank, first = item % (PARTS / TURNS);
            int image = tile / (across * down), x = tile % across * WIDTH + lane / 4;
            int y = tile / across % down * HEIGHT + group * 8 + warp * 2;
            int last = first + TURNS - 1;
            u64 at = (((u64)image * height + y) * width + x) * OUTPUTS + last * COLUMNS + quad * 8;
            bool valid[2];
#pragma unroll
            for (int below = 0; below < 2; below++)
                valid[below] = image < images && y + below < height && x < width;
            float ratio[2] = {0, 0};
#if ADDED
            uint4 residuals[COLUMNS / 16];
#endif
#pragma unroll 1
            for (int part = first; part <= last; part++) {
#pragma unroll
                for (int i = 0; i < COLUMNS / 32; i++) {
                    Eight own = eight(biases + part * COLUMNS + i * 32 + quad * 8);
#pragma unroll
                    for (int j = 0; j < 8; j++)
                        sum[at_of(i, 0, j)] = sum[at_of(i, 1, j)] = own.value[j];
                }
                if (group == 1)
                    wait_at_named<256>(AHEAD);
                int used = -1;  // slot of the ring whose products may not be done
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
#if ADDED
                    if (chunk == CHUNKS - 1 && part == last) {
#pragma unroll
                        for (int i = 0; i < COLUMNS / 16; i++)
                            residuals[i] = load(residual + at + i % 2 * width * OUTPUTS + i / 2 * 32, valid[i % 2]);
                    }
#endif
                    wait_barrier(x_full + x_place.slot * 8, x_place.turn);
                    u32 pixel = x_at + x_place.slot * X_PLACE + group * (8 * AROUND * ROW_BYTES);
                    for (int tap = 0; tap < 9; tap++) {
                        wait_barrier(weight_full + weight_place.slot * 8, weight_place.turn);
                        u64 a = pixels(pixel + (tap / 3 * AROUND + tap % 3) * ROW_BYTES);
                        u64 b = operand(weight_at + weight_place.slot * WEIGHT_BYTES);
                        wgmma_fence();
#pragma unroll
                        for (int step = 0; step < 4; step++)
                            multiply(sum, a + step * 2, b + step * 2);
                        wgmma_commit();
                        if (group == 0 && chunk == 0 && tap == LEAD)
                            arrive_at_named<256>(AHEAD);
                        wgmma_wait<1>();
                        if (used >= 0 && lane < CLUSTER)
                            arrive_at_rank(weight_empty + used * 8, lane);
                        if (chunk > 0 && tap == 0 && lane == 0)
                            arrive_at_rank(x_empty + (x_place.slot ^ 1) * 8, rank);
                        used = weight_place.slot;
                        weight_place.go_on(STAGES);
                    }
                    x_place.go_on(X_SLOTS);
                }
                wgmma_wait<0>();
                if (lane < CLUSTER)
                    arrive_at_rank(weight_empty + used * 8, lane);
                if (lane == 0)
                    arrive_at_rank(x_empty + (x_place.slot ^ 1) * 8, rank);
#if NORMED
#pragma unroll
                for (int below = 0; below < 2; below++) {
#pragma unroll
                    for (int i = 0; i < COLUMNS / 8; i++) {
                        float a = sum[4 * i + 2 * below], b = sum[4 * i + 2 * below + 1];
                        ratio[below] = fmaf(a, a, fmaf(b, b, ratio[below]));
                    }
                }
#if TURNS == 2
                if (part == 0) {
                    wait_at_named<128 + FINISHERS>(FREE + group);
#pragma unroll
                    for (int i = 0; i < COLUMNS / 16; i++) {
                        Eight own = eight_of(sum, i / 2, i % 2);
#pragma unroll
                        for (int j = 0; j < 8; j += 4)
                            __stcg(
                                kept + (2 * i + j / 4) * (WARPS * LANES) + thread,
                                make_float4(own.value[j], own.value[j + 1], own.value[j + 2], own.value[j + 3]));
                    }
                }
#endif
#endif
            }

#if NORMED
#pragma unroll
            for (int below = 0; below < 2; below++) {
                ratio[below] += from_other(ratio[below], 1);
                ratio[below] += from_other(ratio[below], 2);
                ratio[below] = rsqrtf(ratio[below] / OUTPUTS + eps);
            }
#endif
#if TURNS == 2
            if (quad == 0) {
#pragma unroll
                for (int below = 0; below < 2; below++)
                    ratios[group][warp * 16 + below * 8 + lane / 4] = ratio[below];
            }
            __threadfence_block();
            arrive_at_named<128 + FINISHERS>(READY + group);
#endif
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; i++) {
#pragma unroll
                for (int below = 0; below < 2; below++) {
                    int column = last * COLUMNS + i * 32 + quad * 8;
                    uint4 added = make_uint4(0, 0, 0, 0);
#if ADDED
                    added = residuals[2 * i + below];
#endif
                    added = finish(
                        eight_of(sum, i, below), ratio[below], norm_weights + column, norm_biases + column, added);
                    if (valid[below])
                        *(uint4 *)(out + at + below * width * OUTPUTS + i * 32) = added;
                }
            }
        }
    }
    arrive_in_cluster();  // the other may still write to this block
    wait_for_cluster();
}
