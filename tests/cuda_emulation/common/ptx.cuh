// csrc/common/ptx.cuh on the host, from the fragment layouts and rules of the PTX ISA (ldmatrix, mma.m16n8k16,
// mma.m16n8k8, cp.async). The matrix units' sums are taken at their worst: every term is cut off 24 bits below the
// largest one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>

namespace infoclip {

inline unsigned char* dynamic_shared() {
  const uintptr_t start = reinterpret_cast<uintptr_t>(emulation::block.shared.data());
  return reinterpret_cast<unsigned char*>((start + 15) & ~uintptr_t(15));
}

[[noreturn]] inline void broken(const char* rule) {
  fprintf(stderr, "cuda_emulation: %s\n", rule);
  abort();
}

inline void in_shared(const void* p, size_t bytes, size_t alignment) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment) broken("a misaligned address of shared memory");
  if (at < dynamic_shared() || at + bytes > emulation::block.shared.data() + emulation::block.shared.size())
    broken("an address outside shared memory");
}

// Copies land when they are waited for, and not before.
struct Copy { void* to; unsigned char bytes[16]; int size; };
inline std::vector<std::vector<std::vector<Copy>>>& groups() {  // by thread, by group
  static std::vector<std::vector<std::vector<Copy>>> held(1024, std::vector<std::vector<Copy>>(1));
  return held;
}
inline void copy_async(void* to, const void* from, int bytes, int size) {
  in_shared(to, size, size);
  if (reinterpret_cast<uintptr_t>(from) % size) broken("a misaligned address of global memory");
  Copy copy{to, {}, size};
  memcpy(copy.bytes, from, bytes);
  groups()[emulation::block.current].back().push_back(copy);
}
inline void copy_async_16(void* to, const void* from, int bytes) { copy_async(to, from, bytes, 16); }
inline void copy_async_4(void* to, const void* from, int bytes) { copy_async(to, from, bytes, 4); }
inline void copy_async_commit() { groups()[emulation::block.current].emplace_back(); }
template <int PENDING>
void copy_async_wait() {
  auto& mine = groups()[emulation::block.current];  // the last is not committed yet
  while (mine.size() > PENDING + 1) {
    for (const Copy& c : mine.front()) memcpy(c.to, c.bytes, c.size);
    mine.erase(mine.begin());
  }
}

inline void load_matrices_of(uint32_t (&f)[4], const void* row, bool transposed) {
  using namespace emulation;
  in_shared(row, 16, 16);
  block.addresses[block.current] = row;
  meet(block.warps[warp()], [&] {
    const int first = block.current / WARP * WARP;
    for (int l = 0; l < WARP; ++l)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int r = transposed ? l % 4 * 2 + e : l / 4, c = transposed ? l / 4 : l % 4 * 2 + e;
          memcpy(pair + e, static_cast<const unsigned char*>(block.addresses[first + matrix * 8 + r]) + 2 * c, 2);
        }
        memcpy(&block.words[first + l][matrix], pair, 4);
      }
  });
  for (int i = 0; i < 4; ++i) f[i] = block.words[block.current][i];
  meet(block.warps[warp()], [] {});
}
inline void load_matrices(uint32_t (&f)[4], const void* row) { load_matrices_of(f, row, false); }
inline void load_matrices_transposed(uint32_t (&f)[4], const void* row) { load_matrices_of(f, row, true); }

inline float element(const uint32_t& word, int, float) {
  if (word & 0x1fffu) broken("a tf32 operand with bits that tf32 lacks");
  return __uint_as_float(word);
}
inline float element(const uint32_t& word, int e, __half) {
  __half v;
  memcpy(&v, reinterpret_cast<const char*>(&word) + 2 * e, 2);
  return __half2float(v);
}
inline float element(const uint32_t& word, int e, __nv_bfloat16) {
  __nv_bfloat16 v;
  memcpy(&v, reinterpret_cast<const char*>(&word) + 2 * e, 2);
  return __bfloat162float(v);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  using namespace emulation;
  auto& mine = block.words[block.current];
  memcpy(&mine[0], a, 16);
  mine[4] = b0, mine[5] = b1;
  memcpy(&mine[6], c, 16);
  meet(block.warps[warp()], [&] {
    constexpr int IN = 4 / sizeof(T), K = 8 * IN;
    auto* lanes = &block.words[block.current / WARP * WARP];
    double A[16][K], B[K][8], terms[K + 1];
    for (int l = 0; l < WARP; ++l)
      for (int w = 0; w < 4; ++w)
        for (int e = 0; e < IN; ++e) {
          const int k = (l % 4 + w / 2 * 4) * IN + e;
          A[l / 4 + w % 2 * 8][k] = element(lanes[l][w], e, T());
          if (w < 2) B[(l % 4 + w * 4) * IN + e][l / 4] = element(lanes[l][4 + w], e, T());
        }
    for (int l = 0; l < WARP; ++l)
      for (int r = 0; r < 4; ++r) {
        const int row = l / 4 + r / 2 * 8, column = l % 4 * 2 + r % 2;
        terms[K] = __uint_as_float(lanes[l][6 + r]);
        double largest = std::fabs(terms[K]), sum = 0;
        for (int k = 0; k < K; ++k) {
          terms[k] = A[row][k] * B[k][column];
          largest = std::max(largest, std::fabs(terms[k]));
        }
        int exponent = 0;
        const bool finite = std::isfinite(largest);
        if (finite) std::frexp(largest, &exponent);
        for (double term : terms)
          sum += finite ? std::ldexp(std::trunc(std::ldexp(term, 24 - exponent)), exponent - 24) : term;
        float rounded = static_cast<float>(sum);
        if (std::isfinite(rounded) && std::fabs(rounded) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
        lanes[l][6 + r] = __float_as_uint(rounded);
      }
  });
  memcpy(c, &mine[6], 16);
  meet(block.warps[warp()], [] {});
}

inline uint32_t to_tf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  return v != v ? 0x7fffe000u : ((bits & 0x7fffffffu) >= 0x7f800000u ? bits : (bits + 0x1000u)) & 0xffffe000u;
}

}  // namespace infoclip
