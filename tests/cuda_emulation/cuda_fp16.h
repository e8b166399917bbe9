// float16 as the host computes it.
#pragma once
#include <cstdint>
#include <cstring>
struct __half { uint16_t bits; };
inline float __half2float(__half v) { _Float16 h; memcpy(&h, &v, 2); return static_cast<float>(h); }
inline __half __float2half_rn(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  __half r;
  memcpy(&r, &h, 2);
  return r;
}
