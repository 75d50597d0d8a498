// What guard_ops.transitions checks and makes of the usual call's arguments, at once: in 8
// microseconds and not 22, twice that where the kernel's own traffic has emptied the caches. What
// is accepted here is accepted there and gives the same views; of anything else this says nothing,
// and Python says what is wrong with it.
#include <ATen/TensorUtils.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "bindings.h"

namespace guard_ops {
namespace {

namespace py = pybind11;

struct Rejected {};

void require(bool met) {
  if (!met) throw Rejected{};
}

// A tensor and no subclass of it, which may mean something else by any of this.
const Tensor& exact(py::handle value) {
  require(THPVariable_CheckExact(value.ptr()));
  const Tensor& t = THPVariable_Unpack(value.ptr());
  require(t.layout() == at::kStrided && !t.is_neg());
  return t;
}

bool is_floating(const Tensor& t) {
  const at::ScalarType type = t.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

py::object view(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  const Tensor constant = t.requires_grad() ? t.detach() : t;
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(constant.as_strided(sizes, strides)));
}

struct Call {
  at::Device device;
  at::IntArrayRef sizes;  // of model_output
  int64_t leading, steps, batch, numel;
  bool with_grad = at::GradMode::is_enabled();  // of the caller

  Call(const Tensor& model_output, const Tensor& table)
      : device(model_output.device()), sizes(model_output.sizes()) {
    leading = table.dim() == 1 ? 1 : 2;
    require(is_floating(model_output) && model_output.numel() > 0 && model_output.dim() > leading);
    require(table.dim() >= 1 && table.dim() <= 3 && table.device() == device);
    require(table.size(0) == 5 && table.scalar_type() == at::kDouble);
    require(table.sizes().slice(1) == sizes.slice(0, table.dim() - 1));
    steps = leading == 1 ? 1 : sizes[0];
    batch = sizes[leading - 1];
    numel = model_output.numel() / (steps * batch);
  }

  void constant(const Tensor& t) const {
    require(t.device() == device && !(t.requires_grad() && with_grad));
  }

  // [K, B, D] with dense latents.
  py::object latents(const Tensor& t) const {
    require(is_floating(t) && t.sizes() == sizes && t.device() == device);
    const auto strides =
        at::detail::computeStride(sizes, t.strides(), at::DimVector{steps, batch, numel});
    require(strides && (strides->back() == 1 || numel == 1));
    return view(t, {steps, batch, numel}, *strides);
  }

  py::object constant_latents(py::handle value) const {
    if (value.is_none()) return py::none();
    const Tensor& t = exact(value);
    constant(t);
    return latents(t);
  }

  // [K, B] of a tensor of the leading dimensions, or of the samples alone.
  py::object per_transition(py::handle value, bool per_sample = false) const {
    if (value.is_none()) return py::none();
    const Tensor& t = exact(value);
    require(t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat);
    constant(t);
    if (leading == 2 && t.sizes() == sizes.slice(0, 2)) {
      return view(t, {steps, batch}, {t.stride(0), t.stride(1)});
    }
    require((leading == 1 || per_sample) && t.dim() == 1 && t.size(0) == batch);
    return view(t, {steps, batch}, {0, t.stride(0)});
  }

  py::object seeds(py::handle value) const {
    if (value.is_none()) return py::none();
    const Tensor& t = exact(value);
    require(t.scalar_type() == at::kLong && t.device() == device && t.dim() == leading + 1);
    require(t.sizes().slice(0, leading) == sizes.slice(0, leading) && t.size(leading) == 2);
    const int64_t stride_k = leading == 1 ? 0 : t.stride(0);
    return view(t, {steps, batch, 2}, {stride_k, t.stride(leading - 1), t.stride(leading)});
  }

  // [5, K, B]
  py::object coefficients(const Tensor& table) const {
    const int64_t dim = table.dim(), stride_k = dim > 1 ? table.stride(1) : 0;
    return view(table, {5, steps, batch},
                {table.stride(0), stride_k, dim > 2 ? table.stride(2) : 0});
  }
};

// One of guard_ops.transitions.FORMS, and nothing besides it.
bool is_a_form(py::handle x, py::handle y, py::handle m, py::handle v_old, py::handle noise,
               py::handle seed, py::handle log_prob) {
  const auto only = [&](std::initializer_list<py::handle> given) {
    int present = 0;
    for (py::handle h : {x, y, m, v_old, noise, seed, log_prob}) present += !h.is_none();
    return present == int(given.size()) &&
           std::none_of(given.begin(), given.end(), [](py::handle h) { return h.is_none(); });
  };
  return only({x, y, m}) || only({x, y, v_old}) || only({v_old, noise}) || only({v_old, seed}) ||
         only({x, y, log_prob});
}

py::object gather(py::handle model_output, py::handle uncond, py::handle ref, py::handle sample,
                  py::handle prev_sample, py::handle old_mean, py::handle old_model_output,
                  py::handle noise, py::handle seed, py::handle table, py::handle advantages,
                  py::handle old_log_prob, py::handle step_weights) {
  try {
    require(!advantages.is_none());
    require(is_a_form(sample, prev_sample, old_mean, old_model_output, noise, seed, old_log_prob));
    const Tensor &v = exact(model_output), &coefficients = exact(table);
    const Call call(v, coefficients);
    const at::NoGradGuard no_history;
    return py::make_tuple(
        call.latents(v), uncond.is_none() ? py::none() : call.latents(exact(uncond)),
        call.constant_latents(ref), call.constant_latents(sample),
        call.constant_latents(prev_sample), call.constant_latents(old_mean),
        call.constant_latents(old_model_output), call.constant_latents(noise), call.seeds(seed),
        call.coefficients(coefficients), call.per_transition(advantages, true),
        call.per_transition(old_log_prob), call.per_transition(step_weights));
  } catch (const Rejected&) {
    return py::none();
  }
}

}  // namespace

void define_gather(py::module_& m) {
  m.def("gather", gather,
        "(model_output, ..., coefficients, advantages, old_log_prob, step_weights) as a backend's "
        "guard_loss takes them, without history; None for arguments that need a closer look.");
}

}  // namespace guard_ops
