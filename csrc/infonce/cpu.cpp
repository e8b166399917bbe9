// The driver of the CPU form. Rows and columns of S are split into groups; in round r group k of the shorter side meets
// group k + r of the longer, so that no two work items of a round share a row or a column. Each row's and column's sums
// grow in the order of the rounds, whatever the number of threads.
#include <cmath>
#include <limits>
#include <vector>

#include "common/product.hpp"
#include "infonce/infonce.hpp"

namespace infoclip {
namespace {

constexpr int64_t kGroups = 32;     // of either side, at most: as many work items can run at once, for each image
constexpr int64_t kTogether = 4096;  // rows of several small images that are worked on at once

template <class C>
const InfoNceTiles<C>& infonce_tiles_of(Isa isa) {
  return INFOCLIP_BY_ISA(isa, infonce_tiles<C>());
}

// One side's samples, their blocks of `edge` rows and the groups of those.
struct Side {
  int64_t rows, blocks, groups, span;
  const void* src;
  const int64_t* s;
  std::vector<int64_t> off;

  Side(int64_t n, int64_t edge, const void* from, const int64_t* strides)
      : rows(n), blocks(ceil_div(n, edge)), groups(0), span(ceil_div(blocks, kGroups)), src(from), s(strides), off(n) {
    groups = ceil_div(blocks, span);
    for (int64_t i = 0; i < n; ++i) off[i] = i * strides[1];
  }
};

// n shared out to as few parts of at most `most` as can be, of nearly one size.
int64_t evenly(int64_t n, int64_t most) { return ceil_div(n, ceil_div(n, most)); }

template <class C>
C scale_of(const InfoNce& p) {
  if (!p.temperature) return C(p.scale);
  const C t = *static_cast<const C*>(p.temperature);
  return t > 0 ? C(1) / t : std::numeric_limits<C>::quiet_NaN();
}

template <class C>
class Driver {
 public:
  Driver(const InfoNce& problem, Isa isa, int threads)
      : p(problem), k(tiles_of<C>(isa, p.dtype)), f(infonce_tiles_of<C>(isa)),
        together(evenly(p.B, std::max<int64_t>(kTogether / std::max(p.N, p.M), 1))),
        edge(together * std::min(p.N, p.M) >= 8 * 192 ? 192 : 96),
        x(p.N, edge, p.x, p.x_s), y(p.M, edge, p.y, p.y_s), scale(scale_of<C>(p)),
        team(threads, useful_threads(2.0 * p.B * p.N * p.M * p.D)) {}

  void forward() {
    Buffer<char> x_rows(together * x.blocks * rows_bytes(k.mr)), y_rows(together * y.blocks * rows_bytes(k.nr));
    Buffer<C> row_high(together * p.N), row_sum(together * p.N), chosen(p.B * p.N);
    Buffer<C> column_high(together * p.M), column_sum(together * p.M);
    C* rows = static_cast<C*>(p.rows);
    C* columns = static_cast<C*>(p.columns);
    std::fill(chosen.get(), chosen.get() + p.B * p.N, std::numeric_limits<C>::quiet_NaN());
    double total = 0;
    for (int64_t first = 0; first < p.B; first += together) {
      const int64_t images = std::min(together, p.B - first);
      pack(first, images, x, k.mr, x_rows.get(), y, k.nr, y_rows.get());
      for (C* high : {row_high.get(), column_high.get()})
        std::fill(high, high + together * (high == row_high.get() ? p.N : p.M), -std::numeric_limits<C>::infinity());
      std::fill(row_sum.get(), row_sum.get() + together * p.N, C(0));
      std::fill(column_sum.get(), column_sum.get() + together * p.M, C(0));
      rounds(images, [&](int64_t b, int64_t i, int64_t j, int64_t, C* s, char*) {
        const int64_t m = i * edge, n = j * edge;
        const int height = count(x, i), width = count(y, j);
        product(x_rows.get() + (b * x.blocks + i) * rows_bytes(k.mr), height,
                y_rows.get() + (b * y.blocks + j) * rows_bytes(k.nr), width, s);
        f.join(s, height, width, edge, scale, row_high.get() + b * p.N + m, row_sum.get() + b * p.N + m,
               p.symmetric ? column_high.get() + b * p.M + n : nullptr, column_sum.get() + b * p.M + n);
        for (int r = 0; r < height; ++r) {
          const int64_t c = pair(first + b, m + r) - n;
          if (c >= 0 && c < width) chosen.get()[(first + b) * p.N + m + r] = s[r * edge + c];
        }
      });
      for (int64_t b = 0; b < images; ++b) {
        const C* picked = chosen.get() + (first + b) * p.N;
        for (int64_t i = 0; i < p.N; ++i) {
          C lse = row_high.get()[b * p.N + i] + std::log(row_sum.get()[b * p.N + i]);
          if (lse < picked[i]) lse = picked[i];  // by rounding: no loss is below 0
          rows[(first + b) * p.N + i] = lse;
          total += static_cast<double>(lse) - picked[i];
        }
        if (!p.symmetric) continue;
        std::vector<int64_t> pairs(p.M, 0);
        for (int64_t i = 0; i < p.N; ++i) {
          const int64_t c = pair(first + b, i);
          if (c >= 0 && c < p.M) {
            ++pairs[c];
            const C lse = column_high.get()[b * p.M + c] + std::log(column_sum.get()[b * p.M + c]);
            total += lse < picked[i] ? 0.0 : static_cast<double>(lse) - picked[i];
          }
        }
        for (int64_t c = 0; c < p.M; ++c)
          columns[(first + b) * p.M + c] = pairs[c] ? column_high.get()[b * p.M + c] +
                                                          std::log(column_sum.get()[b * p.M + c]) - std::log(C(pairs[c]))
                                                    : std::numeric_limits<C>::infinity();
      }
    }
    const double loss = total / (static_cast<double>(p.B) * p.N * (p.symmetric ? 2 : 1));
    const double most = p.symmetric ? (std::log(double(p.M)) + std::log(double(p.N))) / 2 : std::log(double(p.M));
    *static_cast<C*>(p.loss) = static_cast<C>(loss);
    *static_cast<C*>(p.bound) = static_cast<C>(most - loss);
  }

  void backward() {
    const int64_t entries = ceil_div(p.D, k.nr);  // panels of D entries
    const int64_t block = entries * k.panel_bytes(k.nr, edge), wide = entries * k.nr;
    Buffer<char> x_rows(together * x.blocks * rows_bytes(k.mr)), y_rows(together * y.blocks * rows_bytes(k.nr));
    Buffer<char> x_entries(p.d_y ? together * x.blocks * block : 0), y_entries(p.d_x ? together * y.blocks * block : 0);
    Buffer<C> d_x(p.d_x ? together * x.blocks * edge * wide : 0), d_y(p.d_y ? together * y.blocks * edge * wide : 0);
    std::vector<double> parts(p.d_temperature ? together * x.groups * y.groups : 0);
    const C* rows = static_cast<const C*>(p.rows);
    const C* columns = static_cast<const C*>(p.columns);
    const C directions = p.symmetric ? 2 : 1;
    const double gain = static_cast<double>(*static_cast<const C*>(p.d_loss)) /
                        (static_cast<double>(p.B) * p.N * (p.symmetric ? 2 : 1));
    double weighed = 0;
    for (int64_t first = 0; first < p.B; first += together) {
      const int64_t images = std::min(together, p.B - first);
      pack(first, images, x, k.mr, x_rows.get(), y, k.nr, y_rows.get());
      if (p.d_y) pack_entries(first, images, x, x_entries.get(), block);
      if (p.d_x) pack_entries(first, images, y, y_entries.get(), block);
      if (p.d_x) std::fill(d_x.get(), d_x.get() + images * x.blocks * edge * wide, C(0));
      if (p.d_y) std::fill(d_y.get(), d_y.get() + images * y.blocks * edge * wide, C(0));
      std::fill(parts.begin(), parts.end(), 0.0);
      rounds(images, [&](int64_t b, int64_t i, int64_t j, int64_t patch, C* s, char* panels) {
        const int64_t m = i * edge, n = j * edge;
        const int height = count(x, i), width = count(y, j);
        product(x_rows.get() + (b * x.blocks + i) * rows_bytes(k.mr), height,
                y_rows.get() + (b * y.blocks + j) * rows_bytes(k.nr), width, s);
        int64_t at[192];
        double chosen = 0;
        for (int r = 0; r < height; ++r) {
          at[r] = pair(first + b, m + r) - n;
          if (at[r] >= 0 && at[r] < width) chosen += scale * s[r * edge + at[r]];
        }
        const double found = f.slopes(s, height, width, edge, scale, rows + (first + b) * p.N + m,
                                      p.symmetric ? columns + (first + b) * p.M + n : nullptr, p.d_temperature);
        for (int r = 0; r < height; ++r)
          if (at[r] >= 0 && at[r] < width) s[r * edge + at[r]] -= directions;
        if (p.d_temperature) parts[b * x.groups * y.groups + patch] += found - directions * chosen;
        const int dtype = sizeof(C) == 8 ? kDouble : kFloat;
        int64_t off[192];
        for (int r = 0; r < height; ++r) off[r] = r * edge;
        if (p.d_x) {
          const int across = static_cast<int>(ceil_div(height, k.mr));
          for (int a = 0; a < across; ++a)
            k.pack_rows(s, dtype, off + a * k.mr, std::min(k.mr, height - a * k.mr), 1, width, k.mr, nullptr,
                        panels + a * k.panel_bytes(k.mr, width));
          k.tile(width, panels, across, y_entries.get() + (b * y.blocks + j) * block, static_cast<int>(entries),
                 d_x.get() + (b * x.blocks + i) * edge * wide, wide);
        }
        if (p.d_y) {
          const int across = static_cast<int>(ceil_div(width, k.mr));
          for (int a = 0; a < across; ++a)
            k.pack_columns(s + a * k.mr, dtype, off, height, 1, std::min(k.mr, width - a * k.mr), k.mr, nullptr,
                           panels + a * k.panel_bytes(k.mr, height));
          k.tile(height, panels, across, x_entries.get() + (b * x.blocks + i) * block, static_cast<int>(entries),
                 d_y.get() + (b * y.blocks + j) * edge * wide, wide);
        }
      });
      for (double part : parts) weighed += part;
      store(first, images, x, d_x.get(), wide, p.d_x, gain);
      store(first, images, y, d_y.get(), wide, p.d_y, gain);
    }
    if (p.d_temperature)
      *static_cast<C*>(p.d_temperature) =
          static_cast<C>(-weighed * gain / static_cast<double>(*static_cast<const C*>(p.temperature)));
  }

 private:
  int count(const Side& side, int64_t block) const {
    return static_cast<int>(std::min(edge, side.rows - block * edge));
  }
  int64_t rows_bytes(int width) const { return edge / width * k.panel_bytes(width, p.D); }
  int64_t pair(int64_t b, int64_t i) const {
    return p.positive ? p.positive[b * p.positive_s[0] + i * p.positive_s[1]] : i;
  }
  void product(const char* a, int height, const char* b, int width, C* s) const {
    const int a_panels = static_cast<int>(ceil_div(height, k.mr)), b_panels = static_cast<int>(ceil_div(width, k.nr));
    for (int i = 0; i < a_panels * k.mr; ++i) std::fill(s + i * edge, s + i * edge + b_panels * k.nr, C(0));
    k.tile(p.D, a, a_panels, b, b_panels, s, edge);
  }

  // Panels of whole rows, block by block.
  void pack(int64_t first, int64_t images, const Side& a, int a_width, char* a_to, const Side& b, int b_width,
            char* b_to) {
    team.run(images * (a.blocks + b.blocks), [&](int64_t item) {
      const bool is_a = item < images * a.blocks;
      if (!is_a) item -= images * a.blocks;
      const Side& side = is_a ? a : b;
      const int width = is_a ? a_width : b_width;
      char* to = (is_a ? a_to : b_to) + item * rows_bytes(width);
      const int64_t block = item % side.blocks;
      const void* src = shifted(side.src, p.dtype, (first + item / side.blocks) * side.s[0]);
      for (int r = 0; r < count(side, block); r += width)
        k.pack_rows(src, p.dtype, side.off.data() + block * edge + r, std::min(width, count(side, block) - r),
                    side.s[2], p.D, width, nullptr, to + r / width * k.panel_bytes(width, p.D));
    });
  }

  // Panels of nr entries of D over a block's rows.
  void pack_entries(int64_t first, int64_t images, const Side& side, char* to, int64_t block_bytes) {
    team.run(images * side.blocks, [&](int64_t item) {
      const int64_t block = item % side.blocks;
      const int rows = count(side, block);
      const int64_t start = (first + item / side.blocks) * side.s[0];
      for (int64_t d = 0; d < p.D; d += k.nr)
        k.pack_columns(shifted(side.src, p.dtype, start + d * side.s[2]), p.dtype, side.off.data() + block * edge, rows,
                       side.s[2], static_cast<int>(std::min<int64_t>(k.nr, p.D - d)), k.nr, nullptr,
                       to + item * block_bytes + d / k.nr * k.panel_bytes(k.nr, rows));
    });
  }

  void store(int64_t first, int64_t images, const Side& side, const C* from, int64_t wide, void* to, double gain) {
    if (!to) return;
    team.run(images * side.blocks, [&](int64_t item) {
      const int64_t b = item / side.blocks, block = item % side.blocks;
      for (int r = 0; r < count(side, block); ++r)
        k.store(from + (item * edge + r) * wide, p.D, static_cast<C>(gain * scale), nullptr, to,
                ((first + b) * side.rows + block * edge + r) * p.D, p.dtype);
    });
  }

  // item(image, row block, column block, patch, tile, panels) for every pair of blocks.
  template <class Item>
  void rounds(int64_t images, const Item& item) {
    const int64_t longer = std::max(x.groups, y.groups), shorter = std::min(x.groups, y.groups);
    for (int64_t r = 0; r < longer; ++r)
      team.run(images * shorter, [&](int64_t task) {
        thread_local Buffer<C> s(192 * 192);
        thread_local Buffer<C> panels(192 * 192);
        const int64_t b = task / shorter, near = task % shorter, far = (near + r) % longer;
        const int64_t i = x.groups <= y.groups ? near : far, j = x.groups <= y.groups ? far : near;
        for (int64_t n = j * y.span; n < std::min(y.blocks, (j + 1) * y.span); ++n)
          for (int64_t m = i * x.span; m < std::min(x.blocks, (i + 1) * x.span); ++m)
            item(b, m, n, i * y.groups + j, s.get(), reinterpret_cast<char*>(panels.get()));
      });
  }

  const InfoNce& p;
  const Tiles<C>& k;
  const InfoNceTiles<C>& f;
  const int64_t together, edge;
  const Side x, y;
  const C scale;
  Team team;
};

}  // namespace

void infonce_forward_cpu(const InfoNce& p, Isa isa, int threads) {
  if (p.dtype == kDouble) Driver<double>(p, isa, threads).forward();
  else Driver<float>(p, isa, threads).forward();
}

void infonce_backward_cpu(const InfoNce& p, Isa isa, int threads) {
  if (p.dtype == kDouble) Driver<double>(p, isa, threads).backward();
  else Driver<float>(p, isa, threads).backward();
}

}  // namespace infoclip
