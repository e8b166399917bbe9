// Compiled once a set of instructions, like common/tiles.inl: plain loops for the compiler's vectoriser, only code of
// this namespace. ISA names the namespace.
#include <cstdint>
#include <cstring>

#include "infonce/infonce.hpp"

namespace infoclip {
namespace ISA {
namespace {

// exp(x) for x up to 88, relative error below 2e-7: Cephes' polynomial after a reduction by log 2 in two parts; 0 below
// exp(-87). A NaN stays.
inline float exp_of(float x) {
  const float clipped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number
  const float n = (clipped * 1.44269504088896341f + magic) - magic;
  float r = clipped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
  float power;
  memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}
inline double exp_of(double x) { return __builtin_exp(x); }

constexpr int LANES = 16;

template <class C>
void take(const C* c, int64_t ld, int64_t rows, int64_t columns, C s, C* row_most, C* row_sum, C* column_most,
          C* column_sum) {
  const C least = -C(__builtin_inf());
  for (int64_t i = 0; i < rows; ++i) {
    const C* line = c + i * ld;
    C part[LANES];
    for (int l = 0; l < LANES; ++l) part[l] = least;
    int64_t j = 0;
    for (; j + LANES <= columns; j += LANES)
      for (int l = 0; l < LANES; ++l) part[l] = line[j + l] * s > part[l] ? line[j + l] * s : part[l];
    for (int l = 0; j + l < columns; ++l) part[l] = line[j + l] * s > part[l] ? line[j + l] * s : part[l];
    C most = row_most[i];
    for (int l = 0; l < LANES; ++l) most = part[l] > most ? part[l] : most;
    const C shift = most == least ? C(0) : most;  // nothing but -infinity so far: their exponentials are 0
    for (int l = 0; l < LANES; ++l) part[l] = 0;
    for (j = 0; j + LANES <= columns; j += LANES)
      for (int l = 0; l < LANES; ++l) part[l] += exp_of(line[j + l] * s - shift);
    for (int l = 0; j + l < columns; ++l) part[l] += exp_of(line[j + l] * s - shift);
    for (int half = LANES / 2; half; half /= 2)
      for (int l = 0; l < half; ++l) part[l] += part[l + half];
    row_sum[i] = row_sum[i] * exp_of(row_most[i] - shift) + part[0];
    row_most[i] = most;
  }
  if (!column_most) return;
  for (int64_t j0 = 0; j0 < columns; j0 += LANES) {
    const int count = static_cast<int>(columns - j0 < LANES ? columns - j0 : LANES);
    C most[LANES], sum[LANES], shift[LANES];
    for (int l = 0; l < LANES; ++l) most[l] = l < count ? column_most[j0 + l] : least, sum[l] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const C* line = c + i * ld + j0;  // a line's end is readable: blocks are padded to whole lanes
      for (int l = 0; l < LANES; ++l) most[l] = line[l] * s > most[l] ? line[l] * s : most[l];
    }
    for (int l = 0; l < LANES; ++l) shift[l] = most[l] == least ? C(0) : most[l];
    for (int64_t i = 0; i < rows; ++i) {
      const C* line = c + i * ld + j0;
      for (int l = 0; l < LANES; ++l) sum[l] += exp_of(line[l] * s - shift[l]);
    }
    for (int l = 0; l < count; ++l) {
      column_sum[j0 + l] = column_sum[j0 + l] * exp_of(column_most[j0 + l] - shift[l]) + sum[l];
      column_most[j0 + l] = most[l];
    }
  }
}

template <class C>
double slopes(C* c, int64_t ld, int64_t rows, int64_t columns, C s, const C* row, const C* column, C wr, C wc) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    C* line = c + i * ld;
    const C own = row[i];
    C part[LANES] = {};
    int64_t j = 0;
    for (; j < columns; j += LANES) {
      const int count = static_cast<int>(columns - j < LANES ? columns - j : LANES);
      C l[LANES], g[LANES];
      for (int k = 0; k < LANES; ++k) l[k] = line[j + k] * s, g[k] = wr * exp_of(l[k] - own);
      if (column) {
        for (int k = 0; k < LANES; ++k) g[k] += wc * exp_of(l[k] - column[j + k]);  // padded as the block is
      }
      for (int k = 0; k < count; ++k) line[j + k] = g[k], part[k] += g[k] * l[k];
    }
    for (int k = 0; k < LANES; ++k) total += part[k];
  }
  return total;
}

template <class C>
constexpr InfoNceBlocks<C> table = {take<C>, slopes<C>};

}  // namespace

template <class C>
const InfoNceBlocks<C>& infonce_blocks() { return table<C>; }
template const InfoNceBlocks<float>& infonce_blocks<float>();
template const InfoNceBlocks<double>& infonce_blocks<double>();

}  // namespace ISA
}  // namespace infoclip
