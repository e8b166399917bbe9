// The driver of the CPU form. Forward: a work item is a run of queries. Backward: a work item is one image, head and
// level, whose gradients it alone writes, query after query: no atomics, and the same bits for any number of threads.
#include <algorithm>
#include <vector>

#include "ms_deform_attn/ms_deform_attn.hpp"

namespace infoclip {
namespace {

constexpr int64_t RUN = 32;  // queries of a work item: neighbours sample the same pixels

template <class C>
const DeformRows<C>& rows_of(Isa isa) {
  return INFOCLIP_BY_ISA(isa, deform_rows<C>());
}

// A thread costs some 20 us: fewer than 2^13 samples do not feed one.
int64_t useful(const MsDeformAttn& p, int64_t items) {
  return std::min(p.B * p.Q * p.M * p.L * p.P >> 13, items);
}

template <class C>
void forward_run(const MsDeformAttn& p, Isa isa, int threads) {
  const DeformRows<C>& k = rows_of<C>(isa);
  const int64_t runs = (p.Q + RUN - 1) / RUN, corners = 4 * p.L * p.P;
  Team team(threads, useful(p, p.B * runs));
  team.run(p.B * runs, [&](int64_t i) {
    thread_local std::vector<int64_t> off;
    thread_local std::vector<C> coef;
    off.resize(corners + 1), coef.resize(corners + 1);  // a corner that does not count is written and not kept
    const int64_t q0 = i % runs * RUN;
    k.forward(p, i / runs, q0, std::min(q0 + RUN, p.Q), off.data(), coef.data());
  });
}

template <class C>
void backward_run(const MsDeformAttn& p, Isa isa, int threads) {
  const DeformRows<C>& k = rows_of<C>(isa);
  const bool half = p.dtype == kHalf || p.dtype == kBFloat16;
  std::vector<int64_t> starts(p.L + 1, 0);
  for (int64_t l = 0; l < p.L; ++l) starts[l + 1] = starts[l] + p.shapes[2 * l] * p.shapes[2 * l + 1];
  const int64_t items = p.B * p.M * p.L;
  Team team(threads, useful(p, items));
  team.run(items, [&](int64_t i) {
    std::vector<C> room(3 * p.D), plane;
    const int64_t l = i % p.L;
    if (half && p.d_value) plane.resize((starts[l + 1] - starts[l]) * p.D);
    k.backward(p, i / (p.M * p.L), i / p.L % p.M, l, starts[l], plane.data(), room.data());
  });
}

}  // namespace

void ms_deform_attn_forward_cpu(const MsDeformAttn& p, Isa isa, int threads) {
  if (p.dtype == kDouble) forward_run<double>(p, isa, threads);
  else forward_run<float>(p, isa, threads);
}

void ms_deform_attn_backward_cpu(const MsDeformAttn& p, Isa isa, int threads) {
  if (!p.d_value && !p.d_weights) return;
  if (p.dtype == kDouble) backward_run<double>(p, isa, threads);
  else backward_run<float>(p, isa, threads);
}

}  // namespace infoclip
