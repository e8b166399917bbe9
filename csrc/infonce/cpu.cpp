// The driver of the CPU form. Rows of x and rows of y are cut into the same number of bands; in a round every band of x
// meets one band of y, another each round, so that whoever holds a pair of bands owns the sums of both: no atomics, one
// order whatever the threads, and nothing larger than a pair of bands is ever there.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/check.hpp"
#include "common/product.hpp"
#include "infonce/infonce.hpp"

namespace infoclip {
namespace {

constexpr int64_t kBand = 144;  // rows of a band at least: products outweigh what is done with them
constexpr int64_t kMostBands = 16;

template <class C>
const InfoNceBlocks<C>& blocks_of(Isa isa) {
#ifdef INFOCLIP_X86
  if (isa >= Isa::avx512) return avx512::infonce_blocks<C>();
  if (isa == Isa::avx2) return avx2::infonce_blocks<C>();
#endif
  (void)isa;
  return baseline::infonce_blocks<C>();
}

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

template <class C>
struct Bands {
  const Tiles<C>& k;
  const InfoNceBlocks<C>& ops;
  int64_t count, x_rows, y_rows;  // rows of a band, whole panels on both sides
  int64_t x_panel, y_panel;       // bytes

  Bands(const InfoNce& p, Isa isa)
      : k(tiles_of<C>(isa, p.dtype)), ops(blocks_of<C>(isa)) {
    const int64_t both = std::max(p.N, p.M);
    count = std::min<int64_t>(kMostBands, std::max<int64_t>(1, both / kBand));
    x_rows = round_up(ceil_div(p.N, count), k.mr);
    y_rows = round_up(ceil_div(p.M, count), std::max(k.nr, 16));  // whole lanes of the blocks' loops
    x_panel = k.panel_bytes(k.mr, p.D);
    y_panel = k.panel_bytes(k.nr, p.D);
  }
  int64_t ld() const { return y_rows; }
};

template <class C>
C factor_of(const InfoNce& p) {
  if (!p.temperature) return static_cast<C>(p.scale);
  const double temperature = static_cast<double>(*static_cast<const C*>(p.temperature));
  return temperature > 0 ? static_cast<C>(p.scale / temperature) : std::numeric_limits<C>::quiet_NaN();
}

// The operands of one batch entry: x as left panels, y as right ones.
template <class C>
struct Operands {
  Buffer<char> x, y;
  std::vector<int64_t> x_off, y_off;

  Operands(const InfoNce& p, const Bands<C>& z)
      : x(ceil_div(p.N, z.k.mr) * z.x_panel), y(ceil_div(p.M, z.k.nr) * z.y_panel), x_off(p.N), y_off(p.M) {
    for (int64_t i = 0; i < p.N; ++i) x_off[i] = i * p.x_s[1];
    for (int64_t i = 0; i < p.M; ++i) y_off[i] = i * p.y_s[1];
  }
  void pack(const InfoNce& p, const Bands<C>& z, Team& team, int64_t b) {
    const int64_t x_panels = ceil_div(p.N, z.k.mr), y_panels = ceil_div(p.M, z.k.nr);
    team.run(x_panels + y_panels, [&](int64_t i) {
      const bool is_x = i < x_panels;
      if (!is_x) i -= x_panels;
      const int width = is_x ? z.k.mr : z.k.nr;
      const int rows = static_cast<int>(std::min<int64_t>(width, (is_x ? p.N : p.M) - i * width));
      const void* src = is_x ? shifted(p.x, p.dtype, b * p.x_s[0]) : shifted(p.y, p.dtype, b * p.y_s[0]);
      z.k.pack_rows(src, p.dtype, (is_x ? x_off : y_off).data() + i * width, rows, is_x ? p.x_s[2] : p.y_s[2], p.D,
                    width, nullptr, is_x ? x.get() + i * z.x_panel : y.get() + i * z.y_panel);
    });
  }
  // c [x_rows, y_rows] = the products of bands i and j.
  void multiply_bands(const InfoNce& p, const Bands<C>& z, int64_t i, int64_t j, int64_t rows, int64_t columns,
                      C* c) const {
    std::fill(c, c + z.x_rows * z.y_rows, C(0));
    const int64_t first_x = i * z.x_rows / z.k.mr, first_y = j * z.y_rows / z.k.nr;
    const int64_t a_panels = ceil_div(rows, z.k.mr), b_panels = ceil_div(columns, z.k.nr);
    for (int64_t m = 0; m < a_panels; m += kPanels)
      for (int64_t n = 0; n < b_panels; n += kPanels)
        z.k.tile(p.D, x.get() + (first_x + m) * z.x_panel, static_cast<int>(std::min<int64_t>(kPanels, a_panels - m)),
                 y.get() + (first_y + n) * z.y_panel, static_cast<int>(std::min<int64_t>(kPanels, b_panels - n)),
                 c + m * z.k.mr * z.ld() + n * z.k.nr, z.ld());
  }
};

int64_t positive_of(const InfoNce& p, int64_t b, int64_t i) {
  return p.positive ? p.positive[b * p.positive_s[0] + i * p.positive_s[1]] : i;
}

// Rounds of disjoint pairs of bands: `item(i, j, rows, columns)` with band i of x and band j of y.
template <class C, class Item>
void meet(const InfoNce& p, const Bands<C>& z, Team& team, const Item& item) {
  for (int64_t round = 0; round < z.count; ++round)
    team.run(z.count, [&](int64_t i) {
      const int64_t j = (i + round) % z.count;
      const int64_t rows = std::min(z.x_rows, p.N - i * z.x_rows), columns = std::min(z.y_rows, p.M - j * z.y_rows);
      if (rows > 0 && columns > 0) item(i, j, rows, columns);
    });
}

template <class C>
void forward(const InfoNce& p, Isa isa, int threads) {
  const Bands<C> z(p, isa);
  const C s = factor_of<C>(p);
  Operands<C> operands(p, z);
  // Padded to whole lanes of a band.
  const int64_t n_pad = z.count * z.x_rows, m_pad = z.count * z.y_rows;
  Buffer<C> row_most(n_pad), row_sum(n_pad), column_most(m_pad), column_sum(m_pad), pair(p.N);
  const C least = -std::numeric_limits<C>::infinity();
  const int team_size = useful_threads(2.0 * p.N * p.M * p.D, threads);
  Team team(team_size);
  double total = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    operands.pack(p, z, team, b);
    std::fill(row_most.get(), row_most.get() + n_pad, least);
    std::fill(row_sum.get(), row_sum.get() + n_pad, C(0));
    std::fill(column_most.get(), column_most.get() + m_pad, least);
    std::fill(column_sum.get(), column_sum.get() + m_pad, C(0));
    meet(p, z, team, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
      Buffer<C> c(z.x_rows * z.y_rows);
      operands.multiply_bands(p, z, i, j, rows, columns, c.get());
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = positive_of(p, b, i * z.x_rows + r) - j * z.y_rows;
        if (at >= 0 && at < columns) pair.get()[i * z.x_rows + r] = c.get()[r * z.ld() + at] * s;
      }
      z.ops.take(c.get(), z.ld(), rows, columns, s, row_most.get() + i * z.x_rows, row_sum.get() + i * z.x_rows,
                 p.symmetric ? column_most.get() + j * z.y_rows : nullptr, column_sum.get() + j * z.y_rows);
    });
    C* rows = static_cast<C*>(p.rows) + b * p.N;
    for (int64_t i = 0; i < p.N; ++i) {
      rows[i] = row_most.get()[i] + std::log(row_sum.get()[i]);
      total += static_cast<double>(rows[i] - pair.get()[i]);
    }
    if (!p.symmetric) continue;
    C* columns = static_cast<C*>(p.columns) + b * p.M;
    for (int64_t j = 0; j < p.M; ++j) columns[j] = column_most.get()[j] + std::log(column_sum.get()[j]);
    std::vector<int64_t> times(p.M, 0);
    for (int64_t i = 0; i < p.N; ++i) {
      const int64_t at = positive_of(p, b, i);
      total += static_cast<double>(columns[at] - pair.get()[i]);
      ++times[at];
    }
    for (int64_t j = 0; j < p.M; ++j) columns[j] -= std::log(static_cast<C>(times[j]));  // nobody's pair: +infinity
  }
  const double most = p.symmetric ? 0.5 * (std::log(double(p.M)) + std::log(double(p.N))) : std::log(double(p.M));
  const C loss = static_cast<C>(total / (double(p.B) * p.N * (p.symmetric ? 2 : 1)));
  *static_cast<C*>(p.loss) = loss;
  *static_cast<C*>(p.bound) = static_cast<C>(most) - loss;
}

template <class C>
void backward(const InfoNce& p, Isa isa, int threads) {
  const Bands<C> z(p, isa);
  const Tiles<C>& k = z.k;
  const C s = factor_of<C>(p);
  const C wr = p.symmetric ? C(0.5) : C(1), wc = p.symmetric ? C(0.5) : C(0), both = wr + wc;
  Operands<C> operands(p, z);
  // The bands once more as right operands of the second products: depth the band's rows, columns the entries.
  const int64_t d_panels = ceil_div(p.D, k.nr), d_pad = d_panels * k.nr;
  const int64_t x_right = k.panel_bytes(k.nr, z.x_rows), y_right = k.panel_bytes(k.nr, z.y_rows);
  const int64_t n_pad = z.count * z.x_rows, m_pad = z.count * z.y_rows;
  Buffer<char> x_columns(p.d_y ? z.count * d_panels * x_right : 0), y_columns(p.d_x ? z.count * d_panels * y_right : 0);
  Buffer<C> d_x(p.d_x ? n_pad * d_pad : 0), d_y(p.d_y ? m_pad * d_pad : 0), columns_lse(m_pad);
  std::vector<double> parts(z.count * z.count);
  double temperature_total = 0;
  const double d_loss = static_cast<double>(*static_cast<const C*>(p.d_loss));
  const double mean = d_loss / (double(p.B) * p.N);
  Team team(useful_threads(6.0 * p.N * p.M * p.D, threads));
  for (int64_t b = 0; b < p.B; ++b) {
    operands.pack(p, z, team, b);
    const void* x = shifted(p.x, p.dtype, b * p.x_s[0]);
    const void* y = shifted(p.y, p.dtype, b * p.y_s[0]);
    const int64_t x_items = p.d_y ? z.count * d_panels : 0, y_items = p.d_x ? z.count * d_panels : 0;
    team.run(x_items + y_items, [&](int64_t item) {
      const bool is_x = item < x_items;
      if (!is_x) item -= x_items;
      const int64_t band = item / d_panels, panel = item % d_panels;
      const int64_t step = is_x ? z.x_rows : z.y_rows, first = band * step;
      const int64_t rows = std::min(step, (is_x ? p.N : p.M) - first);
      if (rows <= 0) return;
      const int count = static_cast<int>(std::min<int64_t>(k.nr, p.D - panel * k.nr));
      const int64_t stride = is_x ? p.x_s[2] : p.y_s[2];
      k.pack_columns(shifted(is_x ? x : y, p.dtype, panel * k.nr * stride), p.dtype,
                     (is_x ? operands.x_off : operands.y_off).data() + first, rows, stride, count, k.nr, nullptr,
                     (is_x ? x_columns : y_columns).get() + band * d_panels * (is_x ? x_right : y_right) +
                         panel * k.panel_bytes(k.nr, rows));
    });
    if (p.d_x) std::fill(d_x.get(), d_x.get() + n_pad * d_pad, C(0));
    if (p.d_y) std::fill(d_y.get(), d_y.get() + m_pad * d_pad, C(0));
    std::fill(parts.begin(), parts.end(), 0.0);
    const C* rows_lse = static_cast<const C*>(p.rows) + b * p.N;
    if (p.symmetric) {
      const C* lse = static_cast<const C*>(p.columns) + b * p.M;
      std::fill(std::copy(lse, lse + p.M, columns_lse.get()), columns_lse.get() + m_pad, C(0));
    }
    meet(p, z, team, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
      Buffer<C> c(z.x_rows * z.y_rows);
      operands.multiply_bands(p, z, i, j, rows, columns, c.get());
      std::vector<C> pairs(rows, C(0));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = positive_of(p, b, i * z.x_rows + r) - j * z.y_rows;
        if (at >= 0 && at < columns) pairs[r] = c.get()[r * z.ld() + at] * s;
      }
      double part = z.ops.slopes(c.get(), z.ld(), rows, columns, s, rows_lse + i * z.x_rows,
                                 p.symmetric ? columns_lse.get() + j * z.y_rows : nullptr, wr, wc);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = positive_of(p, b, i * z.x_rows + r) - j * z.y_rows;
        if (at < 0 || at >= columns) continue;
        c.get()[r * z.ld() + at] -= both;
        part -= static_cast<double>(both * pairs[r]);
      }
      parts[i * z.count + j] = part;
      const int type = sizeof(C) == 8 ? kDouble : kFloat;
      // d_x of band i += slopes times y of band j; d_y of band j += slopes^T times x of band i.
      for (const bool is_x : {true, false}) {
        if (!(is_x ? p.d_x : p.d_y)) continue;
        const int64_t left = is_x ? rows : columns, depth = is_x ? columns : rows;
        const int64_t panels = ceil_div(left, k.mr), left_panel = k.panel_bytes(k.mr, depth);
        const int64_t right_panel = k.panel_bytes(k.nr, depth);
        Buffer<char> slopes(panels * left_panel);
        std::vector<int64_t> off(left);
        for (int64_t r = 0; r < left; ++r) off[r] = is_x ? r * z.ld() : r;
        for (int64_t m = 0; m < panels; ++m)
          k.pack_rows(c.get(), type, off.data() + m * k.mr, static_cast<int>(std::min<int64_t>(k.mr, left - m * k.mr)),
                      is_x ? 1 : z.ld(), depth, k.mr, nullptr, slopes.get() + m * left_panel);
        const char* right = is_x ? y_columns.get() + j * d_panels * y_right : x_columns.get() + i * d_panels * x_right;
        C* to = is_x ? d_x.get() + i * z.x_rows * d_pad : d_y.get() + j * z.y_rows * d_pad;
        for (int64_t m = 0; m < panels; m += kPanels)
          for (int64_t n = 0; n < d_panels; n += kPanels)
            k.tile(depth, slopes.get() + m * left_panel, static_cast<int>(std::min<int64_t>(kPanels, panels - m)),
                   right + n * right_panel, static_cast<int>(std::min<int64_t>(kPanels, d_panels - n)),
                   to + m * k.mr * d_pad + n * k.nr, d_pad);
      }
    });
    for (double part : parts) temperature_total += part;
    const C factor = static_cast<C>(mean * static_cast<double>(s));
    team.run((p.d_x ? ceil_div(p.N, 64) : 0) + (p.d_y ? ceil_div(p.M, 64) : 0), [&](int64_t item) {
      const int64_t x_chunks = p.d_x ? ceil_div(p.N, 64) : 0;
      const bool is_x = item < x_chunks;
      if (!is_x) item -= x_chunks;
      const int64_t rows = is_x ? p.N : p.M;
      for (int64_t r = item * 64; r < std::min(rows, item * 64 + 64); ++r)
        k.store((is_x ? d_x : d_y).get() + r * d_pad, p.D, factor, nullptr, is_x ? p.d_x : p.d_y, (b * rows + r) * p.D,
                p.dtype);
    });
  }
  if (p.d_temperature) {
    const double temperature = p.temperature ? static_cast<double>(*static_cast<const C*>(p.temperature)) : 1.0;
    *static_cast<C*>(p.d_temperature) = static_cast<C>(-mean * temperature_total / temperature);
  }
}

void check(const InfoNce& p) {
  for (int64_t b = 0; p.positive && b < p.B; ++b)
    for (int64_t i = 0; i < p.N; ++i) {
      const int64_t at = positive_of(p, b, i);
      INFOCLIP_CHECK(at >= 0 && at < p.M, "a positive index names no row");
    }
}

}  // namespace

void infonce_forward_cpu(const InfoNce& p, Isa isa, int threads) {
  check(p);
  if (p.dtype == kDouble) forward<double>(p, isa, threads);
  else forward<float>(p, isa, threads);
}

void infonce_backward_cpu(const InfoNce& p, Isa isa, int threads) {
  check(p);
  if (p.dtype == kDouble) backward<double>(p, isa, threads);
  else backward<float>(p, isa, threads);
}

}  // namespace infoclip
