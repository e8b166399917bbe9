// Compiled once a set of instructions, like common/tiles.inl: plain loops for the compiler's vectoriser, only code of
// this namespace. ISA names the namespace.
#include <cstdint>

#include "renyi_mutual_information/renyi.hpp"

namespace infoclip {
namespace ISA {
namespace {

template <class C>
C largest(const C* x, int64_t n) {
  C most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const C v = x[i] < 0 ? -x[i] : x[i];
    most = v > most ? v : most;
  }
  return most;
}

template <class C>
C square(const C* x, int64_t n, C factor) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += (x[i] * factor) * (x[i] * factor);
  return sum;
}

template <class C>
void scaled(const C* x, int64_t n, C factor, C* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * factor;
}

template <class C>
void damp(C* c, int64_t ld, int64_t rows, int64_t columns, const C* row, const C* column) {
  for (int64_t i = 0; i < rows; ++i) {
    C* to = c + i * ld;
    const C factor = row[i];
    for (int64_t j = 0; j < columns; ++j) to[j] *= factor * column[j];
  }
}

// A row's sums in C, the rows' in double: what is lost does not grow with the number of samples.
template <int VIEWS, class C>
void sums_of(const C* const* c, int64_t ld, int64_t rows, int64_t columns, C q, double* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    const C* x = c[0] + i * ld;
    const C* y = c[1] + i * ld;
    const C* z = c[VIEWS - 1] + i * ld;
    C joint = 0, sx = 0, sy = 0, sz = 0;
#pragma omp simd reduction(+ : joint, sx, sy, sz)
    for (int64_t j = 0; j < columns; ++j) {
      C p = x[j] * q * y[j];
      if (VIEWS == 3) {
        p *= z[j];
        sz += z[j] * z[j];
      }
      joint += p * p;
      sx += x[j] * x[j];
      sy += y[j] * y[j];
    }
    sums[0] += static_cast<double>(joint);
    sums[1] += static_cast<double>(sx);
    sums[2] += static_cast<double>(sy);
    sums[3] += static_cast<double>(sz);
  }
}

template <class C>
void sums(const C* const* c, int views, int64_t ld, int64_t rows, int64_t columns, C q, double* to) {
  views == 2 ? sums_of<2>(c, ld, rows, columns, q, to) : sums_of<3>(c, ld, rows, columns, q, to);
}

template <class C>
void weigh(const C* const* c, int views, int v, int64_t ld, int64_t rows, int64_t columns, C q, C b, C a, C* to) {
  const C* other = c[v == 0 ? 1 : 0];
  const C* third = views == 3 ? c[v == 2 ? 1 : 2] : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const C* x = c[v] + i * ld;
    const C* y = other + i * ld;
    C* w = to + i * ld;
    if (third) {
      const C* z = third + i * ld;
      for (int64_t j = 0; j < columns; ++j) {
        const C o = q * y[j] * z[j];
        w[j] = b * (x[j] * o) * o + a * x[j];
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        const C o = q * y[j];
        w[j] = b * (x[j] * o) * o + a * x[j];
      }
    }
  }
}

template <class C>
void finish(const C* joint, const C* single, const C* x, int64_t n, C b, C a, C own, C whole, bool unit, C* out) {
  C along = 0;
  if (unit) {
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < n; ++i) along += (whole * x[i]) * (b * joint[i] + (single ? a * single[i] : C(0)));
    own = -along;
  }
  if (single) {
    for (int64_t i = 0; i < n; ++i) out[i] = whole * (b * joint[i] + a * single[i] + own * (whole * x[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = whole * (b * joint[i] + own * (whole * x[i]));
  }
}

template <class C>
constexpr RenyiBlocks<C> table = {largest<C>, square<C>, scaled<C>, damp<C>, sums<C>, weigh<C>, finish<C>};

}  // namespace

template <class C>
const RenyiBlocks<C>& renyi_blocks() { return table<C>; }
template const RenyiBlocks<float>& renyi_blocks<float>();
template const RenyiBlocks<double>& renyi_blocks<double>();

}  // namespace ISA
}  // namespace infoclip
