// Compiled once a set of instructions, like cost_volume/cpu_blocks.inl: only code of this namespace. ISA names the
// namespace, VBYTES the vector's bytes. Vectors run over the channels of a head.
#include <cstdint>
#include <cstring>

#include "ms_deform_attn/ms_deform_attn.hpp"

namespace infoclip {
namespace ISA {
namespace {

#include "common/half.inl"

template <class C>
struct Vector {
  typedef C type __attribute__((vector_size(VBYTES), aligned(alignof(C)), may_alias));
  static constexpr int lanes = VBYTES / sizeof(C);
};

template <class C>
inline typename Vector<C>::type load(const C* from) {
  return *reinterpret_cast<const typename Vector<C>::type*>(from);
}
template <class S>
inline Vector<float>::type load_half(const S* from) {
  float wide[Vector<float>::lanes];
  for (int i = 0; i < Vector<float>::lanes; ++i) wide[i] = widen(from[i]);
  return *reinterpret_cast<const Vector<float>::type*>(wide);
}
inline Vector<float>::type load(const Half* from) { return load_half(from); }
inline Vector<float>::type load(const BFloat16* from) { return load_half(from); }

template <class C>
inline void store(typename Vector<C>::type v, C* to) { *reinterpret_cast<typename Vector<C>::type*>(to) = v; }
template <class C, class S>
inline void store_as(typename Vector<C>::type v, S* to) {
  C wide[Vector<C>::lanes];
  store<C>(v, wide);
  for (int i = 0; i < Vector<C>::lanes; ++i) narrow(wide[i], to[i]);
}

inline float floor_of(float x) { return __builtin_floorf(x); }
inline double floor_of(double x) { return __builtin_floor(x); }

// A sample's place on a map of h x w.
template <class C>
struct Place {
  int64_t y, x;  // upper left corner: -1..h-1, -1..w-1
  C fy, fx;
  bool inside, finite;
};

template <class C>
inline Place<C> place(C px, C py, int64_t h, int64_t w) {
  const C x = px * static_cast<C>(w) - C(0.5), y = py * static_cast<C>(h) - C(0.5);
  Place<C> s;
  s.finite = x - x == 0 && y - y == 0;
  s.inside = s.finite && x > -1 && y > -1 && x < static_cast<C>(w) && y < static_cast<C>(h);
  if (!s.inside) return s;
  const C x0 = floor_of(x), y0 = floor_of(y);
  s.x = static_cast<int64_t>(x0), s.y = static_cast<int64_t>(y0);
  s.fx = x - x0, s.fy = y - y0;
  return s;
}

// out = sum of coef[i] * row i, R vectors of channels at a time. Two corners side by side: the sums are shorter chains.
template <class S, class C, int R>
inline void gather(const S* base, const int64_t* off, const C* coef, int64_t n, S* out) {
  typedef typename Vector<C>::type V;
  constexpr int lanes = Vector<C>::lanes;
  V even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = V{};
  int64_t i = 0;
  for (; i + 1 < n; i += 2) {
    const S *a = base + off[i], *b = base + off[i + 1];
    const C ca = coef[i], cb = coef[i + 1];
    for (int r = 0; r < R; ++r) {
      even[r] += ca * load(a + r * lanes);
      odd[r] += cb * load(b + r * lanes);
    }
  }
  if (i < n)
    for (int r = 0; r < R; ++r) even[r] += coef[i] * load(base + off[i] + r * lanes);
  for (int r = 0; r < R; ++r) store_as<C>(even[r] + odd[r], out + r * lanes);
}

template <class S, class C>
void forward_as(const MsDeformAttn& p, int64_t b, int64_t q0, int64_t q1, int64_t* off, C* coef) {
  constexpr int lanes = Vector<C>::lanes;
  const int64_t ML = p.M * p.L * p.P;
  for (int64_t q = q0; q < q1; ++q)
    for (int64_t m = 0; m < p.M; ++m) {
      const int64_t first = (b * p.Q + q) * ML + m * p.L * p.P;
      const C* at = static_cast<const C*>(p.locations) + 2 * first;
      const C* weight = static_cast<const C*>(p.weights) + first;
      int64_t n = 0, start = 0;
      for (int64_t l = 0; l < p.L; ++l) {
        const int64_t h = p.shapes[2 * l], w = p.shapes[2 * l + 1];
        for (int64_t k = 0; k < p.P; ++k, at += 2, ++weight) {
          const Place<C> s = place(at[0], at[1], h, w);
          if (!s.inside) {
            if (s.finite) continue;
            off[n] = start * p.value_s[1], coef[n++] = static_cast<C>(__builtin_nan(""));
            continue;
          }
          const C below = s.fy * *weight, above = *weight - below;
          const int64_t corner = (start + s.y * w + s.x) * p.value_s[1];
          const bool left = s.x >= 0, right = s.x + 1 < w, top = s.y >= 0, bottom = s.y + 1 < h;
          off[n] = corner, coef[n] = above - above * s.fx, n += top && left;
          off[n] = corner + p.value_s[1], coef[n] = above * s.fx, n += top && right;
          off[n] = corner + w * p.value_s[1], coef[n] = below - below * s.fx, n += bottom && left;
          off[n] = corner + (w + 1) * p.value_s[1], coef[n] = below * s.fx, n += bottom && right;
        }
        start += h * w;
      }
      const S* base = static_cast<const S*>(p.value) + b * p.value_s[0] + m * p.value_s[2];
      S* out = static_cast<S*>(p.out) + ((b * p.Q + q) * p.M + m) * p.D;
      int64_t d = 0;
      for (; d + 4 * lanes <= p.D; d += 4 * lanes) gather<S, C, 4>(base + d, off, coef, n, out + d);
      for (; d + 2 * lanes <= p.D; d += 2 * lanes) gather<S, C, 2>(base + d, off, coef, n, out + d);
      for (; d + lanes <= p.D; d += lanes) gather<S, C, 1>(base + d, off, coef, n, out + d);
      for (; d < p.D; ++d) {
        C sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += coef[i] * widen(base[off[i] + d]);
        narrow(sum, out[d]);
      }
    }
}

// One sample: the four products of the incoming gradient g with the corners' rows, and its share of their gradients.
template <class S, class C, bool VALUE, bool POINT>
inline void sample(const C* g, const S* const* rows, C* const* d_rows, const C* share, int64_t D, C* dots) {
  typedef typename Vector<C>::type V;
  constexpr int lanes = Vector<C>::lanes;
  V sum[4] = {V{}, V{}, V{}, V{}};
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    const V v = load(g + d);
    for (int k = 0; k < 4; ++k) {
      if (POINT) sum[k] += v * load(rows[k] + d);
      if (VALUE) store<C>(load(static_cast<const C*>(d_rows[k]) + d) + share[k] * v, d_rows[k] + d);
    }
  }
  for (int k = 0; k < 4 && POINT; ++k) {
    C total = 0;
    for (int i = 0; i < lanes; ++i) total += sum[k][i];
    dots[k] = total;
  }
  for (; d < D; ++d)
    for (int k = 0; k < 4; ++k) {
      if (POINT) dots[k] += g[d] * widen(rows[k][d]);
      if (VALUE) d_rows[k][d] += share[k] * g[d];
    }
}

template <class S, class C, bool VALUE, bool POINT>
void backward_as(const MsDeformAttn& p, int64_t b, int64_t m, int64_t l, int64_t start, C* plane, C* room) {
  const int64_t h = p.shapes[2 * l], w = p.shapes[2 * l + 1], D = p.D, MD = p.M * D;
  const S* base = static_cast<const S*>(p.value) + b * p.value_s[0] + m * p.value_s[2] + start * p.value_s[1];
  // A corner outside the map reads a row of zeros and writes a row that nobody reads.
  C *g = room, *nothing = room + D, *lost = room + 2 * D;
  memset(nothing, 0, sizeof(C) * 2 * D);
  S* result = VALUE ? static_cast<S*>(p.d_value) + (b * p.S + start) * MD + m * D : nullptr;
  constexpr bool direct = sizeof(S) == sizeof(C);
  C* into = direct ? reinterpret_cast<C*>(result) : plane;
  const int64_t step = direct ? MD : D;
  if (VALUE)
    for (int64_t s = 0; s < h * w; ++s) memset(into + s * step, 0, sizeof(C) * D);
  for (int64_t q = 0; q < p.Q; ++q) {
    const S* grad = static_cast<const S*>(p.grad) + ((b * p.Q + q) * p.M + m) * D;
    for (int64_t d = 0; d < D; ++d) g[d] = widen(grad[d]);
    const int64_t first = (((b * p.Q + q) * p.M + m) * p.L + l) * p.P;
    const C* at = static_cast<const C*>(p.locations) + 2 * first;
    const C* weights = static_cast<const C*>(p.weights) + first;
    for (int64_t k = 0; k < p.P; ++k) {
      const C weight = weights[k];
      const Place<C> s = place(at[2 * k], at[2 * k + 1], h, w);
      C dw = 0, dx = 0, dy = 0;
      if (s.inside) {
        const C gy = C(1) - s.fy, gx = C(1) - s.fx;
        const C part[4] = {gy * gx, gy * s.fx, s.fy * gx, s.fy * s.fx};
        const S* rows[4];
        C *d_rows[4], share[4], dots[4] = {};
        for (int c = 0; c < 4; ++c) {
          const int64_t y = s.y + c / 2, x = s.x + c % 2;
          const bool there = y >= 0 && y < h && x >= 0 && x < w;
          const int64_t pixel = y * w + x;
          rows[c] = there ? base + pixel * p.value_s[1] : reinterpret_cast<const S*>(nothing);
          d_rows[c] = VALUE && there ? into + pixel * step : lost;
          share[c] = weight * part[c];
        }
        sample<S, C, VALUE, POINT>(g, rows, d_rows, share, D, dots);
        dw = part[0] * dots[0] + part[1] * dots[1] + part[2] * dots[2] + part[3] * dots[3];
        dx = static_cast<C>(w) * weight * (gy * (dots[1] - dots[0]) + s.fy * (dots[3] - dots[2]));
        dy = static_cast<C>(h) * weight * (gx * (dots[2] - dots[0]) + s.fx * (dots[3] - dots[1]));
      } else if (!s.finite) {
        dw = dx = dy = static_cast<C>(__builtin_nan(""));
      }
      if (POINT) {
        static_cast<C*>(p.d_weights)[first + k] = dw;
        static_cast<C*>(p.d_locations)[2 * (first + k)] = dx;
        static_cast<C*>(p.d_locations)[2 * (first + k) + 1] = dy;
      }
    }
  }
  if (VALUE && !direct)
    for (int64_t s = 0; s < h * w; ++s)
      for (int64_t d = 0; d < D; ++d) narrow(plane[s * D + d], result[s * MD + d]);
}

template <class S, class C>
void backward_of(const MsDeformAttn& p, int64_t b, int64_t m, int64_t l, int64_t start, C* plane, C* room) {
  if (p.d_value && p.d_weights) backward_as<S, C, true, true>(p, b, m, l, start, plane, room);
  else if (p.d_value) backward_as<S, C, true, false>(p, b, m, l, start, plane, room);
  else backward_as<S, C, false, true>(p, b, m, l, start, plane, room);
}

inline void forward(const MsDeformAttn& p, int64_t b, int64_t q0, int64_t q1, int64_t* off, float* coef) {
  if (p.dtype == kHalf) forward_as<Half>(p, b, q0, q1, off, coef);
  else if (p.dtype == kBFloat16) forward_as<BFloat16>(p, b, q0, q1, off, coef);
  else forward_as<float>(p, b, q0, q1, off, coef);
}
inline void forward(const MsDeformAttn& p, int64_t b, int64_t q0, int64_t q1, int64_t* off, double* coef) {
  forward_as<double>(p, b, q0, q1, off, coef);
}

inline void backward(const MsDeformAttn& p, int64_t b, int64_t m, int64_t l, int64_t start, float* plane, float* room) {
  if (p.dtype == kHalf) backward_of<Half>(p, b, m, l, start, plane, room);
  else if (p.dtype == kBFloat16) backward_of<BFloat16>(p, b, m, l, start, plane, room);
  else backward_of<float>(p, b, m, l, start, plane, room);
}
inline void backward(const MsDeformAttn& p, int64_t b, int64_t m, int64_t l, int64_t start, double* plane,
                     double* room) {
  backward_of<double>(p, b, m, l, start, plane, room);
}

template <class C>
const DeformRows<C> rows_table = {forward, backward};

}  // namespace

template <class C>
const DeformRows<C>& deform_rows() { return rows_table<C>; }
template const DeformRows<float>& deform_rows<float>();
template const DeformRows<double>& deform_rows<double>();

}  // namespace ISA
}  // namespace infoclip
