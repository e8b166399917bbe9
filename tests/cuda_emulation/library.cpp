// The CUDA sources as a host library that ctypes calls.
#include "cost_volume/cuda.cu"

using namespace infoclip;

namespace {
template <class F>
const char* guarded(F&& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}  // namespace

extern "C" {
size_t emulated_launches() { return emulation::launches; }
const char* emulated_cost_volume(CostVolume* p, int backward) {
  return guarded([&] { backward ? cost_volume_backward_cuda(*p, 0) : cost_volume_forward_cuda(*p, 0); });
}
}
