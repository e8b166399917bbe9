// The driver of the CPU form. Samples are cut into blocks of rows; a pair of blocks is one item of work, taken once for
// both its halves, as products are symmetric. Every sum has one order whatever the threads: the blocks of a round of a
// round-robin tournament are disjoint, and what a pair adds to a total has a place of its own.
//
// Where N x N products are little beside the views they are kept between value and gradient; elsewhere each pair adds
// its share of both sides' gradients before the totals are known, which scale them in the end.
#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/check.hpp"
#include "common/product.hpp"
#include "renyi_mutual_information/renyi.hpp"

namespace infoclip {
namespace {

constexpr int64_t kRows = 96;        // of a block: a multiple of every register block's rows and columns
constexpr int64_t kColumns = 512;    // of a gradient that an item works on
constexpr int64_t kDepth = 512;      // entries of a row scaled at a time
constexpr int64_t kPairsFrom = 192;  // samples from which bfloat16 is multiplied in pairs
const double kFour = 4.0 / std::log(2.0);

template <class C>
const RenyiBlocks<C>& blocks_of(Isa isa) {
  return INFOCLIP_BY_ISA(isa, renyi_blocks<C>());
}

template <class C>
constexpr int kExponent = sizeof(C) == 8 ? 1022 : 126;  // of the largest power of two whose inverse is one too

template <class C>
int exponent_of(double v) {  // floor(log2 v), within what a scale can undo
  if (!(v > 0)) return -kExponent<C>;
  if (std::isinf(v)) return kExponent<C>;
  return std::clamp(std::ilogb(v), -kExponent<C>, kExponent<C>);
}

template <class C>
constexpr int type_of = sizeof(C) == 8 ? kDouble : kFloat;

// What every set of the call has in common.
template <class C>
struct Plan {
  const RenyiInformation& p;
  const RenyiBlocks<C>& ops;
  const Tiles<C>& wide;            // products of C
  const Tiles<C>* k[kMostViews];   // of each view: wide, or of pairs of bfloat16
  int64_t blocks, pairs;           // blocks of rows, and pairs (i, j <= i) of them
  bool gradient = false, keep;
  int64_t d_panels[kMostViews];    // panels of wide.nr columns that hold D

  Plan(const RenyiInformation& problem, Isa isa)
      : p(problem), ops(blocks_of<C>(isa)), wide(tiles_of<C>(isa, type_of<C>)) {
    blocks = ceil_div(p.N, kRows);
    pairs = blocks * (blocks + 1) / 2;
    int64_t depth = 0;
    for (int v = 0; v < p.views; ++v) {
      depth += p.D[v];
      gradient |= p.grad[v] != nullptr;
      d_panels[v] = ceil_div(p.D[v], wide.nr);
      // A row of a unit view has a length that bfloat16 would round: its gradient takes rows of C.
      const bool halves = p.N >= kPairsFrom && !(p.unit[v] && p.grad[v]);
      k[v] = halves ? &tiles_of<C>(isa, p.dtype) : &wide;
    }
    keep = gradient && p.views * p.N <= 4 * depth;
  }

  int64_t rows_of(int64_t block) const { return std::min(kRows, p.N - block * kRows); }
  int64_t d_pad(int v) const { return d_panels[v] * wide.nr; }
  int64_t columns_panel(int v) const { return k[v]->panel_bytes(wide.nr, kRows); }
};

// One set at work.
template <class C>
struct Set {
  struct View {
    std::vector<int64_t> off;            // of each row, in elements
    std::vector<int> exponent;           // of each row's largest entry
    std::vector<double> length;          // [N] squared, of the scaled rows
    Buffer<C> whole, packed, post;       // [N] scales of a row: in all, of what is packed, of its products
    bool damped = false;                 // whether post is other than 1
    Buffer<char> left, right, columns;   // panels of mr and nr rows; of nr columns, block by block
    Buffer<C> sums, single, diagonal;    // [N, d_pad] the gradients' sums, [N] what of them stands on the diagonal
    View(const Plan<C>& z, int v)
        : off(z.p.N), exponent(z.p.N), length(z.p.N), whole(z.p.N), packed(z.p.N), post(z.p.N),
          left(ceil_div(z.p.N, z.k[v]->mr) * z.k[v]->panel_bytes(z.k[v]->mr, z.p.D[v])),
          right(ceil_div(z.p.N, z.wide.nr) * z.k[v]->panel_bytes(z.wide.nr, z.p.D[v])),
          columns(z.p.grad[v] ? z.blocks * z.d_panels[v] * z.columns_panel(v) : 0),
          sums(z.p.grad[v] && !z.keep ? z.blocks * kRows * z.d_pad(v) : 0),
          single(z.p.grad[v] && !z.keep && z.p.weights[1 + v] ? z.d_pad(v) * z.d_pad(v) : 0),
          diagonal(z.p.grad[v] && !z.keep ? z.p.N : 0) {
      for (int64_t i = 0; i < z.p.N; ++i) off[i] = i * z.p.x_s[v][1];
    }
  };
  std::vector<std::unique_ptr<View>> views;
  std::vector<double> parts;  // [pairs, 4]
  Buffer<C> kept;             // [pairs, views, kRows, kRows]
  int64_t index = 0;          // of the set
  C q = 1;
  double trace[1 + kMostViews], b = 0, a[kMostViews];  // traces: joint without q, and of each view
  bool there = true;

  explicit Set(const Plan<C>& z) : parts(z.pairs * 4), kept(z.keep ? z.pairs * z.p.views * kRows * kRows : 0) {
    for (int v = 0; v < z.p.views; ++v) views.push_back(std::make_unique<View>(z, v));
  }
  const void* x(const Plan<C>& z, int v) const { return shifted(z.p.x[v], z.p.dtype, index * z.p.x_s[v][0]); }
};

template <class C>
class Run {
 public:
  Run(const RenyiInformation& p, Isa isa, int threads)
      : z_(p, isa), team_(threads, useful_threads(operations(p))) {
    // Enough sets at a time to keep every thread busy: one, but for small sets.
    const int64_t items = z_.keep || !z_.gradient ? z_.pairs : std::max<int64_t>(z_.blocks / 2, 1);
    const int64_t at_a_time = std::clamp<int64_t>(ceil_div(4 * threads, items), 1, p.B);
    for (int64_t i = 0; i < at_a_time; ++i) sets_.push_back(std::make_unique<Set<C>>(z_));
  }

  void all() {
    for (int64_t first = 0; first < z_.p.B; first += static_cast<int64_t>(sets_.size())) {
      active_ = std::min<int64_t>(sets_.size(), z_.p.B - first);
      for (int64_t s = 0; s < active_; ++s) sets_[s]->index = first + s;
      measure();
      for (int64_t s = 0; s < active_; ++s) scale(*sets_[s]);
      pack();
      if (z_.gradient && !z_.keep) tournament();
      else products();
      for (int64_t s = 0; s < active_; ++s) total(*sets_[s]);
      if (!z_.gradient) continue;
      if (z_.keep) gradients_of_kept();
      else gradients_of_sums();
    }
  }

 private:
  static double operations(const RenyiInformation& p) {
    double flop = 0;
    for (int v = 0; v < p.views; ++v) flop += (p.grad[v] ? 3.0 : 1.0) * p.N * p.N * p.D[v] * std::max<int64_t>(p.B, 1);
    return flop;
  }

  // Items of every set at work, and of each of its views.
  template <class Item>
  void each(int64_t count, const Item& item) {
    team_.run(active_ * count, [&](int64_t i) { item(*sets_[i / count], i % count); });
  }

  void measure() {
    const int64_t chunks = ceil_div(z_.p.N, 32);
    each(z_.p.views * chunks, [&](Set<C>& set, int64_t item) {
      const int v = static_cast<int>(item / chunks);
      typename Set<C>::View& view = *set.views[v];
      const int64_t D = z_.p.D[v], first = item % chunks * 32;
      Buffer<C> row(D);
      for (int64_t i = first; i < std::min(z_.p.N, first + 32); ++i) {
        z_.wide.read_rows(set.x(z_, v), z_.p.dtype, view.off.data() + i, 1, z_.p.x_s[v][2], D, row.get());
        view.exponent[i] = exponent_of<C>(z_.ops.largest(row.get(), D));
        view.length[i] = z_.ops.square(row.get(), D, std::ldexp(C(1), -view.exponent[i]));
      }
    });
  }

  void scale(Set<C>& set) {
    const int64_t N = z_.p.N;
    for (int v = 0; v < z_.p.views; ++v) {
      typename Set<C>::View& view = *set.views[v];
      int top = -kExponent<C>;
      for (int64_t i = 0; i < N; ++i)
        if (view.length[i] != 0) top = std::max(top, view.exponent[i]);
      double sum = 0;
      for (int64_t i = 0; i < N; ++i) sum += std::ldexp(view.length[i], 2 * (view.exponent[i] - top));
      // The mean squared length comes to lie in [1, 4). Of a set of zeros, or not finite, any exponent will do.
      const int half = std::isfinite(sum) && sum > 0 ? exponent_of<C>(sum / N) / 2 : 0;
      const int of_set = std::clamp(top + half, -kExponent<C>, kExponent<C>);
      const bool pairs = z_.k[v] != &z_.wide;
      view.damped = pairs && z_.p.unit[v];
      set.trace[1 + v] = 0;
      for (int64_t i = 0; i < N; ++i) {
        double& length = view.length[i];
        const int e = z_.p.unit[v] ? view.exponent[i] : of_set;
        const C power = std::ldexp(C(1), -e);
        // A length that is NaN or infinite gives NaN, and shows.
        const C post = z_.p.unit[v] ? (length == 0 ? C(0) : static_cast<C>(1 / std::sqrt(length))) : C(1);
        length = z_.p.unit[v] ? (length == 0 ? 0.0 : length / length) : std::ldexp(length, 2 * (view.exponent[i] - e));
        view.whole.get()[i] = power * post;
        view.packed.get()[i] = view.damped ? power : power * post;
        view.post.get()[i] = post;
        set.trace[1 + v] += length;
      }
    }
    double joint = 0;
    for (int64_t i = 0; i < N; ++i) {
      double length = 1;
      for (const auto& view : set.views) length *= view->length[i];
      joint += length;
    }
    set.trace[0] = joint;
    set.there = joint != 0;  // NaN passes, and shows
    set.q = std::ldexp(C(1), std::isfinite(joint) && joint > 0 ? -exponent_of<C>(joint / N) : 0);
    std::fill(set.parts.begin(), set.parts.end(), 0.0);
    if (z_.keep || !z_.gradient) return;
    for (int v = 0; v < z_.p.views; ++v)
      if (z_.p.grad[v]) std::fill_n(set.views[v]->sums.get(), z_.blocks * kRows * z_.d_pad(v), C(0));
  }

  // rows [first, first + count) of a view times their scale, as a panel of the table k.
  void pack_panel(const Set<C>& set, int v, const Tiles<C>& k, const C* factor, int64_t first, int count, int width,
                  char* panel) {
    const typename Set<C>::View& view = *set.views[v];
    const int64_t D = z_.p.D[v];
    if (!z_.p.unit[v]) {  // one factor for all: a scale of every depth
      Buffer<C> scale(D);
      std::fill_n(scale.get(), D, factor[first]);
      k.pack_rows(set.x(z_, v), z_.p.dtype, view.off.data() + first, count, z_.p.x_s[v][2], D, width,
                  factor[first] == 1 ? nullptr : scale.get(), panel);
      return;
    }
    Buffer<C> rows(count * std::min(D, kDepth));
    int64_t off[kMaxWidth];
    for (int64_t d = 0; d < D; d += kDepth) {
      const int64_t depth = std::min(kDepth, D - d);
      z_.wide.read_rows(shifted(set.x(z_, v), z_.p.dtype, d * z_.p.x_s[v][2]), z_.p.dtype, view.off.data() + first,
                        count, z_.p.x_s[v][2], depth, rows.get());
      for (int i = 0; i < count; ++i) {
        off[i] = i * depth;
        z_.ops.scaled(rows.get() + off[i], depth, factor[first + i], rows.get() + off[i]);
      }
      k.pack_rows(rows.get(), type_of<C>, off, count, 1, depth, width, nullptr, panel + k.panel_bytes(width, d));
    }
  }

  void pack() {
    int64_t start[kMostViews + 1] = {0};
    const int64_t rights = ceil_div(z_.p.N, z_.wide.nr);
    for (int v = 0; v < z_.p.views; ++v)
      start[v + 1] = start[v] + ceil_div(z_.p.N, z_.k[v]->mr) + rights + (z_.p.grad[v] ? z_.blocks * z_.d_panels[v] : 0);
    each(start[z_.p.views], [&](Set<C>& set, int64_t item) {
      int v = 0;
      while (item >= start[v + 1]) ++v;
      item -= start[v];
      typename Set<C>::View& view = *set.views[v];
      const Tiles<C>& k = *z_.k[v];
      const int mr = k.mr, nr = k.nr;
      const int64_t D = z_.p.D[v], lefts = ceil_div(z_.p.N, mr);
      if (item < lefts) {
        const int count = static_cast<int>(std::min<int64_t>(mr, z_.p.N - item * mr));
        pack_panel(set, v, k, view.packed.get(), item * mr, count, mr, view.left.get() + item * k.panel_bytes(mr, D));
        return;
      }
      item -= lefts;
      if (item < rights) {
        const int count = static_cast<int>(std::min<int64_t>(nr, z_.p.N - item * nr));
        pack_panel(set, v, k, view.packed.get(), item * nr, count, nr, view.right.get() + item * k.panel_bytes(nr, D));
        return;
      }
      item -= rights;
      const int64_t block = item / z_.d_panels[v], panel = item % z_.d_panels[v], first = block * kRows;
      const int count = static_cast<int>(std::min<int64_t>(nr, D - panel * nr));
      k.pack_columns(shifted(set.x(z_, v), z_.p.dtype, panel * nr * z_.p.x_s[v][2]), z_.p.dtype,
                     view.off.data() + first, z_.rows_of(block), z_.p.x_s[v][2], count, nr, view.packed.get() + first,
                     view.columns.get() + (block * z_.d_panels[v] + panel) * z_.columns_panel(v));
    });
  }

  // c[v] = the products of the rows of blocks i and j in view v.
  void multiply_blocks(const Set<C>& set, int64_t i, int64_t j, C* const* c) {
    const int64_t rows = z_.rows_of(i), columns = z_.rows_of(j);
    for (int v = 0; v < z_.p.views; ++v) {
      const typename Set<C>::View& view = *set.views[v];
      const Tiles<C>& k = *z_.k[v];
      const int mr = k.mr, nr = k.nr;
      const int64_t a_panels = ceil_div(rows, mr), b_panels = ceil_div(columns, nr);
      const int64_t D = z_.p.D[v], left = k.panel_bytes(mr, D), right = k.panel_bytes(nr, D);
      std::fill_n(c[v], a_panels * mr * kRows, C(0));
      for (int64_t n = 0; n < b_panels; n += kPanels)
        for (int64_t m = 0; m < a_panels; m += kPanels)
          k.tile(D, view.left.get() + (i * kRows / mr + m) * left, static_cast<int>(std::min<int64_t>(kPanels, a_panels - m)),
                 view.right.get() + (j * kRows / nr + n) * right,
                 static_cast<int>(std::min<int64_t>(kPanels, b_panels - n)), c[v] + m * mr * kRows + n * nr, kRows);
      if (view.damped)
        z_.ops.damp(c[v], kRows, rows, columns, view.post.get() + i * kRows, view.post.get() + j * kRows);
    }
  }

  void add_sums(Set<C>& set, int64_t i, int64_t j, C* const* c) {
    double found[1 + kMostViews] = {0, 0, 0, 0};
    z_.ops.sums(c, z_.p.views, kRows, z_.rows_of(i), z_.rows_of(j), set.q, found);
    double* to = set.parts.data() + pair_index(i, j) * 4;
    for (int s = 0; s < 4; ++s) to[s] = (i == j ? 1 : 2) * found[s];
  }

  static int64_t pair_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }  // j <= i

  C* kept(const Set<C>& set, int64_t i, int64_t j, int v) const {
    return set.kept.get() + (pair_index(i, j) * z_.p.views + v) * kRows * kRows;
  }

  void products() {
    each(z_.pairs, [&](Set<C>& set, int64_t item) {
      int64_t i = static_cast<int64_t>((std::sqrt(8.0 * item + 1) - 1) / 2);
      while (pair_index(i, 0) > item) --i;
      while (pair_index(i + 1, 0) <= item) ++i;
      const int64_t j = item - pair_index(i, 0);
      Buffer<C> scratch(z_.keep ? 0 : z_.p.views * kRows * kRows);
      C* c[kMostViews];
      for (int v = 0; v < z_.p.views; ++v) c[v] = z_.keep ? kept(set, i, j, v) : scratch.get() + v * kRows * kRows;
      multiply_blocks(set, i, j, c);
      add_sums(set, i, j, c);
    });
  }

  // to [rows of the block, columns of `panels` panels from `from` on] += w, or its transpose, times the other block's rows.
  void add_product(const Set<C>& set, int v, const C* w, bool transposed, int64_t block, int64_t other, int64_t from,
                   int64_t panels, C* to, int64_t ld, char* packed) {
    const Tiles<C>& k = *z_.k[v];
    const int mr = k.mr, nr = k.nr;
    const int64_t rows = z_.rows_of(block), depth = z_.rows_of(other), a_panels = ceil_div(rows, mr);
    const int64_t left = k.panel_bytes(mr, depth), right = z_.columns_panel(v);
    int64_t off[kRows];
    for (int64_t i = 0; i < rows; ++i) off[i] = transposed ? i : i * kRows;
    for (int64_t m = 0; m < a_panels; ++m)
      k.pack_rows(w, type_of<C>, off + m * mr, static_cast<int>(std::min<int64_t>(mr, rows - m * mr)),
                  transposed ? kRows : 1, depth, mr, nullptr, packed + m * left);
    const char* columns = set.views[v]->columns.get() + (other * z_.d_panels[v] + from) * right;
    const int64_t step = right == k.panel_bytes(nr, depth) ? kPanels : 1;  // a ragged block's panels lie apart
    for (int64_t n = 0; n < panels; n += step)
      for (int64_t m = 0; m < a_panels; m += kPanels)
        k.tile(depth, packed + m * left, static_cast<int>(std::min<int64_t>(kPanels, a_panels - m)), columns + n * right,
               static_cast<int>(std::min(step, panels - n)), to + m * mr * ld + n * nr, ld);
  }

  // What stands on the diagonal nearly cancels against the traces: it stays out of the product, whose factors bfloat16
  // rounds.
  void take_diagonal(C* w, int64_t rows, C* to) {
    for (int64_t i = 0; i < rows; ++i) {
      to[i] = w[i * kRows + i];
      w[i * kRows + i] = 0;
    }
  }

  void tournament() {
    const int64_t players = z_.blocks + z_.blocks % 2;  // an odd one out rests
    for (int64_t round = -1; round + 1 < players; ++round) {
      each(round < 0 ? z_.blocks : players / 2, [&](Set<C>& set, int64_t item) {
        int64_t i = item, j = item;
        if (round >= 0) {
          const int64_t others = players - 1;
          i = item == 0 ? others : (round + item) % others;
          j = item == 0 ? round : (round + others - item) % others;
          if (i < j) std::swap(i, j);
          if (i >= z_.blocks) return;
        }
        meet(set, i, j);
      });
    }
  }

  void meet(Set<C>& set, int64_t i, int64_t j) {
    Buffer<C> scratch((z_.p.views + 1) * kRows * kRows);
    Buffer<char> packed(z_.wide.panel_bytes(static_cast<int>(kRows), kRows));
    C* c[kMostViews];
    for (int v = 0; v < z_.p.views; ++v) c[v] = scratch.get() + v * kRows * kRows;
    C* w = scratch.get() + z_.p.views * kRows * kRows;
    multiply_blocks(set, i, j, c);
    add_sums(set, i, j, c);
    for (int v = 0; v < z_.p.views; ++v) {
      if (!z_.p.grad[v]) continue;
      typename Set<C>::View& view = *set.views[v];
      z_.ops.weigh(c, z_.p.views, v, kRows, z_.rows_of(i), z_.rows_of(j), set.q, C(1), C(0), w);
      if (i == j) take_diagonal(w, z_.rows_of(i), view.diagonal.get() + i * kRows);
      const int64_t ld = z_.d_pad(v);
      add_product(set, v, w, false, i, j, 0, z_.d_panels[v], view.sums.get() + i * kRows * ld, ld, packed.get());
      if (i != j)
        add_product(set, v, w, true, j, i, 0, z_.d_panels[v], view.sums.get() + j * kRows * ld, ld, packed.get());
    }
  }

  void total(Set<C>& set) {
    double sums[1 + kMostViews] = {0, 0, 0, 0};
    for (int64_t i = 0; i < z_.pairs; ++i)
      for (int s = 0; s < 4; ++s) sums[s] += set.parts[i * 4 + s];
    double value = 0;
    if (set.there) {
      const auto entropy = [](double trace, double square) { return std::log2(trace / square * trace); };
      value = z_.p.weights[0] * entropy(set.trace[0] * set.q, sums[0]);
      for (int v = 0; v < z_.p.views; ++v)
        if (z_.p.weights[1 + v]) value += z_.p.weights[1 + v] * entropy(set.trace[1 + v], sums[1 + v]);
      set.b = -kFour * z_.p.weights[0] / sums[0];
      for (int v = 0; v < z_.p.views; ++v) set.a[v] = -kFour * z_.p.weights[1 + v] / sums[1 + v];
    }
    static_cast<C*>(z_.p.value)[set.index] = static_cast<C>(value);
  }

  // The traces' part of the gradient of row i of view v, as a multiple of the scaled row.
  double own(const Set<C>& set, int v, int64_t i) const {
    double others = 1;
    for (int o = 0; o < z_.p.views; ++o)
      if (o != v) others *= set.views[o]->length[i];
    double found = z_.p.weights[0] * others / set.trace[0];
    if (z_.p.weights[1 + v]) found += z_.p.weights[1 + v] / set.trace[1 + v];
    return kFour * found;
  }

  C* out(const Set<C>& set, int v, int64_t row) const {
    return static_cast<C*>(z_.p.grad[v]) + (set.index * z_.p.N + row) * z_.p.D[v];
  }

  void gradients_of_kept() {
    int64_t start[kMostViews + 1] = {0}, chunks[kMostViews];
    const int64_t chunk = kColumns / z_.wide.nr;
    for (int v = 0; v < z_.p.views; ++v) {
      chunks[v] = z_.p.unit[v] ? 1 : ceil_div(z_.d_panels[v], chunk);  // a unit row is needed whole
      start[v + 1] = start[v] + (z_.p.grad[v] ? z_.blocks * chunks[v] : 0);
    }
    each(start[z_.p.views], [&](Set<C>& set, int64_t item) {
      int v = 0;
      while (item >= start[v + 1]) ++v;
      item -= start[v];
      const int64_t i = item / chunks[v], from = item % chunks[v] * chunk, rows = z_.rows_of(i);
      const int64_t panels = z_.p.unit[v] ? z_.d_panels[v] : std::min(chunk, z_.d_panels[v] - from);
      const int64_t first = from * z_.wide.nr, count = std::min(z_.p.D[v] - first, panels * z_.wide.nr);
      if (!set.there) {
        for (int64_t r = 0; r < rows; ++r) std::fill_n(out(set, v, i * kRows + r) + first, count, C(0));
        return;
      }
      const int64_t ld = panels * z_.wide.nr, mr = z_.k[v]->mr, height = ceil_div(rows, mr) * mr;
      Buffer<C> sums(height * ld), w(kRows * kRows), row(count);
      Buffer<char> packed(z_.wide.panel_bytes(static_cast<int>(kRows), kRows));
      C diagonal[kRows];
      std::fill_n(sums.get(), height * ld, C(0));
      for (int64_t j = 0; j < z_.blocks; ++j) {
        const int64_t high = std::max(i, j), low = std::min(i, j);
        const C* c[kMostViews];
        for (int o = 0; o < z_.p.views; ++o) c[o] = kept(set, high, low, o);
        z_.ops.weigh(c, z_.p.views, v, kRows, z_.rows_of(high), z_.rows_of(low), set.q, C(set.b), C(set.a[v]), w.get());
        if (i == j) take_diagonal(w.get(), rows, diagonal);
        add_product(set, v, w.get(), i < j, i, j, from, panels, sums.get(), ld, packed.get());
      }
      const typename Set<C>::View& view = *set.views[v];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = i * kRows + r;
        z_.wide.read_rows(shifted(set.x(z_, v), z_.p.dtype, first * z_.p.x_s[v][2]), z_.p.dtype, view.off.data() + at, 1,
                          z_.p.x_s[v][2], count, row.get());
        z_.ops.finish(sums.get() + r * ld, nullptr, row.get(), count, C(1), C(0), C(own(set, v, at) + diagonal[r]),
                      view.whole.get()[at], z_.p.unit[v], out(set, v, at) + first);
      }
    });
  }

  // single = x^T x of every view that needs it, [d_pad, d_pad]: strips of rows, from the diagonal on.
  void squares() {
    int64_t start[kMostViews + 1] = {0};
    for (int v = 0; v < z_.p.views; ++v)
      start[v + 1] = start[v] + (z_.p.grad[v] && z_.p.weights[1 + v] ? ceil_div(z_.p.D[v], kPanels * z_.k[v]->mr) : 0);
    each(start[z_.p.views], [&](Set<C>& set, int64_t item) {
      int v = 0;
      while (item >= start[v + 1]) ++v;
      const typename Set<C>::View& view = *set.views[v];
      const Tiles<C>& k = *z_.k[v];
      const int mr = k.mr, nr = k.nr;
      const int64_t height = kPanels * mr;
      const int64_t D = z_.p.D[v], first = (item - start[v]) * height, from = first / nr, ld = z_.d_pad(v);
      const int64_t a_panels = ceil_div(std::min(D - first, height), mr), stride = z_.p.x_s[v][2];
      Buffer<C> strip(height * ld);
      Buffer<char> packed(a_panels * k.panel_bytes(mr, kRows));
      std::fill_n(strip.get(), height * ld, C(0));
      for (int64_t j = 0; j < z_.blocks; ++j) {
        const int64_t depth = z_.rows_of(j), left = k.panel_bytes(mr, depth);
        for (int64_t m = 0; m < a_panels; ++m)
          k.pack_columns(shifted(set.x(z_, v), z_.p.dtype, (first + m * mr) * stride), z_.p.dtype,
                         view.off.data() + j * kRows, depth, stride,
                         static_cast<int>(std::min<int64_t>(mr, D - first - m * mr)), mr, view.packed.get() + j * kRows,
                         packed.get() + m * left);
        for (int64_t n = from; n < z_.d_panels[v]; ++n)
          k.tile(depth, packed.get(), static_cast<int>(a_panels),
                 view.columns.get() + (j * z_.d_panels[v] + n) * z_.columns_panel(v), 1, strip.get() + n * nr, ld);
      }
      for (int64_t i = first; i < std::min(D, first + height); ++i)
        std::copy(strip.get() + (i - first) * ld + i, strip.get() + (i - first) * ld + D, view.single.get() + i * ld + i);
    });
    each(z_.p.views, [&](Set<C>& set, int64_t v) {
      if (start[v + 1] == start[v]) return;
      C* g = set.views[v]->single.get();
      const int64_t D = z_.p.D[v], ld = z_.d_pad(static_cast<int>(v));
      for (int64_t i = 0; i < D; ++i)
        for (int64_t j = i + 1; j < D; ++j) g[j * ld + i] = g[i * ld + j];
    });
  }

  void gradients_of_sums() {
    squares();
    int64_t start[kMostViews + 1] = {0};
    const int mr = z_.wide.mr, nr = z_.wide.nr;
    for (int v = 0; v < z_.p.views; ++v) start[v + 1] = start[v] + (z_.p.grad[v] ? z_.blocks : 0);
    // x^T x as right panels: rounded to bfloat16 it would be felt.
    std::vector<std::unique_ptr<Buffer<char>>> right;
    for (int64_t s = 0; s < active_; ++s)
      for (int v = 0; v < z_.p.views; ++v)
        right.push_back(std::make_unique<Buffer<char>>(
            z_.p.grad[v] && z_.p.weights[1 + v] ? z_.d_panels[v] * z_.wide.panel_bytes(nr, z_.p.D[v]) : 0));
    const auto right_of = [&](const Set<C>& set, int v) {
      return right[(set.index % static_cast<int64_t>(sets_.size())) * z_.p.views + v]->get();
    };
    for (int v = 0; v < z_.p.views; ++v) {
      if (!(z_.p.grad[v] && z_.p.weights[1 + v])) continue;
      const int64_t D = z_.p.D[v], ld = z_.d_pad(v);
      std::vector<int64_t> off(D);
      for (int64_t i = 0; i < D; ++i) off[i] = i * ld;
      each(z_.d_panels[v], [&](Set<C>& set, int64_t n) {
        z_.wide.pack_columns(set.views[v]->single.get() + n * nr, type_of<C>, off.data(), D, 1,
                             static_cast<int>(std::min<int64_t>(nr, D - n * nr)), nr, nullptr,
                             right_of(set, v) + n * z_.wide.panel_bytes(nr, D));
      });
    }
    each(start[z_.p.views], [&](Set<C>& set, int64_t item) {
      int v = 0;
      while (item >= start[v + 1]) ++v;
      const int64_t i = item - start[v], rows = z_.rows_of(i), D = z_.p.D[v], ld = z_.d_pad(v);
      typename Set<C>::View& view = *set.views[v];
      if (!set.there) {
        std::fill_n(out(set, v, i * kRows), rows * D, C(0));
        return;
      }
      const bool has_single = z_.p.weights[1 + v] != 0;
      const int64_t a_panels = ceil_div(rows, mr), left_bytes = z_.wide.panel_bytes(mr, D);
      Buffer<C> single(has_single ? a_panels * mr * ld : 0), row(D);
      if (has_single) {
        const bool stored = z_.k[v] == &z_.wide;
        Buffer<char> packed(stored ? 0 : a_panels * left_bytes);
        for (int64_t m = 0; m < a_panels && !stored; ++m)
          pack_panel(set, v, z_.wide, view.whole.get(), i * kRows + m * mr,
                     static_cast<int>(std::min<int64_t>(mr, rows - m * mr)), mr, packed.get() + m * left_bytes);
        const char* left = stored ? view.left.get() + i * kRows / mr * left_bytes : packed.get();
        std::fill_n(single.get(), a_panels * mr * ld, C(0));
        for (int64_t n = 0; n < z_.d_panels[v]; n += kPanels)
          for (int64_t m = 0; m < a_panels; m += kPanels)
            z_.wide.tile(D, left + m * left_bytes, static_cast<int>(std::min<int64_t>(kPanels, a_panels - m)),
                         right_of(set, v) + n * z_.wide.panel_bytes(nr, D),
                         static_cast<int>(std::min<int64_t>(kPanels, z_.d_panels[v] - n)),
                         single.get() + m * mr * ld + n * nr, ld);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = i * kRows + r;
        z_.wide.read_rows(set.x(z_, v), z_.p.dtype, view.off.data() + at, 1, z_.p.x_s[v][2], D, row.get());
        z_.ops.finish(view.sums.get() + at * ld, has_single ? single.get() + r * ld : nullptr, row.get(), D, C(set.b),
                      C(set.a[v]), C(own(set, v, at) + set.b * view.diagonal.get()[at]), view.whole.get()[at],
                      z_.p.unit[v], out(set, v, at));
      }
    });
  }

  Plan<C> z_;
  Team team_;
  std::vector<std::unique_ptr<Set<C>>> sets_;
  int64_t active_ = 0;
};

}  // namespace

void renyi_information_cpu(const RenyiInformation& p, Isa isa, int threads) {
  // Pairs of blocks, and bytes of what is kept of them, are counted in 64 bits.
  if (p.N >= int64_t(1) << 31) throw std::invalid_argument("infoclip._C: a set of 2^31 samples or more");
  if (p.dtype == kDouble) Run<double>(p, isa, threads).all();
  else Run<float>(p, isa, threads).all();
}

}  // namespace infoclip
