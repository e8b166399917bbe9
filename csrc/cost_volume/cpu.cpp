// The driver of the CPU form: packing, tiles and the gradient's projection, shared out to a team of threads.
// Every output tile is summed by one thread in one fixed order, so any number of threads gives the same bits.
#include <limits>
#include <vector>

#include "common/product.hpp"
#include "cost_volume/cost_volume.hpp"

namespace infoclip {
namespace {

constexpr double kEps = 1e-12;  // torch.nn.functional.normalize

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

int64_t useful(const CostVolume& p) { return useful_threads(2.0 * p.N * p.P * p.T * p.D); }

template <class C>
void forward(const CostVolume& p, Isa isa, int threads) {
  const Tiles<C>& k = tiles_of<C>(isa, p.dtype);
  const int64_t R = p.P * p.T, width = kPanels * k.nr;
  const int64_t text_panels = ceil_div(R, k.mr), image_panels = ceil_div(p.N, k.nr), across = ceil_div(p.N, width);
  const int64_t text_bytes = k.panel_bytes(k.mr, p.D), image_bytes = k.panel_bytes(k.nr, p.D);
  const auto text_off = text_offsets(p), image_off = image_offsets(p);
  Buffer<char> text(text_panels * text_bytes), image(image_panels * image_bytes);
  Buffer<C> text_inverse(text_panels * k.mr), image_inverse(image_panels * k.nr);
  Buffer<C> highest(p.highest ? R * across : 0);  // of each row in each column of tiles
  Team team(threads, useful(p));
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t pack_text = (b == 0 || !p.shared) ? text_panels : 0;
    team.run(pack_text + image_panels, [&](int64_t i) {
      const bool is_text = i < pack_text;
      if (!is_text) i -= pack_text;
      const int panel_width = is_text ? k.mr : k.nr;
      const int rows = static_cast<int>(std::min<int64_t>(panel_width, (is_text ? R : p.N) - i * panel_width));
      char* panel = is_text ? text.get() + i * text_bytes : image.get() + i * image_bytes;
      const void* src = is_text ? shifted(p.text, p.dtype, b * p.text_s[0])
                                : shifted(p.image, p.dtype, b * p.image_s[0]);
      k.pack_rows(src, p.dtype, (is_text ? text_off : image_off).data() + i * panel_width, rows,
                  is_text ? p.text_s[3] : p.image_s[2], p.D, panel_width, nullptr, panel);
      k.norms(panel, p.D, panel_width, C(kEps), (is_text ? text_inverse : image_inverse).get() + i * panel_width);
    });
    multiply<C>(k, team, text.get(), R, image.get(), p.N, p.D, [&](int64_t r, int64_t n, const C* c, int64_t count) {
      const C factor = text_inverse.get()[r] * C(p.scale);
      if (p.out) k.store(c, count, factor, image_inverse.get() + n, p.out, (b * R + r) * p.N + n, p.dtype);
      if (p.highest) highest.get()[r * across + n / width] = factor * k.highest(c, count, image_inverse.get() + n);
    });
    if (!p.highest) continue;
    for (int64_t t = 0; t < p.T; ++t) {
      C most = -std::numeric_limits<C>::infinity();
      for (int64_t i = 0; i < p.P; ++i)
        for (int64_t j = 0; j < across; ++j) {
          const C v = highest.get()[(i * p.T + t) * across + j];
          if (v > most || v != v) most = v;
        }
      static_cast<C*>(p.highest)[b * p.T + t] = most;
    }
  }
}

template <class C>
void inverse_norms(const Tiles<C>& k, Team& team, const CostVolume& p, const void* src,
                   const std::vector<int64_t>& off, int64_t stride, C* inverse) {
  const int64_t rows = static_cast<int64_t>(off.size());
  team.run(ceil_div(rows, k.nr), [&](int64_t i) {
    Buffer<char> panel(k.panel_bytes(k.nr, p.D));
    C found[kMaxWidth];
    const int count = static_cast<int>(std::min<int64_t>(k.nr, rows - i * k.nr));
    k.pack_rows(src, p.dtype, off.data() + i * k.nr, count, stride, p.D, k.nr, nullptr, panel.get());
    k.norms(panel.get(), p.D, k.nr, C(kEps), found);
    std::copy(found, found + count, inverse + i * k.nr);
  });
}

template <class C>
void backward(const CostVolume& p, Isa isa, int threads) {
  const Tiles<C>& k = tiles_of<C>(isa, p.dtype);
  const int64_t R = p.P * p.T, D = p.D, N = p.N;
  const auto text_off = text_offsets(p), grad_off = grad_offsets(p), image_off = image_offsets(p);
  const int64_t d_panels = ceil_div(D, k.nr), n_panels = ceil_div(N, k.mr), r_panels = ceil_div(R, k.mr);
  // Depth R for the image's gradient, depth N for the text's.
  const int64_t left_r = k.panel_bytes(k.mr, R), right_r = k.panel_bytes(k.nr, R);
  const int64_t left_n = k.panel_bytes(k.mr, N), right_n = k.panel_bytes(k.nr, N);
  Buffer<C> text_inverse(R), image_inverse(N);
  Buffer<char> text_columns(p.d_image ? d_panels * right_r : 0), grad_pixels(p.d_image ? n_panels * left_r : 0);
  Buffer<C> d_unit_image(p.d_image ? N * D : 0);
  Buffer<char> image_columns(p.d_text ? d_panels * right_n : 0), grad_rows(p.d_text ? r_panels * left_n : 0);
  Buffer<C> d_unit_text(p.d_text ? R * D : 0);
  Team team(threads, useful(p));
  constexpr int64_t kRows = 16;  // rows of the projection in a work item

  auto finish = [&](const C* g, int64_t rows, const void* x, const std::vector<int64_t>& off, int64_t stride,
                    const C* inverse, void* dst, const auto& place) {
    team.run(ceil_div(rows, kRows), [&](int64_t i) {
      Buffer<C> own(kRows * D);
      const int64_t first = i * kRows, last = std::min(rows, first + kRows);
      k.read_rows(x, p.dtype, off.data() + first, static_cast<int>(last - first), stride, D, own.get());
      for (int64_t r = first; r < last; ++r)
        k.project(g + r * D, own.get() + (r - first) * D, D, inverse[r], C(kEps), dst, place(r), p.dtype);
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
        // A narrow panel rounds the product of a value and its inverse norm: the text's, once a call where it is shared.
        team.run((new_text ? d_panels : 0) + n_panels, [&](int64_t i) {
          if (i < n_panels) {
            const int count = static_cast<int>(std::min<int64_t>(k.mr, N - i * k.mr));
            k.pack_columns(shifted(grad, p.dtype, i * k.mr * p.grad_s[3]), p.dtype, grad_off.data(), R, p.grad_s[3],
                           count, k.mr, nullptr, grad_pixels.get() + i * left_r);
            return;
          }
          i -= n_panels;
          const int count = static_cast<int>(std::min<int64_t>(k.nr, D - i * k.nr));
          k.pack_columns(shifted(text, p.dtype, i * k.nr * p.text_s[3]), p.dtype, text_off.data(), R, p.text_s[3],
                         count, k.nr, text_inverse.get(), text_columns.get() + i * right_r);
        });
        multiply<C>(k, team, grad_pixels.get(), N, text_columns.get(), D, R,
                    [&](int64_t n, int64_t d, const C* c, int64_t count) {
                      k.store(c, count, C(p.scale), nullptr, d_unit_image.get(), n * D + d,
                              sizeof(C) == 8 ? kDouble : kFloat);
                    });
        finish(d_unit_image.get(), N, image, image_off, p.image_s[2], image_inverse.get(), p.d_image,
               [&](int64_t n) { return (b * N + n) * D; });
      }
      if (p.d_text) {
        team.run(d_panels + r_panels, [&](int64_t i) {
          if (i < r_panels) {
            const int count = static_cast<int>(std::min<int64_t>(k.mr, R - i * k.mr));
            k.pack_rows(grad, p.dtype, grad_off.data() + i * k.mr, count, p.grad_s[3], N, k.mr, nullptr,
                        grad_rows.get() + i * left_n);
            return;
          }
          i -= r_panels;
          const int count = static_cast<int>(std::min<int64_t>(k.nr, D - i * k.nr));
          k.pack_columns(shifted(image, p.dtype, i * k.nr * p.image_s[2]), p.dtype, image_off.data(), N, p.image_s[2],
                         count, k.nr, image_inverse.get(), image_columns.get() + i * right_n);
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
  return texts + pixels + (backward ? p.D * ((p.d_image ? pixels : 0) + (p.d_text ? texts : 0)) : 0);
}

}  // namespace infoclip
