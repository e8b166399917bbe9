// A block's tile of a product on the matrix units: C[m, n] = sum over k of A[m, k] B[n, k] for operands of any strides.
// Halves are multiplied as they are and added in fp32. Floats are split in two TF32 parts each, of which three products
// keep the digits of fp32; every 8 terms start from zero and are added by an ordinary sum, as the matrix units truncate
// where that rounds, and truncation over thousands of terms drifts. One block makes a result, in one order of k.
//
// A tile's operands pass through shared memory, 64 bytes of K at a time, STAGES deep: the next are on their way by
// cp.async while one is multiplied. What is outside the operands is filled with zeros. An operand whose neighbouring
// rows lie side by side is kept as [k][row], any other as [row][k], padded so that neither way meets a bank twice.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/device.cuh"
#include "common/ptx.cuh"

namespace infoclip {
namespace {

#ifndef INFOCLIP_FILLS_GPU  // the suite sets a lower number, to run the larger tiles on small sizes
#define INFOCLIP_FILLS_GPU (2 * 132)
#endif
constexpr int64_t FILLS_GPU = INFOCLIP_FILLS_GPU;  // tiles: two for each SM of a large GPU

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
__device__ inline Pair<T> narrow_pair(float first, float second) {
  Pair<T> pair;
  narrow(first, &pair.first);
  narrow(second, &pair.second);
  return pair;
}

// Where index i lies, in elements: i * stride, or two nested axes walked as one where inner is not 0.
struct Axis {
  uint32_t inner;
  int64_t outer_stride, stride;
  __device__ int64_t operator()(uint32_t i) const {
    return inner ? i / inner * outer_stride + i % inner * stride : i * stride;
  }
};

inline Axis plain(int64_t stride) { return {0, 0, stride}; }

inline Axis nested(int64_t outer, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  if (inner <= 1) return plain(outer_stride);
  if (outer <= 1 || outer_stride == inner * inner_stride) return plain(inner_stride);
  return {static_cast<uint32_t>(inner), outer_stride, inner_stride};
}

// Element (i, k) of batch b, summand s: data[b * batch + s * summand + row(i) + depth(k)].
struct Operand {
  const void* data;
  int64_t batch, summand;
  Axis row, depth;
  bool by_row;  // neighbouring rows lie side by side: in shared memory [k][row]
  bool vector;  // 16 bytes along that axis, or else along k, are one aligned access
};

template <class T>
Operand operand(const void* data, int64_t batch, int64_t summand, Axis row, Axis depth) {
  constexpr int64_t LANES = 16 / sizeof(T);
  const auto even = [](int64_t stride) { return stride % LANES == 0; };
  const auto along = [&](const Axis& near, const Axis& far) {
    return near.inner == 0 && near.stride == 1 && even(far.stride) && (far.inner == 0 || even(far.outer_stride));
  };
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && even(batch) && even(summand);
  if (aligned && along(depth, row)) return {data, batch, summand, row, depth, false, true};
  if (aligned && along(row, depth)) return {data, batch, summand, row, depth, true, true};
  return {data, batch, summand, row, depth, row.stride == 1 && depth.stride != 1, false};
}

constexpr int STAGES = 3;
constexpr int WARP_N = 32;  // results of a warp: half the block's rows, 32 columns

template <class T, int ROWS>
struct Layout {
  static constexpr int LANES = 16 / sizeof(T);            // elements of 16 bytes
  static constexpr int DEPTH = 64 / sizeof(T);            // of K in a tile
  static constexpr int PITCH = 80;                        // bytes from row to row of [row][k]: 64 and 16 unused
  static constexpr int ACROSS = ROWS * sizeof(T) + (sizeof(T) == 4 ? 32 : 16);  // from k to k of [k][row]
  static constexpr int BYTES = ROWS * PITCH;
  static_assert(DEPTH * ACROSS <= BYTES, "either layout fits");
};

template <class T, int BM, int BN>
struct Shape {
  static constexpr int THREADS = BN / WARP_N * 2 * 32;
  static constexpr int DEPTH = Layout<T, BM>::DEPTH;
  static constexpr int STAGE = Layout<T, BM>::BYTES + Layout<T, BN>::BYTES + DEPTH * 4;
  static constexpr int SHARED = STAGES * STAGE;
};

// Start the copy of ROWS rows from row0 and a tile of K from k0 on.
template <class T, int ROWS, int THREADS>
__device__ inline void copy_tile(unsigned char* to, const Operand& from, int64_t origin, int row0, int rows, int k0,
                                 int depth) {
  using L = Layout<T, ROWS>;
  const T* data = static_cast<const T*>(from.data);
#pragma unroll
  for (int c = threadIdx.x; c < ROWS * 4; c += THREADS) {
    const int i = row0 + (from.by_row ? c % (ROWS / L::LANES) * L::LANES : c / 4);
    const int k = k0 + (from.by_row ? c / (ROWS / L::LANES) : c % 4 * L::LANES);
    unsigned char* place = to + (from.by_row ? (k - k0) * L::ACROSS + (i - row0) * static_cast<int>(sizeof(T))
                                             : (i - row0) * L::PITCH + (k - k0) * static_cast<int>(sizeof(T)));
    const int left = i >= rows || k >= depth ? 0 : min(from.by_row ? rows - i : depth - k, L::LANES);
    if (from.vector) {
      const T* source = left ? data + origin + from.row(i) + from.depth(k) : data;
      copy_async_16(place, source, left * static_cast<int>(sizeof(T)));
    } else if constexpr (sizeof(T) == 4) {
      for (int e = 0; e < L::LANES; ++e) {
        int64_t at = 0;
        if (e < left) at = origin + from.row(from.by_row ? i + e : i) + from.depth(from.by_row ? k : k + e);
        copy_async_4(place + 4 * e, data + at, e < left ? 4 : 0);
      }
    } else {
      alignas(16) T values[L::LANES];
#pragma unroll
      for (int e = 0; e < L::LANES; ++e) {
        narrow(0.0f, values + e);
        if (e < left)
          values[e] = data[origin + from.row(from.by_row ? i + e : i) + from.depth(from.by_row ? k : k + e)];
      }
      *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(values);
    }
  }
}

// How a warp reads its fragments of an operand's tile; each is 16 rows and half the tile's K.
template <class T, int ROWS>
struct Reader {
  using L = Layout<T, ROWS>;
  bool by_row;
  int lane_offset, row_step, half_step;

  __device__ explicit Reader(bool by_row_) : by_row(by_row_) {
    const int lane = threadIdx.x % 32;
    row_step = by_row ? sizeof(T) : L::PITCH;
    half_step = by_row ? L::DEPTH / 2 * L::ACROSS : 32;
    if (!by_row) lane_offset = lane % 16 * L::PITCH + lane / 16 * 16;
    else if (sizeof(T) == 4) lane_offset = lane % 4 * L::ACROSS + lane / 4 * 4;
    else lane_offset = (lane % 8 + lane / 16 * 8) * L::ACROSS + lane / 8 % 2 * 16;
  }

  __device__ void operator()(uint32_t (&f)[4], const unsigned char* tile, int row, int half) const {
    const unsigned char* from = tile + lane_offset + row * row_step + half * half_step;
    if (!by_row) {
      load_matrices(f, from);
    } else if constexpr (sizeof(T) == 4) {
      f[0] = *reinterpret_cast<const uint32_t*>(from);
      f[1] = *reinterpret_cast<const uint32_t*>(from + 32);
      f[2] = *reinterpret_cast<const uint32_t*>(from + 4 * L::ACROSS);
      f[3] = *reinterpret_cast<const uint32_t*>(from + 4 * L::ACROSS + 32);
    } else {
      load_matrices_transposed(f, from);
    }
  }
};

__device__ inline void split_tf32(uint32_t (&high)[4], uint32_t (&low)[4], const uint32_t (&f)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float v = __uint_as_float(f[w]);
    high[w] = to_tf32(v);
    low[w] = to_tf32(v - __uint_as_float(high[w]));
  }
}

// acc[i][j] += the product of 16 rows of A by 8 of B, over half a tile of K; b are the fragments of 16 rows of B each.
// APART (of floats always): each call's sums start from zero and are added by an ordinary sum.
template <class T, bool APART = false, int MI, int NJ, class ReadA>
__device__ inline void multiply_fragments(float (&acc)[MI][NJ][4], const uint32_t (&b)[NJ / 2][4],
                                          const ReadA& read_a) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      uint32_t a[4];
      read_a(a, i);
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        if constexpr (APART) {
          float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          multiply_add(sum, a, b[j / 2][j % 2], b[j / 2][j % 2 + 2], T());
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[e];
        } else {
          multiply_add(acc[i][j], a, b[j / 2][j % 2], b[j / 2][j % 2 + 2], T());
        }
      }
    }
  } else {
    uint32_t b_high[NJ / 2][4], b_low[NJ / 2][4];
#pragma unroll
    for (int j = 0; j < NJ / 2; ++j) split_tf32(b_high[j], b_low[j], b[j]);
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      uint32_t a[4], a_high[4], a_low[4];
      read_a(a, i);
      split_tf32(a_high, a_low, a);
#pragma unroll
      for (int j = 0; j < NJ; ++j) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply_add(sum, a_low, b_high[j / 2][j % 2], b_high[j / 2][j % 2 + 2], T());
        multiply_add(sum, a_high, b_low[j / 2][j % 2], b_low[j / 2][j % 2 + 2], T());
        multiply_add(sum, a_high, b_high[j / 2][j % 2], b_high[j / 2][j % 2 + 2], T());
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[e];
      }
    }
  }
}

__device__ inline void scale_word(uint32_t& word, const float* scale, float) {
  word = __float_as_uint(__uint_as_float(word) * scale[0]);
}
template <class T>
__device__ inline void scale_word(uint32_t& word, const float* scale, T) {
  const Pair<T> v = *reinterpret_cast<const Pair<T>*>(&word);
  const Pair<T> scaled = narrow_pair<T>(widen(v.first) * scale[0], widen(v.second) * scale[1]);
  word = *reinterpret_cast<const uint32_t*>(&scaled);
}

// All of a word by one factor.
__device__ inline void scale_row(uint32_t& word, float factor, float) { scale_word(word, &factor, 0.0f); }
template <class T>
__device__ inline void scale_row(uint32_t& word, float factor, T) {
  const float both[2] = {factor, factor};
  scale_word(word, both, T());
}

// acc = the block's tile of sum over summands and k of A[m0 + m, k] B[n0 + n, k] scale[k]; every thread of the block
// calls. origin_a and origin_b are the batch's offsets, scale (or null) is the batch's; shared memory is free after.
// rows_a and rows_b (or null) multiply the tile's rows of A and B before they meet: powers of two, in shared memory.
template <class T, int BM, int BN, bool APART = false>
__device__ inline void multiply_tile(float (&acc)[BM / 32][4][4], unsigned char* shared, const Operand& a,
                                     int64_t origin_a, int m0, int M, const Operand& b, int64_t origin_b, int n0,
                                     int N, int K, int summands, const float* scale, int64_t scale_summand,
                                     const float* rows_a = nullptr, const float* rows_b = nullptr) {
  using S = Shape<T, BM, BN>;
  constexpr int WORD = 4 / sizeof(T);  // elements of a fragment's word
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4, lane_row = threadIdx.x % 32 / 4;
  const int warp_m = warp % 2 * (BM / 2), warp_n = warp / 2 * WARP_N;
  const Reader<T, BM> read_a(a.by_row);
  const Reader<T, BN> read_b(b.by_row);
  const int per_summand = (K + S::DEPTH - 1) / S::DEPTH, tiles = per_summand * summands;
#pragma unroll
  for (int i = 0; i < BM / 32; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;

  int copied = 0, copied_summand = 0, copied_k = 0;
  const auto copy = [&] {
    if (copied < tiles) {
      unsigned char* stage = shared + copied % STAGES * S::STAGE;
      copy_tile<T, BM, S::THREADS>(stage, a, origin_a + copied_summand * a.summand, m0, M, copied_k, K);
      copy_tile<T, BN, S::THREADS>(stage + Layout<T, BM>::BYTES, b, origin_b + copied_summand * b.summand, n0, N,
                                   copied_k, K);
      if (scale && threadIdx.x < S::DEPTH) {
        const int k = copied_k + threadIdx.x;
        copy_async_4(stage + Layout<T, BM>::BYTES + Layout<T, BN>::BYTES + 4 * threadIdx.x,
                     scale + copied_summand * scale_summand + (k < K ? k : 0), k < K ? 4 : 0);
      }
      copied_k += S::DEPTH;
      if (copied_k >= K) copied_k = 0, ++copied_summand;
    }
    ++copied;
    copy_async_commit();  // also where there is nothing: the wait counts groups
  };
  for (int s = 0; s < STAGES - 1; ++s) copy();
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and all have left the stage that is filled next
    copy();
    const unsigned char* stage = shared + tile % STAGES * S::STAGE;
    const unsigned char* stage_b = stage + Layout<T, BM>::BYTES;
    const float* scales = reinterpret_cast<const float*>(stage_b + Layout<T, BN>::BYTES) + t * WORD;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) read_b(words[j], stage_b, warp_n + j * 16, half);
      if (scale) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int w = 0; w < 4; ++w) scale_word(words[j][w], scales + half * (S::DEPTH / 2) + w / 2 * 4 * WORD, T());
      }
      if (rows_b) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int w = 0; w < 4; ++w) scale_row(words[j][w], rows_b[warp_n + j * 16 + w % 2 * 8 + lane_row], T());
      }
      multiply_fragments<T, APART>(acc, words, [&](uint32_t(&f)[4], int i) {
        read_a(f, stage, warp_m + i * 16, half);
        if (rows_a) {
#pragma unroll
          for (int w = 0; w < 4; ++w) scale_row(f[w], rows_a[warp_m + i * 16 + w % 2 * 8 + lane_row], T());
        }
      });
    }
  }
  copy_async_wait<0>();
  __syncthreads();
}

// A tile of A that a block makes itself and keeps in shared memory: [row][k] of BN values, padded as a tile is.
template <class T, int BN>
constexpr int KEPT_PITCH = BN * static_cast<int>(sizeof(T)) + 16;
template <class T, int BM, int BN>
constexpr int KEPT = BM * KEPT_PITCH<T, BN>;

// The product of such a tile A[m, k] by B[d0 + n, k0 + k], BD columns of it, by the threads of Shape<T, BM, BN>: half the
// block's rows and a quarter (BN = 128) of the columns each warp. B passes through shared memory as in multiply_tile.
template <class T, int BM, int BN, int BD>
struct KeptProduct {
  static constexpr int THREADS = Shape<T, BM, BN>::THREADS, ACROSS = BD / (THREADS / 64), NJ = ACROSS / 8;
  static constexpr int DEPTH = Layout<T, BD>::DEPTH, TILES = BN / DEPTH, SHARED = STAGES * Layout<T, BD>::BYTES;
  static constexpr int WORD = 4 / sizeof(T);
  static_assert(ACROSS % 16 == 0 && BN % DEPTH == 0, "whole fragments");
  using Sums = float[BM / 32][NJ][4];

  unsigned char* shared;
  const Operand& b;
  int64_t origin;
  int d0, D, k0, K;
  const float* scale = nullptr;  // in shared memory, BN of them, or null: what B's k are multiplied by, powers of two
  int copied = 0;

  __device__ void copy() {
    if (copied < TILES && k0 + copied * DEPTH < K)
      copy_tile<T, BD, THREADS>(shared + copied % STAGES * Layout<T, BD>::BYTES, b, origin, d0, D,
                                k0 + copied * DEPTH, K);
    ++copied;
    copy_async_commit();
  }
  __device__ void start() {  // before A is there: shared memory is B's from here to the end of add
    for (int s = 0; s < STAGES - 1; ++s) copy();
  }
  // acc += the product. A need not be waited for; both are free after.
  __device__ void add(Sums& acc, const unsigned char* a) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned char* rows = a + (warp % 2 * (BM / 2) + lane % 16) * KEPT_PITCH<T, BN> + lane / 16 * 16;
    const Reader<T, BD> read_b(b.by_row);
    for (int tile = 0; tile < TILES && k0 + tile * DEPTH < K; ++tile) {
      copy_async_wait<STAGES - 2>();
      __syncthreads();
      copy();
      const unsigned char* stage = shared + tile % STAGES * Layout<T, BD>::BYTES;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[NJ / 2][4];
#pragma unroll
        for (int j = 0; j < NJ / 2; ++j) {
          read_b(words[j], stage, warp / 2 * ACROSS + j * 16, half);
          if (scale) {
#pragma unroll
            for (int w = 0; w < 4; ++w)
              scale_word(words[j][w], scale + tile * DEPTH + half * (DEPTH / 2) + (w / 2 * 4 + lane % 4) * WORD, T());
          }
        }
        multiply_fragments<T>(acc, words, [&](uint32_t(&f)[4], int i) {
          load_matrices(f, rows + i * 16 * KEPT_PITCH<T, BN> + tile * 64 + half * 32);
        });
      }
    }
    copy_async_wait<0>();
    __syncthreads();
  }
  // f(row, column, values) for every pair of neighbouring results, both within the tile
  template <class F>
  __device__ static void for_each_pair(Sums& acc, F&& f) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < BM / 32; ++i)
#pragma unroll
      for (int j = 0; j < NJ; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          f(warp % 2 * (BM / 2) + i * 16 + g + e / 2 * 8, warp / 2 * ACROSS + j * 8 + 2 * t, acc[i][j][e],
            acc[i][j][e + 1]);
  }
};

// Call f(row, column, values) for every pair of neighbouring results that this thread holds; both within the tile.
template <int BM, int BN, class F>
__device__ inline void for_each_pair(float (&acc)[BM / 32][4][4], F&& f) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < BM / 32; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        f(warp % 2 * (BM / 2) + i * 16 + g + e / 2 * 8, warp / 2 * WARP_N + j * 8 + 2 * t, acc[i][j][e],
          acc[i][j][e + 1]);
}

// One kernel call: any number of blocks that a grid's first axis holds.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared, cudaStream_t stream, A&&... arguments) {
  if (blocks == 0) return;
  if (blocks > 2147483647) throw std::invalid_argument("infoclip._C: too many blocks for one launch");
  if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchConfig_t settings{};
  settings.gridDim = dim3(static_cast<unsigned>(blocks));
  settings.blockDim = dim3(static_cast<unsigned>(threads));
  settings.dynamicSmemBytes = static_cast<size_t>(shared);
  settings.stream = stream;
  check(cudaLaunchKernelEx(&settings, kernel, std::forward<A>(arguments)...));
}

// An extent as the kernels count it: tiles and fragments beyond it stay within 32 bits.
inline int extent(int64_t n) {
  if (n > 2147483647 - 1024) throw std::invalid_argument("infoclip._C: an axis of 2^31 entries or more");
  return static_cast<int>(n);
}

}  // namespace
}  // namespace infoclip
