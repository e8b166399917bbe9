// The driver of the CPU form: a work item is the plane of one image and one class. Each plane's loss and gradient are
// summed by one thread in one order, and the planes' losses in theirs: any number of threads gives the same bits.
#include <algorithm>
#include <atomic>
#include <vector>

#include "upsample_bce/upsample_bce.hpp"

namespace infoclip {
namespace {

template <class C>
const UpsampleRows<C>& rows_of(Isa isa) {
  return INFOCLIP_BY_ISA(isa, upsample_rows<C>());
}

template <class C>
struct Samples {
  std::vector<int32_t> low;
  std::vector<C> frac;
  Samples(int64_t in, int64_t out) : low(out), frac(out) {
    for (int64_t o = 0; o < out; ++o) {
      const int64_t numerator = std::max<int64_t>((2 * o + 1) * in - out, 0);
      const int64_t cell = numerator / (2 * out);
      low[o] = static_cast<int32_t>(std::min(cell, in - 1));
      frac[o] = cell < in - 1 ? static_cast<C>(static_cast<double>(numerator % (2 * out)) / (2.0 * out)) : C(0);
    }
  }
};

template <class C>
double plane(const UpsampleBce& p, const UpsampleRows<C>& k, const Samples<C>& ay, const Samples<C>& ax,
             const int32_t* labels, int64_t b, int64_t t, C scale, std::vector<C>& work) {
  const int64_t W = p.W;
  work.resize(4 * W + 3 * (p.w + 1));
  C *top = work.data(), *bottom = top + W, *upper = bottom + W, *lower = upper + W;
  C *row = lower + W, *here = row + p.w + 1, *below = here + p.w + 1;
  auto expand = [&](int64_t i, C* to) {
    k.load(p.logits, p.dtype, b * p.logits_s[0] + t * p.logits_s[1] + i * p.logits_s[2], p.logits_s[3], p.w, row);
    row[p.w] = row[p.w - 1];
    k.expand(row, ax.low.data(), ax.frac.data(), W, to);
  };
  int64_t next = 0;      // rows of the gradient that are written
  int64_t have = -1;     // the input row that `top` holds
  double loss = 0;
  auto finish = [&](int64_t until) {  // write `here` as row `next`, zeros for rows that no sample touches
    for (; next < until; ++next) {
      C* to = static_cast<C*>(p.grad) + (b * p.T + t) * p.h * p.w + next * p.w;
      for (int64_t x = 0; x < p.w; ++x) to[x] = here[x] * scale;
      std::swap(here, below);
      std::fill(below, below + p.w + 1, C(0));
    }
  };
  std::fill(here, below + p.w + 1, C(0));
  for (int64_t y = 0; y < p.H;) {
    const int64_t i = ay.low[y], j = std::min(i + 1, p.h - 1);
    if (have != i) expand(i, top);
    expand(j, bottom);
    if (p.grad) {
      finish(i);
      std::fill(upper, upper + 2 * W, C(0));
    }
    for (; y < p.H && ay.low[y] == i; ++y)
      loss += k.sweep(top, bottom, ay.frac[y], labels + y * W, static_cast<int32_t>(t), p.masked, W,
                      p.grad ? upper : nullptr, lower);
    if (p.grad) {
      k.reduce(upper, ax.low.data(), ax.frac.data(), W, here);
      if (j > i) k.reduce(lower, ax.low.data(), ax.frac.data(), W, below);  // at the last row frac is 0
    }
    std::swap(top, bottom);
    have = j;
  }
  if (p.grad) finish(p.h);
  return loss;
}

template <class C>
void run(const UpsampleBce& p, Isa isa, int threads, const std::vector<int32_t>& labels, int64_t known) {
  const UpsampleRows<C>& k = rows_of<C>(isa);
  const Samples<C> ay(p.h, p.H), ax(p.w, p.W);
  const double count = p.masked ? std::max<double>(static_cast<double>(known) * p.T, 1.0)
                                : static_cast<double>(p.B) * p.T * p.H * p.W;
  std::vector<double> losses(p.B * p.T);
  // A thread costs some 20 us: a plane of fewer than 2^14 samples does not feed one.
  Team team(threads, std::min<int64_t>(p.B * p.T * p.H * p.W >> 14, p.B * p.T));
  team.run(p.B * p.T, [&](int64_t i) {
    thread_local std::vector<C> work;
    losses[i] = plane(p, k, ay, ax, labels.data() + i / p.T * p.H * p.W, i / p.T, i % p.T,
                      static_cast<C>(1.0 / count), work);
  });
  double total = 0;
  for (double loss : losses) total += loss;
  if (p.dtype == kDouble) *static_cast<double*>(p.loss) = total / count;
  else *static_cast<float*>(p.loss) = static_cast<float>(total / count);
}

}  // namespace

int64_t upsample_bce_cpu(const UpsampleBce& p, Isa isa, int threads, bool* found) {
  std::vector<int32_t> labels(p.B * p.H * p.W);
  int64_t known = 0;
  *found = false;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t y = 0; y < p.H; ++y)
      for (int64_t x = 0; x < p.W; ++x) {
        const int64_t label = p.target[b * p.target_s[0] + y * p.target_s[1] + x * p.target_s[2]];
        const bool is_class = label >= 0 && label < p.T && label != p.ignore_index;
        if (!is_class && label != p.ignore_index) {
          *found = true;
          return label;
        }
        known += is_class;
        labels[(b * p.H + y) * p.W + x] = is_class ? static_cast<int32_t>(label) : -1;
      }
  if (p.dtype == kDouble) run<double>(p, isa, threads, labels, known);
  else run<float>(p, isa, threads, labels, known);
  return 0;
}

}  // namespace infoclip
