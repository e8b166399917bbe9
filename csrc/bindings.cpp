// The only pybind11 file. Tensors arrive as addresses with strides in elements: no torch header, so one build serves
// every torch. Outputs are allocated in Python; this code only writes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <vector>

#include "common/check.hpp"
#include "cost_volume/cost_volume.hpp"
#include "depthwise_conv2d/depthwise_conv2d.hpp"
#include "infonce/infonce.hpp"
#include "ms_deform_attn/ms_deform_attn.hpp"
#include "renyi_mutual_information/renyi.hpp"
#include "upsample_bce/upsample_bce.hpp"

namespace py = pybind11;
using namespace infoclip;

namespace {

using Strides3 = std::array<int64_t, 3>;
using Strides4 = std::array<int64_t, 4>;
using Sizes = std::array<int64_t, 5>;

CostVolume problem(const Sizes& sizes, int dtype, bool shared, double scale, uintptr_t image, const Strides3& image_s,
                   uintptr_t text, const Strides4& text_s) {
  for (int64_t size : sizes) INFOCLIP_CHECK(size >= 0, "a size is negative");
  INFOCLIP_CHECK(dtype >= kFloat && dtype <= kDouble, "unknown dtype");
  INFOCLIP_CHECK(!shared || text_s[0] == 0, "a shared text has no batch stride");
  CostVolume p{};
  p.B = sizes[0], p.N = sizes[1], p.T = sizes[2], p.P = sizes[3], p.D = sizes[4];
  p.dtype = dtype, p.shared = shared, p.scale = scale;
  p.image = reinterpret_cast<const void*>(image);
  p.text = reinterpret_cast<const void*>(text);
  std::copy(image_s.begin(), image_s.end(), p.image_s);
  std::copy(text_s.begin(), text_s.end(), p.text_s);
  return p;
}

void on_device(bool cuda, CostVolume& p, bool backward, const std::string& isa, int threads, uintptr_t stream) {
  if (!cuda) {
    const Isa chosen = parse_isa(isa);
    py::gil_scoped_release release;
    backward ? cost_volume_backward_cpu(p, chosen, threads) : cost_volume_forward_cpu(p, chosen, threads);
    return;
  }
#ifdef INFOCLIP_WITH_CUDA
  INFOCLIP_CHECK(p.dtype != kDouble, "the CUDA form has no float64");
  py::gil_scoped_release release;
  backward ? cost_volume_backward_cuda(p, stream) : cost_volume_forward_cuda(p, stream);
#else
  (void)stream;
  throw std::runtime_error("infoclip._C was built without CUDA");
#endif
}

InfoNce infonce_problem(const std::array<int64_t, 4>& sizes, int dtype, bool symmetric, double scale,
                        uintptr_t temperature, uintptr_t x, const Strides3& x_s, uintptr_t y, const Strides3& y_s,
                        uintptr_t positive, const std::array<int64_t, 2>& positive_s, uintptr_t rows,
                        uintptr_t columns) {
  for (int64_t size : sizes) INFOCLIP_CHECK(size > 0, "a size is not above 0");
  INFOCLIP_CHECK(dtype >= kFloat && dtype <= kDouble, "unknown dtype");
  INFOCLIP_CHECK(positive || sizes[1] == sizes[2], "the diagonal needs as many rows as columns");
  InfoNce p{};
  p.B = sizes[0], p.N = sizes[1], p.M = sizes[2], p.D = sizes[3];
  p.dtype = dtype, p.symmetric = symmetric, p.scale = scale;
  p.temperature = reinterpret_cast<const void*>(temperature);
  p.x = reinterpret_cast<const void*>(x);
  p.y = reinterpret_cast<const void*>(y);
  p.positive = reinterpret_cast<const int64_t*>(positive);
  std::copy(x_s.begin(), x_s.end(), p.x_s);
  std::copy(y_s.begin(), y_s.end(), p.y_s);
  std::copy(positive_s.begin(), positive_s.end(), p.positive_s);
  p.rows = reinterpret_cast<void*>(rows);
  p.columns = reinterpret_cast<void*>(columns);
  return p;
}

void infonce_on_device(bool cuda, const InfoNce& p, bool backward, const std::string& isa, int threads,
                       uintptr_t stream) {
  if (!cuda) {
    const Isa chosen = parse_isa(isa);
    py::gil_scoped_release release;
    backward ? infonce_backward_cpu(p, chosen, threads) : infonce_forward_cpu(p, chosen, threads);
    return;
  }
#ifdef INFOCLIP_WITH_CUDA
  INFOCLIP_CHECK(p.dtype != kDouble, "the CUDA form has no float64");
  py::gil_scoped_release release;
  backward ? infonce_backward_cuda(p, stream) : infonce_forward_cuda(p, stream);
#else
  (void)stream;
  throw std::runtime_error("infoclip._C was built without CUDA");
#endif
}

MsDeformAttn deform_problem(const std::array<int64_t, 6>& sizes, const std::vector<int64_t>& shapes, int dtype,
                            uintptr_t value, const Strides3& value_s, uintptr_t locations, uintptr_t weights,
                            uintptr_t levels) {
  for (int64_t size : sizes) INFOCLIP_CHECK(size > 0, "a size is not above 0");
  INFOCLIP_CHECK(dtype >= kFloat && dtype <= kDouble, "unknown dtype");
  INFOCLIP_CHECK(!shapes.empty() && shapes.size() % 2 == 0, "shapes are pairs of height and width");
  MsDeformAttn p{};
  p.B = sizes[0], p.S = sizes[1], p.M = sizes[2], p.D = sizes[3], p.Q = sizes[4], p.P = sizes[5];
  p.L = static_cast<int64_t>(shapes.size() / 2);
  int64_t pixels = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    INFOCLIP_CHECK(shapes[2 * l] > 0 && shapes[2 * l + 1] > 0, "a level is empty");
    pixels += shapes[2 * l] * shapes[2 * l + 1];
  }
  INFOCLIP_CHECK(pixels == p.S, "the levels do not add up to the value's pixels");
  p.shapes = shapes.data(), p.dtype = dtype;
  p.value = reinterpret_cast<const void*>(value);
  std::copy(value_s.begin(), value_s.end(), p.value_s);
  p.locations = reinterpret_cast<const void*>(locations);
  p.weights = reinterpret_cast<const void*>(weights);
  p.levels = reinterpret_cast<const int32_t*>(levels);
  return p;
}

void deform_on_device(bool cuda, const MsDeformAttn& p, bool backward, const std::string& isa, int threads,
                      uintptr_t stream) {
  if (!cuda) {
    const Isa chosen = parse_isa(isa);
    py::gil_scoped_release release;
    backward ? ms_deform_attn_backward_cpu(p, chosen, threads) : ms_deform_attn_forward_cpu(p, chosen, threads);
    return;
  }
#ifdef INFOCLIP_WITH_CUDA
  INFOCLIP_CHECK(p.dtype != kDouble, "the CUDA form has no float64");
  py::gil_scoped_release release;
  backward ? ms_deform_attn_backward_cuda(p, stream) : ms_deform_attn_forward_cuda(p, stream);
#else
  (void)stream;
  throw std::runtime_error("infoclip._C was built without CUDA");
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = INFOCLIP_VERSION;
  info["compiler"] = __VERSION__;
  py::list compiled, usable;
  compiled.append("baseline");
#ifdef INFOCLIP_X86
  compiled.append("avx2");
  compiled.append("avx512");
  compiled.append("avx512_bf16");
  compiled.append("amx_bf16");
#endif
  for (Isa isa : kIsas)
    if (has_isa(isa)) usable.append(isa_name(isa));
  info["isa_compiled"] = compiled;
  info["isa_usable"] = usable;
  info["isa"] = isa_name(best_isa());
#ifdef INFOCLIP_WITH_CUDA
  info["cuda"] = true;
  info["nvcc"] = INFOCLIP_NVCC;
  info["cuda_architectures"] = "sm_80, sm_90, PTX 9.0";
  info["cuda_runtime"] = cuda_runtime_version();
  info["cuda_driver"] = cuda_driver_version();
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of infoclip; load through infoclip.native.";
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const OutOfMemory& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());  // as torch's allocator reports it
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_RuntimeError, "infoclip._C: out of memory");
    }
  });
  m.def("build_info", &build_info);
  m.def(
      "cost_volume_work_floats",
      [](const Sizes& sizes, bool shared, bool backward, bool d_image, bool d_text) {
        CostVolume p{};
        p.B = sizes[0], p.N = sizes[1], p.T = sizes[2], p.P = sizes[3], p.D = sizes[4];
        p.shared = shared;
        p.d_image = d_image ? &p : nullptr;
        p.d_text = d_text ? &p : nullptr;
        return cost_volume_work_floats(p, backward);
      },
      py::arg("sizes"), py::arg("shared"), py::arg("backward"), py::arg("d_image") = false, py::arg("d_text") = false);
  m.def(
      "cost_volume_forward",
      [](bool cuda, const Sizes& sizes, int dtype, bool shared, double scale, uintptr_t image, const Strides3& image_s,
         uintptr_t text, const Strides4& text_s, uintptr_t out, uintptr_t highest, uintptr_t work,
         const std::string& isa, int threads, uintptr_t stream) {
        CostVolume p = problem(sizes, dtype, shared, scale, image, image_s, text, text_s);
        p.out = reinterpret_cast<void*>(out);
        p.highest = reinterpret_cast<void*>(highest);
        INFOCLIP_CHECK(!cuda || (p.out && !p.highest), "the CUDA form writes the volume and nothing else");
        p.work = reinterpret_cast<void*>(work);
        on_device(cuda, p, false, isa, threads, stream);
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("dtype"), py::arg("shared"), py::arg("scale"),
      py::arg("image"), py::arg("image_s"), py::arg("text"), py::arg("text_s"), py::arg("out"), py::arg("highest"),
      py::arg("work"), py::arg("isa"), py::arg("threads"), py::arg("stream"));
  m.def(
      "cost_volume_backward",
      [](bool cuda, const Sizes& sizes, int dtype, bool shared, double scale, uintptr_t image, const Strides3& image_s,
         uintptr_t text, const Strides4& text_s, uintptr_t grad, const Strides4& grad_s, uintptr_t d_image,
         uintptr_t d_text, uintptr_t work, const std::string& isa, int threads, uintptr_t stream) {
        CostVolume p = problem(sizes, dtype, shared, scale, image, image_s, text, text_s);
        p.grad = reinterpret_cast<const void*>(grad);
        std::copy(grad_s.begin(), grad_s.end(), p.grad_s);
        p.d_image = reinterpret_cast<void*>(d_image);
        p.d_text = reinterpret_cast<void*>(d_text);
        p.work = reinterpret_cast<void*>(work);
        on_device(cuda, p, true, isa, threads, stream);
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("dtype"), py::arg("shared"), py::arg("scale"),
      py::arg("image"), py::arg("image_s"), py::arg("text"), py::arg("text_s"), py::arg("grad"), py::arg("grad_s"),
      py::arg("d_image"), py::arg("d_text"), py::arg("work"), py::arg("isa"), py::arg("threads"), py::arg("stream"));
  m.def(
      "infonce_forward",
      [](bool cuda, const std::array<int64_t, 4>& sizes, int dtype, bool symmetric, double scale, uintptr_t temperature,
         uintptr_t x, const Strides3& x_s, uintptr_t y, const Strides3& y_s, uintptr_t positive,
         const std::array<int64_t, 2>& positive_s, uintptr_t rows, uintptr_t columns, uintptr_t loss, uintptr_t bound,
         uintptr_t work, const std::string& isa, int threads, uintptr_t stream) {
        InfoNce p = infonce_problem(sizes, dtype, symmetric, scale, temperature, x, x_s, y, y_s, positive, positive_s,
                                    rows, columns);
        p.loss = reinterpret_cast<void*>(loss);
        p.bound = reinterpret_cast<void*>(bound);
        p.work = reinterpret_cast<void*>(work);
        infonce_on_device(cuda, p, false, isa, threads, stream);
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("dtype"), py::arg("symmetric"), py::arg("scale"),
      py::arg("temperature"), py::arg("x"), py::arg("x_s"), py::arg("y"), py::arg("y_s"), py::arg("positive"),
      py::arg("positive_s"), py::arg("rows"), py::arg("columns"), py::arg("loss"), py::arg("bound"), py::arg("work"),
      py::arg("isa"), py::arg("threads"), py::arg("stream"));
  m.def(
      "infonce_backward",
      [](bool cuda, const std::array<int64_t, 4>& sizes, int dtype, bool symmetric, double scale, uintptr_t temperature,
         uintptr_t x, const Strides3& x_s, uintptr_t y, const Strides3& y_s, uintptr_t positive,
         const std::array<int64_t, 2>& positive_s, uintptr_t rows, uintptr_t columns, uintptr_t d_loss, uintptr_t d_x,
         uintptr_t d_y, uintptr_t d_temperature, uintptr_t work, const std::string& isa, int threads,
         uintptr_t stream) {
        InfoNce p = infonce_problem(sizes, dtype, symmetric, scale, temperature, x, x_s, y, y_s, positive, positive_s,
                                    rows, columns);
        INFOCLIP_CHECK(temperature || !d_temperature, "no temperature to differentiate");
        p.d_loss = reinterpret_cast<const void*>(d_loss);
        p.d_x = reinterpret_cast<void*>(d_x);
        p.d_y = reinterpret_cast<void*>(d_y);
        p.d_temperature = reinterpret_cast<void*>(d_temperature);
        p.work = reinterpret_cast<void*>(work);
        infonce_on_device(cuda, p, true, isa, threads, stream);
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("dtype"), py::arg("symmetric"), py::arg("scale"),
      py::arg("temperature"), py::arg("x"), py::arg("x_s"), py::arg("y"), py::arg("y_s"), py::arg("positive"),
      py::arg("positive_s"), py::arg("rows"), py::arg("columns"), py::arg("d_loss"), py::arg("d_x"), py::arg("d_y"),
      py::arg("d_temperature"), py::arg("work"), py::arg("isa"), py::arg("threads"), py::arg("stream"));
  m.def(
      "upsample_bce",
      [](bool cuda, const std::array<int64_t, 6>& sizes, int dtype, uintptr_t logits, const Strides4& logits_s,
         uintptr_t target, const Strides3& target_s, int64_t ignore_index, bool masked, uintptr_t loss, uintptr_t grad,
         uintptr_t work, const std::string& isa, int threads, uintptr_t stream) -> std::optional<int64_t> {
        for (int64_t size : sizes) INFOCLIP_CHECK(size > 0, "a size is not above 0");
        INFOCLIP_CHECK(dtype >= kFloat && dtype <= kDouble, "unknown dtype");
        UpsampleBce p{};
        p.B = sizes[0], p.T = sizes[1], p.h = sizes[2], p.w = sizes[3], p.H = sizes[4], p.W = sizes[5];
        p.dtype = dtype, p.ignore_index = ignore_index, p.masked = masked;
        p.logits = reinterpret_cast<const void*>(logits);
        p.target = reinterpret_cast<const int64_t*>(target);
        std::copy(logits_s.begin(), logits_s.end(), p.logits_s);
        std::copy(target_s.begin(), target_s.end(), p.target_s);
        p.loss = reinterpret_cast<void*>(loss);
        p.grad = reinterpret_cast<void*>(grad);
        p.work = reinterpret_cast<void*>(work);
        if (!cuda) {
          const Isa chosen = parse_isa(isa);
          py::gil_scoped_release release;
          bool found = false;
          const int64_t label = upsample_bce_cpu(p, chosen, threads, &found);
          return found ? std::optional<int64_t>(label) : std::nullopt;
        }
#ifdef INFOCLIP_WITH_CUDA
        INFOCLIP_CHECK(p.dtype != kDouble, "the CUDA form has no float64");
        py::gil_scoped_release release;
        upsample_bce_cuda(p, stream);
        return std::nullopt;
#else
        (void)stream;
        throw std::runtime_error("infoclip._C was built without CUDA");
#endif
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("dtype"), py::arg("logits"), py::arg("logits_s"),
      py::arg("target"), py::arg("target_s"), py::arg("ignore_index"), py::arg("masked"), py::arg("loss"),
      py::arg("grad"), py::arg("work"), py::arg("isa"), py::arg("threads"), py::arg("stream"));
  m.def(
      "ms_deform_attn_forward",
      [](bool cuda, const std::array<int64_t, 6>& sizes, const std::vector<int64_t>& shapes, int dtype, uintptr_t value,
         const Strides3& value_s, uintptr_t locations, uintptr_t weights, uintptr_t levels, uintptr_t out,
         const std::string& isa, int threads, uintptr_t stream) {
        MsDeformAttn p = deform_problem(sizes, shapes, dtype, value, value_s, locations, weights, levels);
        p.out = reinterpret_cast<void*>(out);
        deform_on_device(cuda, p, false, isa, threads, stream);
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("shapes"), py::arg("dtype"), py::arg("value"),
      py::arg("value_s"), py::arg("locations"), py::arg("weights"), py::arg("levels"), py::arg("out"), py::arg("isa"),
      py::arg("threads"), py::arg("stream"));
  m.def(
      "ms_deform_attn_backward",
      [](bool cuda, const std::array<int64_t, 6>& sizes, const std::vector<int64_t>& shapes, int dtype, uintptr_t value,
         const Strides3& value_s, uintptr_t locations, uintptr_t weights, uintptr_t levels, uintptr_t grad,
         uintptr_t d_value, uintptr_t d_locations, uintptr_t d_weights, uintptr_t order, uintptr_t starts,
         const std::string& isa, int threads, uintptr_t stream) {
        INFOCLIP_CHECK(!d_locations == !d_weights, "locations and weights have their gradients together");
        MsDeformAttn p = deform_problem(sizes, shapes, dtype, value, value_s, locations, weights, levels);
        p.grad = reinterpret_cast<const void*>(grad);
        p.d_value = reinterpret_cast<void*>(d_value);
        p.d_locations = reinterpret_cast<void*>(d_locations);
        p.d_weights = reinterpret_cast<void*>(d_weights);
        p.order = reinterpret_cast<const int64_t*>(order);
        p.starts = reinterpret_cast<const int64_t*>(starts);
        deform_on_device(cuda, p, true, isa, threads, stream);
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("shapes"), py::arg("dtype"), py::arg("value"),
      py::arg("value_s"), py::arg("locations"), py::arg("weights"), py::arg("levels"), py::arg("grad"),
      py::arg("d_value"), py::arg("d_locations"), py::arg("d_weights"), py::arg("order"), py::arg("starts"),
      py::arg("isa"), py::arg("threads"), py::arg("stream"));
  m.def(
      "depthwise_conv2d_weight_grad",
      [](const Sizes& sizes, int64_t dilation, int dtype, uintptr_t x, const Strides4& x_s, uintptr_t grad,
         const Strides4& grad_s, uintptr_t d_weight, uintptr_t d_bias, const std::string& isa, int threads) {
        for (int64_t size : sizes) INFOCLIP_CHECK(size > 0, "a size is not above 0");
        INFOCLIP_CHECK(sizes[4] % 2 == 1 && dilation > 0, "the kernel's side is odd, its dilation above 0");
        INFOCLIP_CHECK(dtype >= kFloat && dtype <= kDouble, "unknown dtype");
        DepthwiseConv2d p{};
        p.B = sizes[0], p.C = sizes[1], p.H = sizes[2], p.W = sizes[3], p.K = sizes[4];
        p.dilation = dilation, p.dtype = dtype;
        p.x = reinterpret_cast<const void*>(x);
        p.grad = reinterpret_cast<const void*>(grad);
        std::copy(x_s.begin(), x_s.end(), p.x_s);
        std::copy(grad_s.begin(), grad_s.end(), p.grad_s);
        p.d_weight = reinterpret_cast<void*>(d_weight);
        p.d_bias = reinterpret_cast<void*>(d_bias);
        const Isa chosen = parse_isa(isa);
        py::gil_scoped_release release;
        depthwise_conv2d_weight_grad_cpu(p, chosen, threads);
      },
      py::kw_only(), py::arg("sizes"), py::arg("dilation"), py::arg("dtype"), py::arg("x"), py::arg("x_s"),
      py::arg("grad"), py::arg("grad_s"), py::arg("d_weight"), py::arg("d_bias"), py::arg("isa"), py::arg("threads"));
  m.def(
      "renyi_information",
      [](bool cuda, const std::array<int64_t, 2>& sizes, int dtype, const std::vector<int64_t>& widths,
         const std::vector<uintptr_t>& x, const std::vector<Strides3>& x_s, const std::vector<bool>& unit,
         const std::vector<int>& weights, uintptr_t value, const std::vector<uintptr_t>& grad, uintptr_t work,
         const std::string& isa, int threads, uintptr_t stream) {
        RenyiInformation p{};
        p.B = sizes[0], p.N = sizes[1], p.views = static_cast<int>(x.size()), p.dtype = dtype;
        INFOCLIP_CHECK(p.views == 2 || p.views == 3, "there are not 2 or 3 views");
        INFOCLIP_CHECK(widths.size() == x.size() && x_s.size() == x.size() && unit.size() == x.size() &&
                           grad.size() == x.size() && weights.size() == x.size() + 1,
                       "the lists differ in length");
        INFOCLIP_CHECK(p.B > 0 && p.N > 0, "a size is not above 0");
        INFOCLIP_CHECK(dtype >= kFloat && dtype <= kDouble, "unknown dtype");
        p.weights[0] = weights[0];
        for (int v = 0; v < p.views; ++v) {
          INFOCLIP_CHECK(widths[v] > 0, "a size is not above 0");
          p.D[v] = widths[v], p.unit[v] = unit[v], p.weights[1 + v] = weights[1 + v];
          p.x[v] = reinterpret_cast<const void*>(x[v]);
          std::copy(x_s[v].begin(), x_s[v].end(), p.x_s[v]);
          p.grad[v] = reinterpret_cast<void*>(grad[v]);
        }
        p.value = reinterpret_cast<void*>(value);
        p.work = reinterpret_cast<void*>(work);
        if (!cuda) {
          const Isa chosen = parse_isa(isa);
          py::gil_scoped_release release;
          renyi_information_cpu(p, chosen, threads);
          return;
        }
#ifdef INFOCLIP_WITH_CUDA
        INFOCLIP_CHECK(p.dtype != kDouble, "the CUDA form has no float64");
        py::gil_scoped_release release;
        renyi_information_cuda(p, stream);
#else
        (void)stream;
        throw std::runtime_error("infoclip._C was built without CUDA");
#endif
      },
      py::kw_only(), py::arg("cuda"), py::arg("sizes"), py::arg("dtype"), py::arg("widths"), py::arg("x"),
      py::arg("x_s"), py::arg("unit"), py::arg("weights"), py::arg("value"), py::arg("grad"), py::arg("work"),
      py::arg("isa"), py::arg("threads"), py::arg("stream"));
#ifdef INFOCLIP_WITH_CUDA
  m.def(
      "infonce_work_floats",
      [](const std::array<int64_t, 4>& sizes, bool symmetric, bool paired, bool backward, bool learns) {
        const int64_t index = 0;
        InfoNce p{};
        p.B = sizes[0], p.N = sizes[1], p.M = sizes[2], p.D = sizes[3], p.symmetric = symmetric;
        p.positive = paired ? &index : nullptr;
        p.d_temperature = learns ? &p : nullptr;
        return infonce_work_floats(p, backward);
      },
      py::kw_only(), py::arg("sizes"), py::arg("symmetric"), py::arg("paired"), py::arg("backward"),
      py::arg("learns"));
  m.def(
      "renyi_information_work_floats",
      [](const std::array<int64_t, 2>& sizes, const std::vector<int64_t>& widths, bool needed) {
        INFOCLIP_CHECK(widths.size() == 2 || widths.size() == 3, "there are not 2 or 3 views");
        RenyiInformation p{};
        p.B = sizes[0], p.N = sizes[1], p.views = static_cast<int>(widths.size());
        std::copy(widths.begin(), widths.end(), p.D);
        p.grad[0] = needed ? &p : nullptr;
        return renyi_information_work_floats(p);
      },
      py::kw_only(), py::arg("sizes"), py::arg("widths"), py::arg("needed"));
  m.def(
      "upsample_bce_work_bytes",
      [](const std::array<int64_t, 6>& sizes) {
        UpsampleBce p{};
        p.B = sizes[0], p.T = sizes[1], p.h = sizes[2], p.w = sizes[3], p.H = sizes[4], p.W = sizes[5];
        return upsample_bce_work_bytes(p);
      },
      py::arg("sizes"));
#endif
}
