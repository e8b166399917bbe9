// InfoNCE loss between paired sample sets, and its gradients. Strides are in elements. With
// S[b, i, j] = scale x[b, i] . y[b, j], p(i) the positive of row i, and v = 2 directions if symmetric, else 1:
//   loss = 1 / (B N v) sum of (rows[b, i] - S[b, i, p(i)]) + (symmetric) (lse_k S[b, k, p(i)] - S[b, i, p(i)])
//   G[b, i, j] = exp(S - rows[b, i]) + (symmetric) exp(S - columns[b, j]) - v [j = p(i)]
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

struct InfoNce {
  int64_t B, N, M, D;
  int dtype;                             // of x, y and their gradients; all else is float, double for double
  bool symmetric;
  double scale;                          // 1 / temperature
  const void* temperature = nullptr;     // [] or null; given, scale is 1 / it, or NaN where it is not above 0
  const void* x = nullptr;               // [B, N, D]
  int64_t x_s[3] = {0, 0, 0};
  const void* y = nullptr;               // [B, M, D]
  int64_t y_s[3] = {0, 0, 0};
  const int64_t* positive = nullptr;     // [B, N], or null: the diagonal (N = M); outside 0..M-1 the loss is NaN
  int64_t positive_s[2] = {0, 0};
  void* rows = nullptr;                  // [B, N] contiguous: log-sum-exp of each row; forward writes, backward reads
  void* columns = nullptr;               // [B, M]: of each column, less the logarithm of how many rows' positive it is
  void* loss = nullptr;                  // forward: []
  void* bound = nullptr;                 // forward: [] log M - loss; symmetric (log M + log N) / 2 - loss
  const void* d_loss = nullptr;          // backward: []
  void* d_x = nullptr;                   // [B, N, D] contiguous, or null where no gradient is wanted
  void* d_y = nullptr;                   // [B, M, D] contiguous, or null
  void* d_temperature = nullptr;         // [], or null; only where temperature is given
  void* work = nullptr;                  // CUDA: fp32 scratch of infonce_work_floats()
};

void infonce_forward_cpu(const InfoNce& p, Isa isa, int threads);
void infonce_backward_cpu(const InfoNce& p, Isa isa, int threads);

#ifdef INFOCLIP_WITH_CUDA
int64_t infonce_work_floats(const InfoNce& p, bool backward);  // looks at sizes and at what is asked for
void infonce_forward_cuda(const InfoNce& p, uintptr_t stream);
void infonce_backward_cuda(const InfoNce& p, uintptr_t stream);
#endif

// What one set of instructions does with a tile of inner products [rows][columns] (row stride ld).
template <class C>
struct InfoNceTiles {
  // Multiply by scale and join each row's, and where they are not null each column's, log-sum-exp with the tile's, kept
  // as the largest term's (or another near it) and the sum relative to it.
  void (*join)(C* s, int rows, int columns, int64_t ld, C scale, C* row_high, C* row_sum, C* column_high, C* column_sum);
  // Replace s by exp(scale s - row_lse) + exp(scale s - column_lse) (the latter where not null); returns the sum of that
  // times scale s if weigh, else 0.
  double (*slopes)(C* s, int rows, int columns, int64_t ld, C scale, const C* row_lse, const C* column_lse, bool weigh);
};

namespace baseline { template <class C> const InfoNceTiles<C>& infonce_tiles(); }
#ifdef INFOCLIP_X86
namespace avx2 { template <class C> const InfoNceTiles<C>& infonce_tiles(); }
namespace avx512 { template <class C> const InfoNceTiles<C>& infonce_tiles(); }
#endif

}  // namespace infoclip
