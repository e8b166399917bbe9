#include "library.hpp"

#include "renyi_mutual_information/cuda.cu"

extern "C" const char* emulated(infoclip::RenyiInformation* p, int) {
  return guarded([&] { renyi_information_cuda(*p, 0); });
}
extern "C" int64_t work_floats(infoclip::RenyiInformation* p, int) {
  return infoclip::renyi_information_work_floats(*p);
}
