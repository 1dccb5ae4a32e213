// Runs the CUDA kernels on CPU threads, for tests. Any C++20 compiler builds the kernels' source with this header.
// Blocks run one after another, with a std::thread per CUDA thread, so that sanitizers see each access to shared memory
// and each race.
#pragma once

#include <math.h>
#include <stdint.h>

#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

namespace deltamem::host {

constexpr int kLanes = 32;

struct Warp {
  std::barrier<> together{kLanes};
  alignas(8) unsigned char slots[2][kLanes][8];
};

struct Block {
  std::barrier<> together;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;  // exactly the size of the launch, so that an access past the end is found
  size_t bytes;
  Block(int threads, size_t bytes)
      : together(threads), warps(threads / kLanes), shared(new char[bytes]), bytes(bytes) {}
};

struct Index {
  unsigned x;
};

inline thread_local Block* block;
inline thread_local unsigned turn;

}  // namespace deltamem::host

inline thread_local deltamem::host::Index threadIdx, blockIdx;
inline thread_local deltamem::host::Index blockDim, gridDim;

inline void __syncthreads() { deltamem::host::block->together.arrive_and_wait(); }

namespace deltamem::host {

// Each lane of the warp publishes a value and reads that of lane `from`. Two sets of slots alternate, so that a lane
// does not overwrite a value that another lane has not read yet.
template <class T>
T exchange(T value, unsigned from) {
  Warp& warp = block->warps[threadIdx.x / kLanes];
  auto& slots = warp.slots[turn ^= 1];
  std::memcpy(slots[threadIdx.x % kLanes], &value, sizeof(T));
  warp.together.arrive_and_wait();
  std::memcpy(&value, slots[from], sizeof(T));
  return value;
}

}  // namespace deltamem::host

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return deltamem::host::exchange(value, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return deltamem::host::exchange(value, (threadIdx.x % 32 & ~(width - 1)) + lane % width);
}

namespace deltamem {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(host::block->shared.get());
}

// Shared memory is filled with NaN before each block.
template <class... P, class... A>
int start(void (*kernel)(P...), unsigned blocks, int threads, size_t shared, void* /*stream*/, const A&... arguments) {
  host::Block block(threads, shared);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      host::block = &block;
      threadIdx.x = i, blockDim.x = threads, gridDim.x = blocks;
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        if (i == 0) std::memset(block.shared.get(), 0xff, shared);
        __syncthreads();
        kernel(arguments...);
        __syncthreads();
      }
    });
  for (std::thread& thread : running) thread.join();
  return 0;
}

}  // namespace deltamem
