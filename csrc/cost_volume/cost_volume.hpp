// Cosine similarities of every pixel with every prompt, and their gradients. Strides are in elements.
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

struct CostVolume {
  int64_t B, N, T, P, D;
  int dtype;                     // of every tensor below
  bool shared;                   // one text for all images: text is [T, P, D] and text_s[0] is 0
  double scale;                  // 1 / temperature
  const void* image;             // [B, N, D]
  int64_t image_s[3];
  const void* text;              // [B, T, P, D], or [T, P, D]
  int64_t text_s[4];
  void* out = nullptr;           // forward: [B, P, T, N] contiguous
  const void* grad = nullptr;    // backward: [B, P, T, N]
  int64_t grad_s[4] = {0, 0, 0, 0};
  void* d_image = nullptr;       // [B, N, D] contiguous, or null where no gradient is wanted
  void* d_text = nullptr;        // as text, contiguous, or null
  void* work = nullptr;          // CUDA: fp32 scratch of work_floats() elements
};

void cost_volume_forward_cpu(const CostVolume& p, Isa isa, int threads);
void cost_volume_backward_cpu(const CostVolume& p, Isa isa, int threads);

int64_t cost_volume_work_floats(const CostVolume& p, bool backward);  // CUDA scratch, in floats
#ifdef INFOCLIP_WITH_CUDA
void cost_volume_forward_cuda(const CostVolume& p, uintptr_t stream);
void cost_volume_backward_cuda(const CostVolume& p, uintptr_t stream);
int cuda_driver_version();
int cuda_runtime_version();
#endif

// What one set of instructions offers; C is the type of the arithmetic, float or double.
template <class C>
struct Blocks {
  int mr, nr;  // rows and columns of the register block
  // panel[k][i] = src[off[i] + k * sk] for i < rows, zeros up to width.
  void (*pack_rows)(const void* src, int dtype, const int64_t* off, int rows, int64_t sk, int64_t K, int width,
                    C* panel);
  // panel[k][j] = src[off[k] + j * sj] * scale[k] for j < columns, zeros up to width; scale may be null.
  void (*pack_columns)(const void* src, int dtype, const int64_t* off, int64_t K, int64_t sj, int columns, int width,
                       const C* scale, C* panel);
  // inverse[i] = 1 / max(|column i of the panel|, eps); with apply the panel is multiplied by it.
  void (*norms)(C* panel, int64_t K, int width, C eps, bool apply, C* inverse);
  // c[a_panels * mr][b_panels * nr] (row stride ldc) += A B over K.
  void (*tile)(int64_t K, const C* A, int a_panels, const C* B, int b_panels, C* c, int64_t ldc);
  // dst[offset + i] = src[i] * scale, rounded once to dtype.
  void (*store)(const C* src, int64_t n, C scale, void* dst, int64_t offset, int dtype);
  // The gradient through x / max(|x|, eps): dst = inverse * (g - u <u, g>), u = x * inverse; without the projection
  // where the norm was clamped. row is scratch of D elements.
  void (*project)(const C* g, const void* x, int64_t x_offset, int64_t x_stride, int64_t D, C inverse, C eps, C* row,
                  void* dst, int64_t offset, int dtype);
};

namespace baseline { template <class C> const Blocks<C>& blocks(); }
#ifdef INFOCLIP_X86
namespace avx2 { template <class C> const Blocks<C>& blocks(); }
namespace avx512 { template <class C> const Blocks<C>& blocks(); }
#endif

}  // namespace infoclip
