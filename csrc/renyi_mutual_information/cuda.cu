// The CUDA form in three launches: lengths of the rows, values, and gradients (or the sum of the values alone). A value's
// block takes pairs of row blocks of the symmetric products; a gradient's owns 64 rows of a view and up to 256 (fp32: 128)
// of their entries, meets 128 rows at a time and multiplies their weights from shared memory. Where the products of all
// pairs are small beside the views they are kept between the two. No atomics: each sum has one order.
//
// Rows are scaled by powers of two, exactly, so that the mean squared length of a set lies in [1, 4): as a rule the
// products are, after they are made. Where an exponent is so far from 0 that products of raw rows could leave fp32's
// range, the operands are scaled before they meet. The squares of float16 fit fp32 as they are.
#include <cmath>

#include "common/tile.cuh"
#include "renyi_mutual_information/renyi.hpp"

namespace infoclip {
namespace {

constexpr int OWN = 64, MET = 128;  // rows that a block of the gradients owns, and that it meets at a time
constexpr int THREADS = 256;        // of every kernel but the smaller values
constexpr int PART = 64;            // rows whose lengths are added up by a block of the first launch
constexpr int PROGRAMS = 1024;      // of a set in the second launch, at most
constexpr int FAR = 30;             // exponents beyond which operands are scaled before they meet
constexpr float FOUR = 5.770780163555854f;  // 4 / ln 2

// Of up to PART rows. Lengths are relative to 2^top of a view that is used as given, and 1 or 0 in one of unit rows.
struct Part {
  float top[kMostViews], low[kMostViews];  // exponents of rows that are not zero: largest, smallest; else -126 and 126
  float square[kMostViews], joint;         // sums of squared lengths, and of their products
};

struct View {
  Operand rows, entries;  // [N, D], and as [D, N]
  int D, weight;
  bool unit;
  float* grad;  // [B, N, D] contiguous, or null
  int chunk;    // the first of this view's blocks among those of some rows
};

struct Sets {
  View v[kMostViews];
  int views, N, weight, parts, programs, chunks;
  int32_t* exponents;  // [B, V, N] of each row's largest entry
  float* squares;      // [B, V, N] squared lengths once that is divided out
  Part* part;          // [B, parts]
  float* sums;         // [B, programs, 4] of squares: of the joint's products and of each view's
  float* kept;         // [B, V, N, N] or null
  float* value;        // [B]
};

__device__ inline float power(int e) {  // 2^e, exactly; e is clamped to what a normal number can have
  return __uint_as_float(static_cast<uint32_t>(min(max(e, -126), 127) + 127) << 23);
}
__device__ inline int exponent(float v) {  // floor(log2 v) for v >= 0, at least -126 and at most 126
  return min(max(static_cast<int>(__float_as_uint(v) >> 23) - 127, -126), 126);
}
__device__ inline float scaled(float v, int e) { return v * power(e) * power(e); }  // v 4^e

template <class T>
__global__ void __launch_bounds__(THREADS, 4) lengths(const __grid_constant__ Sets p) {
  __shared__ int e[kMostViews][PART];
  __shared__ float square[kMostViews][PART];
  const int64_t b = blockIdx.x / p.parts;
  const int part = blockIdx.x % p.parts, lane = threadIdx.x % 32;
  for (int item = threadIdx.x / 32; item < PART * p.views; item += THREADS / 32) {  // a warp a row
    const int r = item % PART, n = part * PART + r, v = item / PART;
    if (n >= p.N) continue;
    const Operand& x = p.v[v].rows;
    const T* row = static_cast<const T*>(x.data) + b * x.batch + x.row(n);
    float most = 0.0f, sum = 0.0f;
    for (int d = lane; d < p.v[v].D; d += 32) most = fmaxf(most, fabsf(widen(row[x.depth(d)])));
    const int top = exponent(lanes_max<1, 16>(most));
    const float less = power(-top);
    for (int d = lane; d < p.v[v].D; d += 32) {
      const float entry = widen(row[x.depth(d)]) * less;
      sum = fmaf(entry, entry, sum);
    }
    sum = warp_sum(sum);
    if (lane) continue;
    e[v][r] = top, square[v][r] = sum;
    p.exponents[(b * p.views + v) * p.N + n] = top;
    p.squares[(b * p.views + v) * p.N + n] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int left = min(p.N - part * PART, PART);
  float joint[PART / 32];
#pragma unroll
  for (int k = 0; k < PART / 32; ++k) joint[k] = k * 32 + lane < left ? 1.0f : 0.0f;
  Part& to = p.part[blockIdx.x];
  for (int v = 0; v < p.views; ++v) {
    float top = -126.0f, low = -126.0f, sum = 0.0f;
    for (int r = lane; r < left; r += 32)
      if (square[v][r] != 0.0f) top = fmaxf(top, e[v][r]), low = fmaxf(low, -e[v][r]);
    top = lanes_max<1, 16>(top), low = -lanes_max<1, 16>(low);
#pragma unroll
    for (int k = 0; k < PART / 32; ++k) {
      const int r = k * 32 + lane;
      if (r >= left) continue;
      float length = square[v][r];
      if (p.v[v].unit) length = length == 0.0f ? 0.0f : length / length;  // what is not finite shows
      else length = scaled(length, e[v][r] - static_cast<int>(top));
      joint[k] *= length;
      sum += length;
    }
    sum = warp_sum(sum);
    if (lane == 0) to.top[v] = top, to.low[v] = low, to.square[v] = sum;
  }
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < PART / 32; ++k) sum += joint[k];
  sum = warp_sum(sum);
  if (lane == 0) to.joint = sum;
}

// Of a set: the exponents by which its views are divided, whether before their rows meet, and the traces.
struct Scales {
  int e[kMostViews];
  bool before[kMostViews];
  float trace[kMostViews], joint;
  float q;  // a power of two that brings the joint's products near 1
};

// A view's entry, without an address: what is indexed at run time would lie in local memory.
template <class V>
__device__ inline V entry_of(const V (&values)[kMostViews], int v) {
  return v == 0 ? values[0] : v == 1 ? values[1] : values[2];
}

template <class T, int N_THREADS>
__device__ inline Scales scales_of(const Sets& p, int64_t b, float* room) {
  Scales s;
  const Part* part = p.part + b * p.parts;
  int top[kMostViews];
  float joint = 0.0f;
#pragma unroll
  for (int v = 0; v < kMostViews; ++v) {
    s.e[v] = 0, s.before[v] = false, s.trace[v] = 0.0f, top[v] = 0;
    if (v >= p.views) continue;
    float high = -126.0f, low = -126.0f, sum = 0.0f;
    for (int i = threadIdx.x; i < p.parts; i += N_THREADS)
      high = fmaxf(high, part[i].top[v]), low = fmaxf(low, -part[i].low[v]);
    top[v] = static_cast<int>(block_max<N_THREADS>(high, room));
    const int least = -static_cast<int>(block_max<N_THREADS>(low, room));
    const bool unit = p.v[v].unit;
    for (int i = threadIdx.x; i < p.parts; i += N_THREADS)
      sum += unit ? part[i].square[v] : scaled(part[i].square[v], static_cast<int>(part[i].top[v]) - top[v]);
    sum = block_sum<N_THREADS>(sum, room);
    // Of a set without a non-zero entry, and of one that is not finite, any exponent will do.
    if (!unit) s.e[v] = min(max(top[v] + (exponent(sum / p.N) >> 1), -126), 126);
    s.trace[v] = unit ? sum : scaled(sum, top[v] - s.e[v]);
    if (!is_half(T())) s.before[v] = unit ? top[v] > FAR || least < -FAR : abs(s.e[v]) > FAR;
  }
  for (int i = threadIdx.x; i < p.parts; i += N_THREADS) {
    float sum = part[i].joint;
#pragma unroll
    for (int v = 0; v < kMostViews; ++v)
      if (v < p.views && !p.v[v].unit) sum = scaled(sum, static_cast<int>(part[i].top[v]) - top[v]);
    joint += sum;
  }
  joint = block_sum<N_THREADS>(joint, room);
#pragma unroll
  for (int v = 0; v < kMostViews; ++v)
    if (v < p.views && !p.v[v].unit) joint = scaled(joint, top[v] - s.e[v]);
  s.joint = joint;
  // Where no sample is there in all views, 2^126 would make infinities of the products of one.
  s.q = joint == 0.0f ? 1.0f : power(-exponent(joint / p.N));
  return s;
}

struct RowScale {
  float before, after, square;  // a row's scale before its products and after them; its squared length so scaled
};
__device__ inline RowScale row_scale(const Sets& p, const Scales& s, int64_t b, int v, int n) {
  const int64_t at = (b * p.views + v) * p.N + n;
  const int e = p.exponents[at];
  const float square = p.squares[at];
  if (p.v[v].unit)
    return {power(-e), square == 0.0f ? 0.0f : 1.0f / sqrtf(square), square == 0.0f ? 0.0f : square / square};
  const int all = entry_of(s.e, v);
  return {power(-all), 1.0f, scaled(square, e - all)};
}

// c = products of the view's scaled rows, BM of them from i0 on with BN from j0 on. room: 2 (BM + BN) floats.
template <class T, int BM, int BN>
__device__ inline void products(float (&c)[BM / 32][4][4], unsigned char* shared, float* room, const Sets& p,
                                const Scales& s, int64_t b, int v, int i0, int j0) {
  const bool before = entry_of(s.before, v);
  float* after = room + BM + BN;
  __syncthreads();  // all have left the room
  for (int r = threadIdx.x; r < BM + BN; r += Shape<T, BM, BN>::THREADS) {
    const int n = r < BM ? i0 + r : j0 + r - BM;
    const RowScale f = n < p.N ? row_scale(p, s, b, v, n) : RowScale{0.0f, 0.0f, 0.0f};
    room[r] = f.before;
    after[r] = before ? f.after : f.before * f.after;
  }
  const Operand& x = p.v[v].rows;
  // APART: the value is a small difference of logarithms, and feels what the matrix units cut off of long sums.
  multiply_tile<T, BM, BN, true>(c, shared, x, b * x.batch, i0, p.N, x, b * x.batch, j0, p.N, p.v[v].D, 1, nullptr, 0,
                           before ? room : nullptr, before ? room + BM : nullptr);
  for_each_pair<BM, BN>(c, [&](int m, int n, float& left, float& right) {
    left *= after[m] * after[BM + n];
    right *= after[m] * after[BM + n + 1];
    // A row with itself: its squared length, which the traces have too and against which the diagonal's sums cancel.
    const int row = i0 + m, column = j0 + n;
    if (row < p.N && row == column) left = row_scale(p, s, b, v, row).square;
    if (row < p.N && row == column + 1) right = row_scale(p, s, b, v, row).square;
  });
}

template <class T>
constexpr int VALUES_SHARED = Shape<T, OWN, OWN>::SHARED + 4 * (4 * OWN + 8);

template <class T>  // the products of two views at a time are held: larger tiles would spill
__global__ void __launch_bounds__(Shape<T, OWN, OWN>::THREADS, 2) values(const __grid_constant__ Sets p) {
  constexpr int EDGE = OWN, COUNT = Shape<T, EDGE, EDGE>::THREADS;
  const int64_t b = blockIdx.x / p.programs, program = blockIdx.x % p.programs;
  unsigned char* shared = dynamic_shared();
  float* room = reinterpret_cast<float*>(shared + Shape<T, EDGE, EDGE>::SHARED);
  float* rows = room + 8;
  const Scales s = scales_of<T, COUNT>(p, b, room);
  const int64_t blocks = (p.N + EDGE - 1) / EDGE, pairs = blocks * (blocks + 1) / 2;
  const int64_t first = pairs * program / p.programs, last = pairs * (program + 1) / p.programs;
  // Pair t is (i, j), j <= i, counted row by row.
  int64_t i = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(first) + 1.0) - 1.0) / 2.0);
  while (i * (i + 1) / 2 > first) --i;
  while ((i + 1) * (i + 2) / 2 <= first) ++i;
  int64_t j = first - i * (i + 1) / 2;
  float sums[1 + kMostViews] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t pair = first; pair < last; ++pair) {
    const int i0 = static_cast<int>(i * EDGE), j0 = static_cast<int>(j * EDGE);
    const float times = i == j ? 1.0f : 2.0f;
    float joint[EDGE / 32][4][4];
#pragma unroll
    for (int v = 0; v < kMostViews; ++v) {
      if (v >= p.views) continue;
      float c[EDGE / 32][4][4];
      products<T, EDGE, EDGE>(c, shared, rows, p, s, b, v, i0, j0);
      float own = 0.0f, both = 0.0f;
#pragma unroll
      for (int x = 0; x < EDGE / 32; ++x)
#pragma unroll
        for (int y = 0; y < 4; ++y)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float one = c[x][y][e];
            own = fmaf(one, one, own);
            joint[x][y][e] = v ? joint[x][y][e] * one : s.q * one;
            both = fmaf(joint[x][y][e], joint[x][y][e], both);
          }
      sums[1 + v] = fmaf(times, own, sums[1 + v]);
      if (v + 1 == p.views) sums[0] = fmaf(times, both, sums[0]);
      if (p.kept) {
        float* kept = p.kept + (b * p.views + v) * p.N * p.N;
        for_each_pair<EDGE, EDGE>(c, [&](int m, int n, float left, float right) {
          const int64_t row = i0 + m;
          for (int e = 0; e < 2; ++e) {
            const int64_t column = j0 + n + e;
            if (row >= p.N || column >= p.N) continue;
            kept[row * p.N + column] = e ? right : left;
            // On the diagonal another thread has the other half.
            if (i != j) kept[column * p.N + row] = e ? right : left;
          }
        });
      }
    }
    if (++j > i) ++i, j = 0;
  }
#pragma unroll
  for (int k = 0; k < 1 + kMostViews; ++k) {
    const float sum = block_sum<COUNT>(sums[k], room);
    if (threadIdx.x == 0) p.sums[blockIdx.x * int64_t(4) + k] = sum;
  }
}

// The value, and the gradient's factors: of the joint's weights and traces, and of each view's.
struct Totals {
  float value, b, joint, a[kMostViews], t[kMostViews];
};
__device__ inline Totals totals_of(const Sets& p, const Scales& s, int64_t set, double* room) {
  double sums[1 + kMostViews];
#pragma unroll
  for (int k = 0; k < 1 + kMostViews; ++k) {
    double sum = 0;
    for (int i = threadIdx.x; i < p.programs; i += THREADS) sum += p.sums[(set * p.programs + i) * 4 + k];
    sums[k] = block_sum<THREADS>(sum, room);
  }
  // The ratio is 2^value: one logarithm in the end keeps the digits of a small difference.
  double ratio = 1.0;
  const auto weigh = [&](double trace, double square, int weight) {
    if (weight > 0) ratio *= trace / square * trace;
    if (weight < 0) ratio /= trace / square * trace;
  };
  const bool there = s.joint != 0.0f;  // NaN passes, and shows
  weigh(static_cast<double>(s.joint) * s.q, sums[0], p.weight);
  Totals t{};
  if (there) t.b = static_cast<float>(-p.weight * static_cast<double>(FOUR) / sums[0]);
  if (there) t.joint = p.weight * FOUR / s.joint;
#pragma unroll
  for (int v = 0; v < kMostViews; ++v) {
    if (v >= p.views) continue;
    const int weight = p.v[v].weight;
    weigh(s.trace[v], sums[1 + v], weight);
    if (there && weight) t.a[v] = static_cast<float>(-weight * static_cast<double>(FOUR) / sums[1 + v]);
    if (there && weight) t.t[v] = weight * FOUR / s.trace[v];
  }
  t.value = there ? static_cast<float>(log2(ratio)) : 0.0f;
  return t;
}

template <class T>
__global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Sets p) {
  __shared__ float room[THREADS / 32];
  __shared__ double wide[THREADS / 32];
  const Scales s = scales_of<T, THREADS>(p, blockIdx.x, room);
  const Totals t = totals_of(p, s, blockIdx.x, wide);
  if (threadIdx.x == 0) p.value[blockIdx.x] = t.value;
}

struct GradientRoom {  // behind the stages and the weights
  double wide[THREADS / 32];
  float room[THREADS / 32];
  float rows[2 * (OWN + MET)];        // of the products
  float before[MET], after[MET];      // of the rows met, in the view itself
  float diagonal[OWN], own[OWN], whole[OWN];
  float along[MET / WARP_N][OWN];     // <row's sum, row> by warps
};

template <class T, int BD>
struct GradientShared {
  static constexpr int STAGED = std::max(Shape<T, OWN, MET>::SHARED, KeptProduct<T, OWN, MET, BD>::SHARED);
  static constexpr int ROOM = STAGED + KEPT<T, OWN, MET>, SHARED = ROOM + static_cast<int>(sizeof(GradientRoom));
};

template <class T, int BD>
__global__ void __launch_bounds__(THREADS, 1) gradients(const __grid_constant__ Sets p) {
  using Kept = KeptProduct<T, OWN, MET, BD>;
  static_assert(Kept::THREADS == THREADS, "one shape");
  const int blocks = (p.N + OWN - 1) / OWN;
  const int item = blockIdx.x % p.chunks, block = blockIdx.x / p.chunks % blocks;
  const int64_t b = blockIdx.x / p.chunks / blocks;
  int v = 0;  // the last view whose blocks begin at or before this one
  for (int o = 1; o < p.views; ++o)
    if (p.v[o].grad && item >= p.v[o].chunk) v = o;
  if (!p.v[v].grad) return;
  const int i0 = block * OWN, d0 = (item - p.v[v].chunk) * BD, D = p.v[v].D;
  const bool unit = p.v[v].unit;
  unsigned char* shared = dynamic_shared();
  unsigned char* weights = shared + GradientShared<T, BD>::STAGED;
  GradientRoom& room = *reinterpret_cast<GradientRoom*>(shared + GradientShared<T, BD>::ROOM);
  const Scales s = scales_of<T, THREADS>(p, b, room.room);
  const Totals total = totals_of(p, s, b, room.wide);
  if (item == 0 && block == 0 && threadIdx.x == 0) p.value[b] = total.value;
  const float a = entry_of(total.a, v);
  const float trace = entry_of(total.t, v);

  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float lift = is_half(T()) ? power(100) : 1.0f;  // a power of two that keeps fp16's weights in its range
  float along[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
  typename Kept::Sums acc;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < Kept::NJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;

  for (int j0 = 0; j0 < p.N; j0 += MET) {
    float o[2][4][4], c[2][4][4];
    for (int k = 1; k <= p.views; ++k) {  // the view itself is the last
      const int other = (v + k) % p.views;
      if (p.kept) {
        const float* kept = p.kept + (b * p.views + other) * p.N * p.N;
        for_each_pair<OWN, MET>(c, [&](int m, int n, float& left, float& right) {
          const int64_t at = int64_t(i0 + m) * p.N + j0 + n;
          left = i0 + m < p.N && j0 + n < p.N ? kept[at] : 0.0f;
          right = i0 + m < p.N && j0 + n + 1 < p.N ? kept[at + 1] : 0.0f;
        });
      } else {
        products<T, OWN, MET>(c, shared, room.rows, p, s, b, other, i0, j0);
      }
      if (k == p.views) break;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[i][j][e] = k == 1 ? s.q * c[i][j][e] : o[i][j][e] * c[i][j][e];
    }
    for (int r = threadIdx.x; r < MET; r += THREADS) {
      const RowScale f = j0 + r < p.N ? row_scale(p, s, b, v, j0 + r) : RowScale{0.0f, 0.0f, 0.0f};
      room.before[r] = f.before, room.after[r] = unit ? f.after : 1.0f;
    }
    const Operand& entries = p.v[v].entries;
    Kept product{shared, entries, b * entries.batch, d0, D, j0, p.N, unit ? room.before : nullptr};
    product.start();
    __syncthreads();  // the scales are there
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = warp % 2 * (OWN / 2) + i * 16 + g + e / 2 * 8, n = warp / 2 * WARP_N + j * 8 + 2 * t + e % 2;
          const float one = c[i][j][e], rest = o[i][j][e];
          float w = total.b * (one * rest) * rest + a * one;
          // The diagonal nearly cancels against the traces: it stays out of the product, whose factors are rounded.
          if (i0 + m == j0 + n) room.diagonal[m] = w, w = 0.0f;
          along[i][e / 2] = fmaf(w, one, along[i][e / 2]);
          c[i][j][e] = w * room.after[n];
          largest = fmaxf(largest, fabsf(c[i][j][e]));
        }
    if (is_half(T())) {
      largest = block_max<THREADS>(largest, room.room);
      const float wanted = power(min(14 - exponent(largest), 100));
      if (wanted < lift) {
        const float less = wanted / lift;
        lift = wanted;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < Kept::NJ; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][j][e] *= less;
      }
    }
    for_each_pair<OWN, MET>(c, [&](int m, int n, float left, float right) {
      *reinterpret_cast<Pair<T>*>(weights + m * KEPT_PITCH<T, MET> + n * static_cast<int>(sizeof(T))) =
          narrow_pair<T>(left * lift, right * lift);
    });
    product.add(acc, weights);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = lanes_sum<1, 2>(along[i][r]);
      if (t == 0) room.along[warp / 2][warp % 2 * (OWN / 2) + i * 16 + g + r * 8] = sum;
    }
  __syncthreads();
  if (threadIdx.x < OWN && i0 + threadIdx.x < p.N) {
    const int m = threadIdx.x;
    const RowScale f = row_scale(p, s, b, v, i0 + m);
    float others = 1.0f;
    for (int k = 0; k < p.views; ++k)
      if (k != v) others *= row_scale(p, s, b, k, i0 + m).square;
    float own = room.diagonal[m] + total.joint * others + trace;
    if (unit) {  // through the normalisation: what lies along the row drops out
      float off = 0.0f;
#pragma unroll
      for (int w = 0; w < MET / WARP_N; ++w) off += room.along[w][m];
      own -= off + own * f.square;
    }
    room.own[m] = own, room.whole[m] = f.before * f.after;
  }
  __syncthreads();
  const Operand& x = p.v[v].rows;
  const float scale = (unit ? 1.0f : power(-entry_of(s.e, v))) / lift;  // of rows used as given, the scale of those met
  const T* from = static_cast<const T*>(x.data) + b * x.batch;
  float* to = p.v[v].grad + (b * p.N + i0) * D;
  Kept::for_each_pair(acc, [&](int m, int n, float left, float right) {
    if (i0 + m >= p.N) return;
    const float whole = room.whole[m], own = room.own[m];
    for (int e = 0; e < 2; ++e) {
      const int d = d0 + n + e;
      if (d >= D) continue;
      const float entry = widen(from[x.row(i0 + m) + x.depth(d)]) * whole;
      to[int64_t(m) * D + d] = whole * ((e ? right : left) * scale + own * entry);
    }
  });
}

int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

struct Plan {
  bool needed = false, kept = false;
  int64_t programs, parts;

  explicit Plan(const RenyiInformation& p) {
    int64_t depth = 0;
    for (int v = 0; v < p.views; ++v) depth += p.D[v], needed = needed || p.grad[v];
    kept = needed && p.views * p.N <= 4 * depth;  // no more than four times the views in fp32
    const int64_t blocks = parts_of(p.N, OWN);
    programs = std::min<int64_t>(blocks * (blocks + 1) / 2, PROGRAMS), parts = parts_of(p.N, PART);
  }
  int64_t floats(const RenyiInformation& p) const {
    const int64_t rows = p.B * p.views * p.N;
    return 2 * rows + p.B * (parts * static_cast<int64_t>(sizeof(Part) / 4) + programs * 4) + (kept ? rows * p.N : 0);
  }
};

template <class T>
struct Information {
  static constexpr int64_t WIDEST = sizeof(T) == 2 ? 256 : 128;  // entries of a block of the gradients
  const RenyiInformation& p;
  cudaStream_t stream;

  void all() {
    const Plan plan(p);
    Sets q{};
    q.views = p.views, q.N = extent(p.N), q.weight = p.weights[0];
    q.parts = static_cast<int>(plan.parts), q.programs = static_cast<int>(plan.programs);
    const int64_t rows = p.B * p.views * p.N;
    float* work = static_cast<float*>(p.work);
    q.exponents = reinterpret_cast<int32_t*>(work), work += rows;
    q.squares = work, work += rows;
    q.part = reinterpret_cast<Part*>(work), work += p.B * plan.parts * static_cast<int64_t>(sizeof(Part) / 4);
    q.sums = work, work += p.B * plan.programs * 4;
    q.kept = plan.kept ? work : nullptr;
    q.value = static_cast<float*>(p.value);
    int64_t wide = 1;
    for (int v = 0; v < p.views; ++v) {
      View& to = q.v[v];
      const int64_t batch = p.B == 1 ? 0 : p.x_s[v][0];
      to.rows = operand<T>(p.x[v], batch, 0, plain(p.x_s[v][1]), plain(p.x_s[v][2]));
      to.entries = operand<T>(p.x[v], batch, 0, plain(p.x_s[v][2]), plain(p.x_s[v][1]));
      to.D = extent(p.D[v]), to.weight = p.weights[1 + v], to.unit = p.unit[v];
      to.grad = static_cast<float*>(p.grad[v]);
      if (to.grad) wide = std::max(wide, parts_of(p.D[v], parts_of(p.D[v], WIDEST)));
    }
    launch(lengths<T>, p.B * plan.parts, THREADS, 0, stream, q);
    launch(values<T>, p.B * q.programs, Shape<T, OWN, OWN>::THREADS, VALUES_SHARED<T>, stream, q);
    if (!plan.needed) return launch(finish<T>, p.B, THREADS, 0, stream, q);
    if (wide <= 64) sweep_back<64>(q);
    else if (wide <= 128) sweep_back<128>(q);
    else if constexpr (sizeof(T) == 2) wide <= 192 ? sweep_back<192>(q) : sweep_back<256>(q);
  }

  template <int BD>
  void sweep_back(Sets& q) {
    int64_t chunks = 0;
    for (int v = 0; v < p.views; ++v) {
      q.v[v].chunk = static_cast<int>(chunks);
      if (q.v[v].grad) chunks += parts_of(p.D[v], BD);
    }
    q.chunks = static_cast<int>(chunks);
    launch(gradients<T, BD>, p.B * parts_of(p.N, OWN) * chunks, THREADS, GradientShared<T, BD>::SHARED, stream, q);
  }
};

}  // namespace

int64_t renyi_information_work_floats(const RenyiInformation& p) { return Plan(p).floats(p); }

void renyi_information_cuda(const RenyiInformation& p, uintptr_t stream) {
  by_type(p.dtype, [&](auto t) { Information<decltype(t)>{p, reinterpret_cast<cudaStream_t>(stream)}.all(); });
}

}  // namespace infoclip
