// In the place of the kernels' own `hopper.cuh`: what the blocks of a cluster, a thread for each of their threads, share,
// wait for, copy and multiply. Copies are done in another order than they are asked for, and products only when they are
// waited for: who does not wait, or gives a place back too early, finds something else there.

#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>

#include "pairs.cuh"

#define ROW_BYTES 128
#define SHARED_BYTES (256 << 10)  // more would not have an address of its own in an operand's description
#define REGISTERS 65536           // of a multiprocessor
#define __cluster_dims__(...)
#define __grid_constant__

struct uint4 {
    u32 x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float4 __ldcg(const float4 *from) { return *from; }
inline void __stcg(float4 *to, float4 value) { *to = value; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// A tensor of up to five dimensions, the innermost one last.
struct alignas(64) TensorMap {
    const u16 *base;
    u64 shape[5], stride[5];  // in numbers
    u32 box[5];
    int rank;
};
static_assert(sizeof(TensorMap) == 128);

// Arrivals, and at a named barrier or the cluster's no bytes.
struct Barrier {
    int wanted = 0, missing = 0;
    long bytes = 0;
    u32 phase = 0;
    std::condition_variable changed;
};

// Copies what it is asked for in a thread of its own, the last first.
struct Engine {
    std::vector<std::function<void()>> asked;
    bool at_work = false;
    std::thread thread;

    void start();
    void stop();
};

struct Block {
    alignas(1024) u8 memory[SHARED_BYTES];
    Engine engine;
    std::vector<u32> barriers;  // where they are, in the order in which they were begun
    Barrier named[16];
    long registers = 0;
};

static Block cluster[2];
static thread_local int block_rank = 0;
static std::mutex mutex;
static std::map<u32, Barrier> barriers;
static Barrier of_cluster;
static thread_local u32 cluster_phase = 0;

inline Block &own_block() { return cluster[block_rank]; }

[[noreturn]] inline void fail(const char *why) {
    std::fprintf(stderr, "emulated kernel: %s\n", why);
    std::abort();
}

// ---- Addresses of 32 bits --------------------------------------------------------------------------------------------

inline u32 shared_address(const void *pointer) { return (u32)(u64)pointer; }

inline u8 *pointer_of(u32 address) { return (u8 *)cluster + (int)(address - shared_address(cluster)); }

inline u32 rank_in_cluster() { return block_rank; }

inline u32 address_of_rank(u32 address, u32 rank) {
    u32 from = address - shared_address(own_block().memory);
    if (from < SHARED_BYTES)
        return shared_address(cluster[rank].memory) + from;
    std::vector<u32> &own = own_block().barriers;
    size_t index = std::find(own.begin(), own.end(), address) - own.begin();
    return index < own.size() ? cluster[rank].barriers[index] : (fail("an address that is not shared"), 0);
}

// ---- Barriers --------------------------------------------------------------------------------------------------------

inline void wait_until_changed(Barrier &barrier, std::unique_lock<std::mutex> &lock, u32 phase) {
    if (!barrier.changed.wait_for(lock, std::chrono::seconds(100), [&] { return barrier.phase != phase; }))
        fail("threads wait for each other");
}

// Arrivals and bytes that came.
inline void count(Barrier &barrier, int arrivals, long bytes) {
    barrier.missing -= arrivals, barrier.bytes -= bytes;
    if (barrier.missing < 0)
        fail("more arrivals than a barrier wants");
    if (barrier.missing || barrier.bytes)
        return;
    barrier.missing = barrier.wanted, barrier.phase++;
    barrier.changed.notify_all();
}

inline void init_barrier(u32 address, u32 arrivals) {
    std::unique_lock<std::mutex> lock(mutex);
    own_block().barriers.push_back(address);
    Barrier &barrier = barriers[address];
    barrier.wanted = barrier.missing = arrivals, barrier.bytes = 0, barrier.phase = 0;
}

inline void publish_barriers() {}

inline void expect_bytes(u32 address, u32 bytes) {
    std::unique_lock<std::mutex> lock(mutex);
    Barrier &barrier = barriers.at(address);
    barrier.bytes += bytes;
    count(barrier, 1, 0);
}

inline void wait_barrier(u32 address, u32 parity) {
    std::unique_lock<std::mutex> lock(mutex);
    Barrier &barrier = barriers.at(address);
    if (barrier.phase % 2 == parity)
        wait_until_changed(barrier, lock, barrier.phase);
}

inline void arrive_at_rank(u32 address, u32 rank) {
    std::unique_lock<std::mutex> lock(mutex);
    count(barriers.at(address_of_rank(address, rank)), 1, 0);
}

inline u32 arrive(Barrier &barrier, int wanted) {
    u32 phase = barrier.phase;
    if (!barrier.wanted)
        barrier.wanted = barrier.missing = wanted;
    if (barrier.wanted != wanted)
        fail("a barrier of other threads");
    count(barrier, 1, 0);
    return phase;
}

template <int COUNT>
void arrive_at_named(int barrier) {
    std::unique_lock<std::mutex> lock(mutex);
    arrive(own_block().named[barrier], COUNT);
}

template <int COUNT>
void wait_at_named(int barrier) {
    std::unique_lock<std::mutex> lock(mutex);
    Barrier &own = own_block().named[barrier];
    wait_until_changed(own, lock, arrive(own, COUNT));
}

inline void arrive_in_cluster() {
    std::unique_lock<std::mutex> lock(mutex);
    cluster_phase = arrive(of_cluster, of_cluster.wanted);
}

inline void wait_for_cluster() {
    std::unique_lock<std::mutex> lock(mutex);
    wait_until_changed(of_cluster, lock, cluster_phase);
}

inline void check_rest(const Barrier &barrier) {
    if (barrier.missing != barrier.wanted || barrier.bytes)
        fail("a barrier at which something arrived that was not waited for");
}

// ---- Registers -------------------------------------------------------------------------------------------------------

template <int COUNT>
void take_registers() {
    std::unique_lock<std::mutex> lock(mutex);
    own_block().registers += COUNT;
}

template <int COUNT>
void give_registers_back() {
    take_registers<COUNT>();
}

// Of what a block has: as many for each of its threads, in steps of eight.
inline void check_registers(const Block &block, int threads) {
    if (block.registers > REGISTERS / threads / 8 * 8 * threads)
        fail("more registers than a block has");
}

// ---- Copies ----------------------------------------------------------------------------------------------------------

// Of a row of 128 bytes, 16 bytes lie where the number of the row, as its address has it, was added without carry.
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void Engine::start() {
    at_work = true;
    thread = std::thread([this] {
        for (;;) {
            std::this_thread::sleep_for(std::chrono::microseconds(200));
            std::unique_lock<std::mutex> lock(mutex);
            if (asked.empty() && !at_work)
                return;
            if (asked.empty())
                continue;
            std::function<void()> copy = std::move(asked.back());
            asked.pop_back();
            lock.unlock();
            copy();
        }
    });
}

inline void Engine::stop() {
    {
        std::unique_lock<std::mutex> lock(mutex);
        at_work = false;
    }
    thread.join();
}

inline void copy(u32 to, const TensorMap &from, std::array<int, 5> at, u32 barrier, u16 mask) {
    int rows = 1;
    for (int i = 0; i < from.rank - 1; i++)
        rows *= from.box[i];
    for (int rank = 0; rank < 2; rank++) {
        if (!(mask >> rank & 1))
            continue;
        u32 there = address_of_rank(to, rank);
        for (int row = 0; row < rows; row++)
            for (u32 column = 0; column < from.box[from.rank - 1]; column++) {
                const u16 *source = from.base;
                bool inside = true;
                for (int i = from.rank - 1, rest = row; i >= 0; i--) {
                    long place = at[i] + (i == from.rank - 1 ? (long)column : rest % from.box[i]);
                    rest = i == from.rank - 1 ? rest : rest / from.box[i];
                    inside &= 0 <= place && place < (long)from.shape[i];
                    source += place * (long)from.stride[i];
                }
                *(u16 *)pointer_of(swizzled(there + row * ROW_BYTES + column * 2)) = inside ? *source : 0;
            }
        std::unique_lock<std::mutex> lock(mutex);
        count(barriers.at(address_of_rank(barrier, rank)), 0, rows * ROW_BYTES);
    }
}

inline void ask(std::array<int, 5> at, u32 to, const TensorMap &from, u32 barrier, u16 mask) {
    std::unique_lock<std::mutex> lock(mutex);
    own_block().engine.asked.push_back([=, &from, rank = block_rank] {
        block_rank = rank;
        copy(to, from, at, barrier, mask);
    });
}

inline void copy_box(u32 to, const TensorMap &from, int channel, int x, int y, int image, u32 barrier) {
    ask({image, y, x, channel}, to, from, barrier, 1 << block_rank);
}

inline void copy_box_to_blocks(
    u32 to, const TensorMap &from, int a, int b, int c, int d, int e, u32 barrier, u16 mask) {
    ask({e, d, c, b, a}, to, from, barrier, mask);
}

inline void prefetch_map(const TensorMap &map) {}

// ---- Products --------------------------------------------------------------------------------------------------------

static thread_local std::vector<std::vector<std::function<void()>>> products;  // in groups, the last not committed

inline u64 operand(u32 address, u32 apart = 16) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(apart >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

inline void wgmma_fence() {
    if (products.empty())
        products.emplace_back();
}

inline void wgmma_commit() { products.emplace_back(); }

template <int PENDING = 0>
void wgmma_wait() {
    while (products.size() > PENDING + 1) {
        for (std::function<void()> &product : products.front())
            product();
        products.erase(products.begin());
    }
    own_warp().barrier.arrive_and_wait();  // a warp waits as one
}

// What an operand's description says of where a row's sixteen numbers lie.
inline const u16 *row_of(u64 operand, int row) {
    u32 base = shared_address(own_block().memory), low = operand << 4 & 0x3ffff, apart = operand >> 32 << 4 & 0x3fff0;
    u32 start = base + (low - base & 0x3ffff);
    return (const u16 *)pointer_of(start + row / 8 * apart + row % 8 * ROW_BYTES);
}

inline float number_of(const u16 *row, int k) {
    return widen(*(const u16 *)pointer_of(swizzled(shared_address(row + k))));
}
