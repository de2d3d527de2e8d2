// A product of up to 64 rows with a weight, out[m, n] = sum_k x[m, k] * W[n, k], and what a layer does around it.
//
// A block has a tile of columns and a part of K. Its part of the weight fits its shared memory and is asked for before
// the kernel before has finished; a cluster shares the parts of K. Each of its blocks adds up a share of the rows, in a
// fixed order: the others write their sums to its shared memory, so that nobody waits for what others read.
//
// A norm's statistics are of whole rows, which no block has: y = x * (1 + scale) * ratio + shift enters the product as
// z = x * (1 + scale), written by whoever writes x together with sums of squares of x, one of a tile of columns. The
// ratio is a factor of the product's rows, and the shift is one more row of z, whose product is added to all others.
//
// Macros: BFLOAT; KIND; HALF, columns of each of the two parts of a tile; SLICE, of K in a block; SPLIT, blocks of a
// cluster; LENT, chunks whose weights' place others' sums may take, or 0 if these have their own; WIDTH, of x; PARTS,
// sums of squares of a row; of QKV also HEADS and SIZE, of a head.

#include "hopper.cuh"
#include "wgmma.cuh"  // multiply(float sum[HALF / 2], u64 x, u64 weight)

#define QKV 0       // z to queries, keys and values, both rotated; the parts of a tile are a head's halves
#define GATE_UP 1   // z to gelu(gate) * up
#define ADD 2       // anything to x + product * gate, and its z
#define PREPARE 3   // x to z

#define THREADS 256
#define ROWS 64
#define CHUNK 64  // of K, in a box
#define CHUNKS (SLICE / CHUNK)
#define COLUMNS (2 * HALF)
#define WEIGHT_BYTES (COLUMNS * ROW_BYTES)  // of a chunk
#define X_BYTES (ROWS * ROW_BYTES)
#define STRIDE (COLUMNS + 8)    // of a row of sums: lanes of a warp write to different banks
#define MINE (ROWS / SPLIT)     // rows that a block adds up
#define SHIFTED (KIND != ADD)   // z has the shift's row
#define GIVEN (MINE + SHIFTED)  // rows that each block of the cluster gives it: the shift's too

__device__ inline float first(u32 pair) { return widen(pair & 0xffff); }
__device__ inline float second(u32 pair) { return widen(pair >> 16); }

__device__ inline float4 widened(uint2 four) {
    return make_float4(first(four.x), second(four.x), first(four.y), second(four.y));
}

__device__ inline uint2 narrowed(float4 v) { return make_uint2(narrow(v.x, v.y), narrow(v.z, v.w)); }

__device__ inline float4 rounded(float4 v) { return widened(narrowed(v)); }

__device__ inline uint2 load_four(const u16 *from) { return *(const uint2 *)from; }
__device__ inline void store_four(u16 *to, uint2 four) { *(uint2 *)to = four; }

__device__ inline float4 operator*(float4 a, float4 b) {
    return make_float4(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y), __fmul_rn(a.z, b.z), __fmul_rn(a.w, b.w));
}
__device__ inline float4 operator+(float4 a, float4 b) {
    return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w));
}
__device__ inline float4 four_times(float a) { return make_float4(a, a, a, a); }

// Of PER_ROW lanes side by side.
template <int PER_ROW>
__device__ inline float sum_of_lanes(float value) {
#pragma unroll
    for (int mask = PER_ROW / 2; mask; mask /= 2)
        value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, mask));
    return value;
}

// What the next norm gets of four columns of x: z, and one sum of the squares of a tile's columns.
template <int PER_ROW>
__device__ inline void store_modulated(u16 *z, float *squares, float4 x, uint2 scale, bool valid, bool writes) {
    float4 square = x * x;
    float sum = sum_of_lanes<PER_ROW>(square.x + square.y + square.z + square.w);
    if (valid) {
        store_four(z, narrowed(x * (widened(scale) + four_times(1.0f))));
        if (writes)
            *squares = sum;
    }
}

#if KIND == PREPARE

// A block has a row; the last one has the shift.
extern "C" __global__ void run(
    const u16 *x, const u16 *scale, const u16 *shift, u16 *z, float *squares, int tokens) {
    let_next_kernel_begin();
    int row = blockIdx.x, column = threadIdx.x * 4;
    const int PER_ROW = WIDTH / PARTS / 4;
    if (row == tokens)
        store_four(z + (u64)row * WIDTH + column, load_four(shift + column));
    else
        store_modulated<PER_ROW>(
            z + (u64)row * WIDTH + column, squares + row * PARTS + threadIdx.x / PER_ROW,
            widened(load_four(x + (u64)row * WIDTH + column)), load_four(scale + column), true,
            threadIdx.x % PER_ROW == 0);
}

#else

// Of what the cluster gave of a row.
__device__ inline float4 sum_of_cluster(const float *at) {
    float4 parts[SPLIT];
#pragma unroll
    for (int rank = 0; rank < SPLIT; rank++)
        parts[rank] = *(const float4 *)(at + rank * (GIVEN * STRIDE));
#pragma unroll
    for (int rank = 1; rank < SPLIT; rank++)
        parts[0] = parts[0] + parts[rank];
    return parts[0];
}

// Where in W the parts of a tile begin.
__device__ inline int row_of_part(int tile, int part, int N) {
#if KIND == QKV
    const int TILES = SIZE / COLUMNS;
    return tile / TILES * SIZE + tile % TILES * HALF + part * (SIZE / 2);
#elif KIND == GATE_UP
    return tile * HALF + part * (N / 2);
#else
    return tile * COLUMNS + part * HALF;
#endif
}

__device__ inline float gelu(float g) {
    float inner = g * (g * g * 0.044715f + 1) * 1.5957691216057308f;
    return g / (1 + __expf(-inner));
}

extern "C" __global__ __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS) void run(
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map,
    const float *squares,                   // of QKV and GATE_UP
    const float *cos, const float *sin,     // of QKV
    u16 *out, u16 *out_key, u16 *out_value, // the latter two of QKV
    const u16 *residual, const u16 *gate, const u16 *scale, const u16 *shift, u16 *z, float *out_squares,  // of ADD
    int tokens, int x_rows, int N, float eps) {
    extern __shared__ u8 memory[];
    __shared__ float ratios[ROWS];
    __shared__ alignas(8) u64 barrier_memory[CHUNKS];
    u32 base = (shared_address(memory) + 1023) & ~1023u;
    u32 weight_at = base, x_at = base + CHUNKS * WEIGHT_BYTES, barriers = shared_address(barrier_memory);
    u32 sums_at = LENT ? weight_at : x_at + CHUNKS * X_BYTES;
    const float *sums = (const float *)(memory + (sums_at - shared_address(memory)));
    int rank = rank_in_cluster(), tile = blockIdx.x / SPLIT, thread = threadIdx.x, part = thread / 128;

    if (thread == 0) {
        for (int i = 0; i < CHUNKS; i++)
            init_barrier(barriers + i * 8, 1);
        publish_barriers();
        for (int i = 0; i < CHUNKS; i++) {
            expect_bytes(barriers + i * 8, WEIGHT_BYTES + x_rows * ROW_BYTES);
            for (int half = 0; half < 2; half++)
                copy_box(
                    weight_at + i * WEIGHT_BYTES + half * (HALF * ROW_BYTES), weight_map, rank * SLICE + i * CHUNK,
                    row_of_part(tile, half, N), barriers + i * 8);
        }
        prefetch_map(x_map);
    }
    let_next_kernel_begin();
    if (!LENT)
        arrive_in_cluster();  // this block runs

    // What was there before the first of these kernels is read before the wait too.
#if KIND == ADD
    const int PER_ROW = COLUMNS / 4, ITEMS = (MINE * PER_ROW + THREADS - 1) / THREADS;
    int column = tile * COLUMNS + thread % PER_ROW * 4;
    uint2 gate_four = load_four(gate + column), scale_four = load_four(scale + column);
    uint2 shift_four = load_four(shift + column), residual_four[ITEMS];
#else
    const int PER_ROW = HALF / 4, ITEMS = (MINE * PER_ROW + THREADS - 1) / THREADS;
    int column = thread % PER_ROW * 4;  // in each part
#endif
    wait_for_kernel_before();
    if (thread == 0) {
        for (int i = 0; i < CHUNKS; i++)
            copy_box(x_at + i * X_BYTES, x_map, rank * SLICE + i * CHUNK, 0, barriers + i * 8);
    }
#if KIND == ADD
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int row = rank * MINE + (thread + i * THREADS) / PER_ROW;
        residual_four[i] = row < tokens ? load_four(residual + (u64)row * WIDTH + column) : make_uint2(0, 0);
    }
#else
    if (thread >= 192 && thread - 192 < tokens) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < PARTS; i += 4) {
            float4 four = *(const float4 *)(squares + (thread - 192) * PARTS + i);
            sum = sum + four.x + four.y + four.z + four.w;
        }
        ratios[thread - 192] = rsqrtf(sum / WIDTH + eps);
    }
#endif
    __syncthreads();

    float sum[HALF / 2];
#pragma unroll
    for (int i = 0; i < HALF / 2; i++)
        sum[i] = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        wait_barrier(barriers + i * 8, 0);
        u64 x = operand(x_at + i * X_BYTES);
        u64 weight = operand(weight_at + i * WEIGHT_BYTES + part * (HALF * ROW_BYTES));
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++)
            multiply(sum, x + step * 2, weight + step * 2);
        wgmma_commit();
        if (LENT && i == LENT) {
            wgmma_wait<1>();
            arrive_in_cluster();  // others may write where the first chunks were
        }
    }
    wgmma_wait();
    wait_for_cluster();
    int lane = thread % LANES;
#pragma unroll
    for (int below = 0; below < 2; below++) {
        int row = thread % 128 / LANES * 16 + lane / 4 + below * 8;
        u32 to = sums_at + (rank * GIVEN * STRIDE + part * HALF + lane % 2 * 8 + lane % 4 / 2 * 4) * 4;
        u32 to_owner = address_of_rank(to + row % MINE * (STRIDE * 4), row / MINE);
#pragma unroll
        for (int i = 0; i < HALF / 8; i += 2) {
            const float *pair = sum + 4 * i + 2 * below;
            float4 four = neighbours(pair[0], pair[1], pair[4], pair[5]);
            if (row < tokens)
                store_to_rank(to_owner + i * 32, four);
            else if (SHIFTED && row == tokens)
                for (int other = 0; other < SPLIT; other++)
                    store_to_rank(address_of_rank(to + MINE * (STRIDE * 4) + i * 32, other), four);
        }
    }
    arrive_in_cluster();
    wait_for_cluster();

#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int mine = (thread + i * THREADS) / PER_ROW, row = rank * MINE + mine;
        bool valid = mine < MINE && row < tokens;
#if KIND == ADD
        float4 added = valid ? rounded(sum_of_cluster(sums + mine * STRIDE + thread % PER_ROW * 4)) : four_times(0);
        float4 total = rounded(widened(residual_four[i]) + rounded(added * widened(gate_four)));
        u64 at = (u64)row * WIDTH + column;
        if (valid)
            store_four(out + at, narrowed(total));
        store_modulated<PER_ROW>(
            z + at, out_squares + row * (WIDTH / COLUMNS) + tile, total, scale_four, valid, thread % PER_ROW == 0);
#else
        if (!valid)
            continue;
        float4 ratio = four_times(ratios[row]), found[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
            found[half] = rounded(
                sum_of_cluster(sums + mine * STRIDE + half * HALF + column) * ratio +
                sum_of_cluster(sums + MINE * STRIDE + half * HALF + column));
#if KIND == GATE_UP
        float4 g = found[0], u = found[1];
        store_four(
            out + (u64)row * (N / 2) + tile * HALF + column,
            narrowed(make_float4(gelu(g.x) * u.x, gelu(g.y) * u.y, gelu(g.z) * u.z, gelu(g.w) * u.w)));
#else
        const int TILES = SIZE / COLUMNS;
        int head = tile / TILES, d = tile % TILES * HALF + column;
        u16 *to = head < HEADS ? out + ((u64)row * HEADS + head) * SIZE
                               : (head == HEADS ? out_key : out_value) + (u64)row * SIZE;
        if (head <= HEADS) {
            const float *c = cos + row * SIZE + d, *s = sin + row * SIZE + d;
            float4 low = found[0] * *(const float4 *)c + found[1] * (*(const float4 *)s * four_times(-1.0f));
            found[1] = found[1] * *(const float4 *)(c + SIZE / 2) + found[0] * *(const float4 *)(s + SIZE / 2);
            found[0] = low;
        }
        store_four(to + d, narrowed(found[0]));
        store_four(to + d + SIZE / 2, narrowed(found[1]));
#endif
#endif
    }
#if KIND == ADD
    if (rank == 0 && thread < PER_ROW)
        store_four(z + (u64)tokens * WIDTH + column, shift_four);
#endif
}

#endif
