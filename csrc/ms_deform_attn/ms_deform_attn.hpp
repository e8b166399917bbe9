// Multi-scale deformable attention: every query adds up bilinear samples of its head's channels on several maps.
// Strides are in elements; what has none is contiguous. A sample at (x, y) in 0..1 lies at (x w - 1/2, y h - 1/2) in
// pixels; a corner outside the map counts as zero; a location that is not finite gives NaN.
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

struct MsDeformAttn {
  int64_t B, S, M, D, Q, L, P;  // images, pixels of all levels, heads, channels a head, queries, levels, points
  const int64_t* shapes;        // [L, 2] heights and widths, in host memory
  int dtype;                    // of value, out, grad and d_value; locations and weights are fp32, fp64 for fp64
  const void* value;            // [B, S, M, D], channels side by side
  int64_t value_s[3];           // of B, S, M
  const void* locations;        // [B, Q, M, L, P, 2]
  const void* weights;          // [B, Q, M, L, P]
  void* out = nullptr;          // [B, Q, M, D]
  const void* grad = nullptr;   // [B, Q, M, D]
  void* d_value = nullptr;      // [B, S, M, D]; each gradient may be null
  void* d_locations = nullptr;  // as locations; with d_weights or not at all
  void* d_weights = nullptr;    // as weights
  const int32_t* levels = nullptr;  // CUDA: [L, 4] height, width, first pixel, first cell
  const int64_t* order = nullptr;   // CUDA, for d_value: samples by cell (kernels/ms_deform_attn/cells.py)
  const int64_t* starts = nullptr;  // CUDA, for d_value: [B M cells + 1] first sample of a cell in `order`
};

void ms_deform_attn_forward_cpu(const MsDeformAttn& p, Isa isa, int threads);
void ms_deform_attn_backward_cpu(const MsDeformAttn& p, Isa isa, int threads);

#ifdef INFOCLIP_WITH_CUDA
void ms_deform_attn_forward_cuda(const MsDeformAttn& p, uintptr_t stream);
void ms_deform_attn_backward_cuda(const MsDeformAttn& p, uintptr_t stream);
#endif

// What one set of instructions offers; C is float or double.
template <class C>
struct DeformRows {
  // The outputs of the queries q0..q1-1 of image b, every head. off and coef: room for 4 L P corners.
  void (*forward)(const MsDeformAttn& p, int64_t b, int64_t q0, int64_t q1, int64_t* off, C* coef);
  // The gradients that image b, head m and level l give. start: the level's first pixel; plane: room for h w D where
  // d_value is a half; rows: room for 3 D.
  void (*backward)(const MsDeformAttn& p, int64_t b, int64_t m, int64_t l, int64_t start, C* plane, C* rows);
};

#define INFOCLIP_DECLARE(isa)                      \
  namespace isa {                                  \
  template <class C>                               \
  const DeformRows<C>& deform_rows();              \
  }
INFOCLIP_DECLARE(baseline)
INFOCLIP_DECLARE(avx2)
INFOCLIP_DECLARE(avx512)
#undef INFOCLIP_DECLARE

}  // namespace infoclip
