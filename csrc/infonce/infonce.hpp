// InfoNCE between sample sets: loss and the log-sum-exps it needs, and the gradients. Strides are in elements.
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

struct InfoNce {
  int64_t B, N, M, D;
  int dtype;                        // of x, y, d_x and d_y; what is called wide below is fp32, or fp64 for fp64
  bool symmetric;
  double scale;                     // of the inner products, before the temperature
  const void* x;                    // [B, N, D]
  int64_t x_s[3];
  const void* y;                    // [B, M, D]
  int64_t y_s[3];
  const void* temperature;          // [] wide, or null for 1
  const int64_t* positive;          // [B, N], or null for the diagonal
  int64_t positive_s[2];
  void* rows = nullptr;             // [B, N] wide contiguous: log-sum-exp of each row; backward reads it
  void* columns = nullptr;          // [B, M] wide contiguous if symmetric: of each column less log(its positives)
  void* loss = nullptr;             // forward: [] wide
  void* bound = nullptr;            // forward: [] wide
  const void* d_loss = nullptr;     // backward: [] wide
  void* d_x = nullptr;              // backward: [B, N, D] contiguous, or null where no gradient is wanted
  void* d_y = nullptr;              // backward: [B, M, D] contiguous, or null
  void* d_temperature = nullptr;    // backward: [] wide, or null
};

void infonce_forward_cpu(const InfoNce& p, Isa isa, int threads);
void infonce_backward_cpu(const InfoNce& p, Isa isa, int threads);

// What one set of instructions offers for a block of products c [rows, columns], row stride ld; s is the logits' factor.
template <class C>
struct InfoNceBlocks {
  // Online log-sum-exp: most and sum of each row, and of each column where column_most is not null, take the block in.
  void (*take)(const C* c, int64_t ld, int64_t rows, int64_t columns, C s, C* row_most, C* row_sum, C* column_most,
               C* column_sum);
  // c = wr exp(s c - row) + wc exp(s c - column), the second term only where column is not null; returns the sum of
  // each new entry times its s c.
  double (*slopes)(C* c, int64_t ld, int64_t rows, int64_t columns, C s, const C* row, const C* column, C wr, C wc);
};

namespace baseline { template <class C> const InfoNceBlocks<C>& infonce_blocks(); }
#ifdef INFOCLIP_X86
namespace avx2 { template <class C> const InfoNceBlocks<C>& infonce_blocks(); }
namespace avx512 { template <class C> const InfoNceBlocks<C>& infonce_blocks(); }
#endif

}  // namespace infoclip
