// The driver of the CPU form: packing, tiles and the gradient's projection, shared out to a team of threads.
// Every output tile is summed by one thread in one fixed order, so any number of threads gives the same bits.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/check.hpp"
#include "cost_volume/cost_volume.hpp"

namespace infoclip {
namespace {

constexpr double kEps = 1e-12;  // torch.nn.functional.normalize
constexpr int kPanels = 4;      // panels of A and of B in a tile: 48 x 128 results with AVX-512
constexpr int kMaxTile = 48 * 128;

template <class C>
const Blocks<C>& blocks_of(Isa isa) {
#ifdef INFOCLIP_X86
  if (isa == Isa::avx512) return avx512::blocks<C>();
  if (isa == Isa::avx2) return avx2::blocks<C>();
#endif
  (void)isa;
  return baseline::blocks<C>();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free { void operator()(void* p) const { std::free(p); } };

template <class C>
class Buffer {  // 64-byte aligned, uninitialised
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<C*>(std::aligned_alloc(64, ceil_div(std::max<int64_t>(n, 1) * sizeof(C), 64) * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  C* get() const { return data_.get(); }

 private:
  std::unique_ptr<C, Free> data_;
};

std::vector<int64_t> text_offsets(const CostVolume& p) {  // row r = p * T + t of the output
  std::vector<int64_t> off(p.P * p.T);
  for (int64_t i = 0; i < p.P; ++i)
    for (int64_t t = 0; t < p.T; ++t) off[i * p.T + t] = i * p.text_s[2] + t * p.text_s[1];
  return off;
}

std::vector<int64_t> grad_offsets(const CostVolume& p) {
  std::vector<int64_t> off(p.P * p.T);
  for (int64_t i = 0; i < p.P; ++i)
    for (int64_t t = 0; t < p.T; ++t) off[i * p.T + t] = i * p.grad_s[1] + t * p.grad_s[2];
  return off;
}

std::vector<int64_t> image_offsets(const CostVolume& p) {
  std::vector<int64_t> off(p.N);
  for (int64_t n = 0; n < p.N; ++n) off[n] = n * p.image_s[1];
  return off;
}

const void* shifted(const void* base, int dtype, int64_t elements) {
  const int64_t size = dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2;
  return static_cast<const char*>(base) + elements * size;
}

// rows x columns results = A B over K; what is done with a finished row of a tile is `take(row, column, c, n)`.
template <class C, class Take>
void multiply(const Blocks<C>& k, Team& team, const C* A, int64_t rows, const C* B, int64_t columns, int64_t K,
              const Take& take) {
  const int64_t height = kPanels * k.mr, width = kPanels * k.nr;
  const int64_t across = ceil_div(columns, width);
  team.run(ceil_div(rows, height) * across, [&](int64_t task) {
    alignas(64) C c[kMaxTile];
    const int64_t m = task / across * height, n = task % across * width;
    const int a_panels = static_cast<int>(std::min<int64_t>(kPanels, ceil_div(rows - m, k.mr)));
    const int b_panels = static_cast<int>(std::min<int64_t>(kPanels, ceil_div(columns - n, k.nr)));
    std::fill(c, c + a_panels * k.mr * width, C(0));
    k.tile(K, A + m * K, a_panels, B + n * K, b_panels, c, width);
    const int64_t last = std::min(rows, m + height), count = std::min(columns - n, width);
    for (int64_t i = m; i < last; ++i) take(i, n, c + (i - m) * width, count);
  });
}

// A thread's wake-up costs as much as about 20 million operations: a small image is not worth a second one.
int useful_threads(const CostVolume& p, int threads) {
  const double work = 2.0 * p.N * p.P * p.T * p.D;
  return static_cast<int>(std::min<double>(std::max(threads, 1), 1.0 + work / 2e7));
}

template <class C>
void forward(const CostVolume& p, Isa isa, int threads) {
  const Blocks<C>& k = blocks_of<C>(isa);
  const int64_t R = p.P * p.T;
  const int64_t text_panels = ceil_div(R, k.mr), image_panels = ceil_div(p.N, k.nr);
  const auto text_off = text_offsets(p), image_off = image_offsets(p);
  Buffer<C> text(text_panels * k.mr * p.D), image(image_panels * k.nr * p.D);
  Team team(useful_threads(p, threads));
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t pack_text = (b == 0 || !p.shared) ? text_panels : 0;
    team.run(pack_text + image_panels, [&](int64_t i) {
      C inverse[64];
      const bool is_text = i < pack_text;
      if (!is_text) i -= pack_text;
      const int width = is_text ? k.mr : k.nr;
      const int rows = static_cast<int>(std::min<int64_t>(width, (is_text ? R : p.N) - i * width));
      C* panel = (is_text ? text : image).get() + i * width * p.D;
      const void* src = is_text ? shifted(p.text, p.dtype, b * p.text_s[0])
                                : shifted(p.image, p.dtype, b * p.image_s[0]);
      k.pack_rows(src, p.dtype, (is_text ? text_off : image_off).data() + i * width, rows,
                  is_text ? p.text_s[3] : p.image_s[2], p.D, width, panel);
      k.norms(panel, p.D, width, C(kEps), true, inverse);
    });
    multiply<C>(k, team, text.get(), R, image.get(), p.N, p.D, [&](int64_t r, int64_t n, const C* c, int64_t count) {
      k.store(c, count, C(p.scale), p.out, (b * R + r) * p.N + n, p.dtype);
    });
  }
}

template <class C>
void inverse_norms(const Blocks<C>& k, Team& team, const CostVolume& p, const void* src,
                   const std::vector<int64_t>& off, int64_t stride, C* inverse) {
  const int64_t rows = static_cast<int64_t>(off.size());
  team.run(ceil_div(rows, k.nr), [&](int64_t i) {
    Buffer<C> panel(p.D * k.nr);
    C found[64];
    const int count = static_cast<int>(std::min<int64_t>(k.nr, rows - i * k.nr));
    k.pack_rows(src, p.dtype, off.data() + i * k.nr, count, stride, p.D, k.nr, panel.get());
    k.norms(panel.get(), p.D, k.nr, C(kEps), false, found);
    std::copy(found, found + count, inverse + i * k.nr);
  });
}

template <class C>
void backward(const CostVolume& p, Isa isa, int threads) {
  const Blocks<C>& k = blocks_of<C>(isa);
  const int64_t R = p.P * p.T, D = p.D, N = p.N;
  const auto text_off = text_offsets(p), grad_off = grad_offsets(p), image_off = image_offsets(p);
  const int64_t d_panels = ceil_div(D, k.nr), n_panels = ceil_div(N, k.mr), r_panels = ceil_div(R, k.mr);
  Buffer<C> text_inverse(R), image_inverse(N);
  Buffer<C> text_columns(p.d_image ? d_panels * k.nr * R : 0), grad_pixels(p.d_image ? n_panels * k.mr * R : 0);
  Buffer<C> d_unit_image(p.d_image ? N * D : 0);
  Buffer<C> image_columns(p.d_text ? d_panels * k.nr * N : 0), grad_rows(p.d_text ? r_panels * k.mr * N : 0);
  Buffer<C> d_unit_text(p.d_text ? R * D : 0);
  Team team(useful_threads(p, threads));
  constexpr int64_t kRows = 16;  // rows of the projection in a work item

  auto finish = [&](const C* g, int64_t rows, const void* x, const std::vector<int64_t>& off, int64_t stride,
                    const C* inverse, void* dst, const auto& place) {
    team.run(ceil_div(rows, kRows), [&](int64_t i) {
      Buffer<C> row(D);
      for (int64_t r = i * kRows; r < std::min(rows, (i + 1) * kRows); ++r)
        k.project(g + r * D, x, off[r], stride, D, inverse[r], C(kEps), row.get(), dst, place(r), p.dtype);
    });
  };

  if (p.d_text && p.shared) std::fill(d_unit_text.get(), d_unit_text.get() + R * D, C(0));
  for (int64_t b = 0; b < std::max<int64_t>(p.B, 1); ++b) {
    const void* text = shifted(p.text, p.dtype, b * p.text_s[0]);
    const bool new_text = b == 0 || !p.shared;
    auto text_place = [&](int64_t r) { return ((p.shared ? 0 : b * R) + r % p.T * p.P + r / p.T) * D; };
    if (new_text && (p.B > 0 || p.shared))
      inverse_norms<C>(k, team, p, text, text_off, p.text_s[3], text_inverse.get());
    if (p.B > 0) {
      const void* image = shifted(p.image, p.dtype, b * p.image_s[0]);
      const void* grad = shifted(p.grad, p.dtype, b * p.grad_s[0]);
      inverse_norms<C>(k, team, p, image, image_off, p.image_s[2], image_inverse.get());
      if (p.d_image) {
        team.run((new_text ? d_panels : 0) + n_panels, [&](int64_t i) {
          if (i < n_panels) {
            const int count = static_cast<int>(std::min<int64_t>(k.mr, N - i * k.mr));
            k.pack_columns(shifted(grad, p.dtype, i * k.mr * p.grad_s[3]), p.dtype, grad_off.data(), R, p.grad_s[3],
                           count, k.mr, nullptr, grad_pixels.get() + i * k.mr * R);
            return;
          }
          i -= n_panels;
          const int count = static_cast<int>(std::min<int64_t>(k.nr, D - i * k.nr));
          k.pack_columns(shifted(text, p.dtype, i * k.nr * p.text_s[3]), p.dtype, text_off.data(), R, p.text_s[3],
                         count, k.nr, text_inverse.get(), text_columns.get() + i * k.nr * R);
        });
        multiply<C>(k, team, grad_pixels.get(), N, text_columns.get(), D, R,
                    [&](int64_t n, int64_t d, const C* c, int64_t count) {
                      k.store(c, count, C(p.scale), d_unit_image.get(), n * D + d, sizeof(C) == 8 ? kDouble : kFloat);
                    });
        finish(d_unit_image.get(), N, image, image_off, p.image_s[2], image_inverse.get(), p.d_image,
               [&](int64_t n) { return (b * N + n) * D; });
      }
      if (p.d_text) {
        team.run(d_panels + r_panels, [&](int64_t i) {
          if (i < r_panels) {
            const int count = static_cast<int>(std::min<int64_t>(k.mr, R - i * k.mr));
            k.pack_rows(grad, p.dtype, grad_off.data() + i * k.mr, count, p.grad_s[3], N, k.mr,
                        grad_rows.get() + i * k.mr * N);
            return;
          }
          i -= r_panels;
          const int count = static_cast<int>(std::min<int64_t>(k.nr, D - i * k.nr));
          k.pack_columns(shifted(image, p.dtype, i * k.nr * p.image_s[2]), p.dtype, image_off.data(), N, p.image_s[2],
                         count, k.nr, image_inverse.get(), image_columns.get() + i * k.nr * N);
        });
        const bool add = p.shared;
        multiply<C>(k, team, grad_rows.get(), R, image_columns.get(), D, N,
                    [&](int64_t r, int64_t d, const C* c, int64_t count) {
                      C* to = d_unit_text.get() + r * D + d;
                      for (int64_t i = 0; i < count; ++i) to[i] = (add ? to[i] : C(0)) + c[i] * C(p.scale);
                    });
      }
    }
    if (p.d_text && (p.shared ? b + 1 >= p.B : p.B > 0))
      finish(d_unit_text.get(), R, text, text_off, p.text_s[3], text_inverse.get(), p.d_text, text_place);
  }
}

}  // namespace

void cost_volume_forward_cpu(const CostVolume& p, Isa isa, int threads) {
  if (p.dtype == kDouble) forward<double>(p, isa, threads);
  else forward<float>(p, isa, threads);
}

void cost_volume_backward_cpu(const CostVolume& p, Isa isa, int threads) {
  if (p.dtype == kDouble) backward<double>(p, isa, threads);
  else backward<float>(p, isa, threads);
}

int64_t cost_volume_work_floats(const CostVolume& p, bool backward) {
  const int64_t texts = (p.shared ? 1 : p.B) * p.T * p.P, pixels = p.B * p.N;
  return texts + pixels + (backward ? p.D * std::max(p.d_image ? pixels : 0, p.d_text ? texts : 0) : 0);
}

}  // namespace infoclip
