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
  void* out = nullptr;           // forward: [B, P, T, N] contiguous, or null
  void* highest = nullptr;       // forward, CPU: [B, T] contiguous in the arithmetic's type, or null: each class's largest
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

}  // namespace infoclip
