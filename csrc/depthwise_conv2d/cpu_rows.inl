// Compiled once a set of instructions: only code of this namespace. ISA names the namespace, VBYTES the vector's bytes.
// Vectors run over channels. A row of the input is packed once, channels side by side between zeros, and multiplied with
// the K rows of the gradient that its taps reach, so that the sums of a row of taps stay in registers along a row.
#include <cstdint>
#include <cstring>

#include "depthwise_conv2d/depthwise_conv2d.hpp"

namespace infoclip {
namespace ISA {
namespace {

#include "common/half.inl"

template <class C>
struct Vector {
  typedef C type __attribute__((vector_size(VBYTES), aligned(alignof(C)), may_alias));
  static constexpr int64_t lanes = VBYTES / sizeof(C);
};

// W pixels of `count` channels, side by side; the channels above them are zero.
template <class S, class C>
void pack(const S* from, int64_t channel_s, int64_t pixel_s, int64_t W, int64_t count, C* to) {
  constexpr int64_t lanes = Vector<C>::lanes;
  if (count < lanes) memset(to, 0, W * lanes * sizeof(C));
  if (channel_s == 1 && count == lanes) {
    for (int64_t x = 0; x < W; ++x)
      for (int64_t c = 0; c < lanes; ++c) to[x * lanes + c] = widen(from[x * pixel_s + c]);
    return;
  }
  for (int64_t c = 0; c < count; ++c)
    for (int64_t x = 0; x < W; ++x) to[x * lanes + c] = widen(from[c * channel_s + x * pixel_s]);
}

// sums[j] += sum over a row's pixels of g * x, J taps `step` entries apart.
template <class C, int J>
inline void taps(const C* x, const C* g, int64_t W, int64_t step, C* sums) {
  typedef typename Vector<C>::type V;
  constexpr int64_t lanes = Vector<C>::lanes;
  V sum[J];
  for (int j = 0; j < J; ++j) sum[j] = *reinterpret_cast<const V*>(sums + j * lanes);
  for (int64_t i = 0; i < W * lanes; i += lanes) {
    const V grad = *reinterpret_cast<const V*>(g + i);
    for (int j = 0; j < J; ++j) sum[j] += grad * *reinterpret_cast<const V*>(x + i + j * step);
  }
  for (int j = 0; j < J; ++j) *reinterpret_cast<V*>(sums + j * lanes) = sum[j];
}

// A row of K taps, as many at a time as leave the sums in registers.
template <class C>
void row_of_taps(const C* x, const C* g, int64_t W, int64_t step, int64_t K, C* sums) {
  constexpr int64_t lanes = Vector<C>::lanes;
  for (int64_t left = K; left > 0; left -= 7, x += 7 * step, sums += 7 * lanes) switch (left) {
      case 1: taps<C, 1>(x, g, W, step, sums); break;
      case 2: taps<C, 2>(x, g, W, step, sums); break;
      case 3: taps<C, 3>(x, g, W, step, sums); break;
      case 4: taps<C, 4>(x, g, W, step, sums); break;
      case 5: taps<C, 5>(x, g, W, step, sums); break;
      case 6: taps<C, 6>(x, g, W, step, sums); break;
      default: taps<C, 7>(x, g, W, step, sums);
    }
}

template <class S, class C>
void weight_grad_as(const DepthwiseConv2d& p, int64_t b, int64_t c0, int64_t y0, int64_t y1, C* x, C* g, C* sums) {
  typedef typename Vector<C>::type V;
  constexpr int64_t lanes = Vector<C>::lanes;
  const int64_t count = p.C - c0 < lanes ? p.C - c0 : lanes;
  const int64_t reach = p.K / 2 * p.dilation, rows = 2 * reach + 1, width = (p.W + 2 * reach) * lanes;
  const S* input = static_cast<const S*>(p.x) + b * p.x_s[0] + c0 * p.x_s[1];
  const S* grad = static_cast<const S*>(p.grad) + b * p.grad_s[0] + c0 * p.grad_s[1];
  memset(sums, 0, (p.K * p.K + 1) * lanes * sizeof(C));
  V& bias = *reinterpret_cast<V*>(sums + p.K * p.K * lanes);
  int64_t next = y0 > reach ? y0 - reach : 0;  // first row that is not packed yet
  for (int64_t y = y0; y < y1; ++y) {
    for (; next < p.H && next <= y + reach; ++next)
      pack(input + next * p.x_s[2], p.x_s[1], p.x_s[3], p.W, count, x + next % rows * width + reach * lanes);
    pack(grad + y * p.grad_s[2], p.grad_s[1], p.grad_s[3], p.W, count, g);
    V row{};
    for (int64_t i = 0; i < p.W * lanes; i += lanes) row += *reinterpret_cast<const V*>(g + i);
    bias += row;
    for (int64_t i = 0; i < p.K; ++i) {
      const int64_t r = y - reach + i * p.dilation;
      if (r < 0 || r >= p.H) continue;
      row_of_taps(x + r % rows * width, g, p.W, p.dilation * lanes, p.K, sums + i * p.K * lanes);
    }
  }
}

template <class C>
void weight_grad(const DepthwiseConv2d& p, int64_t b, int64_t c0, int64_t y0, int64_t y1, C* x, C* g, C* sums) {
  if constexpr (sizeof(C) == 8) {
    weight_grad_as<double>(p, b, c0, y0, y1, x, g, sums);
  } else if (p.dtype == kHalf) {
    weight_grad_as<Half>(p, b, c0, y0, y1, x, g, sums);
  } else if (p.dtype == kBFloat16) {
    weight_grad_as<BFloat16>(p, b, c0, y0, y1, x, g, sums);
  } else {
    weight_grad_as<float>(p, b, c0, y0, y1, x, g, sums);
  }
}

}  // namespace

template <class C>
const DepthwiseRows<C>& depthwise_rows() {
  static const DepthwiseRows<C> table{Vector<C>::lanes, weight_grad<C>};
  return table;
}
template const DepthwiseRows<float>& depthwise_rows<float>();
template const DepthwiseRows<double>& depthwise_rows<double>();

}  // namespace ISA
}  // namespace infoclip
