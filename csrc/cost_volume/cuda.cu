// The CUDA form: row norms, one tiled product that serves the forward and both gradients, and the projection.
// No atomics: every result is summed by one thread in one order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cost_volume/cost_volume.hpp"

namespace infoclip {
namespace {

constexpr float kEps = 1e-12f;
constexpr int TILE = 64;   // results a block of threads computes in each direction
constexpr int DEPTH = 16;  // of K in shared memory
constexpr int SIDE = 16;   // threads a block in each direction, 4 x 4 results each

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("infoclip._C: CUDA: ") + cudaGetErrorString(status));
}

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void narrow(float v, float* out) { *out = v; }
__device__ inline void narrow(float v, __half* out) { *out = __float2half_rn(v); }
__device__ inline void narrow(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }

// Where index i lies: two nested axes walked as one.
struct Axis {
  int64_t inner, outer_stride, inner_stride;
  __device__ int64_t operator()(int64_t i) const { return i / inner * outer_stride + i % inner * inner_stride; }
};

// element (i, k) of batch o, summand s: data[o * batch + s * summand + row(i) + column(k)] * row_scale * column_scale
template <class T>
struct Operand {
  const T* data;
  int64_t batch, summand;
  Axis row, column;
  const float* row_scale;
  int64_t row_scale_batch;
  const float* column_scale;
  int64_t column_scale_batch, column_scale_summand;
};

template <class A, class B, class O>
__global__ void __launch_bounds__(SIDE* SIDE)
    product(Operand<A> a, Operand<B> b, O* out, int64_t out_batch, Axis out_row, int64_t M, int64_t N, int64_t K,
            int64_t summands, float scale) {
  __shared__ float sa[DEPTH][TILE + 1], sb[DEPTH][TILE + 1];
  const int64_t o = blockIdx.z, m0 = int64_t(blockIdx.y) * TILE, n0 = int64_t(blockIdx.x) * TILE;
  const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
  float acc[4][4] = {};
  for (int64_t s = 0; s < summands; ++s) {
    for (int64_t k0 = 0; k0 < K; k0 += DEPTH) {
      for (int e = threadIdx.x; e < TILE * DEPTH; e += SIDE * SIDE) {
        // Neighbouring threads walk the axis whose stride is 1.
        const bool a_rows = a.row.inner_stride == 1, b_rows = b.row.inner_stride == 1;
        const int ai = a_rows ? e % TILE : e / DEPTH, ak = a_rows ? e / TILE : e % DEPTH;
        const int bi = b_rows ? e % TILE : e / DEPTH, bk = b_rows ? e / TILE : e % DEPTH;
        float va = 0, vb = 0;
        if (m0 + ai < M && k0 + ak < K) {
          va = widen(a.data[o * a.batch + s * a.summand + a.row(m0 + ai) + a.column(k0 + ak)]);
          if (a.row_scale) va *= a.row_scale[o * a.row_scale_batch + m0 + ai];
        }
        if (n0 + bi < N && k0 + bk < K) {
          vb = widen(b.data[o * b.batch + s * b.summand + b.row(n0 + bi) + b.column(k0 + bk)]);
          if (b.row_scale) vb *= b.row_scale[o * b.row_scale_batch + n0 + bi];
          if (b.column_scale) vb *= b.column_scale[o * b.column_scale_batch + s * b.column_scale_summand + k0 + bk];
        }
        sa[ak][ai] = va;
        sb[bk][bi] = vb;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < DEPTH; ++k) {
        float va[4], vb[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) va[i] = sa[k][ty + i * SIDE], vb[i] = sb[k][tx + i * SIDE];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(va[i], vb[j], acc[i][j]);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t m = m0 + ty + i * SIDE, n = n0 + tx + j * SIDE;
      if (m < M && n < N) narrow(acc[i][j] * scale, out + o * out_batch + out_row(m) + n);
    }
}

__device__ inline float warp_sum(float v) {
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class T>  // one warp a row
__global__ void row_norms(const T* x, int64_t batch, Axis row, int64_t stride, int64_t rows, int64_t total, int64_t D,
                          float* inverse) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= total) return;
  const T* from = x + i / rows * batch + row(i % rows);
  float sum = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const float v = widen(from[d * stride]);
    sum = fmaf(v, v, sum);
  }
  const float norm = sqrtf(warp_sum(sum));
  if (threadIdx.x % 32 == 0) inverse[i] = 1.0f / (norm < kEps ? kEps : norm);
}

template <class T>  // one warp a row: out = inverse * (g - u <u, g>)
__global__ void project(const float* g, const T* x, int64_t batch, Axis row, int64_t stride, int64_t rows,
                        int64_t total, int64_t D, const float* inverse, T* out, int64_t out_batch, Axis out_row) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= total) return;
  const T* from = x + i / rows * batch + row(i % rows);
  T* to = out + i / rows * out_batch + out_row(i % rows);
  const float inv = inverse[i];
  const bool clamped = inv >= 1.0f / kEps;
  float dot = 0;
  if (!clamped)
    for (int64_t d = threadIdx.x % 32; d < D; d += 32) dot = fmaf(widen(from[d * stride]) * inv, g[i * D + d], dot);
  dot = warp_sum(dot);
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const float u = clamped ? 0.0f : widen(from[d * stride]) * inv;
    narrow(inv * (g[i * D + d] - u * dot), to + d);
  }
}

template <class T>
struct Run {
  const CostVolume& p;
  cudaStream_t stream;
  int64_t R = p.P * p.T, texts = p.shared ? 1 : p.B;
  Axis text_row{std::max<int64_t>(p.T, 1), p.text_s[2], p.text_s[1]};
  Axis grad_row{std::max<int64_t>(p.T, 1), p.grad_s[1], p.grad_s[2]};
  Axis image_row = plain(p.image_s[1]);
  float* text_inverse = static_cast<float*>(p.work);
  float* image_inverse = text_inverse + texts * R;
  float* unit = image_inverse + p.B * p.N;

  static Axis plain(int64_t stride) { return {int64_t(1) << 62, 0, stride}; }
  static unsigned warps(int64_t rows) { return static_cast<unsigned>((rows * 32 + 255) / 256); }

  void norms() {
    const int64_t pixels = p.B * p.N;
    if (texts * R)
      row_norms<T><<<warps(texts * R), 256, 0, stream>>>(static_cast<const T*>(p.text), p.text_s[0], text_row,
                                                         p.text_s[3], R, texts * R, p.D, text_inverse);
    if (pixels)
      row_norms<T><<<warps(pixels), 256, 0, stream>>>(static_cast<const T*>(p.image), p.image_s[0], image_row,
                                                      p.image_s[2], p.N, pixels, p.D, image_inverse);
    check(cudaGetLastError());
  }

  template <class A, class B, class O>
  void multiply(const Operand<A>& a, const Operand<B>& b, O* out, int64_t out_batch, Axis out_row, int64_t batches,
                int64_t M, int64_t N, int64_t K, int64_t summands) {
    if (batches == 0 || M == 0 || N == 0) return;
    const dim3 grid(static_cast<unsigned>((N + TILE - 1) / TILE), static_cast<unsigned>((M + TILE - 1) / TILE),
                    static_cast<unsigned>(batches));
    if (grid.y > 65535 || grid.z > 65535) throw std::invalid_argument("infoclip._C: too many rows for one launch");
    product<<<grid, SIDE * SIDE, 0, stream>>>(a, b, out, out_batch, out_row, M, N, K, summands,
                                              static_cast<float>(p.scale));
    check(cudaGetLastError());
  }

  void forward() {
    norms();
    Operand<T> text{static_cast<const T*>(p.text), p.text_s[0], 0, text_row, plain(p.text_s[3]),
                    text_inverse, p.shared ? 0 : R, nullptr, 0, 0};
    Operand<T> image{static_cast<const T*>(p.image), p.image_s[0], 0, image_row, plain(p.image_s[2]),
                     image_inverse, p.N, nullptr, 0, 0};
    multiply(text, image, static_cast<T*>(p.out), R * p.N, plain(p.N), p.B, R, p.N, p.D, 1);
  }

  void backward() {
    norms();
    const int64_t pixels = p.B * p.N;
    if (p.d_image) {
      Operand<T> grad{static_cast<const T*>(p.grad), p.grad_s[0], 0, plain(p.grad_s[3]), grad_row,
                      nullptr, 0, nullptr, 0, 0};
      Operand<T> text{static_cast<const T*>(p.text), p.text_s[0], 0, plain(p.text_s[3]), text_row,
                      nullptr, 0, text_inverse, p.shared ? 0 : R, 0};
      multiply(grad, text, unit, p.N * p.D, plain(p.D), p.B, p.N, p.D, R, 1);
      if (pixels)
        project<T><<<warps(pixels), 256, 0, stream>>>(unit, static_cast<const T*>(p.image), p.image_s[0], image_row,
                                                      p.image_s[2], p.N, pixels, p.D, image_inverse,
                                                      static_cast<T*>(p.d_image), p.N * p.D, plain(p.D));
      check(cudaGetLastError());
    }
    if (p.d_text) {
      Operand<T> grad{static_cast<const T*>(p.grad), p.shared ? 0 : p.grad_s[0], p.shared ? p.grad_s[0] : 0, grad_row,
                      plain(p.grad_s[3]), nullptr, 0, nullptr, 0, 0};
      Operand<T> image{static_cast<const T*>(p.image), p.shared ? 0 : p.image_s[0], p.shared ? p.image_s[0] : 0,
                       plain(p.image_s[2]), image_row, nullptr, 0,
                       image_inverse, p.shared ? 0 : p.N, p.shared ? p.N : 0};
      multiply(grad, image, unit, R * p.D, plain(p.D), texts, R, p.D, p.N, p.shared ? p.B : 1);
      if (texts * R)
        project<T><<<warps(texts * R), 256, 0, stream>>>(
            unit, static_cast<const T*>(p.text), p.text_s[0], text_row, p.text_s[3], R, texts * R, p.D, text_inverse,
            static_cast<T*>(p.d_text), R * p.D, Axis{std::max<int64_t>(p.T, 1), p.D, p.P * p.D});
      check(cudaGetLastError());
    }
  }
};

template <class F>
void by_type(int dtype, F&& f) {
  if (dtype == kFloat) f(float());
  else if (dtype == kHalf) f(__half());
  else f(__nv_bfloat16());
}

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
