// Runs the blocks of `decode.cu` one after the other, their threads as threads of the CPU.

#include "decode.cu"

struct Any {  // a pointer of whatever type the kernel wants
    void *pointer;
    template <class T>
    operator T *() const {
        return (T *)pointer;
    }
};

template <size_t... P, size_t... N>
static void call(void **p, const int *n, float scale, float softcap, std::index_sequence<P...>,
                 std::index_sequence<N...>) {
    attend(Any{p[P]}..., scale, softcap, n[N]...);
}

extern "C" void run(int splits, int heads, void **pointers, const int *numbers, float scale, float softcap) {
    for (int y = 0; y < heads; y++)
        for (int x = 0; x < splits; x++) {
            warps.clear();
            for (int i = 0; i < WARPS; i++)
                warps.push_back(std::make_unique<Warp>());
            std::barrier<> barrier(THREADS);
            std::vector<std::thread> threads;
            for (int i = 0; i < THREADS; i++)
                threads.emplace_back([=, &barrier] {
                    own_barrier = &barrier;
                    threadIdx.x = i, blockIdx.x = x, blockIdx.y = y;
                    call(pointers, numbers, scale, softcap, std::make_index_sequence<POINTERS>(),
                         std::make_index_sequence<NUMBERS>());
                });
            for (std::thread &thread : threads)
                thread.join();
        }
}
