// Compiled once a set of instructions, like upsample_bce/cpu_rows.inl: plain loops for the compiler's vectoriser, only
// code of this namespace. ISA names the namespace.
#include <cstdint>
#include <cstring>

#include "infonce/infonce.hpp"

namespace infoclip {
namespace ISA {
namespace {

constexpr int kMost = 192;  // rows or columns of a tile

// exp(x) for x up to 87, relative error below 2e-7: Cephes' polynomial after a reduction by log 2 in two parts. Below
// exp(-87) it stays there, which is nothing beside the 1 that a log-sum-exp holds.
inline float exp_of(float x) {
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
  float factor;
  memcpy(&factor, &bits, 4);
  return p * factor;
}
inline double exp_of(double x) { return __builtin_exp(x); }

template <class C>
constexpr C nothing = -C(__builtin_inf());

template <class C>
inline C finite(C high) { return high == nothing<C> ? C(0) : high; }  // of an empty maximum

// (high, sum) of each of n log-sum-exps joined with (more_high, more_sum).
template <class C>
void join_all(int n, C* __restrict high, C* __restrict sum, const C* __restrict more_high, const C* __restrict more_sum) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C larger = high[i] > more_high[i] ? high[i] : more_high[i];
    const C zero = finite(larger);
    sum[i] = sum[i] * exp_of(high[i] - zero) + more_sum[i] * exp_of(more_high[i] - zero);
    high[i] = larger;
  }
}

template <class C>
void join(C* s, int rows, int columns, int64_t ld, C scale, C* row_high, C* row_sum, C* column_high, C* column_sum) {
  C most[kMost], least[kMost], high[kMost], sum[kMost], column[kMost];
  for (int j = 0; j < columns; ++j) most[j] = nothing<C>, least[j] = -nothing<C>, column[j] = 0;
  for (int i = 0; i < rows; ++i) {
    C* __restrict row = s + i * ld;
#pragma omp simd
    for (int j = 0; j < columns; ++j) {
      row[j] *= scale;
      most[j] = row[j] > most[j] ? row[j] : most[j];
      least[j] = row[j] < least[j] ? row[j] : least[j];
    }
  }
  C top = nothing<C>, bottom = -nothing<C>;
  for (int j = 0; j < columns; ++j) {
    top = most[j] > top ? most[j] : top;
    bottom = least[j] < bottom ? least[j] : bottom;
  }
  if (top - bottom <= C(80)) {  // one exponential, relative to the tile's largest, serves rows and columns
    for (int i = 0; i < rows; ++i) {
      const C* __restrict row = s + i * ld;
      C total = 0;
#pragma omp simd reduction(+ : total)
      for (int j = 0; j < columns; ++j) {
        const C e = exp_of(row[j] - top);
        total += e;
        column[j] += e;
      }
      sum[i] = total, high[i] = top;
    }
    join_all(rows, row_high, row_sum, high, sum);
    if (!column_high) return;
    for (int j = 0; j < columns; ++j) high[j] = top;
    join_all(columns, column_high, column_sum, high, column);
    return;
  }
  for (int i = 0; i < rows; ++i) {
    const C* __restrict row = s + i * ld;
    C largest = nothing<C>, total = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < columns; ++j) largest = row[j] > largest ? row[j] : largest;
    const C zero = finite(largest);
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < columns; ++j) total += exp_of(row[j] - zero);
    sum[i] = total, high[i] = largest;
  }
  join_all(rows, row_high, row_sum, high, sum);
  if (!column_high) return;
  for (int i = 0; i < rows; ++i) {
    const C* __restrict row = s + i * ld;
#pragma omp simd
    for (int j = 0; j < columns; ++j) column[j] += exp_of(row[j] - finite(most[j]));
  }
  join_all(columns, column_high, column_sum, most, column);
}

template <class C, bool WEIGH, bool BOTH>
double slopes_as(C* s, int rows, int columns, int64_t ld, C scale, const C* __restrict row_lse,
                 const C* __restrict column_lse) {
  C top = nothing<C>, row_factor[kMost], column_factor[kMost];
  for (int i = 0; i < rows; ++i) {
    C* __restrict row = s + i * ld;
    C largest = nothing<C>;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < columns; ++j) {
      row[j] *= scale;
      largest = row[j] > largest ? row[j] : largest;
    }
    top = largest > top ? largest : top;
  }
  bool near = true;  // false for NaN too
  for (int i = 0; i < rows; ++i) near &= top - row_lse[i] <= C(60);
  if (BOTH)
    for (int j = 0; j < columns; ++j) near &= top - column_lse[j] <= C(60);
  double weighed = 0;
  if (near) {  // exp(s - lse) = exp(s - top) exp(top - lse): one exponential serves both
    for (int i = 0; i < rows; ++i) row_factor[i] = exp_of(top - row_lse[i]);
    for (int j = 0; j < columns; ++j) column_factor[j] = BOTH ? exp_of(top - column_lse[j]) : C(0);
  }
  for (int i = 0; i < rows; ++i) {
    C* __restrict row = s + i * ld;
    const C lse = row_lse[i], factor = near ? row_factor[i] : C(0);
    C total = 0;
    if (near) {
#pragma omp simd reduction(+ : total)
      for (int j = 0; j < columns; ++j) {
        const C g = exp_of(row[j] - top) * (BOTH ? factor + column_factor[j] : factor);
        if (WEIGH) total += g * row[j];
        row[j] = g;
      }
    } else {
#pragma omp simd reduction(+ : total)
      for (int j = 0; j < columns; ++j) {
        C g = exp_of(row[j] - lse);
        if (BOTH) g += exp_of(row[j] - column_lse[j]);
        if (WEIGH) total += g * row[j];
        row[j] = g;
      }
    }
    weighed += total;
  }
  return weighed;
}

template <class C>
double slopes(C* s, int rows, int columns, int64_t ld, C scale, const C* row_lse, const C* column_lse, bool weigh) {
  if (column_lse) return weigh ? slopes_as<C, true, true>(s, rows, columns, ld, scale, row_lse, column_lse)
                               : slopes_as<C, false, true>(s, rows, columns, ld, scale, row_lse, column_lse);
  return weigh ? slopes_as<C, true, false>(s, rows, columns, ld, scale, row_lse, column_lse)
               : slopes_as<C, false, false>(s, rows, columns, ld, scale, row_lse, column_lse);
}

template <class C>
constexpr InfoNceTiles<C> table = {join<C>, slopes<C>};

}  // namespace

template <class C>
const InfoNceTiles<C>& infonce_tiles() { return table<C>; }
template const InfoNceTiles<float>& infonce_tiles<float>();
template const InfoNceTiles<double>& infonce_tiles<double>();

}  // namespace ISA
}  // namespace infoclip
