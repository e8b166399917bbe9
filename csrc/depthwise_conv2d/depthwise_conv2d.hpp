// Gradient of a depthwise convolution in its weights and bias (stride 1, "same" zero padding, odd kernel):
//   d_weight[c, i, j] = sum over b, y, x of grad[b, c, y, x] * input[b, c, y + (i - K/2) dilation, x + (j - K/2) dilation]
// Strides are in elements; what has none is contiguous.
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

struct DepthwiseConv2d {
  int64_t B, C, H, W, K, dilation;  // images, channels, height, width, side of the kernel
  int dtype;                        // of x and grad; sums and results are fp32, fp64 for fp64
  const void* x;                    // [B, C, H, W]
  int64_t x_s[4];
  const void* grad;  // [B, C, H, W]
  int64_t grad_s[4];
  void* d_weight;          // [C, K, K]
  void* d_bias = nullptr;  // [C], or null
};

void depthwise_conv2d_weight_grad_cpu(const DepthwiseConv2d& p, Isa isa, int threads);

// What one set of instructions offers; C is float or double.
template <class C>
struct DepthwiseRows {
  int64_t lanes;  // channels of a work item
  // The rows y0..y1-1 of grad's share, for image b and the channels from c0. x: zeroed room for
  // ((K - 1) dilation + 1) rows of (W + (K - 1) dilation) lanes; g: room for W lanes; sums: [K K + 1, lanes], written,
  // the last row the bias's.
  void (*weight_grad)(const DepthwiseConv2d& p, int64_t b, int64_t c0, int64_t y0, int64_t y1, C* x, C* g, C* sums);
};

#define INFOCLIP_DECLARE(isa)                      \
  namespace isa {                                  \
  template <class C>                               \
  const DepthwiseRows<C>& depthwise_rows();        \
  }
INFOCLIP_DECLARE(baseline)
INFOCLIP_DECLARE(avx2)
INFOCLIP_DECLARE(avx512)
#undef INFOCLIP_DECLARE

}  // namespace infoclip
