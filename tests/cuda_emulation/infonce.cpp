#include "library.hpp"

#include "infonce/cuda.cu"

extern "C" const char* emulated(infoclip::InfoNce* p, int backward) {
  return guarded([&] { backward ? infonce_backward_cuda(*p, 0) : infonce_forward_cuda(*p, 0); });
}
extern "C" int64_t work_floats(infoclip::InfoNce* p, int backward) {
  return infoclip::infonce_work_floats(*p, backward);
}
