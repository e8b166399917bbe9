// What every CUDA form has: errors as exceptions, the arithmetic types, and the choice of one by a dtype's code.
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

template <class F>
void by_type(int dtype, F&& f) {
  if (dtype == kFloat) f(float());
  else if (dtype == kHalf) f(__half());
  else f(__nv_bfloat16());
}

}  // namespace
}  // namespace infoclip
