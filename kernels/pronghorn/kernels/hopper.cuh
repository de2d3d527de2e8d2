// What Hopper adds: the copy engine and its barriers, clusters, launches ahead of time, operands of wgmma.

#pragma once

#include "pairs.cuh"

// Made by the host (_nvrtc.tensor_map): boxes are swizzled by 128 bytes, as wgmma expects.
struct alignas(64) TensorMap {
    u8 opaque[128];
};

#define ROW_BYTES 128  // of a box: 64 numbers of 16 bits

__device__ inline u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- Barriers ------------------------------------------------------------------------------------------------------

__device__ inline void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After it the copy engine sees what init_barrier wrote.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void wait_barrier(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra WAIT; }" ::"r"(barrier), "r"(parity) : "memory");
}

// The hardware's sixteen barriers of a block, 0 of which is that of __syncthreads: COUNT threads, of whole warps, arrive,
// and of them those go on at once that do not wait.
template <int COUNT>
__device__ inline void arrive_at_named(int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

template <int COUNT>
__device__ inline void wait_at_named(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// ---- Copies --------------------------------------------------------------------------------------------------------

// One thread copies a box of a matrix. What lies outside of the matrix becomes zero.
__device__ inline void copy_box(u32 to, const TensorMap &from, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&from), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Likewise of images.
__device__ inline void copy_box(u32 to, const TensorMap &from, int channel, int x, int y, int image, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&from), "r"(channel), "r"(x), "r"(y), "r"(image), "r"(barrier)
        : "memory");
}

// Likewise of five dimensions, to the same place in all blocks of the cluster that the mask has, each with its barrier.
__device__ inline void copy_box_to_blocks(
    u32 to, const TensorMap &from, int a, int b, int c, int d, int e, u32 barrier, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
        "l"(&from), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "r"(barrier), "h"(mask)
        : "memory");
}

// The first copy does not wait for the description then.
__device__ inline void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- Launches ahead of time ----------------------------------------------------------------------------------------

// The kernel before has finished, and what it wrote can be read.
__device__ inline void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// When all blocks have called it, the next kernel may begin, up to where it waits for this one.
__device__ inline void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- Clusters ------------------------------------------------------------------------------------------------------

__device__ inline u32 rank_in_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of a cluster in two parts; what was written to any block's shared memory before arriving can
// be read after waiting.
__device__ inline void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where a block of the cluster has what lies at an address of this one's shared memory.
__device__ inline u32 address_of_rank(u32 address, u32 rank) {
    u32 d;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(address), "r"(rank));
    return d;
}

// At a barrier of that block. For what was read alone: what was written may not be seen there.
__device__ inline void arrive_at_rank(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_of_rank(barrier, rank)) : "memory");
}

__device__ inline void store_to_rank(u32 address, float a) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(a) : "memory");
}

__device__ inline void store_to_rank(u32 address, float4 v) {
    asm volatile(
        "st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}

// ---- Registers -----------------------------------------------------------------------------------------------------

// By all threads of a warpgroup, so that they have so many each; what is given back, others of the block may take.
template <int COUNT>
__device__ inline void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

// What lies in a warp as wgmma leaves it, columns [0, 16) of a row in four lanes of two numbers of each half, as four
// neighbours in each lane: of the half `lane % 2`, from column `lane % 4 / 2 * 4`. Longer stores cost less.
__device__ inline float4 neighbours(float a, float b, float c, float d) {
    bool odd = threadIdx.x % 2;
    float e = __shfl_xor_sync(0xffffffffu, odd ? a : c, 1), f = __shfl_xor_sync(0xffffffffu, odd ? b : d, 1);
    return odd ? make_float4(e, f, c, d) : make_float4(a, b, e, f);
}

// Rows of 128 bytes, eight of which are 1024 bytes from the next eight. `apart`: where the operand is summed over along
// rows, bytes from one box of 64 columns to the next; else of no meaning.
__device__ inline u64 operand(u32 address, u32 apart = 16) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(apart >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last PENDING groups are done.
template <int PENDING = 0>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
