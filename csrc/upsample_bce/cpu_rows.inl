// Compiled once a set of instructions, like common/tiles.inl: plain loops for the compiler's vectoriser, only
// code of this namespace. ISA names the namespace.
#include <cstdint>
#include <cstring>

#include "upsample_bce/upsample_bce.hpp"

namespace infoclip {
namespace ISA {
namespace {

#include "common/half.inl"

// exp(-a) for a >= 0, relative error below 2e-7: Cephes' polynomial after a reduction by log 2 in two parts. Below
// exp(-87) nothing is lost: the loss adds it to a number of at least 87, the gradient to 0 or 1.
inline float exp_neg(float a) {
  float x = -a;
  x = x < -87.0f ? -87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number
  const float n = (x * 1.44269504088896341f + magic) - magic;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}
inline double exp_neg(double a) { return __builtin_exp(-a); }

// log(1 + e) for e in 0..1: 2 artanh(s) with s = e / (2 + e) <= 1/3, whose series needs seven terms for fp32.
inline float log1p_unit(float e) {
  const float s = e / (2.0f + e);
  const float q = s * s;
  float p = 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}
inline double log1p_unit(double e) { return __builtin_log1p(e); }

template <class S, class C>
void load_as(const S* src, int64_t stride, int64_t n, C* dst) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<C>(widen(src[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<C>(widen(src[i * stride]));
  }
}

inline void load_any(const void* src, int dtype, int64_t offset, int64_t stride, int64_t n, float* dst) {
  if (dtype == kHalf) load_as(static_cast<const Half*>(src) + offset, stride, n, dst);
  else if (dtype == kBFloat16) load_as(static_cast<const BFloat16*>(src) + offset, stride, n, dst);
  else load_as(static_cast<const float*>(src) + offset, stride, n, dst);
}
inline void load_any(const void* src, int, int64_t offset, int64_t stride, int64_t n, double* dst) {
  load_as(static_cast<const double*>(src) + offset, stride, n, dst);
}

template <class C>
void expand(const C* src, const int32_t* low, const C* frac, int64_t W, C* dst) {
  for (int64_t x = 0; x < W; ++x) {
    const C a = src[low[x]], b = src[low[x] + 1];
    dst[x] = a + frac[x] * (b - a);
  }
}

template <class C>
void reduce(const C* g, const int32_t* low, const C* frac, int64_t W, C* dst) {
  for (int64_t x = 0; x < W;) {  // a cell's samples lie side by side: two sums in registers, one write
    const int32_t i = low[x];
    C left = 0, right = 0;
    for (; x < W && low[x] == i; ++x) {
      right += frac[x] * g[x];
      left += g[x] - frac[x] * g[x];
    }
    dst[i] += left;
    dst[i + 1] += right;
  }
}

template <class C, bool GRAD, bool MASKED>
double sweep_as(const C* __restrict top, const C* __restrict bottom, C fy, const int32_t* __restrict label, int32_t t,
                int64_t W, C* __restrict upper, C* __restrict lower) {
  C total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t x = 0; x < W; ++x) {
    const C z = top[x] + fy * (bottom[x] - top[x]);
    const bool positive = label[x] == t;
    const C u = positive ? -z : z;  // either way the loss is log(1 + exp(u)): nothing cancels
    const C e = exp_neg(u < 0 ? -u : u);
    const C loss = (u < 0 ? C(0) : u) + log1p_unit(e);  // a NaN is not below 0 and stays
    const bool keep = !MASKED || label[x] >= 0;
    total += keep ? loss : C(0);
    if (GRAD) {
      const C inverse = C(1) / (C(1) + e);
      const C slope = u >= 0 ? inverse : e * inverse;
      const C g = keep ? (positive ? -slope : slope) : C(0);
      lower[x] += fy * g;
      upper[x] += g - fy * g;
    }
  }
  return total;
}

template <class C>
double sweep(const C* top, const C* bottom, C fy, const int32_t* label, int32_t t, bool masked, int64_t W, C* upper,
             C* lower) {
  if (upper) return masked ? sweep_as<C, true, true>(top, bottom, fy, label, t, W, upper, lower)
                           : sweep_as<C, true, false>(top, bottom, fy, label, t, W, upper, lower);
  return masked ? sweep_as<C, false, true>(top, bottom, fy, label, t, W, upper, lower)
                : sweep_as<C, false, false>(top, bottom, fy, label, t, W, upper, lower);
}

template <class C>
const UpsampleRows<C> rows_table = {load_any, expand<C>, reduce<C>, sweep<C>};

}  // namespace

template <class C>
const UpsampleRows<C>& upsample_rows() { return rows_table<C>; }
template const UpsampleRows<float>& upsample_rows<float>();
template const UpsampleRows<double>& upsample_rows<double>();

}  // namespace ISA
}  // namespace infoclip
