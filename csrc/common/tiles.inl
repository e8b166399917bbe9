// Compiled once a set of instructions. ISA names the namespace, VBYTES the vector's bytes, MR the rows of the register
// block (it is two vectors wide), PAIRS the dot product of bfloat16 pairs, AMX (with PAIRS) that of the matrix unit's tiles.
// Only code of this namespace: an inline function of the standard library compiled here could be the copy that the linker
// keeps for everybody, with instructions that the CPU may not have.
#include <cstdint>
#include <cstring>

#include "common/tiles.hpp"
#ifdef PAIRS
#include <immintrin.h>
#endif

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

// The element of a panel and its place: [k][i], or [k / 2][i][2] for pairs.
#ifdef PAIRS
template <class C> struct Element { typedef BFloat16 type; };
constexpr int PAIR = 2;
#else
template <class C> struct Element { typedef C type; };
constexpr int PAIR = 1;
#endif
#ifdef AMX
constexpr int ROW = 32;  // depths in a row of a tile
// Panels of MR rows lie as the left tiles are loaded, [k / 32][i][32]; the others' pairs are rows of right tiles already.
inline int64_t place(int64_t k, int64_t i, int64_t width) {
  return width == MR ? (k / ROW * MR + i) * ROW + k % ROW : (k / 2 * width + i) * 2 + (k & 1);
}
constexpr int DEPTHS = ROW;
#else
inline int64_t place(int64_t k, int64_t i, int64_t width) {
  return PAIR == 1 ? k * width + i : (k / 2 * width + i) * 2 + (k & 1);
}
constexpr int DEPTHS = PAIR;
#endif
inline int64_t padded(int64_t K) { return (K + DEPTHS - 1) / DEPTHS * DEPTHS; }

inline void put(float v, float& to) { to = v; }
inline void put(double v, double& to) { to = v; }
inline void put(float v, BFloat16& to) { narrow(v, to); }
inline void put(BFloat16 v, float& to) { to = widen(v); }
inline void put(Half v, float& to) { to = widen(v); }
inline void put(BFloat16 v, BFloat16& to) { to = v; }
inline void put(Half v, BFloat16& to) { narrow(widen(v), to); }

#ifdef PAIRS
inline __m512 read(const float* from, __mmask16 m) { return _mm512_maskz_loadu_ps(m, from); }
inline __m512 read(const Half* from, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, from)); }
inline __m512 read(const BFloat16* from, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from)), 16));
}
// 16 entries times f as bfloat16, each in the low half of a word. Numbers that have no normal bfloat16 become zeros, which
// the dot product would take them for.
template <bool SCALED, class S>
inline __m512i read_halves(const S* from, float f, __mmask16 m) {
  const __m512 v = read(from, m);
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(SCALED ? _mm512_mul_ps(v, _mm512_set1_ps(f)) : v));
}
#endif

// One depth of a panel (PAIRS: two) from entries that lie side by side; second is null at the end of an odd depth.
template <bool SCALED, class S, class C, class E>
inline void put_line(const S* first, const S* second, int count, C f, C g, E* to) {
#ifdef PAIRS
  for (int i = 0; i < count; i += 16) {
    const __mmask16 m = count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu;
    __m512i both = read_halves<SCALED>(first + i, f, m);
    if (second) both = _mm512_or_si512(both, _mm512_slli_epi32(read_halves<SCALED>(second + i, g, m), 16));
    _mm512_mask_storeu_epi32(to + 2 * i, m, both);
  }
#else
  (void)second, (void)g;
  for (int i = 0; i < count; ++i) {
    if (SCALED) put(widen(first[i]) * f, to[i]);
    else put(first[i], to[i]);
  }
#endif
}

template <class S, class C, class E>
inline void put_lines(const S* src, const int64_t* off, int64_t step, int64_t K, int count, int width, const C* scale,
                      E* panel) {
  for (int64_t k = 0; k < K; k += PAIR) {
    const S* first = src + (off ? off[k] : k * step);
    const S* second = k + 1 < K ? src + (off ? off[k + 1] : (k + 1) * step) : nullptr;
    if (!off) __builtin_prefetch(first + 16 * step);  // a map's rows lie further apart than the hardware follows
    E* to = panel + place(k, 0, width);
    if (scale) put_line<true>(first, second, count, scale[k], second ? scale[k + 1] : C(0), to);
    else put_line<false>(first, second, count, C(1), C(1), to);
  }
}

#if defined(__clang__)  // __builtin_shuffle is GCC's alone
template <class C>
inline void transpose(typename Vector<C>::type (&v)[Vector<C>::lanes]) {
  constexpr int L = Vector<C>::lanes;
  C from[L][L], to[L][L];
  memcpy(from, v, sizeof(from));
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) to[j][i] = from[i][j];
  memcpy(v, to, sizeof(to));
}
#else
template <int BYTES> struct Index;
template <> struct Index<4> { typedef int32_t type __attribute__((vector_size(VBYTES))); };
template <> struct Index<8> { typedef int64_t type __attribute__((vector_size(VBYTES))); };

// v[i][j] becomes v[j][i] in log2 of the lanes rounds of perfect shuffles.
template <class C>
inline void transpose(typename Vector<C>::type (&v)[Vector<C>::lanes]) {
  constexpr int L = Vector<C>::lanes;
  typename Index<sizeof(C)>::type low, high;
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = low[i] + L / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    typename Vector<C>::type w[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      w[2 * i] = __builtin_shuffle(v[i], v[i + L / 2], low);
      w[2 * i + 1] = __builtin_shuffle(v[i], v[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = w[i];
  }
}
#endif

#if !defined(__clang__)
// A vector's lanes of neighbouring depths of a row: a word is a depth, or a pair of them.
template <class S, class C>
inline typename Vector<C>::type read_depths(const S* from, const C* scale) {
  constexpr int L = Vector<C>::lanes;
#ifdef PAIRS
  const __m512 low = read(from, 0xffffu), high = read(from + L, 0xffffu);
  return (typename Vector<C>::type)(
      scale ? _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, _mm512_loadu_ps(scale + L)),
                                  _mm512_mul_ps(low, _mm512_loadu_ps(scale)))
            : _mm512_cvtne2ps_pbh(high, low));
#else
  C line[L];
  for (int k = 0; k < L; ++k) line[k] = scale ? widen(from[k]) * scale[k] : widen(from[k]);
  return *reinterpret_cast<const typename Vector<C>::type*>(line);
#endif
}

template <int WORDS, class C>
inline void put_words(const typename Vector<C>::type (&v)[Vector<C>::lanes], int width, C* to) {
  for (int k = 0; k < Vector<C>::lanes; ++k) memcpy(to + k * width, &v[k], WORDS * sizeof(C));
}

// Rows whose entries lie side by side, as many as there are lanes by as many words; returns the depths that it did.
template <class S, class C, class E>
inline int64_t pack_squares(const S* src, const int64_t* off, int rows, int64_t K, int width, const C* scale,
                            E* panel) {
  constexpr int L = Vector<C>::lanes;
  int64_t k = 0;
  for (; k + L * PAIR <= K; k += L * PAIR)
    for (int r = 0; r < width; r += L) {
      typename Vector<C>::type v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (r + i < rows) v[i] = read_depths(src + off[r + i] + k, scale ? scale + k : nullptr);
        else v[i] = typename Vector<C>::type{};
      }
      transpose<C>(v);
      C* to = reinterpret_cast<C*>(panel) + k / PAIR * width + r;
      if (width - r >= L) put_words<L>(v, width, to);
      else put_words<MR % L ? MR % L : L>(v, width, to);
    }
  return k;
}
#else
template <class S, class C, class E>
inline int64_t pack_squares(const S*, const int64_t*, int, int64_t, int, const C*, E*) { return 0; }
#endif

#ifdef AMX
inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffffu : n > 0 ? (1u << n) - 1 : 0; }

// Left panels of rows whose entries lie side by side.
template <class S>
void put_left_rows(const S* src, const int64_t* off, int rows, int64_t K, const float* scale, BFloat16* panel) {
  for (int i = 0; i < rows; ++i)
    for (int64_t k = 0; k < K; k += ROW) {
      const __mmask16 m = first_lanes(K - k), n = first_lanes(K - k - 16);
      __m512 low = read(src + off[i] + k, m), high = read(src + off[i] + k + 16, n);
      if (scale) {
        low = _mm512_mul_ps(low, _mm512_maskz_loadu_ps(m, scale + k));
        high = _mm512_mul_ps(high, _mm512_maskz_loadu_ps(n, scale + k + 16));
      }
      _mm512_storeu_si512(panel + place(k, i, MR), (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// Left panels from depths that lie side by side, as put_lines does the others.
template <class S>
void put_left_lines(const S* src, const int64_t* off, int64_t step, int64_t K, int count, const float* scale,
                    BFloat16* panel) {
  const __mmask16 m = first_lanes(count);
  for (int64_t start = 0; start < K; start += ROW) {
    typename Vector<float>::type v[16];
    for (int64_t k = start; k < start + ROW; k += 2) {
      __m512i both = _mm512_setzero_si512();
      for (int64_t half = 0; half < 2 && k + half < K; ++half) {
        const S* from = src + (off ? off[k + half] : (k + half) * step);
        if (!off) __builtin_prefetch(from + 16 * step);
        const __m512i found = scale ? read_halves<true>(from, scale[k + half], m) : read_halves<false>(from, 1, m);
        both = _mm512_or_si512(both, half ? _mm512_slli_epi32(found, 16) : found);
      }
      v[(k - start) / 2] = (typename Vector<float>::type)both;
    }
    transpose<float>(v);
    for (int i = 0; i < MR; ++i) memcpy(panel + place(start, i, MR), &v[i], 64);
  }
}
#endif

template <class S, class C, class E>
void pack_rows_as(const S* src, const int64_t* off, int rows, int64_t sk, int64_t K, int width, const C* scale,
                  E* panel) {
  bool side_by_side = true;
  for (int i = 1; i < rows; ++i) side_by_side &= off[i] == off[i - 1] + 1;
  if (rows < width || padded(K) != K) memset(panel, 0, sizeof(E) * padded(K) * width);
#ifdef AMX
  if (width == MR && sk == 1) return put_left_rows(src, off, rows, K, scale, panel);
  if (width == MR && side_by_side && rows > 1) return put_left_lines(src + off[0], nullptr, sk, K, rows, scale, panel);
#endif
  if (side_by_side && rows > 1) {
    put_lines<S, C, E>(src + off[0], nullptr, sk, K, rows, width, scale, panel);
    return;
  }
  // 16 of each row at a time, so that what is read and what is written stay near.
  for (int64_t k0 = sk == 1 ? pack_squares<S, C, E>(src, off, rows, K, width, scale, panel) : 0; k0 < K; k0 += 16) {
    const int64_t depth = K - k0 < 16 ? K - k0 : 16;
    for (int i = 0; i < rows; ++i) {
      const S* from = src + off[i] + k0 * sk;
      E* to = panel + place(k0, i, width);
      if (scale) {
        for (int64_t k = 0; k < depth; ++k) put(widen(from[k * sk]) * scale[k0 + k], to[place(k, 0, width)]);
      } else {
        for (int64_t k = 0; k < depth; ++k) put(from[k * sk], to[place(k, 0, width)]);
      }
    }
  }
}

template <class S, class C, class E>
void pack_columns_as(const S* src, const int64_t* off, int64_t K, int64_t sj, int columns, int width, const C* scale,
                     E* panel) {
  if (columns < width || padded(K) != K) memset(panel, 0, sizeof(E) * padded(K) * width);
#ifdef AMX
  if (width == MR && sj == 1) return put_left_lines(src, off, 0, K, columns, scale, panel);
#endif
  if (sj == 1) {
    put_lines<S, C, E>(src, off, 0, K, columns, width, scale, panel);
    return;
  }
  const int64_t next = place(0, 1, width);
  for (int64_t k = 0; k < K; ++k) {
    const S* from = src + off[k];
    E* to = panel + place(k, 0, width);
    if (scale) {
      for (int j = 0; j < columns; ++j) put(widen(from[j * sj]) * scale[k], to[j * next]);
    } else {
      for (int j = 0; j < columns; ++j) put(from[j * sj], to[j * next]);
    }
  }
}

template <class C>
C root(C v);
template <>
inline float root(float v) { return __builtin_sqrtf(v); }
template <>
inline double root(double v) { return __builtin_sqrt(v); }

template <class C, class E>
void norms_of(const E* panel, int64_t K, int width, C eps, C* inverse) {
#ifdef AMX
  if (width == MR) {  // a row's entries lie side by side
    for (int i = 0; i < MR; ++i) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int64_t k = 0; k < padded(K); k += ROW) {
        const __m512i both = _mm512_loadu_si512(panel + place(k, i, MR));
        const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        even = _mm512_fmadd_ps(a, a, even);
        odd = _mm512_fmadd_ps(b, b, odd);
      }
      const C norm = root(_mm512_reduce_add_ps(_mm512_add_ps(even, odd)));
      inverse[i] = C(1) / (norm < eps ? eps : norm);
    }
    return;
  }
#endif
  C sum[4][2 * Vector<C>::lanes > MR ? 2 * Vector<C>::lanes : MR];
  for (int part = 0; part < 4; ++part)
    for (int i = 0; i < width; ++i) sum[part][i] = 0;
  // Four partial sums: the rounding error grows with K / 4.
#ifdef PAIRS
  for (int64_t k = 0; k < padded(K); k += 2) {
    C* low = sum[k & 2];
    C* high = sum[(k & 2) + 1];
    for (int i = 0; i < width; ++i) {
      uint32_t both;
      memcpy(&both, panel + place(k, i, width), 4);
      const C a = as_float(both << 16), b = as_float(both & 0xffff0000u);
      low[i] += a * a;
      high[i] += b * b;
    }
  }
#else
  for (int64_t k = 0; k < K; ++k) {
    const E* row = panel + k * width;
    C* to = sum[k & 3];
    for (int i = 0; i < width; ++i) to[i] += row[i] * row[i];
  }
#endif
  for (int i = 0; i < width; ++i) {
    const C norm = root((sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]));
    // A NaN norm stays NaN, as in the reference.
    inverse[i] = C(1) / (norm < eps ? eps : norm);
  }
}

template <class C>
void norms(const void* panel, int64_t K, int width, C eps, C* inverse) {
  norms_of(static_cast<const typename Element<C>::type*>(panel), K, width, eps, inverse);
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

#if defined(PAIRS) && !defined(AMX)
// The same block on pairs of bfloat16: each step is two depths. Products are exact, sums are fp32.
inline void block(int64_t K, const BFloat16* __restrict a, const BFloat16* __restrict b, float* __restrict c,
                  int64_t ldc) {
  __m512 left[MR], right[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    left[i] = _mm512_loadu_ps(c + i * ldc);
    right[i] = _mm512_loadu_ps(c + i * ldc + 16);
  }
  for (int64_t k = 0; k < K; k += 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      int two;
      memcpy(&two, a + 2 * i, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
      left[i] = _mm512_dpbf16_ps(left[i], both, b0);
      right[i] = _mm512_dpbf16_ps(right[i], both, b1);
    }
    a += 2 * MR;
    b += 64;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    _mm512_storeu_ps(c + i * ldc, left[i]);
    _mm512_storeu_ps(c + i * ldc + 16, right[i]);
  }
}
#endif

#ifdef AMX
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig tile_config;

// Rows of two panels (or one) by the columns of one: four (two) tiles of 16 x 16 results, as many as leave room for the
// operands'. Each step is 32 depths. Products are exact, sums are fp32.
template <bool TWO>
inline void tile_block(int64_t depth, const char* a, int64_t a_bytes, const char* b, float* c, int64_t ldc) {
  const int64_t ld = ldc * sizeof(float);
  _tile_loadd(0, c, ld);
  _tile_loadd(1, c + 16, ld);
  if (TWO) {
    _tile_loadd(2, c + 16 * ldc, ld);
    _tile_loadd(3, c + 16 * ldc + 16, ld);
  }
  for (int64_t k = 0; k < depth; k += ROW, a += 1024, b += 2048) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, a + a_bytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ld);
  _tile_stored(1, c + 16, ld);
  if (TWO) {
    _tile_stored(2, c + 16 * ldc, ld);
    _tile_stored(3, c + 16 * ldc + 16, ld);
  }
}

template <class C>
void tile(int64_t K, const void* A, int a_panels, const void* B, int b_panels, C* c, int64_t ldc) {
  __asm__ volatile("" ::: "memory");  // what the tile loads read is written
  _tile_loadconfig(&tile_config);
  const int64_t depth = padded(K), a_bytes = depth * MR * 2, b_bytes = depth * 64;
  for (int j = 0; j < b_panels; ++j) {
    const char* a = static_cast<const char*>(A);
    const char* b = static_cast<const char*>(B) + j * b_bytes;
    for (int i = 0; i < a_panels; i += 2, a += 2 * a_bytes) {
      C* to = c + i * MR * ldc + j * 32;
      if (i + 1 < a_panels) tile_block<true>(depth, a, a_bytes, b, to, ldc);
      else tile_block<false>(depth, a, a_bytes, b, to, ldc);
    }
  }
  _tile_release();
}
#else
template <class C>
void tile(int64_t K, const void* A, int a_panels, const void* B, int b_panels, C* c, int64_t ldc) {
  typedef typename Element<C>::type E;
  constexpr int NR = 2 * Vector<C>::lanes;
  const int64_t full = padded(K);
  const E* a = static_cast<const E*>(A);
  const E* b = static_cast<const E*>(B);
  for (int64_t k = 0; k < full; k += KC) {
    const int64_t depth = full - k < KC ? full - k : KC;
    for (int j = 0; j < b_panels; ++j)
      for (int i = 0; i < a_panels; ++i)
        block(depth, a + (i * full + k) * MR, b + (j * full + k) * NR, c + i * MR * ldc + j * NR, ldc);
  }
}
#endif

template <class S, class C>
void store_as(const C* src, int64_t n, C factor, const C* columns, S* dst) {
  if (columns) {
    for (int64_t i = 0; i < n; ++i) narrow(src[i] * factor * columns[i], dst[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(src[i] * factor, dst[i]);
  }
}

// Of two values the larger, or the one that is not a number: once it is NaN, nothing is greater.
template <class V>
inline V larger(V most, V v) {
  return (v > most) | (v != v) ? v : most;
}

template <class C>
C highest(const C* src, int64_t n, const C* columns) {
  using V = typename Vector<C>::type;
  constexpr int L = Vector<C>::lanes;
  V part[2];  // two, as each comparison waits for the one before
  for (int i = 0; i < L; ++i) part[0][i] = part[1][i] = -C(__builtin_inf());
  int64_t k = 0;
  for (; k + 2 * L <= n; k += 2 * L)
    for (int half = 0; half < 2; ++half) {
      const V* a = reinterpret_cast<const V*>(src + k + half * L);
      const V* b = reinterpret_cast<const V*>(columns + k + half * L);
      part[half] = larger<V>(part[half], *a * *b);
    }
  part[0] = larger<V>(part[0], part[1]);
  C most = part[0][0];
  for (int i = 1; i < L; ++i) most = larger<C>(most, part[0][i]);
  for (; k < n; ++k) most = larger<C>(most, src[k] * columns[k]);
  return most;
}

template <class S, class C>
void read_rows_as(const S* src, const int64_t* off, int rows, int64_t sk, int64_t K, C* to) {
  bool side_by_side = sk != 1;
  for (int i = 1; i < rows; ++i) side_by_side &= off[i] == off[i - 1] + 1;
  if (side_by_side) {  // 16 of each row at a time, as the lines of memory hold them
    for (int64_t k0 = 0; k0 < K; k0 += 16) {
      const int64_t last = K - k0 < 16 ? K : k0 + 16;
      for (int64_t k = k0; k < last; ++k)
        for (int i = 0; i < rows; ++i) to[i * K + k] = widen(src[off[0] + i + k * sk]);
    }
    return;
  }
  for (int i = 0; i < rows; ++i) {
    const S* from = src + off[i];
    if (sk == 1) {
      for (int64_t k = 0; k < K; ++k) to[i * K + k] = widen(from[k]);
    } else {
      for (int64_t k = 0; k < K; ++k) to[i * K + k] = widen(from[k * sk]);
    }
  }
}

template <class S, class C>
void project_as(const C* g, const C* x, int64_t D, C inverse, C eps, S* dst) {
  C dot = 0;
  const C unit = inverse < C(1) / eps ? inverse : C(0);  // where the norm was clamped nothing is projected
  C part[32] = {};
  int64_t d = 0;
  for (; d + 32 <= D; d += 32)
    for (int i = 0; i < 32; ++i) part[i] += x[d + i] * unit * g[d + i];
  for (int i = 0; d + i < D; ++i) part[i] += x[d + i] * unit * g[d + i];
  for (int half = 16; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  dot = part[0];
  if (unit != 0) {
    for (d = 0; d < D; ++d) narrow(inverse * (g[d] - x[d] * unit * dot), dst[d]);
  } else {
    for (d = 0; d < D; ++d) narrow(inverse * g[d], dst[d]);
  }
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
void pack_rows(const void* src, int dtype, const int64_t* off, int rows, int64_t sk, int64_t K, int width,
               const C* scale, void* panel) {
  by_type<C>(dtype, [&](auto s) {
    pack_rows_as(static_cast<const decltype(s)*>(src), off, rows, sk, K, width, scale,
                 static_cast<typename Element<C>::type*>(panel));
  });
}

template <class C>
void pack_columns(const void* src, int dtype, const int64_t* off, int64_t K, int64_t sj, int columns, int width,
                  const C* scale, void* panel) {
  by_type<C>(dtype, [&](auto s) {
    pack_columns_as(static_cast<const decltype(s)*>(src), off, K, sj, columns, width, scale,
                    static_cast<typename Element<C>::type*>(panel));
  });
}

template <class C>
void store(const C* src, int64_t n, C factor, const C* columns, void* dst, int64_t offset, int dtype) {
  by_type<C>(dtype, [&](auto s) { store_as(src, n, factor, columns, static_cast<decltype(s)*>(dst) + offset); });
}

template <class C>
void read_rows(const void* src, int dtype, const int64_t* off, int rows, int64_t sk, int64_t K, C* to) {
  by_type<C>(dtype, [&](auto s) { read_rows_as(static_cast<const decltype(s)*>(src), off, rows, sk, K, to); });
}

template <class C>
void project(const C* g, const C* x, int64_t D, C inverse, C eps, void* dst, int64_t offset, int dtype) {
  by_type<C>(dtype, [&](auto s) {
    project_as(g, x, D, inverse, eps, static_cast<decltype(s)*>(dst) + offset);
  });
}

template <class C>
constexpr Tiles<C> table = {MR,           2 * Vector<C>::lanes, DEPTHS,   sizeof(typename Element<C>::type),
                            pack_rows<C>, pack_columns<C>,      norms<C>, tile<C>,
                            store<C>,     highest<C>,           read_rows<C>, project<C>};

}  // namespace

#ifdef PAIRS
const Tiles<float>& tiles() { return table<float>; }
#else
template <class C>
const Tiles<C>& tiles() { return table<C>; }
template const Tiles<float>& tiles<float>();
template const Tiles<double>& tiles<double>();
#endif

}  // namespace ISA
}  // namespace infoclip
