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

template <class T>
__device__ constexpr bool is_half(T) { return false; }
__device__ constexpr bool is_half(__half) { return true; }

template <class V>
__device__ inline V warp_sum(V v) {
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Over the lanes that differ in the bits FROM .. TO of their number; every one of them has the result.
template <int FROM, int TO>
__device__ inline float lanes_sum(float v) {
#pragma unroll
  for (int step = FROM; step <= TO; step *= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
template <int FROM, int TO>
__device__ inline float lanes_max(float v) {  // of what is a number
#pragma unroll
  for (int step = FROM; step <= TO; step *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

template <int N>  // the largest number of a block of N threads, in every thread; `room` holds N / 32
__device__ inline float block_max(float v, float* room) {
  v = lanes_max<1, 16>(v);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
  for (int i = 0; i < N / 32; ++i) v = fmaxf(v, room[i]);
  __syncthreads();
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
