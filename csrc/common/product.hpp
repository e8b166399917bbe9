// What the drivers of the tiled ops share: aligned buffers and the product of packed panels, shared out to a team.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/check.hpp"
#include "common/tiles.hpp"

namespace infoclip {

constexpr int kPanels = 4;  // panels of A and of B in a tile: 48 x 128 results with AVX-512, 64 x 128 with AMX
constexpr int kMaxTile = 64 * 128;
constexpr int kMaxWidth = 32;  // of any panel

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const void* shifted(const void* base, int dtype, int64_t elements) {
  const int64_t size = dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2;
  return static_cast<const char*>(base) + elements * size;
}

struct Free { void operator()(void* p) const { std::free(p); } };

template <class T>
class Buffer {  // n elements, 64-byte aligned, uninitialised
 public:
  explicit Buffer(int64_t n)
      : data_(n >= 0 && n < kMost ? static_cast<T*>(std::aligned_alloc(64, bytes(n))) : nullptr) {
    if (!data_) throw OutOfMemory(n, sizeof(T));
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr int64_t kMost = int64_t{1} << 58;  // far above any memory, and its bytes do not overflow
  static size_t bytes(int64_t n) { return ceil_div(std::max<int64_t>(n, 1) * sizeof(T), 64) * 64; }
  std::unique_ptr<T, Free> data_;
};

// rows x columns results = A B over K, from packed panels; `take(row, column, c, n)` gets each finished row of a tile.
template <class C, class Take>
void multiply(const Tiles<C>& k, Team& team, const char* A, int64_t rows, const char* B, int64_t columns, int64_t K,
              const Take& take) {
  const int64_t height = kPanels * k.mr, width = kPanels * k.nr;
  const int64_t across = ceil_div(columns, width);
  team.run(ceil_div(rows, height) * across, [&](int64_t task) {
    alignas(64) C c[kMaxTile];
    const int64_t m = task / across * height, n = task % across * width;
    const int a_panels = static_cast<int>(std::min<int64_t>(kPanels, ceil_div(rows - m, k.mr)));
    const int b_panels = static_cast<int>(std::min<int64_t>(kPanels, ceil_div(columns - n, k.nr)));
    std::fill(c, c + a_panels * k.mr * width, C(0));
    k.tile(K, A + m / k.mr * k.panel_bytes(k.mr, K), a_panels, B + n / k.nr * k.panel_bytes(k.nr, K), b_panels, c,
           width);
    const int64_t last = std::min(rows, m + height), count = std::min(columns - n, width);
    for (int64_t i = m; i < last; ++i) take(i, n, c + (i - m) * width, count);
  });
}

// A thread's wake-up costs as much as about 20 million operations: little work is not worth a second one.
inline int64_t useful_threads(double operations) { return static_cast<int64_t>(1.0 + operations / 2e7); }

}  // namespace infoclip
