// The CUDA form. Forward: norms of both inputs, then the product, to whose finished sums they are applied. Backward:
// norms, both gradients' products in one launch, both projections in one. No atomics: each sum has one order.
#include "common/tile.cuh"
#include "cost_volume/cost_volume.hpp"

namespace infoclip {
namespace {

constexpr float kEps = 1e-12f;
constexpr int ROW_THREADS = 256;  // of the launches that give a row to a warp

// out[b, m, n] = factor row_scale[b, m] column_scale[b, n] sum over s, k of A[m, k] depth_scale[b, s, k] B[n, k]
struct Product {
  Operand a, b;
  const float *row_scale, *column_scale, *depth_scale;  // or null
  int64_t row_scale_batch, column_scale_batch, depth_scale_batch, depth_scale_summand;
  void* out;
  int64_t out_batch, out_row;  // columns are contiguous
  bool wide;                   // the result is fp32, whatever the operands are
  bool pairs;                  // two neighbouring results are one aligned access
  int M, N, K, summands;
  float factor;
  int64_t blocks;
};

template <class O>
__device__ inline void store(const Product& p, int64_t b, int m, int n, float first, float second) {
  if (m >= p.M || n >= p.N) return;
  const float row = p.row_scale ? p.row_scale[b * p.row_scale_batch + m] * p.factor : p.factor;
  const float* column = p.column_scale ? p.column_scale + b * p.column_scale_batch + n : nullptr;
  O* to = static_cast<O*>(p.out) + b * p.out_batch + m * p.out_row + n;
  first *= column ? row * column[0] : row;
  if (n + 1 == p.N) return narrow(first, to);
  second *= column ? row * column[1] : row;
  if (p.pairs) {
    *reinterpret_cast<Pair<O>*>(to) = narrow_pair<O>(first, second);
  } else {
    narrow(first, to);
    narrow(second, to + 1);
  }
}

// 128 registers a thread at most, so that an SM holds two blocks of 8 warps or four of 4: 16 warps hide each other's
// waits at the barriers. Their shared memory is 121 KiB or 122 KiB of an SM's 164 (8.0) or 228 (9.0). The larger tiles
// of floats have both parts of each fragment to hold as well and would spill: one block an SM, and up to 255 registers.
template <class T, int BM, int BN>
__global__ void __launch_bounds__(Shape<T, BM, BN>::THREADS, BM == 64 ? 4 : sizeof(T) == 2 ? 2 : 1)
    products(const __grid_constant__ Product first, const __grid_constant__ Product second) {
  const bool is_first = blockIdx.x < first.blocks;
  const Product& p = is_first ? first : second;
  uint32_t rest = is_first ? blockIdx.x : blockIdx.x - static_cast<uint32_t>(first.blocks);
  const uint32_t columns = (p.N + BN - 1) / BN, rows = (p.M + BM - 1) / BM;
  const int n0 = rest % columns * BN;
  rest /= columns;
  const int m0 = rest % rows * BM;
  const int64_t b = rest / rows;
  float acc[BM / 32][4][4];
  multiply_tile<T, BM, BN>(acc, dynamic_shared(), p.a, b * p.a.batch, m0, p.M, p.b, b * p.b.batch, n0, p.N, p.K,
                           p.summands, p.depth_scale ? p.depth_scale + b * p.depth_scale_batch : nullptr,
                           p.depth_scale_summand);
  for_each_pair<BM, BN>(acc, [&](int m, int n, float left, float right) {
    if (p.wide) store<float>(p, b, m0 + m, n0 + n, left, right);
    else store<T>(p, b, m0 + m, n0 + n, left, right);
  });
}

// The rows of one input: x[i / rows * batch + row(i % rows) + d * stride].
struct Rows {
  const void* x;
  int64_t batch, stride, rows, total, D;
  Axis row;
  float* inverse;     // [total] 1 / max(norm, kEps)
  const float* unit;  // [total, D] gradient of the unit vector
  void* out;          // its projection
  int64_t out_batch;
  Axis out_row;
};

template <class T>  // one warp a row
__global__ void __launch_bounds__(ROW_THREADS)
    row_norms(const __grid_constant__ Rows first, const __grid_constant__ Rows second) {
  int64_t i = (int64_t(blockIdx.x) * ROW_THREADS + threadIdx.x) / 32;
  const Rows& r = i < first.total ? first : second;
  if (i >= first.total) i -= first.total;
  if (i >= r.total) return;
  const T* from = static_cast<const T*>(r.x) + i / r.rows * r.batch + r.row(static_cast<uint32_t>(i % r.rows));
  float sum = 0;
  for (int64_t d = threadIdx.x % 32; d < r.D; d += 32) {
    const float v = widen(from[d * r.stride]);
    sum = fmaf(v, v, sum);
  }
  const float norm = sqrtf(warp_sum(sum));
  if (threadIdx.x % 32 == 0) r.inverse[i] = 1.0f / (norm < kEps ? kEps : norm);
}

template <class T>  // one warp a row: out = inverse (g - u <u, g>)
__global__ void __launch_bounds__(ROW_THREADS)
    project(const __grid_constant__ Rows first, const __grid_constant__ Rows second) {
  int64_t i = (int64_t(blockIdx.x) * ROW_THREADS + threadIdx.x) / 32;
  const Rows& r = i < first.total ? first : second;
  if (i >= first.total) i -= first.total;
  if (i >= r.total) return;
  const uint32_t row = static_cast<uint32_t>(i % r.rows);
  const T* from = static_cast<const T*>(r.x) + i / r.rows * r.batch + r.row(row);
  T* to = static_cast<T*>(r.out) + i / r.rows * r.out_batch + r.out_row(row);
  const float* g = r.unit + i * r.D;
  const float inverse = r.inverse[i];
  const bool clamped = inverse >= 1.0f / kEps;  // a constant then: nothing to project on
  float dot = 0;
  if (!clamped)
    for (int64_t d = threadIdx.x % 32; d < r.D; d += 32) dot = fmaf(widen(from[d * r.stride]) * inverse, g[d], dot);
  dot = warp_sum(dot);
  for (int64_t d = threadIdx.x % 32; d < r.D; d += 32) {
    const float u = clamped ? 0.0f : widen(from[d * r.stride]) * inverse;
    narrow(inverse * (g[d] - u * dot), to + d);
  }
}

template <class T>
struct Run {
  const CostVolume& p;
  cudaStream_t stream;
  int64_t R = p.P * p.T, texts = p.shared ? 1 : p.B, pixels = p.B * p.N;
  float* unit_image = static_cast<float*>(p.work);  // first, where the work's alignment is
  float* unit_text = unit_image + (p.d_image ? pixels * p.D : 0);
  float* text_inverse = unit_text + (p.d_text ? texts * R * p.D : 0);
  float* image_inverse = text_inverse + texts * R;
  Axis text_row = nested(p.P, p.T, p.text_s[2], p.text_s[1]);
  Axis image_row = plain(p.image_s[1]);

  Rows image_rows() const {
    return {p.image, p.image_s[0], p.image_s[2], p.N, pixels, p.D, image_row, image_inverse, unit_image, p.d_image,
            p.N * p.D, plain(p.D)};
  }
  Rows text_rows() const {
    return {p.text, p.text_s[0], p.text_s[3], R, texts * R, p.D, text_row, text_inverse, unit_text, p.d_text,
            R * p.D, nested(p.P, p.T, p.D, p.P * p.D)};
  }

  void by_row(void (*kernel)(Rows, Rows), const Rows& first, const Rows& second) {
    const int64_t warps = first.total + second.total;
    launch(kernel, (warps + ROW_THREADS / 32 - 1) / (ROW_THREADS / 32), ROW_THREADS, 0, stream, first, second);
  }

  // The larger tiles where there are enough of them.
  void multiply(Product first, Product second) {
    const auto tiles = [](const Product& q, int64_t batches, int64_t side) {
      return batches * ((q.M + side - 1) / side) * ((q.N + side - 1) / side);
    };
    const int64_t batches_1 = first.blocks, batches_2 = second.blocks;  // until they are counted
    const bool large = tiles(first, batches_1, 128) + tiles(second, batches_2, 128) >= FILLS_GPU;
    first.blocks = tiles(first, batches_1, large ? 128 : 64);
    second.blocks = tiles(second, batches_2, large ? 128 : 64);
    const int64_t blocks = first.blocks + second.blocks;
    if (large)
      launch(products<T, 128, 128>, blocks, Shape<T, 128, 128>::THREADS, Shape<T, 128, 128>::SHARED, stream, first,
             second);
    else
      launch(products<T, 64, 64>, blocks, Shape<T, 64, 64>::THREADS, Shape<T, 64, 64>::SHARED, stream, first, second);
  }

  template <class O>
  Product result(Product q, O* out, int64_t batches, int64_t M, int64_t N, int64_t K, int64_t summands) const {
    q.out = out, q.out_batch = M * N, q.out_row = N, q.wide = sizeof(O) == 4;
    q.pairs = reinterpret_cast<uintptr_t>(out) % sizeof(Pair<O>) == 0 && N % 2 == 0;
    q.M = extent(M), q.N = extent(N), q.K = extent(K), q.summands = extent(summands);
    extent((K + 15) / 16 * summands);
    q.factor = static_cast<float>(p.scale);
    q.blocks = batches;
    return q;
  }

  void forward() {
    by_row(row_norms<T>, text_rows(), image_rows());
    Product q{};
    q.a = operand<T>(p.text, p.text_s[0], 0, text_row, plain(p.text_s[3]));
    q.b = operand<T>(p.image, p.image_s[0], 0, image_row, plain(p.image_s[2]));
    q.row_scale = text_inverse, q.row_scale_batch = p.shared ? 0 : R;
    q.column_scale = image_inverse, q.column_scale_batch = p.N;
    multiply(result(q, static_cast<T*>(p.out), p.B, R, p.N, p.D, 1), Product{});
  }

  void backward() {
    by_row(row_norms<T>, text_rows(), image_rows());
    const Axis grad_row = nested(p.P, p.T, p.grad_s[1], p.grad_s[2]), grad_column = plain(p.grad_s[3]);
    Product of_text{}, of_image{};
    Rows text{}, image{};
    if (p.d_text) {  // first: with one text for all images its sums are the longest
      of_text.a = operand<T>(p.grad, p.shared ? 0 : p.grad_s[0], p.shared ? p.grad_s[0] : 0, grad_row, grad_column);
      of_text.b = operand<T>(p.image, p.shared ? 0 : p.image_s[0], p.shared ? p.image_s[0] : 0, plain(p.image_s[2]),
                             image_row);
      of_text.depth_scale = image_inverse;
      of_text.depth_scale_batch = p.shared ? 0 : p.N, of_text.depth_scale_summand = p.shared ? p.N : 0;
      of_text = result(of_text, unit_text, texts, R, p.D, p.N, p.shared ? p.B : 1);
      text = text_rows();
    }
    if (p.d_image) {
      of_image.a = operand<T>(p.grad, p.grad_s[0], 0, grad_column, grad_row);
      of_image.b = operand<T>(p.text, p.text_s[0], 0, plain(p.text_s[3]), text_row);
      of_image.depth_scale = text_inverse, of_image.depth_scale_batch = p.shared ? 0 : R;
      of_image = result(of_image, unit_image, p.B, p.N, p.D, R, 1);
      image = image_rows();
    }
    multiply(of_text, of_image);
    by_row(project<T>, text, image);
  }
};

}  // namespace

void cost_volume_forward_cuda(const CostVolume& p, uintptr_t stream) {
  by_type(p.dtype, [&](auto t) { Run<decltype(t)>{p, reinterpret_cast<cudaStream_t>(stream)}.forward(); });
}

void cost_volume_backward_cuda(const CostVolume& p, uintptr_t stream) {
  by_type(p.dtype, [&](auto t) { Run<decltype(t)>{p, reinterpret_cast<cudaStream_t>(stream)}.backward(); });
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace infoclip
