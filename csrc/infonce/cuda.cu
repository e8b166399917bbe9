// The CUDA form. Forward in three launches: patches of tiles of logits leave each row's and column's log-sum-exp in two
// parts, the second joins patches, the third adds up. Backward in one, two with the temperature's gradient: a block owns
// 64 samples of either side and up to 256 of their entries, sweeps the other side, makes the logits again and multiplies
// their slopes, which never leave shared memory. No atomics: each sum has one order.
#include <cmath>

#include "common/tile.cuh"
#include "infonce/infonce.hpp"

namespace infoclip {
namespace {

#ifndef INFOCLIP_GROUPS  // the suite sets a lower number, to have patches of several tiles on small sizes
#define INFOCLIP_GROUPS 32
#endif
constexpr int64_t GROUPS = INFOCLIP_GROUPS;  // patches along an axis, at most: each row keeps two numbers for each
constexpr int JOINED = 256;        // rows or columns that a block of the second launch joins
constexpr int ADDED = 1024;        // threads of the launches that add up
constexpr float APART = 80.0f;     // logits of a tile that lie no further apart share one largest: exp(-80) is a normal
constexpr int OWN = 64, MET = 128; // samples that a block of the backward owns, and that it meets at a time

__device__ inline float negative_infinity() { return __uint_as_float(0xff800000u); }

struct Logits {
  Operand x, y;
  const float* temperature;  // [] or null
  float scale;
  const int64_t* positive;   // [B, N] or null: the diagonal
  int64_t positive_b, positive_n;
  int N, M, D;
  bool symmetric;

  __device__ float factor() const {
    if (!temperature) return scale;
    return *temperature > 0.0f ? 1.0f / *temperature : __uint_as_float(0x7fc00000u);
  }
  __device__ int64_t pair(int64_t b, int64_t i) const {
    return positive ? positive[b * positive_b + i * positive_n] : i;
  }
};

struct Patches {
  Logits s;
  float *pairs;         // [B, N] written: the logit of each row's pair
  float *row_parts;     // [2, B, column_groups, N] written: largest logit (or one near it), sum relative to it
  float *column_parts;  // [2 or 4, B, row_groups, M] written: the same, how many rows' pair, their logits' sum
  int64_t row_part, column_part;  // from one part to the next
  int row_groups, column_groups, row_span, column_span;  // of a patch, in tiles
};

// What a tile's reduction passes through shared memory, behind the tile's stages.
template <int BM, int BN>
struct Room {
  float row_high[BN / WARP_N][BM], row_sum[BN / WARP_N][BM];
  float column_high[2][BN], column_sum[2][BN];
  float chosen[BM];          // the logit of a row's pair
  int pair[BM];              // its column in the tile, or -1
  float high[BN / WARP_N * 2], low[BN / WARP_N * 2];  // of a warp
  int found;                 // whether any row's pair is in the tile
};

// Two log-sum-exps in parts, of which one or both may be of nothing (-inf, 0).
__device__ inline void join_parts(float& high, float& sum, float more_high, float more_sum) {
  const float most = fmaxf(high, more_high), zero = most == negative_infinity() ? 0.0f : most;
  sum = sum * expf(high - zero) + more_sum * expf(more_high - zero);
  high = most;
}

template <class T, int BM, int BN>
__global__ void __launch_bounds__(Shape<T, BM, BN>::THREADS, BM == 64 ? 3 : sizeof(T) == 2 ? 2 : 1)
    patches(const __grid_constant__ Patches p) {
  constexpr int THREADS = Shape<T, BM, BN>::THREADS, MI = BM / 32, WARPS_N = BN / WARP_N;
  static_assert(BM <= THREADS && BN <= THREADS, "a thread a row, and a column");
  const int group_n = blockIdx.x % p.column_groups, group_m = blockIdx.x / p.column_groups % p.row_groups;
  const int64_t b = blockIdx.x / p.column_groups / p.row_groups;
  const int N = p.s.N, M = p.s.M;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_m = warp % 2, warp_n = warp / 2;
  unsigned char* shared = dynamic_shared();
  Room<BM, BN>& room = *reinterpret_cast<Room<BM, BN>*>(shared + Shape<T, BM, BN>::SHARED);
  const float factor = p.s.factor(), nothing = negative_infinity();
  float* row_parts = p.row_parts + (b * p.column_groups + group_n) * N;
  float* column_parts = p.column_parts + (b * p.row_groups + group_m) * M;
  const int first_n = group_n * p.column_span, last_n = min(first_n + p.column_span, (M + BN - 1) / BN);
  const int first_m = group_m * p.row_span, last_m = min(first_m + p.row_span, (N + BM - 1) / BM);

  for (int tile_n = first_n; tile_n < last_n; ++tile_n) {
    const int n0 = tile_n * BN;
    // Of column n0 + threadIdx.x, where there is one.
    float column_high = nothing, column_sum = 0.0f, count = 0.0f, chosen_sum = 0.0f;
    for (int tile_m = first_m; tile_m < last_m; ++tile_m) {
      const int m0 = tile_m * BM;
      if (threadIdx.x == 0) room.found = 0;
      __syncthreads();  // all have left the room
      if (threadIdx.x < BM) {
        const int m = m0 + threadIdx.x;
        const int64_t at = m < N ? p.s.pair(b, m) - n0 : -1;
        const bool here = at >= 0 && at < BN && n0 + at < M;
        room.pair[threadIdx.x] = here ? static_cast<int>(at) : -1;
        if (here) room.found = 1;
      }
      float s[MI][4][4];
      multiply_tile<T, BM, BN>(s, shared, p.s.x, b * p.s.x.batch, m0, N, p.s.y, b * p.s.y.batch, n0, M, p.s.D, 1,
                               nullptr, 0);
      float high = nothing, low = -nothing;
      for_each_pair<BM, BN>(s, [&](int m, int n, float& left, float& right) {
        float* pair[2] = {&left, &right};
        const int partner = room.pair[m];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& v = *pair[e];
          const bool there = m0 + m < N && n0 + n + e < M;
          v = there ? v * factor : nothing;  // outside is -inf before any maximum is taken
          if (there) high = fmaxf(high, v), low = fminf(low, v);
          if (partner == n + e) {
            room.chosen[m] = v;
            p.pairs[b * N + m0 + m] = v;
          }
        }
      });
      high = lanes_max<1, 16>(high), low = -lanes_max<1, 16>(-low);
      if (threadIdx.x % 32 == 0) room.high[warp] = high, room.low[warp] = low;
      __syncthreads();
      high = room.high[0], low = room.low[0];
#pragma unroll
      for (int w = 1; w < WARPS_N * 2; ++w) high = fmaxf(high, room.high[w]), low = fminf(low, room.low[w]);

      // Where the tile's logits lie near each other, one exponential serves rows and columns.
      const bool near = high - low <= APART;
      if (!near) {
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float most = nothing;
#pragma unroll
            for (int j = 0; j < 4; ++j) most = fmaxf(most, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]));
            most = lanes_max<1, 2>(most);
            if (t == 0) room.row_high[warp_n][warp_m * (BM / 2) + i * 16 + g + r * 8] = most;
          }
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float most = nothing;
#pragma unroll
            for (int i = 0; i < MI; ++i) most = fmaxf(most, fmaxf(s[i][j][e], s[i][j][e + 2]));
            most = lanes_max<4, 16>(most);
            if (g == 0) room.column_high[warp_m][warp_n * WARP_N + j * 8 + 2 * t + e] = most;
          }
        __syncthreads();
      }
      const auto row_high = [&](int m) {
        if (near) return high;
        float most = room.row_high[0][m];
#pragma unroll
        for (int w = 1; w < WARPS_N; ++w) most = fmaxf(most, room.row_high[w][m]);
        return most;
      };
      const auto column_most = [&](int n) {
        return near ? high : fmaxf(room.column_high[0][n], room.column_high[1][n]);
      };
      const auto zero = [&](float most) { return most == nothing ? 0.0f : most; };
      float columns[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) columns[j][0] = columns[j][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int m = warp_m * (BM / 2) + i * 16 + g + r * 8;
          const float most = zero(row_high(m));
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float v = s[i][j][2 * r + e], power = expf(v - most);
              sum += power;
              if (p.s.symmetric)
                columns[j][e] += near ? power : expf(v - zero(column_most(warp_n * WARP_N + j * 8 + 2 * t + e)));
            }
          sum = lanes_sum<1, 2>(sum);
          if (t == 0) room.row_sum[warp_n][m] = sum;
        }
      if (p.s.symmetric) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = lanes_sum<4, 16>(columns[j][e]);
            if (g == 0) room.column_sum[warp_m][warp_n * WARP_N + j * 8 + 2 * t + e] = sum;
          }
      }
      __syncthreads();
      if (threadIdx.x < BM && m0 + threadIdx.x < N) {  // a row's parts are this very thread's from tile to tile
        const int m = m0 + threadIdx.x;
        float most = row_high(threadIdx.x), sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS_N; ++w) sum += room.row_sum[w][threadIdx.x];
        if (tile_n > first_n) join_parts(most, sum, row_parts[m], row_parts[p.row_part + m]);
        row_parts[m] = most;
        row_parts[p.row_part + m] = sum;
      }
      if (p.s.symmetric && threadIdx.x < BN && n0 + threadIdx.x < M) {
        const int n = threadIdx.x;
        join_parts(column_high, column_sum, column_most(n), room.column_sum[0][n] + room.column_sum[1][n]);
        if (p.s.positive && room.found)
          for (int m = 0; m < BM; ++m)
            if (room.pair[m] == n) count += 1.0f, chosen_sum += room.chosen[m];
      }
      __syncthreads();
    }
    if (p.s.symmetric && threadIdx.x < BN && n0 + threadIdx.x < M) {
      float* to = column_parts + n0 + threadIdx.x;
      to[0] = column_high;
      to[p.column_part] = column_sum;
      if (p.s.positive) to[2 * p.column_part] = count, to[3 * p.column_part] = chosen_sum;
    }
  }
}

struct Joined {
  Patches p;
  float *rows, *columns;  // [B, N], [B, M] written
  float* losses;          // [B, programs] written
  int programs;
};

__global__ void __launch_bounds__(JOINED) join(const __grid_constant__ Joined q) {
  __shared__ float room[JOINED / 32];
  const Patches& p = q.p;
  const int64_t b = blockIdx.x / q.programs, N = p.s.N, M = p.s.M;
  const int64_t program = blockIdx.x % q.programs, row_programs = (N + JOINED - 1) / JOINED;
  float loss = 0.0f, high = negative_infinity(), sum = 0.0f;
  if (program < row_programs) {
    const int64_t i = program * JOINED + threadIdx.x;
    if (i < N) {
      for (int64_t g = 0; g < p.column_groups; ++g) {
        const float* part = p.row_parts + (b * p.column_groups + g) * N + i;
        join_parts(high, sum, part[0], part[p.row_part]);
      }
      const float row = high + logf(sum);
      q.rows[b * N + i] = row;
      const int64_t at = p.s.pair(b, i);  // nothing was written for an index that is no column's
      loss = at >= 0 && at < M ? row - p.pairs[b * N + i] : __uint_as_float(0x7fc00000u);
    }
  } else {
    const int64_t j = (program - row_programs) * JOINED + threadIdx.x;
    if (j < M) {
      float count = 0.0f, chosen = 0.0f;
      for (int64_t g = 0; g < p.row_groups; ++g) {
        const float* part = p.column_parts + (b * p.row_groups + g) * M + j;
        join_parts(high, sum, part[0], part[p.column_part]);
        if (p.s.positive) count += part[2 * p.column_part], chosen += part[3 * p.column_part];
      }
      float column = high + logf(sum);
      if (!p.s.positive) {
        loss = column - p.pairs[b * N + j];
      } else if (count > 0.0f) {
        loss = count * column - chosen;
        column -= logf(count);
      } else {
        column = -negative_infinity();  // nobody's pair passes nothing on
      }
      q.columns[b * M + j] = column;
    }
  }
  loss = block_sum<JOINED>(loss, room);
  if (threadIdx.x == 0) q.losses[blockIdx.x] = loss;
}

// total = factor sum of parts; with d_loss times -d_loss / temperature; without it also bound = most - total.
__global__ void __launch_bounds__(ADDED)
    add_up(const float* parts, int64_t n, double factor, double most, float* total, float* bound, const float* d_loss,
           const float* temperature) {
  __shared__ double room[ADDED / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += ADDED) sum += parts[i];
  sum = block_sum<ADDED>(sum, room) * factor;
  if (threadIdx.x != 0) return;
  if (d_loss) {
    *total = static_cast<float>(-sum * *d_loss / *temperature);
  } else {
    *total = static_cast<float>(sum);
    *bound = static_cast<float>(most - sum);
  }
}

struct Slopes {
  Logits s;
  Operand x_entries, y_entries;  // [D, samples]: what the slopes are multiplied by
  const float *rows, *columns, *d_loss;
  void *d_x, *d_y;      // [B, N, D], [B, M, D] contiguous, or null
  float* parts;         // [B, x_blocks] written, or null: of the temperature's gradient
  float inverse;        // 1 / (B N directions)
  float lift;           // a power of two that keeps small slopes of fp16 normal numbers
  bool adapt;           // slopes may be as large as there are rows: the lift follows them
  int x_blocks, y_blocks, chunks;
};

template <class T, int BD>
struct SlopesRoom {  // shared memory: the stages of either product, the slopes, and what is known of the rows owned
  static constexpr int STAGED = std::max(Shape<T, OWN, MET>::SHARED, KeptProduct<T, OWN, MET, BD>::SHARED);
  static constexpr int SHARED = STAGED + KEPT<T, OWN, MET> + 8 * OWN + 32;
};

// Halves of up to 64 entries: 128 registers a thread at most, so that an SM holds two blocks, of which one multiplies
// while the other takes exponentials. More sums, and floats with both parts of each fragment, would spill: one block an SM.
template <class T, int BD>
__global__ void __launch_bounds__(256, sizeof(T) == 2 && BD == 64 ? 2 : 1) slopes(const __grid_constant__ Slopes p) {
  using Kept = KeptProduct<T, OWN, MET, BD>;
  static_assert(Kept::THREADS == 256, "one shape");
  const int chunk = blockIdx.x % p.chunks, programs = p.x_blocks + p.y_blocks;
  const int64_t b = blockIdx.x / p.chunks / programs;
  const int program = blockIdx.x / p.chunks % programs;
  const bool is_x = program < p.x_blocks;
  void* out = is_x ? p.d_x : p.d_y;
  if (!out && chunk) return;  // only the temperature's part is wanted of these rows, and chunk 0 makes it
  const int block = is_x ? program : program - p.x_blocks, i0 = block * OWN, d0 = chunk * BD;
  const int own_rows = is_x ? p.s.N : p.s.M, met_rows = is_x ? p.s.M : p.s.N, D = p.s.D;
  const Operand &own = is_x ? p.s.x : p.s.y, &met = is_x ? p.s.y : p.s.x;
  const Operand& entries = is_x ? p.y_entries : p.x_entries;
  const float* own_lse = (is_x ? p.rows : p.columns) + b * own_rows;
  const float* met_lse = (is_x ? p.columns : p.rows) + b * met_rows;
  const bool use_own = p.s.symmetric || is_x, use_met = p.s.symmetric || !is_x;
  const float factor = p.s.factor(), directions = p.s.symmetric ? 2.0f : 1.0f;
  unsigned char* shared = dynamic_shared();
  unsigned char* kept = shared + SlopesRoom<T, BD>::STAGED;
  float* room = reinterpret_cast<float*>(kept + KEPT<T, OWN, MET>);

  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float* lse = room + 8;  // of the rows owned
  int* pair = reinterpret_cast<int*>(lse + OWN);  // the pairs of rows that are x's
  if (threadIdx.x < OWN) {
    const int m = i0 + threadIdx.x;
    lse[threadIdx.x] = use_own && m < own_rows ? own_lse[m] : 0.0f;
    const int64_t at = is_x && m < own_rows ? p.s.pair(b, m) : -1;
    pair[threadIdx.x] = at >= 0 && at < met_rows ? static_cast<int>(at) : -1;
  }  // the product's barriers order this before it is read
  float part = 0.0f, lift = p.lift;
  typename Kept::Sums acc;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < Kept::NJ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;

  for (int j0 = 0; j0 < met_rows; j0 += MET) {
    float s[2][4][4];
    multiply_tile<T, OWN, MET>(s, shared, own, b * own.batch, i0, own_rows, met, b * met.batch, j0, met_rows, D, 1,
                               nullptr, 0);
    Kept product{shared, entries, b * entries.batch, d0, D, j0, met_rows};
    if (out) product.start();
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = j0 + warp / 2 * WARP_N + j * 8 + 2 * t + e;
        const bool there = n < met_rows;
        const float other = use_met && there ? met_lse[n] : 0.0f;
        int64_t owner = -1;
        if (!is_x && there) owner = p.s.pair(b, n);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int row = warp % 2 * (OWN / 2) + i * 16 + g + r * 8, m = i0 + row;
            float& v = s[i][j][2 * r + e];
            const float logit = v * factor;
            float slope = 0.0f;
            if (use_own) slope += expf(logit - lse[row]);
            if (use_met) slope += expf(logit - other);
            if (is_x) slope -= pair[row] == n ? directions : 0.0f;
            else slope -= owner == m ? directions : 0.0f;
            v = there && m < own_rows ? slope : 0.0f;
            if (p.parts && there && m < own_rows) part = fmaf(slope, logit, part);
            largest = fmaxf(largest, fabsf(v));
          }
      }
    if (!out) continue;
    if (p.adapt) {
      largest = block_max<256>(largest, room);
      // 2^14 over the power of two below the largest; 1 counts as the least of those
      const int above = max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, 0);
      const float wanted = __uint_as_float(static_cast<uint32_t>(127 + 14 - above) << 23);
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
    for_each_pair<OWN, MET>(s, [&](int m, int n, float left, float right) {
      *reinterpret_cast<Pair<T>*>(kept + m * KEPT_PITCH<T, MET> + n * static_cast<int>(sizeof(T))) =
          narrow_pair<T>(left * lift, right * lift);
    });
    product.add(acc, kept);
  }
  if (p.parts && is_x && chunk == 0) {
    part = block_sum<256>(part, room);
    if (threadIdx.x == 0) p.parts[b * p.x_blocks + block] = part;
  }
  if (!out) return;
  const float gain = *p.d_loss * factor * p.inverse / lift;
  T* to = static_cast<T*>(out) + (b * own_rows + i0) * D + d0;
  Kept::for_each_pair(acc, [&](int m, int n, float left, float right) {
    if (i0 + m >= own_rows) return;
    if (d0 + n < D) narrow(left * gain, to + int64_t(m) * D + n);
    if (d0 + n + 1 < D) narrow(right * gain, to + int64_t(m) * D + n + 1);
  });
}

int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

// How the rows and columns of logits are cut.
struct Cut {
  int edge;
  int64_t row_span, column_span, row_groups, column_groups, programs;

  explicit Cut(const InfoNce& p) {
    edge = p.B * parts_of(p.N, 128) * parts_of(p.M, 128) >= FILLS_GPU ? 128 : 64;  // the larger where there are enough
    row_span = parts_of(parts_of(p.N, edge), GROUPS), column_span = parts_of(parts_of(p.M, edge), GROUPS);
    row_groups = parts_of(parts_of(p.N, edge), row_span), column_groups = parts_of(parts_of(p.M, edge), column_span);
    programs = parts_of(p.N, JOINED) + (p.symmetric ? parts_of(p.M, JOINED) : 0);
  }
};

template <class T>
struct Contrast {
  const InfoNce& p;
  cudaStream_t stream;
  double inverse = 1.0 / (static_cast<double>(p.B) * p.N * (p.symmetric ? 2 : 1));

  Logits logits() const {
    const auto batch = [&](int64_t stride) { return p.B == 1 ? 0 : stride; };
    Logits s{};
    s.x = operand<T>(p.x, batch(p.x_s[0]), 0, plain(p.x_s[1]), plain(p.x_s[2]));
    s.y = operand<T>(p.y, batch(p.y_s[0]), 0, plain(p.y_s[1]), plain(p.y_s[2]));
    s.temperature = static_cast<const float*>(p.temperature), s.scale = static_cast<float>(p.scale);
    s.positive = p.positive, s.positive_b = p.positive_s[0], s.positive_n = p.positive_s[1];
    s.N = extent(p.N), s.M = extent(p.M), s.D = extent(p.D);
    s.symmetric = p.symmetric;
    return s;
  }

  void forward() {
    const Cut cut(p);
    Patches q{};
    q.s = logits();
    q.row_part = p.B * cut.column_groups * p.N, q.column_part = p.B * cut.row_groups * p.M;
    q.pairs = static_cast<float*>(p.work);
    q.row_parts = q.pairs + p.B * p.N;
    q.column_parts = q.row_parts + 2 * q.row_part;
    float* losses = q.column_parts + (p.symmetric ? (p.positive ? 4 : 2) * q.column_part : 0);
    q.row_groups = static_cast<int>(cut.row_groups), q.column_groups = static_cast<int>(cut.column_groups);
    q.row_span = static_cast<int>(cut.row_span), q.column_span = static_cast<int>(cut.column_span);
    const int64_t blocks = p.B * cut.row_groups * cut.column_groups;
    if (cut.edge == 128) sweep<128>(q, blocks);
    else sweep<64>(q, blocks);
    launch(join, p.B * cut.programs, JOINED, 0, stream,
           Joined{q, static_cast<float*>(p.rows), static_cast<float*>(p.columns), losses,
                  static_cast<int>(cut.programs)});
    const double most = p.symmetric ? (std::log(double(p.M)) + std::log(double(p.N))) / 2 : std::log(double(p.M));
    launch(add_up, 1, ADDED, 0, stream, losses, p.B * cut.programs, inverse, most, static_cast<float*>(p.loss),
           static_cast<float*>(p.bound), nullptr, nullptr);
  }

  template <int EDGE>
  void sweep(const Patches& q, int64_t blocks) {
    using S = Shape<T, EDGE, EDGE>;
    launch(patches<T, EDGE, EDGE>, blocks, S::THREADS, S::SHARED + static_cast<int>(sizeof(Room<EDGE, EDGE>)), stream,
           q);
  }

  void backward() {
    Slopes q{};
    q.s = logits();
    q.x_entries = operand<T>(p.x, q.s.x.batch, 0, plain(p.x_s[2]), plain(p.x_s[1]));
    q.y_entries = operand<T>(p.y, q.s.y.batch, 0, plain(p.y_s[2]), plain(p.y_s[1]));
    q.rows = static_cast<const float*>(p.rows), q.columns = static_cast<const float*>(p.columns);
    q.d_loss = static_cast<const float*>(p.d_loss);
    q.d_x = p.d_x, q.d_y = p.d_y;
    q.parts = p.d_temperature ? static_cast<float*>(p.work) : nullptr;
    q.inverse = static_cast<float>(inverse);
    const bool half = p.dtype == kHalf;
    q.lift = half ? 16384.0f : 1.0f;
    q.adapt = half && p.positive && p.symmetric;  // a column may be many rows' pair
    q.x_blocks = p.d_x || p.d_temperature ? static_cast<int>(parts_of(p.N, OWN)) : 0;
    q.y_blocks = p.d_y ? static_cast<int>(parts_of(p.M, OWN)) : 0;
    q.chunks = p.d_x || p.d_y ? static_cast<int>(parts_of(p.D, 256)) : 1;
    const int64_t blocks = p.B * (int64_t(q.x_blocks) + q.y_blocks) * q.chunks, wide = parts_of(p.D, q.chunks);
    if (wide <= 64) sweep_back<64>(q, blocks);
    else if (wide <= 128) sweep_back<128>(q, blocks);
    else if (wide <= 192) sweep_back<192>(q, blocks);
    else sweep_back<256>(q, blocks);
    if (p.d_temperature)
      launch(add_up, 1, ADDED, 0, stream, q.parts, p.B * q.x_blocks, inverse, 0.0,
             static_cast<float*>(p.d_temperature), nullptr, q.d_loss, q.s.temperature);
  }

  template <int BD>
  void sweep_back(const Slopes& q, int64_t blocks) {
    launch(slopes<T, BD>, blocks, 256, SlopesRoom<T, BD>::SHARED, stream, q);
  }
};

}  // namespace

int64_t infonce_work_floats(const InfoNce& p, bool backward) {
  if (backward) return p.d_temperature ? p.B * parts_of(p.N, OWN) : 0;
  const Cut cut(p);
  const int64_t columns = p.symmetric ? (p.positive ? 4 : 2) * cut.row_groups * p.M : 0;
  return p.B * (p.N + 2 * cut.column_groups * p.N + columns + cut.programs);
}

void infonce_forward_cuda(const InfoNce& p, uintptr_t stream) {
  by_type(p.dtype, [&](auto t) { Contrast<decltype(t)>{p, reinterpret_cast<cudaStream_t>(stream)}.forward(); });
}

void infonce_backward_cuda(const InfoNce& p, uintptr_t stream) {
  by_type(p.dtype, [&](auto t) { Contrast<decltype(t)>{p, reinterpret_cast<cudaStream_t>(stream)}.backward(); });
}

}  // namespace infoclip
