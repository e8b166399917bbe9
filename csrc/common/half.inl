// float16 and bfloat16 as the CPU kernels read and write them. Included inside a kernel's own anonymous namespace: a
// shared inline function compiled for one instruction set could be the copy that the linker keeps for all.
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) { return as_float(static_cast<uint32_t>(v.bits) << 16); }
inline float widen(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  // Multiplying by 2^112 rebiases normal and subnormal numbers alike, exactly.
  const float finite = as_float(magnitude << 13) * as_float(0x77800000u);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return as_float(sign | (magnitude >= 0x7c00u ? special : as_bits(finite)));
}

inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(float v, BFloat16& out) {
  const uint32_t bits = as_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(v != v ? ((bits >> 16) | 0x40u) : rounded);
}
inline void narrow(float v, Half& out) {
  const uint32_t bits = as_bits(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    half = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // subnormal: the sum rounds at 2^-24, to even
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}
