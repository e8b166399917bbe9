// Compiled once a set of instructions. ISA names the namespace, VBYTES the vector's bytes, MR the rows of the register
// block (it is two vectors wide). Only code of this namespace: an inline function of the standard library compiled
// here could be the copy that the linker keeps for everybody, with instructions that the CPU may not have.
#include <cstdint>
#include <cstring>

#include "cost_volume/cost_volume.hpp"

namespace infoclip {
namespace ISA {
namespace {

constexpr int64_t KC = 256;  // depth of a block: its panel of B (32 KiB with AVX-512) stays in the first-level cache

template <class C>
struct Vector {
  typedef C type __attribute__((vector_size(VBYTES), aligned(alignof(C)), may_alias));
  static constexpr int lanes = VBYTES / sizeof(C);
};

#include "common/half.inl"

template <class S, class C>
void pack_rows_as(const S* src, const int64_t* off, int rows, int64_t sk, int64_t K, int width, C* panel) {
  bool side_by_side = true;
  for (int i = 1; i < rows; ++i) side_by_side &= off[i] == off[i - 1] + 1;
  if (rows < width) memset(panel, 0, sizeof(C) * K * width);
  if (side_by_side && rows > 1) {
    for (int64_t k = 0; k < K; ++k) {
      const S* from = src + off[0] + k * sk;
      C* to = panel + k * width;
      for (int i = 0; i < rows; ++i) to[i] = widen(from[i]);
    }
    return;
  }
  // 16 of each row at a time, so that what is read and what is written stay near.
  for (int64_t k0 = 0; k0 < K; k0 += 16) {
    const int64_t depth = K - k0 < 16 ? K - k0 : 16;
    for (int i = 0; i < rows; ++i) {
      const S* from = src + off[i] + k0 * sk;
      C* to = panel + k0 * width + i;
      if (depth == 16 && sk == 1) {
        C line[16];
        for (int k = 0; k < 16; ++k) line[k] = widen(from[k]);
        for (int k = 0; k < 16; ++k) to[k * width] = line[k];
      } else {
        for (int64_t k = 0; k < depth; ++k) to[k * width] = widen(from[k * sk]);
      }
    }
  }
}

template <class S, class C>
void pack_columns_as(const S* src, const int64_t* off, int64_t K, int64_t sj, int columns, int width, const C* scale,
                     C* panel) {
  for (int64_t k = 0; k < K; ++k) {
    const S* from = src + off[k];
    const C factor = scale ? scale[k] : C(1);
    C* to = panel + k * width;
    if (sj == 1) {
      for (int j = 0; j < columns; ++j) to[j] = widen(from[j]) * factor;
    } else {
      for (int j = 0; j < columns; ++j) to[j] = widen(from[j * sj]) * factor;
    }
    for (int j = columns; j < width; ++j) to[j] = 0;
  }
}

template <class C>
C root(C v);
template <>
inline float root(float v) { return __builtin_sqrtf(v); }
template <>
inline double root(double v) { return __builtin_sqrt(v); }

template <class C>
void norms(C* panel, int64_t K, int width, C eps, bool apply, C* inverse) {
  C sum[4][2 * Vector<C>::lanes > MR ? 2 * Vector<C>::lanes : MR];
  for (int part = 0; part < 4; ++part)
    for (int i = 0; i < width; ++i) sum[part][i] = 0;
  for (int64_t k = 0; k < K; ++k) {  // four partial sums: the rounding error grows with K / 4
    const C* row = panel + k * width;
    C* to = sum[k & 3];
    for (int i = 0; i < width; ++i) to[i] += row[i] * row[i];
  }
  for (int i = 0; i < width; ++i) {
    const C norm = root((sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]));
    // A NaN norm stays NaN, as in the reference.
    inverse[i] = C(1) / (norm < eps ? eps : norm);
  }
  if (!apply) return;
  for (int64_t k = 0; k < K; ++k)
    for (int i = 0; i < width; ++i) panel[k * width + i] *= inverse[i];
}

template <class C>
inline void block(int64_t K, const C* __restrict a, const C* __restrict b, C* __restrict c, int64_t ldc) {
  using V = typename Vector<C>::type;
  constexpr int L = Vector<C>::lanes;
  V left[MR], right[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    left[i] = *reinterpret_cast<const V*>(c + i * ldc);
    right[i] = *reinterpret_cast<const V*>(c + i * ldc + L);
  }
  for (int64_t k = 0; k < K; ++k) {
    const V b0 = *reinterpret_cast<const V*>(b);
    const V b1 = *reinterpret_cast<const V*>(b + L);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      left[i] += a[i] * b0;
      right[i] += a[i] * b1;
    }
    a += MR;
    b += 2 * L;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    *reinterpret_cast<V*>(c + i * ldc) = left[i];
    *reinterpret_cast<V*>(c + i * ldc + L) = right[i];
  }
}

template <class C>
void tile(int64_t K, const C* A, int a_panels, const C* B, int b_panels, C* c, int64_t ldc) {
  constexpr int NR = 2 * Vector<C>::lanes;
  for (int64_t k = 0; k < K; k += KC) {
    const int64_t depth = K - k < KC ? K - k : KC;
    for (int j = 0; j < b_panels; ++j)
      for (int i = 0; i < a_panels; ++i)
        block<C>(depth, A + (i * K + k) * MR, B + (j * K + k) * NR, c + i * MR * ldc + j * NR, ldc);
  }
}

template <class S, class C>
void store_as(const C* src, int64_t n, C scale, S* dst) {
  for (int64_t i = 0; i < n; ++i) narrow(src[i] * scale, dst[i]);
}

template <class S, class C>
void project_as(const C* g, const S* x, int64_t stride, int64_t D, C inverse, C eps, C* row, S* dst) {
  C dot = 0;
  if (inverse < C(1) / eps) {
    if (stride == 1) {
      for (int64_t d = 0; d < D; ++d) row[d] = widen(x[d]) * inverse;
    } else {
      for (int64_t d = 0; d < D; ++d) row[d] = widen(x[d * stride]) * inverse;
    }
    C part[16] = {};
    int64_t d = 0;
    for (; d + 16 <= D; d += 16)
      for (int i = 0; i < 16; ++i) part[i] += row[d + i] * g[d + i];
    for (int i = 0; d + i < D; ++i) part[i] += row[d + i] * g[d + i];
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    dot = part[0];
  } else {
    for (int64_t d = 0; d < D; ++d) row[d] = 0;
  }
  for (int64_t d = 0; d < D; ++d) narrow(inverse * (g[d] - row[d] * dot), dst[d]);
}

// float arithmetic serves the three narrow types, double only itself.
template <class C, class F>
inline void by_type(int dtype, F&& f) {
  if constexpr (sizeof(C) == 8) {
    (void)dtype;
    f(double());
  } else {
    if (dtype == kHalf) f(Half());
    else if (dtype == kBFloat16) f(BFloat16());
    else f(float());
  }
}

template <class C>
void pack_rows(const void* src, int dtype, const int64_t* off, int rows, int64_t sk, int64_t K, int width, C* panel) {
  by_type<C>(dtype, [&](auto s) {
    pack_rows_as(static_cast<const decltype(s)*>(src), off, rows, sk, K, width, panel);
  });
}

template <class C>
void pack_columns(const void* src, int dtype, const int64_t* off, int64_t K, int64_t sj, int columns, int width,
                  const C* scale, C* panel) {
  by_type<C>(dtype, [&](auto s) {
    pack_columns_as(static_cast<const decltype(s)*>(src), off, K, sj, columns, width, scale, panel);
  });
}

template <class C>
void store(const C* src, int64_t n, C scale, void* dst, int64_t offset, int dtype) {
  by_type<C>(dtype, [&](auto s) { store_as(src, n, scale, static_cast<decltype(s)*>(dst) + offset); });
}

template <class C>
void project(const C* g, const void* x, int64_t x_offset, int64_t x_stride, int64_t D, C inverse, C eps, C* row,
             void* dst, int64_t offset, int dtype) {
  by_type<C>(dtype, [&](auto s) {
    using S = decltype(s);
    project_as(g, static_cast<const S*>(x) + x_offset, x_stride, D, inverse, eps, row, static_cast<S*>(dst) + offset);
  });
}

template <class C>
constexpr Blocks<C> table = {MR,      2 * Vector<C>::lanes, pack_rows<C>, pack_columns<C>,
                             norms<C>, tile<C>,             store<C>,     project<C>};

}  // namespace

template <class C>
const Blocks<C>& blocks() { return table<C>; }
template const Blocks<float>& blocks<float>();
template const Blocks<double>& blocks<double>();

}  // namespace ISA
}  // namespace infoclip
