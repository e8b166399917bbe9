// The CUDA form. Forward: a thread owns one channel of one query and head. Gradients of locations and weights: a group
// of lanes shares the channels of one query and head. Gradient of the value: a warp owns one pixel and head and gathers
// from the samples of the four cells around it, which lie sorted (kernels/ms_deform_attn/cells.py). No atomics: every
// result is summed by one thread, or by one group of lanes, in one order.

#include "common/device.cuh"
#include "ms_deform_attn/ms_deform_attn.hpp"

namespace infoclip {
namespace {

constexpr int THREADS = 256;

template <class S>
struct Problem {
  const S* value;
  int64_t s[3];
  const float *locations, *weights;
  const int32_t* levels;  // [L, 4] height, width, first pixel, first cell
  const S* grad;
  S *out, *d_value;
  float *d_locations, *d_weights;
  const int64_t *order, *starts;
  int64_t B, S_, M, D, Q, L, P, cells;
};

struct Place {
  int y, x;
  float fy, fx;
  bool inside, finite;
};

__device__ inline Place place(float px, float py, int h, int w) {
  const float x = px * w - 0.5f, y = py * h - 0.5f;
  Place s;
  s.finite = isfinite(x) && isfinite(y);
  s.inside = s.finite && x > -1.0f && y > -1.0f && x < static_cast<float>(w) && y < static_cast<float>(h);
  const float x0 = s.inside ? floorf(x) : 0.0f, y0 = s.inside ? floorf(y) : 0.0f;
  s.x = static_cast<int>(x0), s.y = static_cast<int>(y0);
  s.fx = x - x0, s.fy = y - y0;
  return s;
}

template <class S>
__global__ void __launch_bounds__(THREADS) forward(Problem<S> p) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= p.B * p.Q * p.M * p.D) return;
  const int64_t d = i % p.D, row = i / p.D, m = row % p.M, b = row / p.M / p.Q;
  const S* base = p.value + b * p.s[0] + m * p.s[2] + d;
  const float2* at = reinterpret_cast<const float2*>(p.locations) + row * p.L * p.P;
  const float* weight = p.weights + row * p.L * p.P;
  float sum = 0.0f;
  for (int64_t l = 0; l < p.L; ++l) {
    const int h = p.levels[4 * l], w = p.levels[4 * l + 1];
    const S* map = base + p.levels[4 * l + 2] * p.s[1];
    for (int64_t k = 0; k < p.P; ++k, ++at, ++weight) {
      const Place s = place(at->x, at->y, h, w);
      if (!s.finite) sum += nanf("");
      if (!s.inside) continue;
      const bool left = s.x >= 0, right = s.x + 1 < w, top = s.y >= 0, bottom = s.y + 1 < h;
      const S* corner = map + (int64_t(s.y) * w + s.x) * p.s[1];
      const float v0 = top && left ? widen(corner[0]) : 0.0f, v1 = top && right ? widen(corner[p.s[1]]) : 0.0f;
      const float v2 = bottom && left ? widen(corner[w * p.s[1]]) : 0.0f;
      const float v3 = bottom && right ? widen(corner[(w + 1) * p.s[1]]) : 0.0f;
      const float upper = (1.0f - s.fx) * v0 + s.fx * v1, lower = (1.0f - s.fx) * v2 + s.fx * v3;
      sum += *weight * ((1.0f - s.fy) * upper + s.fy * lower);
    }
  }
  narrow(sum, p.out + i);
}

template <int GROUP>
__device__ inline float group_sum(float v) {
  for (int step = GROUP / 2; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step, GROUP);
  return v;
}

template <class S, int GROUP>
__global__ void __launch_bounds__(THREADS) points(Problem<S> p) {
  const int64_t row = int64_t(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP;
  const int lane = threadIdx.x % GROUP;
  const bool mine = row < p.B * p.Q * p.M;  // every lane of a warp takes part in its shuffles
  const int64_t m = mine ? row % p.M : 0, b = mine ? row / p.M / p.Q : 0;
  const S* base = p.value + b * p.s[0] + m * p.s[2];
  const S* grad = p.grad + (mine ? row : 0) * p.D;
  int64_t i = (mine ? row : 0) * p.L * p.P;
  for (int64_t l = 0; l < p.L; ++l) {
    const int h = p.levels[4 * l], w = p.levels[4 * l + 1];
    const S* map = base + p.levels[4 * l + 2] * p.s[1];
    for (int64_t k = 0; k < p.P; ++k, ++i) {
      const float2 at = reinterpret_cast<const float2*>(p.locations)[i];
      const float weight = p.weights[i];
      const Place s = place(at.x, at.y, h, w);
      float d0 = 0.0f, d1 = 0.0f, d2 = 0.0f, d3 = 0.0f;
      if (s.inside) {
        const bool left = s.x >= 0, right = s.x + 1 < w, top = s.y >= 0, bottom = s.y + 1 < h;
        const S* corner = map + (int64_t(s.y) * w + s.x) * p.s[1];
        for (int64_t d = lane; d < p.D; d += GROUP) {
          const float g = widen(grad[d]);
          if (top && left) d0 += g * widen(corner[d]);
          if (top && right) d1 += g * widen(corner[p.s[1] + d]);
          if (bottom && left) d2 += g * widen(corner[w * p.s[1] + d]);
          if (bottom && right) d3 += g * widen(corner[(w + 1) * p.s[1] + d]);
        }
      }
      d0 = group_sum<GROUP>(d0), d1 = group_sum<GROUP>(d1), d2 = group_sum<GROUP>(d2), d3 = group_sum<GROUP>(d3);
      if (!mine || lane != 0) continue;
      const float gx = 1.0f - s.fx, gy = 1.0f - s.fy;
      const float other = s.finite ? 0.0f : nanf("");
      p.d_weights[i] = s.inside ? gy * (gx * d0 + s.fx * d1) + s.fy * (gx * d2 + s.fx * d3) : other;
      p.d_locations[2 * i] = s.inside ? w * weight * (gy * (d1 - d0) + s.fy * (d3 - d2)) : other;
      p.d_locations[2 * i + 1] = s.inside ? h * weight * (gx * (d2 - d0) + s.fx * (d3 - d1)) : other;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(THREADS) pixels(Problem<S> p) {
  const int64_t item = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if (item >= p.B * p.S_ * p.M) return;
  const int lane = threadIdx.x % 32;
  const int64_t m = item % p.M, pixel = item / p.M % p.S_, b = item / p.M / p.S_;
  int64_t l = 0;
  while (l + 1 < p.L && pixel >= p.levels[4 * l + 6]) ++l;
  const int h = p.levels[4 * l], w = p.levels[4 * l + 1];
  const int y = static_cast<int>(pixel - p.levels[4 * l + 2]) / w, x = static_cast<int>(pixel - p.levels[4 * l + 2]) % w;
  const int64_t cells = (b * p.M + m) * p.cells + p.levels[4 * l + 3];
  const int64_t per_query = p.M * p.L * p.P;
  for (int64_t d0 = 0; d0 < p.D; d0 += 32) {
    const int64_t d = d0 + lane;
    float sum = 0.0f;
    for (int c = 0; c < 4; ++c) {  // the cell whose lower right, lower left, upper right, upper left corner this is
      const int cy = y + c / 2, cx = x + c % 2;
      const int64_t cell = cells + int64_t(cy) * (w + 1) + cx;
      for (int64_t i = p.starts[cell]; i < p.starts[cell + 1]; ++i) {
        const int64_t id = p.order[i];
        const float fx = p.locations[2 * id] * w - 0.5f - (cx - 1), fy = p.locations[2 * id + 1] * h - 0.5f - (cy - 1);
        const float share = (c / 2 ? 1.0f - fy : fy) * (c % 2 ? 1.0f - fx : fx) * p.weights[id];
        const int64_t query = id / per_query;  // of all images: samples are numbered through the batch
        if (d < p.D) sum += share * widen(p.grad[(query * p.M + m) * p.D + d]);
      }
    }
    if (d < p.D) narrow(sum, p.d_value + item * p.D + d);
  }
}

template <class S>
Problem<S> problem(const MsDeformAttn& p) {
  int64_t cells = 0;
  for (int64_t l = 0; l < p.L; ++l) cells += (p.shapes[2 * l] + 1) * (p.shapes[2 * l + 1] + 1);
  return {static_cast<const S*>(p.value), {p.value_s[0], p.value_s[1], p.value_s[2]},
          static_cast<const float*>(p.locations), static_cast<const float*>(p.weights), p.levels,
          static_cast<const S*>(p.grad), static_cast<S*>(p.out), static_cast<S*>(p.d_value),
          static_cast<float*>(p.d_locations), static_cast<float*>(p.d_weights), p.order, p.starts,
          p.B, p.S, p.M, p.D, p.Q, p.L, p.P, cells};
}

unsigned blocks(int64_t items, int64_t each) {
  const int64_t count = (items + each - 1) / each;
  if (count > 0x7fffffff) throw std::invalid_argument("infoclip._C: more than 2^31 blocks");
  return static_cast<unsigned>(count);
}

template <class S>
void launch_forward(const MsDeformAttn& p, cudaStream_t stream) {
  forward<S><<<blocks(p.B * p.Q * p.M * p.D, THREADS), THREADS, 0, stream>>>(problem<S>(p));
  check(cudaGetLastError());
}

template <class S>
void launch_backward(const MsDeformAttn& p, cudaStream_t stream) {
  const Problem<S> s = problem<S>(p);
  const int64_t rows = p.B * p.Q * p.M;
  if (p.d_weights) {
    if (p.D > 16) points<S, 32><<<blocks(rows, THREADS / 32), THREADS, 0, stream>>>(s);
    else if (p.D > 8) points<S, 16><<<blocks(rows, THREADS / 16), THREADS, 0, stream>>>(s);
    else points<S, 8><<<blocks(rows, THREADS / 8), THREADS, 0, stream>>>(s);
    check(cudaGetLastError());
  }
  if (p.d_value) {
    pixels<S><<<blocks(p.B * p.S * p.M, THREADS / 32), THREADS, 0, stream>>>(s);
    check(cudaGetLastError());
  }
}

}  // namespace

void ms_deform_attn_forward_cuda(const MsDeformAttn& p, uintptr_t stream) {
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  by_type(p.dtype, [&](auto t) { launch_forward<decltype(t)>(p, s); });
}

void ms_deform_attn_backward_cuda(const MsDeformAttn& p, uintptr_t stream) {
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  by_type(p.dtype, [&](auto t) { launch_backward<decltype(t)>(p, s); });
}

}  // namespace infoclip
