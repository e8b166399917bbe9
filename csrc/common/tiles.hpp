// The CPU's tiled matrix product: packing from any strides and dtype into panels, and register-blocked products of
// panels, per instruction set. Ops are drivers on top (common/product.hpp): they share out tiles to a Team and finish what a
// tile holds.
//
// A panel holds `width` rows (mr of the left operand, nr of the right) and the whole depth K, depth by depth: element
// (k, i) at [k][i]. In the bfloat16 panels of the AVX512-BF16 dot product two neighbouring depths lie side by side,
// [k / 2][i][2]; for AMX those of the left operand lie [k / 32][i][32]. There K is padded with zeros to a multiple of
// `depths`. Strides are in elements.
#pragma once
#include <cstdint>

#include "common/cpu.hpp"
#include "common/dtype.hpp"

namespace infoclip {

// What one set of instructions offers. C is the type of the arithmetic and of the sums: float or double. Panels are
// void because their elements may be narrower than C; only the functions of the same table read them.
template <class C>
struct Tiles {
  int mr, nr;   // rows and columns of the register block
  int depths;   // the depth of a panel is a multiple of
  int element;  // bytes of a panel's element
  // panel(k, i) = src[off[i] + k * sk] for i < rows, zeros up to width; widened or narrowed to the panel's element.
  // scale, where not null, multiplies row k.
  void (*pack_rows)(const void* src, int dtype, const int64_t* off, int rows, int64_t sk, int64_t K, int width,
                    const C* scale, void* panel);
  // panel(k, j) = src[off[k] + j * sj] * scale[k] for j < columns, zeros up to width; scale may be null.
  void (*pack_columns)(const void* src, int dtype, const int64_t* off, int64_t K, int64_t sj, int columns, int width,
                       const C* scale, void* panel);
  // inverse[i] = 1 / max(|row i of the panel|, eps); a NaN norm stays NaN.
  void (*norms)(const void* panel, int64_t K, int width, C eps, C* inverse);
  // c[a_panels * mr][b_panels * nr] (row stride ldc) += A B over K. Panels follow each other at panel_bytes(width, K).
  void (*tile)(int64_t K, const void* A, int a_panels, const void* B, int b_panels, C* c, int64_t ldc);
  // dst[offset + i] = src[i] * factor * columns[i], rounded once to dtype; columns may be null.
  void (*store)(const C* src, int64_t n, C factor, const C* columns, void* dst, int64_t offset, int dtype);
  // The largest of src[i] * columns[i], NaN where one is; -infinity for n = 0.
  C (*highest)(const C* src, int64_t n, const C* columns);
  // to[i][k] = src[off[i] + k * sk], widened: rows x K, contiguous.
  void (*read_rows)(const void* src, int dtype, const int64_t* off, int rows, int64_t sk, int64_t K, C* to);
  // The gradient of a row through x / max(|x|, eps): dst = inverse * (g - u <u, g>), u = x * inverse; without the
  // projection where the norm was clamped.
  void (*project)(const C* g, const C* x, int64_t D, C inverse, C eps, void* dst, int64_t offset, int dtype);

  int64_t depth(int64_t K) const { return (K + depths - 1) / depths * depths; }
  int64_t panel_bytes(int width, int64_t K) const { return depth(K) * width * element; }
};

namespace baseline { template <class C> const Tiles<C>& tiles(); }
#ifdef INFOCLIP_X86
namespace avx2 { template <class C> const Tiles<C>& tiles(); }
namespace avx512 { template <class C> const Tiles<C>& tiles(); }
namespace avx512_bf16 { const Tiles<float>& tiles(); }
namespace amx_bf16 { const Tiles<float>& tiles(); }
#endif

// The table for tensors of a dtype: bfloat16 takes the dot product of bfloat16 pairs, or the matrix unit, where the set
// has it.
template <class C>
const Tiles<C>& tiles_of(Isa isa, int dtype) {
#ifdef INFOCLIP_X86
  if constexpr (sizeof(C) == 4)
    if (isa >= Isa::avx512_bf16 && dtype == kBFloat16)
      return isa == Isa::amx_bf16 ? amx_bf16::tiles() : avx512_bf16::tiles();
#endif
  (void)dtype;
  return INFOCLIP_BY_ISA(isa, tiles<C>());
}

}  // namespace infoclip
