// What every CUDA form has: errors as exceptions, the arithmetic types, the choice of one by a dtype's code, sums over
// warps and blocks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/dtype.hpp"

namespace infoclip {
namespace {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("infoclip._C: CUDA: ") + cudaGetErrorString(status));
}

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void narrow(float v, float* to) { *to = v; }
__device__ inline void narrow(float v, __half* to) { *to = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }

template <class V>
__device__ inline V warp_sum(V v) {
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <int N, class V>  // the sum over a block of N threads, in every thread; `room` holds N / 32
__device__ inline V block_sum(V v, V* room) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
  V sum = 0;
  for (int i = 0; i < N / 32; ++i) sum += room[i];
  __syncthreads();
  return sum;
}

template <class F>
void by_type(int dtype, F&& f) {
  if (dtype == kFloat) f(float());
  else if (dtype == kHalf) f(__half());
  else f(__nv_bfloat16());
}

}  // namespace
}  // namespace infoclip
