// Runs the clusters of `convolution.cu` one after the other, the threads of their two blocks as threads of the CPU. KERNEL
// is a copy of that file whose dynamic shared memory is `own_block().memory`; each block has its shared variables.

#include "hopper.cuh"
#include "lanes.cuh"
#include "wgmma.cuh"

static Index gridDim;

#define run run_first
namespace first {
#include KERNEL
}
#undef run
#define run run_second
namespace second {
#include KERNEL
}
#undef run

extern "C" void launch(int blocks, const TensorMap *maps, void **p, const int *n, float eps) {
    gridDim.x = blocks;
    for (int index = 0; index < blocks / CLUSTER; index++) {
        warps.clear(), barriers.clear();
        of_cluster.wanted = of_cluster.missing = CLUSTER * THREADS;
        std::barrier<> synced[CLUSTER] = {std::barrier<>(THREADS), std::barrier<>(THREADS)};
        for (int i = 0; i < CLUSTER * THREADS / LANES; i++)
            warps.push_back(std::make_unique<Warp>());
        for (Block &block : cluster) {
            block.barriers.clear(), block.registers = 0;
            std::memset(block.memory, 0xff, SHARED_BYTES);  // NaN, for what is read and nobody wrote
            block.engine.start();
        }
        std::vector<std::thread> threads;
        for (int i = 0; i < CLUSTER * THREADS; i++)
            threads.emplace_back([=, &synced] {
                block_rank = i / THREADS, first_warp = block_rank * (THREADS / LANES);
                own_barrier = &synced[block_rank];
                threadIdx.x = i % THREADS, blockIdx.x = index * CLUSTER + block_rank;
                (block_rank ? second::run_second : first::run_first)(
                    maps[0], maps[1], (u16 *)p[0], (u16 *)p[1], (u16 *)p[2], n[0], (u16 *)p[3], (float4 *)p[4],
                    (u16 *)p[5], n[1], n[2], n[3], eps);
            });
        for (std::thread &thread : threads)
            thread.join();
        for (Block &block : cluster) {
            block.engine.stop();
            check_registers(block, THREADS);
            for (Barrier &barrier : block.named)
                check_rest(barrier);
        }
        for (auto &[address, barrier] : barriers)
            check_rest(barrier);
    }
}
