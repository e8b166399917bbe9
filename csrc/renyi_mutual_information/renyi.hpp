// Matrix-based Renyi entropies of order 2 of two or three views of the same N samples, combined to one value a set, and
// in the same sweep its gradients. Strides are in elements.
//
// With c_v(i, j) = <x_i, x_j> of view v (rows brought to length 1 first where unit says so), all sums over i and j:
//   S_v = sum c_v^2         t_v = sum c_v(i, i)
//   S   = sum prod_v c_v^2  t   = sum prod_v c_v(i, i)
//   value = weights[0] log2(t^2 / S) + sum_v weights[1 + v] log2(t_v^2 / S_v);  0, without gradient, where t is 0
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

constexpr int kMostViews = 3;

struct RenyiInformation {
  int64_t B, N;
  int views;                                       // 2 or 3
  int64_t D[kMostViews];
  int dtype;                                       // of every x
  const void* x[kMostViews];                       // [B, N, D]
  int64_t x_s[kMostViews][3];
  bool unit[kMostViews];
  int weights[1 + kMostViews];                     // -1, 0 or 1
  void* value = nullptr;                           // [B] fp32, or fp64 for fp64 views
  void* grad[kMostViews] = {nullptr, nullptr, nullptr};  // [B, N, D] contiguous, as value, or null where none is wanted
  void* work = nullptr;                            // CUDA: fp32 scratch of renyi_information_work_floats()
};

void renyi_information_cpu(const RenyiInformation& p, Isa isa, int threads);

#ifdef INFOCLIP_WITH_CUDA
int64_t renyi_information_work_floats(const RenyiInformation& p);  // looks at sizes and at what is asked for
void renyi_information_cuda(const RenyiInformation& p, uintptr_t stream);
#endif

// What one set of instructions offers. Blocks of products c [rows, columns] have the row stride ld.
template <class C>
struct RenyiBlocks {
  C (*largest)(const C* x, int64_t n);            // of the magnitudes; a NaN counts for nothing
  C (*square)(const C* x, int64_t n, C factor);   // squared length of x times factor
  void (*scaled)(const C* x, int64_t n, C factor, C* to);
  // c *= row (outer) column
  void (*damp)(C* c, int64_t ld, int64_t rows, int64_t columns, const C* row, const C* column);
  // sums[0] += sum (q prod_v c_v)^2, sums[1 + v] += sum c_v^2
  void (*sums)(const C* const* c, int views, int64_t ld, int64_t rows, int64_t columns, C q, double* sums);
  // to = b c_v o^2 + a c_v with o = q times the product of the other views' blocks
  void (*weigh)(const C* const* c, int views, int v, int64_t ld, int64_t rows, int64_t columns, C q, C b, C a, C* to);
  // out = whole (g + own u), g = b joint + a single, u = whole x; of a unit view out = whole (g - u <u, g>). single may
  // be null.
  void (*finish)(const C* joint, const C* single, const C* x, int64_t n, C b, C a, C own, C whole, bool unit, C* out);
};

namespace baseline { template <class C> const RenyiBlocks<C>& renyi_blocks(); }
#ifdef INFOCLIP_X86
namespace avx2 { template <class C> const RenyiBlocks<C>& renyi_blocks(); }
namespace avx512 { template <class C> const RenyiBlocks<C>& renyi_blocks(); }
#endif

}  // namespace infoclip
