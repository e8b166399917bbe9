// The driver of the CPU form. A work item is one image, a vector of channels and 32 rows of the gradient, whatever the
// number of threads is; the items' sums are then added up in order, so that it does not change a bit either.
#include <algorithm>
#include <vector>

#include "depthwise_conv2d/depthwise_conv2d.hpp"

namespace infoclip {
namespace {

constexpr int64_t ROWS = 32;  // of a work item: what is packed twice, K - 1 rows, stays small beside them

template <class C>
void run(const DepthwiseConv2d& p, Isa isa, int threads) {
  const DepthwiseRows<C>& k = INFOCLIP_BY_ISA(isa, depthwise_rows<C>());
  const int64_t blocks = (p.C + k.lanes - 1) / k.lanes, runs = (p.H + ROWS - 1) / ROWS, parts = p.B * runs;
  const int64_t taps = p.K * p.K + 1, reach = p.K / 2 * p.dilation;
  const int64_t x_size = (2 * reach + 1) * (p.W + 2 * reach) * k.lanes;
  std::vector<C> sums(blocks * parts * taps * k.lanes);
  // A thread costs some 20 us: fewer than 2^16 products do not feed one.
  Team team(threads, std::min<int64_t>(p.B * p.C * p.H * p.W * p.K * p.K >> 16, blocks * parts));
  team.run(blocks * parts, [&](int64_t i) {
    const int64_t block = i / parts, part = i % parts, y0 = part % runs * ROWS;
    std::vector<C> x(x_size), g(p.W * k.lanes);  // the zeros beside and above the rows are read as they are
    k.weight_grad(p, part / runs, block * k.lanes, y0, std::min(y0 + ROWS, p.H), x.data(), g.data(),
                  sums.data() + i * taps * k.lanes);
  });
  C* d_weight = static_cast<C*>(p.d_weight);
  C* d_bias = static_cast<C*>(p.d_bias);
  for (int64_t c = 0; c < p.C; ++c) {
    const C* first = sums.data() + c / k.lanes * parts * taps * k.lanes + c % k.lanes;
    for (int64_t t = 0; t < taps; ++t) {
      C sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += first[(part * taps + t) * k.lanes];
      if (t + 1 < taps) d_weight[c * (taps - 1) + t] = sum;
      else if (d_bias) d_bias[c] = sum;
    }
  }
}

}  // namespace

void depthwise_conv2d_weight_grad_cpu(const DepthwiseConv2d& p, Isa isa, int threads) {
  if (p.dtype == kDouble) run<double>(p, isa, threads);
  else run<float>(p, isa, threads);
}

}  // namespace infoclip
