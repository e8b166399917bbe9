// CUDA's runtime as far as csrc/ uses it, on the host: device code is compiled as C++ and a block's threads are fibers
// that take turns, each running until it waits for its warp or block. Slow and exact; for tests alone.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 { uint32_t x, y, z, w; };
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

struct Group {  // threads that wait for each other
  int size = 0, arrived = 0;
  uint64_t round = 0;
};

struct Thread {
  ucontext_t context;
  bool done = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Group> warps;
  Group all;
  std::vector<unsigned char> shared;
  unsigned char* stacks = nullptr;
  ucontext_t scheduler;
  int current = 0;
  std::function<void()> body;
  // what a warp's lanes hand in together, by warp and lane
  std::vector<const void*> addresses;
  std::vector<std::array<uint32_t, 12>> words;
};

inline Block block;
inline dim3 block_index, thread_index;
inline size_t launches = 0, granted_shared = 48 * 1024;

inline void yield() { swapcontext(&block.threads[block.current].context, &block.scheduler); }

// Wait for the group; its last thread runs `together` first.
template <class F>
void meet(Group& group, F&& together) {
  const uint64_t round = group.round;
  if (++group.arrived == group.size) {
    together();
    group.arrived = 0;
    ++group.round;
    return;
  }
  while (group.round == round) yield();
}

inline int warp() { return block.current / WARP; }
inline int lane() { return block.current % WARP; }

inline void enter() {
  block.body();
  block.threads[block.current].done = true;
  // A thread that has returned is waited for no longer, as on the device; the kernels let whole warps return alone.
  swapcontext(&block.threads[block.current].context, &block.scheduler);
}

inline void run_block(int threads, size_t shared) {
  block.threads.assign(threads, Thread());
  block.warps.assign((threads + WARP - 1) / WARP, Group{WARP, 0, 0});
  block.all = Group{threads, 0, 0};
  block.addresses.assign(threads, nullptr);
  block.words.assign(threads, {});
  // What nobody wrote is NaN, in each type. 32 bytes more: as shared memory, aligned to 16.
  block.shared.assign(shared + 32, 0xff);
  if (!block.stacks)
    block.stacks = static_cast<unsigned char*>(
        mmap(nullptr, STACK * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int i = 0; i < threads; ++i) {
    ucontext_t& c = block.threads[i].context;
    getcontext(&c);
    c.uc_stack.ss_sp = block.stacks + i * STACK;
    c.uc_stack.ss_size = STACK;
    c.uc_link = nullptr;
    makecontext(&c, enter, 0);
  }
  for (int left = threads; left;) {
    left = 0;
    for (int i = 0; i < threads; ++i) {
      if (block.threads[i].done) continue;
      ++left;
      block.current = i;
      thread_index.x = static_cast<unsigned>(i);
      swapcontext(&block.scheduler, &block.threads[i].context);
    }
  }
}

}  // namespace emulation

#define blockIdx emulation::block_index
#define threadIdx emulation::thread_index


inline void __syncthreads() {
  emulation::meet(emulation::block.all, [] {});
}

template <class V>
V __shfl_xor_sync(unsigned, V v, int mask) {
  using namespace emulation;
  static_assert(sizeof(V) <= 8, "two words");
  memcpy(&block.words[block.current][0], &v, sizeof(V));
  V found;
  meet(block.warps[warp()], [] {
    const int first = block.current / WARP * WARP;
    for (int l = 0; l < WARP; ++l)
      for (int w = 0; w < 2; ++w) block.words[first + l][2 + w] = block.words[first + l][w];
  });
  memcpy(&found, &block.words[block.current / WARP * WARP + (lane() ^ mask)][2], sizeof(V));
  meet(block.warps[warp()], [] {});
  return found;
}

inline float __uint_as_float(uint32_t v) { float f; memcpy(&f, &v, 4); return f; }
inline uint32_t __float_as_uint(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
using std::max;
using std::min;

inline cudaError_t cudaDriverGetVersion(int* v) { *v = 0; return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { *v = 0; return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "more shared memory than a block was granted"; }
template <class K>
cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int bytes) {
  emulation::granted_shared = static_cast<size_t>(bytes);
  return bytes <= 99 * 1024 ? cudaSuccess : 1;  // the least of compute capability 8.x
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  if (c->dynamicSmemBytes > emulation::granted_shared) return 1;
  emulation::granted_shared = 48 * 1024;
  ++emulation::launches;
  const std::tuple<std::decay_t<P>...> held(std::forward<A>(arguments)...);
  emulation::block.body = [&] { std::apply(kernel, held); };
  for (unsigned b = 0; b < c->gridDim.x; ++b) {
    emulation::block_index.x = b;
    emulation::run_block(static_cast<int>(c->blockDim.x), c->dynamicSmemBytes);
  }
  return cudaSuccess;
}
