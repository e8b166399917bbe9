// The CUDA form in three launches: labels and their count, one sweep for loss and gradient, the sum of the losses.
// A thread owns a cell (the square between four neighbouring logits): four logits and four gradients in registers, all
// the cell's samples one after the other; the gradients of neighbouring cells meet in shared memory. No atomics: every
// result is summed by one thread in one order.
#include <algorithm>

#include "common/device.cuh"
#include "upsample_bce/upsample_bce.hpp"

namespace infoclip {
namespace {

constexpr int TH = 8, TW = 32;                  // logits whose gradient a block owns
constexpr int CH = TH + 1, CW = TW + 1;         // cells that reach them: one row and one column more
constexpr int THREADS = 320;                    // at least CH * CW, whole warps
constexpr int PREPARE = 256, MOST_COUNTS = 256; // threads and blocks of the first launch
static_assert(CH * CW <= THREADS && THREADS % 32 == 0, "a thread a cell");

// Where the samples of an output axis lie on the input axis, in exact integer arithmetic: sample o is at
// ((2 o + 1) in - out) / (2 out), clamped to 0..in-1; its cell is the integer part.
struct Axis {
  int64_t in, out;
  __device__ int64_t first(int64_t cell) const {  // first sample whose cell is at least `cell`
    if (cell <= 0) return 0;
    if (cell >= in) return out;
    const int64_t o = (out * (2 * cell + 1) - in + 2 * in - 1) / (2 * in);
    return o < out ? o : out;
  }
};

struct Labels {
  const int64_t* target;
  int64_t s[3];
  int64_t ignore_index, T, H, W, pixels;
};

__global__ void __launch_bounds__(PREPARE) prepare(Labels p, int32_t* labels, int32_t* counts) {
  __shared__ int room[PREPARE / 32];
  int count = 0;
  for (int64_t o = int64_t(blockIdx.x) * PREPARE + threadIdx.x; o < p.pixels; o += int64_t(gridDim.x) * PREPARE) {
    const int64_t row = o / p.W;
    const int64_t label = p.target[row / p.H * p.s[0] + row % p.H * p.s[1] + o % p.W * p.s[2]];
    const bool known = label >= 0 && label < p.T && label != p.ignore_index;
    labels[o] = known ? static_cast<int32_t>(label) : -1;
    count += known;
  }
  count = block_sum<PREPARE>(count, room);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

template <class S>
struct Sweep {
  const S* logits;
  int64_t s[4];
  const int32_t *labels, *counts;
  int blocks;            // of the first launch
  float inverse;         // 1 / samples, where pixels without a class are negatives
  float *losses, *grad;  // [planes, tiles]; [B, T, h, w] or null
  int64_t T, h, w, H, W;
  int tiles_x, tiles;
};

template <class S, bool GRAD, bool MASKED>
__global__ void __launch_bounds__(THREADS) sweep(Sweep<S> p) {
  __shared__ float corner[GRAD ? 4 : 1][CH][CW];
  __shared__ float room[THREADS / 32];
  __shared__ int counts_room[THREADS / 32];
  const int64_t plane = blockIdx.x / p.tiles, b = plane / p.T;
  const int32_t t = static_cast<int32_t>(plane % p.T);
  const int tile = static_cast<int>(blockIdx.x % p.tiles);
  const int64_t i0 = int64_t(tile / p.tiles_x) * TH, j0 = int64_t(tile % p.tiles_x) * TW;
  float inverse = p.inverse;
  if (MASKED) {
    int known = 0;
    for (int i = threadIdx.x; i < p.blocks; i += THREADS) known += p.counts[i];
    known = block_sum<THREADS>(known, counts_room);
    inverse = 1.0f / fmaxf(static_cast<float>(known) * static_cast<float>(p.T), 1.0f);
  }
  const int row = threadIdx.x / CW, column = threadIdx.x % CW;
  const int64_t i = i0 - 1 + row, j = j0 - 1 + column;
  float loss = 0, g00 = 0, g01 = 0, g10 = 0, g11 = 0;
  if (row < CH && i >= 0 && i < p.h && j >= 0 && j < p.w) {
    const Axis ay{p.h, p.H}, ax{p.w, p.W};
    const int64_t y0 = ay.first(i), y1 = ay.first(i + 1), x0 = ax.first(j), x1 = ax.first(j + 1);
    const int64_t below = i + 1 < p.h ? p.s[2] : 0, right = j + 1 < p.w ? p.s[3] : 0;
    const S* at = p.logits + b * p.s[0] + t * p.s[1] + i * p.s[2] + j * p.s[3];
    const float a00 = widen(at[0]), a01 = widen(at[right]), a10 = widen(at[below]), a11 = widen(at[below + right]);
    const int32_t* labels = p.labels + b * p.H * p.W;
    const float step_y = 1.0f / (2 * p.H), step_x = 1.0f / (2 * p.W);
    for (int64_t y = y0; y < y1; ++y) {
      // Exact up to the one product: where the sample lies in its cell; samples outside the logits are clamped.
      const float fy = below ? fmaxf(((2 * y + 1) * p.h - p.H - 2 * p.H * i) * step_y, 0.0f) : 0.0f;
      const float left = a00 + fy * (a10 - a00), slope = a01 + fy * (a11 - a01) - left;
      float sum = 0, moment = 0;
      for (int64_t x = x0; x < x1; ++x) {
        const float fx = right ? fmaxf(((2 * x + 1) * p.w - p.W - 2 * p.W * j) * step_x, 0.0f) : 0.0f;
        const int32_t label = labels[y * p.W + x];
        if (MASKED && label < 0) continue;
        const float z = left + fx * slope;
        const float u = label == t ? -z : z;  // either way the loss is log(1 + exp(u)): nothing cancels
        const float e = __expf(-fabsf(u));
        const float s = __fdividef(e, 2.0f + e), q = s * s;
        float series = 1.0f / 13.0f;  // log(1 + e) = 2 artanh(s)
        series = fmaf(series, q, 1.0f / 11.0f);
        series = fmaf(series, q, 1.0f / 9.0f);
        series = fmaf(series, q, 1.0f / 7.0f);
        series = fmaf(series, q, 1.0f / 5.0f);
        series = fmaf(series, q, 1.0f / 3.0f);
        series = fmaf(series, q, 1.0f);
        loss += (u < 0.0f ? 0.0f : u) + 2.0f * s * series;  // a NaN is not below 0 and stays
        if (GRAD) {
          const float inv = __fdividef(1.0f, 1.0f + e);
          const float d = u >= 0.0f ? inv : e * inv;
          const float g = label == t ? -d : d;
          sum += g;
          moment = fmaf(fx, g, moment);
        }
      }
      if (GRAD) {
        const float near = sum - moment;
        g00 += near - fy * near;
        g10 += fy * near;
        g01 += moment - fy * moment;
        g11 += fy * moment;
      }
    }
    if (row == 0 || column == 0) loss = 0;  // a neighbouring block counts it
  }
  if (GRAD && row < CH) {
    corner[0][row][column] = g00;
    corner[1][row][column] = g01;
    corner[2][row][column] = g10;
    corner[3][row][column] = g11;
  }
  loss = block_sum<THREADS>(loss, room);  // its barriers also order the corners
  if (threadIdx.x == 0) p.losses[plane * p.tiles + tile] = loss * inverse;
  if (GRAD && row >= 1 && row < CH && column >= 1 && i < p.h && j < p.w)
    p.grad[(plane * p.h + i) * p.w + j] = inverse * ((corner[0][row][column] + corner[1][row][column - 1]) +
                                                    (corner[2][row - 1][column] + corner[3][row - 1][column - 1]));
}

__global__ void __launch_bounds__(1024) sum_losses(const float* losses, int64_t n, float* loss) {
  __shared__ double room[32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += 1024) sum += losses[i];
  sum = block_sum<1024>(sum, room);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t tiles_of(const UpsampleBce& p) { return ceil_div(p.h, TH) * ceil_div(p.w, TW); }

template <class S>
void launch(const UpsampleBce& p, cudaStream_t stream) {
  const int64_t pixels = p.B * p.H * p.W, tiles = tiles_of(p), planes = p.B * p.T;
  if (planes * tiles > 0x7fffffff || tiles > 0x7fffffff)
    throw std::invalid_argument("infoclip._C: more than 2^31 tiles of logits");
  auto* labels = static_cast<int32_t*>(p.work);
  int32_t* counts = labels + pixels;
  auto* losses = reinterpret_cast<float*>(counts + MOST_COUNTS);
  const int blocks = static_cast<int>(std::min<int64_t>(ceil_div(pixels, PREPARE), MOST_COUNTS));
  prepare<<<blocks, PREPARE, 0, stream>>>(
      Labels{p.target, {p.target_s[0], p.target_s[1], p.target_s[2]}, p.ignore_index, p.T, p.H, p.W, pixels}, labels,
      counts);
  check(cudaGetLastError());
  const Sweep<S> s{static_cast<const S*>(p.logits),
                   {p.logits_s[0], p.logits_s[1], p.logits_s[2], p.logits_s[3]},
                   labels, counts, blocks,
                   static_cast<float>(1.0 / (static_cast<double>(pixels) * p.T)),
                   losses, static_cast<float*>(p.grad), p.T, p.h, p.w, p.H, p.W,
                   static_cast<int>(ceil_div(p.w, TW)), static_cast<int>(tiles)};
  const unsigned grid = static_cast<unsigned>(planes * tiles);
  if (p.grad) {
    if (p.masked) sweep<S, true, true><<<grid, THREADS, 0, stream>>>(s);
    else sweep<S, true, false><<<grid, THREADS, 0, stream>>>(s);
  } else {
    if (p.masked) sweep<S, false, true><<<grid, THREADS, 0, stream>>>(s);
    else sweep<S, false, false><<<grid, THREADS, 0, stream>>>(s);
  }
  check(cudaGetLastError());
  sum_losses<<<1, 1024, 0, stream>>>(losses, planes * tiles, static_cast<float*>(p.loss));
  check(cudaGetLastError());
}

}  // namespace

int64_t upsample_bce_work_bytes(const UpsampleBce& p) {
  return 4 * (p.B * p.H * p.W + MOST_COUNTS + p.B * p.T * tiles_of(p));
}

void upsample_bce_cuda(const UpsampleBce& p, uintptr_t stream) {
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  by_type(p.dtype, [&](auto t) { launch<decltype(t)>(p, s); });
}

}  // namespace infoclip
