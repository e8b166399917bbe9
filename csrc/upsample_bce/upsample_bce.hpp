// Bilinear upsampling (align_corners = False) and one-hot binary cross-entropy of [B, T, h, w] logits against
// [B, H, W] labels as one op: the loss, and in the same sweep its gradient. Strides are in elements.
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

struct UpsampleBce {
  int64_t B, T, h, w, H, W;
  int dtype;                // of logits
  const void* logits;       // [B, T, h, w]
  int64_t logits_s[4];
  const int64_t* target;    // [B, H, W]
  int64_t target_s[3];
  int64_t ignore_index;     // a label that is no class; any label outside 0..T-1 counts as it
  bool masked;              // pixels without a class are left out; else they are negatives of every class
  void* loss = nullptr;     // [] fp32, or fp64 for fp64 logits
  void* grad = nullptr;     // [B, T, h, w] contiguous, as loss: d loss / d logits, or null. Never a half: the mean over
                            // some 10^8 samples would drown in one.
  void* work = nullptr;     // CUDA: scratch of upsample_bce_work_bytes()
};

// Returns the first label that is neither a class nor ignore_index, or -1 ("none"; then the outputs are written).
// found tells which of the two it is.
int64_t upsample_bce_cpu(const UpsampleBce& p, Isa isa, int threads, bool* found);

#ifdef INFOCLIP_WITH_CUDA
int64_t upsample_bce_work_bytes(const UpsampleBce& p);
void upsample_bce_cuda(const UpsampleBce& p, uintptr_t stream);
#endif

// What one set of instructions offers; C is float or double.
template <class C>
struct UpsampleRows {
  // dst[i] = src[offset + i * stride] as C
  void (*load)(const void* src, int dtype, int64_t offset, int64_t stride, int64_t n, C* dst);
  // dst[x] = (1 - frac[x]) src[low[x]] + frac[x] src[low[x] + 1]; src has one readable element behind its end
  void (*expand)(const C* src, const int32_t* low, const C* frac, int64_t W, C* dst);
  // the adjoint: dst[low[x]] += (1 - frac[x]) g[x], dst[low[x] + 1] += frac[x] g[x]
  void (*reduce)(const C* g, const int32_t* low, const C* frac, int64_t W, C* dst);
  // One output row at height fy between the rows top and bottom: the loss is returned, the gradient added to upper and
  // lower (both null: loss only). label -1: no class; masked leaves such pixels out.
  double (*sweep)(const C* top, const C* bottom, C fy, const int32_t* label, int32_t t, bool masked, int64_t W,
                  C* upper, C* lower);
};

#define INFOCLIP_DECLARE(isa)                      \
  namespace isa {                                  \
  template <class C>                               \
  const UpsampleRows<C>& upsample_rows();          \
  }
INFOCLIP_DECLARE(baseline)
INFOCLIP_DECLARE(avx2)
INFOCLIP_DECLARE(avx512)
#undef INFOCLIP_DECLARE

}  // namespace infoclip
