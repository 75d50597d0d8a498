// The usual call of a loss: what guard_ops.loss_call checks and makes of its arguments, and the
// operator's call, in C++. In Python the same takes some 30 microseconds more, and twice that where
// the kernel's own traffic has emptied the caches. What is accepted here is accepted there and
// gives the same views; of anything else this says nothing, and Python says what is wrong with it.
#include <ATen/TensorUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>

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

py::object wrap(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

py::object wrap(const MaybeTensor& t) { return t ? wrap(*t) : py::none(); }

// The order of guard_ops.transitions.LossArguments.
enum Argument {
  model_output,
  model_output_uncond,
  ref_model_output,
  sample,
  prev_sample,
  old_mean,
  old_model_output,
  noise,
  seed,
  coeffs,
  guidance_scale,
  old_log_prob,
  advantages,
  step_weights,
};

// guard_ops.backends.operators.objective_arguments
using Objective = std::tuple<int64_t, int64_t, bool, bool, bool, bool, double, double, double,
                             double, double, double, double>;

class PlainCall {
 public:
  // `keep`: for autograd, whose saved tensors must notice changes. Without it a constant that
  // requires grad is refused under no_grad too.
  PlainCall(const py::tuple& given, const Tensor& v, const Tensor& table, bool keep)
      : sizes_(v.sizes()), device_(v.device()), refuse_grad_(!keep || at::GradMode::is_enabled()) {
    leading_ = table.dim() == 1 ? 1 : 2;
    require(is_floating(v) && v.numel() > 0 && v.dim() > leading_);
    require(table.dim() >= 1 && table.dim() <= 3 && table.device() == device_);
    require(table.size(0) == 5 && table.scalar_type() == at::kDouble);
    require(table.sizes().slice(1) == v.sizes().slice(0, table.dim() - 1));
    steps_ = leading_ == 1 ? 1 : sizes_[0];
    batch_ = sizes_[leading_ - 1];
    numel_ = v.numel() / (steps_ * batch_);
    scale(given[model_output_uncond], given[guidance_scale]);

    const at::NoGradGuard no_history;
    std::optional<at::AutoDispatchBelowADInplaceOrView> no_autograd;
    if (!keep) no_autograd.emplace();
    for (int n = 0; n < seed; ++n) {
      if (const py::handle h = given[n]; !h.is_none()) latents_[n] = latents(h, n > 1);
    }
    seed_ = seeds(given[seed]);
    const int64_t dim = table.dim(), stride_k = dim > 1 ? table.stride(1) : 0;
    coefficients_ = view(table, {5, steps_, batch_},
                         {table.stride(0), stride_k, dim > 2 ? table.stride(2) : 0});
    require(!given[advantages].is_none());
    advantages_ = *per_transition(given[advantages], true);
    old_log_prob_ = per_transition(given[old_log_prob]);
    step_weights_ = per_transition(given[step_weights]);
  }

  // guard_ops.transitions.Shape
  py::tuple shape() const {
    py::tuple latent(sizes_.size() - leading_);
    for (size_t n = 0; n < latent.size(); ++n) latent[n] = sizes_[leading_ + n];
    return py::make_tuple(steps_, batch_, latent, leading_ == 1);
  }

  // guard_ops.transitions.Transitions
  py::tuple transitions() const {
    const auto& x = latents_;
    return py::make_tuple(wrap(x[0]), wrap(x[1]), wrap(x[2]), wrap(x[3]), wrap(x[4]), wrap(x[5]),
                          wrap(x[6]), wrap(x[7]), wrap(seed_), wrap(coefficients_), scale_);
  }

  // The first three of guard_ops.autograd.Problem.
  py::tuple rows() const {
    return py::make_tuple(wrap(advantages_), wrap(old_log_prob_), wrap(step_weights_));
  }

  bool wide() const {
    return std::any_of(latents_.begin(), latents_.end(),
                       [](const auto& x) { return x && x->scalar_type() == at::kDouble; });
  }

  // The operator guard_ops::guard_loss.
  py::tuple guard_loss(py::handle mean_std, const Objective& objective, bool cond,
                       bool uncond) const {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("guard_ops::guard_loss", "")
                               .typed<GuardLoss>();
    MaybeTensor stats;
    if (!mean_std.is_none()) {
      if (!THPVariable_Check(mean_std.ptr())) throw py::type_error("mean_std needs a tensor");
      stats = THPVariable_Unpack(mean_std.ptr());
    }
    const auto run = [&](auto... value) {
      const py::gil_scoped_release no_gil;
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      const auto& x = latents_;
      return op.call(*x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], seed_, coefficients_, scale_,
                     advantages_, old_log_prob_, step_weights_, stats, value..., cond, uncond);
    };
    const auto [loss, grad, grad_uncond, per_row, metrics, sum_grads] = std::apply(run, objective);
    return py::make_tuple(wrap(loss), wrap(grad), wrap(grad_uncond), wrap(per_row), wrap(metrics),
                          wrap(sum_grads));
  }

  // A gradient [K, B, D] that nobody else holds, in the shape of model_output.
  py::object shaped(py::handle grad) const {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    return wrap(THPVariable_Unpack(grad.ptr()).view(sizes_));
  }

 private:
  at::DimVector sizes_;  // of model_output
  at::Device device_;
  bool refuse_grad_;
  int64_t leading_, steps_, batch_, numel_;
  double scale_ = 1;
  std::array<MaybeTensor, seed> latents_;  // [K, B, D], in the order of Argument
  MaybeTensor seed_;                       // [K, B, 2]
  Tensor coefficients_;                    // [5, K, B]
  Tensor advantages_;                      // [K, B], like the next two
  MaybeTensor old_log_prob_, step_weights_;

  static Tensor view(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
    return (t.requires_grad() ? t.detach() : t).as_strided(sizes, strides);
  }

  void scale(py::handle uncond, py::handle value) {
    require(uncond.is_none() == value.is_none());
    if (value.is_none()) return;
    require(PyFloat_CheckExact(value.ptr()) || PyLong_CheckExact(value.ptr()));
    scale_ = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  void constant(const Tensor& t) const {
    require(t.device() == device_ && !(t.requires_grad() && refuse_grad_));
  }

  // [K, B, D] with dense latents.
  Tensor latents(py::handle value, bool is_constant) const {
    const Tensor& t = exact(value);
    if (is_constant) constant(t);
    require(is_floating(t) && t.sizes() == sizes_ && t.device() == device_);
    const at::DimVector flat{steps_, batch_, numel_};
    const auto strides = at::detail::computeStride(sizes_, t.strides(), flat);
    require(strides && (strides->back() == 1 || numel_ == 1));
    return view(t, flat, *strides);
  }

  // [K, B] of a tensor of the leading dimensions, or of the samples alone.
  MaybeTensor per_transition(py::handle value, bool per_sample = false) const {
    if (value.is_none()) return {};
    const Tensor& t = exact(value);
    require(t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat);
    constant(t);
    if (leading_ == 2 && t.sizes() == at::IntArrayRef(sizes_).slice(0, 2)) {
      return view(t, {steps_, batch_}, {t.stride(0), t.stride(1)});
    }
    require((leading_ == 1 || per_sample) && t.dim() == 1 && t.size(0) == batch_);
    return view(t, {steps_, batch_}, {0, t.stride(0)});
  }

  MaybeTensor seeds(py::handle value) const {
    if (value.is_none()) return {};
    const Tensor& t = exact(value);
    require(t.scalar_type() == at::kLong && t.device() == device_ && t.dim() == leading_ + 1);
    require(t.sizes().slice(0, leading_) == at::IntArrayRef(sizes_).slice(0, leading_));
    require(t.size(leading_) == 2);
    return view(t, {steps_, batch_, 2},
                {leading_ == 1 ? 0 : t.stride(0), t.stride(leading_ - 1), t.stride(leading_)});
  }
};

// One of guard_ops.transitions.FORMS, and nothing besides it.
bool is_a_form(const py::tuple& given) {
  const auto only = [&](std::initializer_list<Argument> names) {
    const auto present = [&](Argument name) { return !py::handle(given[name]).is_none(); };
    const auto all = {sample, prev_sample, old_mean, old_model_output, noise, seed, old_log_prob};
    return std::all_of(names.begin(), names.end(), present) &&
           std::count_if(all.begin(), all.end(), present) == int64_t(names.size());
  };
  return only({sample, prev_sample, old_mean}) || only({sample, prev_sample, old_model_output}) ||
         only({old_model_output, noise}) || only({old_model_output, seed}) ||
         only({sample, prev_sample, old_log_prob});
}

std::unique_ptr<PlainCall> plain_call(const py::tuple& given, py::handle table, bool keep) {
  try {
    require(is_a_form(given));
    return std::make_unique<PlainCall>(given, exact(given[model_output]), exact(table), keep);
  } catch (const Rejected&) {
    return nullptr;
  }
}

}  // namespace

void define_plain(py::module_& m) {
  py::class_<PlainCall>(m, "PlainCall", "A loss whose arguments are what a backend takes.")
      .def_property_readonly("shape", &PlainCall::shape)
      .def_property_readonly("wide", &PlainCall::wide)
      .def("transitions", &PlainCall::transitions)
      .def("rows", &PlainCall::rows)
      .def("guard_loss", &PlainCall::guard_loss)
      .def("shaped", &PlainCall::shaped);
  m.def("plain_call", plain_call,
        "(LossArguments, coefficients, keep) -> PlainCall without history; None for arguments that "
        "need a closer look.");
}

}  // namespace guard_ops
