// Attention of up to 64 tokens, whose heads share keys and values, over a cached prefix and over themselves.
//
// A block has 64 queries (tokens' heads), half of the values' channels and one tile of keys: all but the last of a
// cluster have one of the prefix, asked for before the kernel before has finished, and the last has the tokens' own.
// Each block of a cluster joins the partial softmaxes of a share of the rows, in a fixed order: the others write theirs
// to its shared memory.
//
// Macros: BFLOAT; KEYS, of a tile; SIZE, of a head; SPLIT, blocks of a cluster.

#include "hopper.cuh"
#include "lanes.cuh"
#include "wgmma.cuh"  // score(float[KEYS / 2], u64 q, u64 k), gather(float[PART / 2], const u32 p[4], u64 v)

#define THREADS 256
#define ROWS 64
#define BOXES (SIZE / 64)
#define QUERY_BYTES (ROWS * ROW_BYTES)  // of a box
#define KEY_BYTES (KEYS * ROW_BYTES)
#define PART (SIZE / 2)      // channels of values that a block has
#define STRIDE (PART + 8)    // of a row of sums
#define MINE (ROWS / SPLIT)  // rows that a block joins
#define LOWEST -1e30f

extern "C" __global__ __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, 1) void run(
    const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap prefix_key_map,
    const __grid_constant__ TensorMap prefix_value_map, const __grid_constant__ TensorMap key_map,
    const __grid_constant__ TensorMap value_map, const u8 *prefix_mask, u16 *out, int rows, int tokens, int length,
    float factor) {
    extern __shared__ u8 memory[];
    __shared__ float bias[KEYS], peaks[SPLIT][MINE], totals[SPLIT][MINE], shares[MINE][SPLIT];
    __shared__ alignas(8) u64 barrier_memory[2];
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    const float *sums = (const float *)(memory + (base - shared_address(memory)));  // where queries and keys were
    u32 query_at = base, key_at = query_at + BOXES * QUERY_BYTES, value_at = key_at + BOXES * KEY_BYTES;
    u32 of_keys = shared_address(barrier_memory), of_values = of_keys + 8;
    int rank = rank_in_cluster(), tile = blockIdx.x / SPLIT / 2, part = blockIdx.x / SPLIT % 2, thread = threadIdx.x;
    bool own = rank == SPLIT - 1;

    if (thread == 0) {
        init_barrier(of_keys, 1);
        init_barrier(of_values, 1);
        publish_barriers();
        expect_bytes(of_keys, BOXES * (QUERY_BYTES + KEY_BYTES));
        expect_bytes(of_values, BOXES / 2 * KEY_BYTES);
    }
    if (thread == 0 && !own) {
        for (int i = 0; i < BOXES; i++)
            copy_box(key_at + i * KEY_BYTES, prefix_key_map, i * 64, rank * KEYS, of_keys);
        for (int i = 0; i < BOXES / 2; i++)
            copy_box(value_at + i * KEY_BYTES, prefix_value_map, part * PART + i * 64, rank * KEYS, of_values);
    }
    if (thread == 0) {
        prefetch_map(query_map);
        if (own) {
            prefetch_map(key_map);
            prefetch_map(value_map);
        }
    }
    let_next_kernel_begin();
    for (int i = thread; i < KEYS; i += THREADS) {
        int at = own ? i : rank * KEYS + i;
        bias[i] = (own ? at < tokens : at < length && prefix_mask[at]) ? 0.0f : LOWEST;
    }
    wait_for_kernel_before();
    if (thread == 0) {
        for (int i = 0; i < BOXES; i++)
            copy_box(query_at + i * QUERY_BYTES, query_map, i * 64, tile * ROWS, of_keys);
        if (own) {
            for (int i = 0; i < BOXES; i++)
                copy_box(key_at + i * KEY_BYTES, key_map, i * 64, 0, of_keys);
            for (int i = 0; i < BOXES / 2; i++)
                copy_box(value_at + i * KEY_BYTES, value_map, part * PART + i * 64, 0, of_values);
        }
    }
    __syncthreads();

    float sum[PART / 2];
    float peak[2] = {LOWEST, LOWEST}, total[2] = {0, 0};
    int lane = thread % LANES, row = thread % 128 / LANES * 16 + lane / 4;  // and the row 8 below
    if (thread >= 128) {  // these help to join
        arrive_in_cluster();
    } else {
        float scores[KEYS / 2];
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            scores[i] = 0;
        wait_barrier(of_keys, 0);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < SIZE / 16; step++)
            score(
                scores, operand(query_at + step / 4 * QUERY_BYTES) + step % 4 * 2,
                operand(key_at + step / 4 * KEY_BYTES) + step % 4 * 2);
        wgmma_commit();
        wgmma_wait();
        arrive_in_cluster();  // others may write where queries and keys were
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            scores[i] = scores[i] * factor + bias[i / 4 * 8 + lane % 4 * 2 + i % 2];
            peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], scores[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            peak[i] = fmaxf(peak[i], from_other(peak[i], 1));
            peak[i] = fmaxf(peak[i], from_other(peak[i], 2));
        }
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            scores[i] = scores[i] > LOWEST / 2 ? power_of_two(scores[i] - peak[i / 2 % 2]) : 0.0f;
            total[i / 2 % 2] += scores[i];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[i] += from_other(total[i], 1);
            total[i] += from_other(total[i], 2);
        }
        u32 weights[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++)
            weights[i / 4][i % 4] = narrow(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < PART / 2; i++)
            sum[i] = 0;
        wait_barrier(of_values, 0);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
            gather(sum, weights[step], operand(value_at + step * 16 * ROW_BYTES, KEY_BYTES));
        wgmma_commit();
        wgmma_wait();
    }
    wait_for_cluster();
    if (thread < 128) {
#pragma unroll
        for (int below = 0; below < 2; below++) {
            int to = (row + 8 * below) / MINE, mine = (row + 8 * below) % MINE;
            u32 at = base + ((rank * MINE + mine) * STRIDE + lane % 2 * 8 + lane % 4 / 2 * 4) * 4;
            at = address_of_rank(at, to);
#pragma unroll
            for (int i = 0; i < PART / 8; i += 2) {
                const float *pair = sum + 4 * i + 2 * below;
                store_to_rank(at + i * 32, neighbours(pair[0], pair[1], pair[4], pair[5]));
            }
            if (lane % 4 == 0) {
                store_to_rank(address_of_rank(shared_address(&peaks[rank][mine]), to), peak[below]);
                store_to_rank(address_of_rank(shared_address(&totals[rank][mine]), to), total[below]);
            }
        }
    }
    arrive_in_cluster();
    wait_for_cluster();

    if (thread < ROWS) {
        int mine = thread / SPLIT, from = thread % SPLIT;
        float peak = peaks[from][mine], total = totals[from][mine], highest = peak;
#pragma unroll
        for (int mask = 1; mask < SPLIT; mask *= 2)
            highest = fmaxf(highest, from_other(highest, mask));
        float share = total > 0 ? power_of_two(peak - highest) : 0.0f, all = share * total;
#pragma unroll
        for (int mask = 1; mask < SPLIT; mask *= 2)
            all += from_other(all, mask);
        shares[mine][from] = share / all;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MINE * (PART / 4) / THREADS; i++) {
        int item = thread + i * THREADS, mine = item / (PART / 4), d = item % (PART / 4) * 4;
        int of = tile * ROWS + rank * MINE + mine;
        float4 joined = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int from = 0; from < SPLIT; from++) {
            float4 four = *(const float4 *)(sums + (from * MINE + mine) * STRIDE + d);
            float share = shares[mine][from];
            joined.x += share * four.x;
            joined.y += share * four.y;
            joined.z += share * four.z;
            joined.w += share * four.w;
        }
        if (of < rows)
            *(uint2 *)(out + (u64)of * SIZE + part * PART + d) =
                make_uint2(narrow(joined.x, joined.y), narrow(joined.z, joined.w));
    }
}
