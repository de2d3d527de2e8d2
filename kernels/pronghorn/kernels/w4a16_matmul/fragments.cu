// Matmul with a weight in the "fragments" layout (layouts.py), for Hopper: out[m, n] = sum_k x[m, k] * W[n, k].
//
// The weight is the A operand of the tensor cores, so the products are out transposed: rows are outputs n, columns are
// tokens m. A lane loads the codes of its own fragment, 64 inputs at a time, straight from device memory into
// registers; no shared memory, no shuffles. A code becomes an exact 16-bit float by setting the exponent bits of
// 1024 (fp16) or 128 (bf16) above it and subtracting the same constant with the zero point in it.
//
// Macros: BITS, GROUP (inputs a scale; 0: one for the row), CHUNKS (that make a unit, which has one scale: 1 or 2), BFLOAT,
// SPLIT (blocks that share the inputs of a tile: a cluster, which adds up through distributed shared memory), and those
// named at each kernel.

#include "pairs.cuh"

#define TILE_N 16  // outputs of a fragment
#define CHUNK 64   // inputs that a lane loads at once: four steps of 16
#define STEPS 4
#define UNIT (CHUNK * CHUNKS)  // inputs between two looks at the scales
#define SCALES (GROUP == 32 ? 2 : 1)  // of an output in a unit

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

// ---- Weights -------------------------------------------------------------------------------------------------------

// What a lane holds of 16 outputs x a unit: its codes, and scales and zero points of outputs g (low) and g + 8.
struct Packed {
    u32 words[CHUNKS][BITS];
    u32 scales[SCALES];
    u16 zeros[SCALES];
};

// Where a lane's part of a tile's first unit lies.
struct Weight {
    const u32 *words;
    const u32 *scales;
    const u16 *zeros;

    __device__ inline Weight(const u32 *qweight, const u32 *scales, const u16 *zeros, int tile, int K, int lane) {
        u64 first_scale = (u64)tile * (GROUP ? K / (GROUP ? GROUP : 1) : 1) * 8 + lane / 4;
        words = qweight + (u64)tile * (K / CHUNK) * (LANES * BITS) + lane * (BITS == 4 ? 4 : 1);
        this->scales = scales + first_scale;
        this->zeros = zeros + first_scale;
    }

    __device__ inline void load(Packed &packed, int unit) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const u32 *at = words + (unit * CHUNKS + i) * (LANES * BITS);
#if BITS == 4
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(packed.words[i][0]), "=r"(packed.words[i][1]), "=r"(packed.words[i][2]),
                           "=r"(packed.words[i][3])
                         : "l"(at));
#else
#pragma unroll
            for (int j = 0; j < BITS; j++)
                asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];"
                             : "=r"(packed.words[i][j])
                             : "l"(at + j * LANES));
#endif
        }
#pragma unroll
        for (int i = 0; i < SCALES; i++) {
            int group = GROUP ? (unit * UNIT + i * 32) / (GROUP ? GROUP : 1) : 0;
            packed.scales[i] = __ldg(scales + group * 8);
            packed.zeros[i] = __ldg(zeros + group * 8);
        }
    }
};

template <int P>  // 0 ... 15
__device__ inline u32 magic_pair(const u32 *words) {
#if BITS == 3
    if (P == 15)
        return (words[0] >> 15 & 0x00010001u) | (words[1] >> 14 & 0x00020002u) | (words[2] >> 13 & 0x00040004u) | MAGIC;
#endif
    constexpr int pairs = 16 / BITS, word = P / pairs < BITS ? P / pairs : 0;
    return with_magic<((1u << BITS) - 1) * 0x10001u>(words[word] >> (BITS * (P % pairs)));
}

// Magic + zero point, twice, of outputs g and g + 8.
__device__ inline u32 low_zero(const Packed &packed, int i) { return bytes<0x7050>(packed.zeros[i], MAGIC); }
__device__ inline u32 high_zero(const Packed &packed, int i) { return bytes<0x7151>(packed.zeros[i], MAGIC); }

// The fragment of one step: code - zero as exact 16-bit floats.
template <int STEP>
__device__ inline void integers(u32 a[4], const Packed &packed) {
    constexpr int scale = STEP % STEPS * SCALES / STEPS;
    const u32 *words = packed.words[STEP / STEPS];
    u32 low = low_zero(packed, scale), high = high_zero(packed, scale);
#if BITS == 4 && !BFLOAT
    // Codes four bits up are 1024 + 16 code here, and (1024 + 16 code) / 16 - (64 + zero) is exact: two shifts less.
    u32 word = words[STEP % STEPS], upper = word >> 8, sixteenth = 0x2c002c00u, shifted = subtract(0x63806380u, high);
    a[0] = subtract(with_magic<0x000f000fu>(word), low);
    a[1] = fused_multiply_add(with_magic<0x00f000f0u>(word), sixteenth, shifted);
    a[2] = subtract(with_magic<0x000f000fu>(upper), low);
    a[3] = fused_multiply_add(with_magic<0x00f000f0u>(upper), sixteenth, shifted);
#else
    constexpr int first = STEP % STEPS * 4;
    a[0] = subtract(magic_pair<first + 0>(words), low);
    a[1] = subtract(magic_pair<first + 1>(words), high);
    a[2] = subtract(magic_pair<first + 2>(words), low);
    a[3] = subtract(magic_pair<first + 3>(words), high);
#endif
}

// The same, times the scale, which rounds to 16 bits.
template <int STEP>
__device__ inline void scaled(u32 a[4], const Packed &packed) {
    constexpr int scale = STEP % STEPS * SCALES / STEPS;
    u32 low = bytes<0x1010>(packed.scales[scale], 0), high = bytes<0x3232>(packed.scales[scale], 0);
    integers<STEP>(a, packed);
    a[0] = multiply(a[0], low);
    a[1] = multiply(a[1], high);
    a[2] = multiply(a[2], low);
    a[3] = multiply(a[3], high);
}

// ---- Shared memory and clusters ------------------------------------------------------------------------------------

__device__ inline u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ inline void copy_async(u32 to, const void *from, bool valid) {
    int bytes = valid ? 16 : 0;  // the rest of the 16 becomes zero
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ inline u32 rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline float4 load_of_rank(const float *pointer, u32 rank) {
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
    float4 d;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(d.x), "=f"(d.y), "=f"(d.z), "=f"(d.w)
                 : "r"(address)
                 : "memory");
    return d;
}

// Adds PARTS tiles [ROWS, STRIDE] of this block and those of the cluster, in a fixed order, and writes 16 bits.
template <int COUNT, int PARTS, int ROWS, int WIDTH, int STRIDE>
__device__ inline void add_and_store(float *sums, u16 *out, int first_m, int first_n, int M, int N) {
    __syncthreads();
#if SPLIT > 1
    cluster_barrier();
    u32 rank = rank_in_cluster();
#else
    u32 rank = 0;
#endif
    for (int index = (int)threadIdx.x * SPLIT + rank; index < ROWS * WIDTH / 4; index += COUNT * SPLIT) {
        int token = index / (WIDTH / 4), n = index % (WIDTH / 4) * 4;
        if (first_m + token >= M || first_n + n >= N)
            continue;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int source = 0; source < SPLIT; source++)
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const float *at = sums + (part * ROWS + token) * STRIDE + n;
#if SPLIT > 1
                float4 value = load_of_rank(at, source);
#else
                float4 value = *(const float4 *)at;
#endif
                sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
            }
        *(uint2 *)(out + (u64)(first_m + token) * N + first_n + n) =
            make_uint2(narrow(sum.x, sum.y), narrow(sum.z, sum.w));
    }
#if SPLIT > 1
    cluster_barrier();  // nobody leaves while others read its shared memory
#endif
}

#ifdef STREAM
// ---- A few tokens: bound by the bytes of the weight -----------------------------------------------------------------
// Macros: TOKENS (8 or 16), WARPS_N (tiles of 16 outputs a block), WARPS_K (warps that share a tile's inputs), DEPTH
// (units in flight a warp), BLOCKS (at least so many fit a multiprocessor). x goes to shared memory once; then each warp streams its chunks without a barrier. Sums
// over a chunk are exact products added in float32, and scaled in float32.

#define THREADS (LANES * WARPS_N * WARPS_K)

__device__ inline void load_matrices(u32 d[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address));
}

template <int STEP>
__device__ inline void multiply_step(float part[TOKENS / 8][4], const Packed &packed, const u32 b[TOKENS / 8][8]) {
    u32 a[4];
    integers<STEP>(a, packed);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++)
        mma(part[i], a, b[i][STEP % STEPS * 2], b[i][STEP % STEPS * 2 + 1]);
}

__device__ inline void add_scaled(float sum[TOKENS / 8][4], float part[TOKENS / 8][4], u32 scales) {
    float low = widen(scales & 0xffff), high = widen(scales >> 16);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        sum[i][0] += low * part[i][0];
        sum[i][1] += low * part[i][1];
        sum[i][2] += high * part[i][2];
        sum[i][3] += high * part[i][3];
        part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0;
    }
}

template <int I>  // of the unit's chunks
__device__ inline void multiply_chunk(
    float sum[TOKENS / 8][4], float part[TOKENS / 8][4], const Packed &packed, const u32 at[TOKENS / 8], int unit) {
    u32 b[TOKENS / 8][8];
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        u32 address = at[j] + (unit * CHUNKS + I) * (CHUNK * 2);
        load_matrices(b[j], address);
        load_matrices(b[j] + 4, address + 64);
    }
    multiply_step<I * STEPS + 0>(part, packed, b);
    multiply_step<I * STEPS + 1>(part, packed, b);
    if (SCALES == 2)
        add_scaled(sum, part, packed.scales[0]);
    multiply_step<I * STEPS + 2>(part, packed, b);
    multiply_step<I * STEPS + 3>(part, packed, b);
    if (I + 1 == CHUNKS)
        add_scaled(sum, part, packed.scales[SCALES - 1]);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) CLUSTER multiply_fragments(
    const u16 *x, const u32 *qweight, const u32 *scales, const u16 *zeros, u16 *out, int M, int N, int K) {
    extern __shared__ __align__(16) u8 memory[];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    int first_tile = blockIdx.x / SPLIT * WARPS_N;
    int tile = min(first_tile + warp_n, N / TILE_N - 1);
    int units = K / UNIT, share = (units + SPLIT - 1) / SPLIT;
    int first = blockIdx.x % SPLIT * share, count = max(min(share, units - first), 0);

    Weight weight(qweight, scales, zeros, tile, K, lane);
    Packed ring[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (warp_k + i * WARPS_K < count)
            weight.load(ring[i], first + warp_k + i * WARPS_K);

    // Rows of x in shared memory are 16 bytes longer than they need be, so that ldmatrix meets no bank twice.
    int row_bytes = (share * UNIT + 8) * 2, vectors = count * (UNIT / 8);
    for (int m = 0; m < M; m++)
#pragma unroll 1
        for (int i = threadIdx.x; i < vectors; i += THREADS)
            copy_async(shared_address(memory) + m * row_bytes + i * 16, x + (u64)m * K + first * UNIT + i * 8, true);
    commit_copies();
    wait_copies<0>();
    __syncthreads();

    u32 at[TOKENS / 8];  // tokens that are not there repeat the last one and are not stored
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++)
        at[i] = shared_address(memory) + min(i * 8 + lane % 8, M - 1) * row_bytes + lane / 8 * 16;

    float sum[TOKENS / 8][4] = {}, part[TOKENS / 8][4] = {};
#pragma unroll 1
    for (int base = warp_k; base < count; base += WARPS_K * DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            int unit = base + i * WARPS_K, next = unit + DEPTH * WARPS_K;
            if (unit >= count)
                break;
            Packed packed = ring[i];
            if (next < count)
                weight.load(ring[i], first + next);
            multiply_chunk<0>(sum, part, packed, at, unit);
            if (CHUNKS == 2)
                multiply_chunk<CHUNKS - 1>(sum, part, packed, at, unit);
        }
    }

    __syncthreads();  // the sums take the place of x
    float *sums = (float *)memory;
    constexpr int width = WARPS_N * TILE_N, stride = width + 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int token = i * 8 + lane % 4 * 2 + j % 2, n = warp_n * TILE_N + lane / 4 + j / 2 * 8;
            sums[(warp_k * TOKENS + token) * stride + n] = sum[i][j];
        }
    add_and_store<THREADS, WARPS_K, TOKENS, width, stride>(sums, out, 0, first_tile * TILE_N, M, N);
}

#else
// ---- More tokens: wgmma ---------------------------------------------------------------------------------------------
// Macros: TOKENS (8 ... 256), GROUPS_N (warpgroups a block, 64 outputs each), STAGES (units of x in shared memory), DEPTH
// (units of the weight in flight a warp; even if CHUNKS is 1), BLOCKS. While the tensor cores multiply one chunk, the warps
// unpack the next.

#include "wgmma.cuh"  // wgmma(float sum[TOKENS / 2], const u32 a[4], u64 descriptor), written for TOKENS by cuda.py

#define WARPS (4 * GROUPS_N)
#define THREADS (LANES * WARPS)
#define CHUNK_BYTES (TOKENS * CHUNK * 2)
#define STAGE_BYTES (CHUNK_BYTES * CHUNKS)

// Behind the end the last unit counts with a scale of zero: a branch would make the compiler serialize wgmma.
__device__ inline void load_or_zero(Packed &packed, const Weight &weight, int unit, int end) {
    weight.load(packed, min(unit, end - 1));
#pragma unroll
    for (int i = 0; i < SCALES; i++)
        packed.scales[i] = unit < end ? packed.scales[i] : 0;
}

__device__ inline void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra WAIT; }" ::"r"(barrier), "r"(parity) : "memory");
}

// A tensor map of x [M, K], made by the host: boxes of 64 inputs x min(TOKENS, M) rows, swizzled by 128 bytes as wgmma
// expects.
struct alignas(64) TensorMap {
    u8 opaque[128];
};

// The stages of x in shared memory and their barriers. The copy engine fills them: after cp.async the tensor cores would
// need a fence at every unit, and that waits for all loads of the weight that are in flight.
struct Stages {
    u32 memory, filled, released;  // addresses; of a barrier a stage
    int row, bytes;

    __device__ inline Stages(const void *pointer, int row, int rows)
        : memory(shared_address(pointer)), filled(memory + STAGES * STAGE_BYTES), released(filled + STAGES * 8),
          row(row), bytes(rows * (UNIT * 2)) {}

    __device__ inline void init() const {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(filled + i * 8, 1);
            init_barrier(released + i * 8, WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    // One thread calls it. Columns behind x become zero.
    __device__ inline void fill(int stage, const TensorMap &x, int column) const {
        u32 barrier = filled + stage * 8;
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                "[%0], [%1, {%2, %3}], [%4];" ::"r"(memory + stage * STAGE_BYTES + i * CHUNK_BYTES),
                "l"(&x), "r"(column + i * CHUNK), "r"(row), "r"(barrier)
                : "memory");
    }

    // Every warp calls it when its tensor core is done with the stage. Nothing was written: no order is needed.
    __device__ inline void release(int stage) const {
        if (threadIdx.x % LANES == 0)
            asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" ::"r"(released + stage * 8) : "memory");
    }
};

// Fragments of chunk C of a unit.
template <int C>
__device__ inline void unpack(u32 a[STEPS][4], const Packed &packed) {
    scaled<C * STEPS + 0>(a[0], packed);
    scaled<C * STEPS + 1>(a[1], packed);
    scaled<C * STEPS + 2>(a[2], packed);
    scaled<C * STEPS + 3>(a[3], packed);
}

// Starts the products of a chunk and waits for those of the chunk before.
__device__ inline void multiply_chunk(float sum[TOKENS / 2], u32 a[STEPS][4], u32 x) {
    // The operands must be complete before the fence; otherwise the compiler serializes.
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        asm volatile("" : "+r"(a[step][0]), "+r"(a[step][1]), "+r"(a[step][2]), "+r"(a[step][3])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    // K-major, swizzled by 128 bytes (1 << 62), 1024 bytes from eight rows to the next eight.
    u64 descriptor = (u64)(x >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        wgmma(sum, a[step], descriptor + step * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

// Writes the block's tile in 16 bits: transposed on its way through shared memory, then in rows.
template <int WIDTH, int STRIDE>
__device__ inline void store(u16 *memory, const float sum[TOKENS / 2], u16 *out, int first_m, int first_n, int M, int N) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    // Four matrices of 8 x 8: tokens i * 8 ... + 7 by outputs 0 ... 7 and 8 ... 15, and the next eight tokens.
    u32 to = shared_address(memory + (lane / 16 * 8 + lane % 8) * STRIDE + warp * TILE_N + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i += 2)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 8 * STRIDE * 2),
                     "r"(narrow(sum[i * 4], sum[i * 4 + 1])), "r"(narrow(sum[i * 4 + 2], sum[i * 4 + 3])),
                     "r"(narrow(sum[i * 4 + 4], sum[i * 4 + 5])), "r"(narrow(sum[i * 4 + 6], sum[i * 4 + 7]))
                     : "memory");
    __syncthreads();
    for (int index = threadIdx.x; index < TOKENS * WIDTH / 8; index += THREADS) {
        int token = index / (WIDTH / 8), n = index % (WIDTH / 8) * 8;
        if (first_m + token < M && first_n + n < N)
            *(uint4 *)(out + (u64)(first_m + token) * N + first_n + n) = *(const uint4 *)(memory + token * STRIDE + n);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) CLUSTER multiply_fragments(
    const __grid_constant__ TensorMap x, const u32 *qweight, const u32 *scales, const u16 *zeros, u16 *out, int M, int N,
    int K) {
    extern __shared__ __align__(1024) u8 memory[];
    constexpr int width = 64 * GROUPS_N;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int first_n = blockIdx.x / SPLIT * width;
    // The last tile ends where x does, and repeats rows of the one before: filling up with zeros is slow in the copy engine.
    int rows = min(TOKENS, M), first_m = min((int)blockIdx.y * TOKENS, M - rows);
    int units = K / UNIT, share = (units + SPLIT - 1) / SPLIT;
    int first = blockIdx.x % SPLIT * share, end = min(first + share, units);

    Weight weight(qweight, scales, zeros, min(first_n / TILE_N + warp, N / TILE_N - 1), K, lane);
    Packed ring[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        load_or_zero(ring[i], weight, first + i, end);

    Stages stages(memory, first_m, rows);
    // As many units as the loop handles; those behind the end are read from behind x, which gives zeros.
    int last = first + (end - first + DEPTH - 1) / DEPTH * DEPTH;
    if (threadIdx.x == 0) {
        stages.init();
        for (int i = 0; i < STAGES && first + i < last; i++)
            stages.fill(i, x, first + i < end ? (first + i) * UNIT : K);
    }
    __syncthreads();

    float sum[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++)
        sum[i] = 0;
    u32 a[2][STEPS][4];
    int stage = 0, old_stage = STAGES - 2;  // of this unit, and of the one before the last
    u32 parity = 0, old_parity = 1;
#pragma unroll 1
    for (int base = first; base < end; base += DEPTH) {  // no way out halfway: it would serialize wgmma
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            constexpr int odd = CHUNKS % 2;
            u32 at = stages.memory + stage * STAGE_BYTES;
            unpack<0>(a[i % 2 * odd], ring[i]);
            wait_barrier(stages.filled + stage * 8, parity);
            multiply_chunk(sum, a[i % 2 * odd], at);
            if (CHUNKS == 2) {
                unpack<CHUNKS - 1>(a[1], ring[i]);
                multiply_chunk(sum, a[1], at + CHUNK_BYTES);
            }
            load_or_zero(ring[i], weight, base + i + DEPTH, end);
            // The unit before is done. That all warps are done with the one before it is likely: hardly a wait.
            if (base + i > first)
                stages.release(stage ? stage - 1 : STAGES - 1);
            int old = base + i - 2, next = old + STAGES;
            if (threadIdx.x == 0 && old >= first && next < last) {
                wait_barrier(stages.released + old_stage * 8, old_parity);
                stages.fill(old_stage, x, next < end ? next * UNIT : K);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            parity ^= stage == 0;
            old_stage = old_stage + 1 == STAGES ? 0 : old_stage + 1;
            old_parity ^= old_stage == 0;
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();  // the sums take the place of x

#if SPLIT > 1
    constexpr int stride = width + 4;
    float *sums = (float *)memory;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        int token = i / 4 * 8 + lane % 4 * 2 + i % 2, n = warp * TILE_N + lane / 4 + i / 2 % 2 * 8;
        sums[token * stride + n] = sum[i];
    }
    add_and_store<THREADS, 1, TOKENS, width, stride>(sums, out, first_m, first_n, M, N);
#else
    store<width, width + 8>((u16 *)memory, sum, out, first_m, first_n, M, N);
#endif
}
#endif
