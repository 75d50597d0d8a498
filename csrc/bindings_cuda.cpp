// The same operators for CUDA tensors: memory from torch's allocator, work on its current stream,
// nothing that waits for the device but its first call, for the counters.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.h"
#include "cuda/kernels.h"

namespace guard_ops {
namespace {

cuda::Path path_named(const std::string& name) {
  std::string names;
  for (const auto path : cuda::paths) {
    if (name == cuda::name_of(path)) return path;
    names += std::string(names.empty() ? "" : ", ") + cuda::name_of(path);
  }
  throw std::invalid_argument("guard_ops: there is no path " + name + "; one of " + names);
}

std::atomic<cuda::Path> forced{cuda::Path::automatic}, last{cuda::Path::automatic};

cuda::Stream stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// A call whose tensors are all on one device, and none in float64, as the kernels take them.
const Call& checked(const Call& call, const Tensor& coefficients) {
  const Batch& t = call.batch;
  TORCH_CHECK_TYPE(!t.wide,
                   "the 'cuda' backend has no float64 kernels; convert the latents to float32, or "
                   "use guard_ops.use_backend('triton') or 'reference'");
  TORCH_CHECK(coefficients.device() == call.model_output().device(),
              "guard_ops: coefficients is on another device");
  TORCH_CHECK(t.steps > 0 && t.batch > 0 && t.numel > 0, "guard_ops: an operand is empty");
  TORCH_CHECK(t.steps * t.batch < int64_t(1) << 24, "guard_ops: K B has to be below 2^24");
  return call;
}

c10::Device device_of(const TensorList& latents) { return latents.get(0).value().device(); }

Tensor workspace_for(const Call& call) {
  return at::empty({cuda::workspace_bytes(call.batch)},
                   call.model_output().options().dtype(at::kByte));
}

Tensor gradient_like(const MaybeTensor& branch, bool wanted, const Tensor& model_output) {
  if (!wanted || !branch) return at::empty({0}, model_output.options());
  return at::empty_like(*branch);
}

Tensor sums(GUARD_OPS_OPERANDS) {
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call(GUARD_OPS_PASS);
  const Batch& t = checked(call, coefficients).batch;
  const auto options = call.model_output().options().dtype(at::kDouble);
  Tensor out = at::empty({3, t.steps, t.batch}, options);
  const Tensor workspace = workspace_for(call);
  cuda::sums(t, call.table, out.data_ptr<double>(), workspace.data_ptr(), stream());
  return out;
}

void gradient_into(const Call& call, const Tensor& grad, const Tensor& grad_uncond,
                   const MaybeTensor& factor, const Tensor& sum_grads) {
  cuda::Factor by;
  if (factor) {
    TORCH_CHECK(factor->numel() == 1 && factor->device() == call.model_output().device() &&
                    (factor->scalar_type() == at::kFloat || factor->scalar_type() == at::kDouble),
                "guard_ops: factor needs one float32 or float64 on the device");
    by = {factor->const_data_ptr(), factor->scalar_type() == at::kDouble};
  }
  cuda::gradient(call.batch, call.table, triple_of(sum_grads, "sum_grads").data(),
                 gradient_operand(grad), gradient_operand(grad_uncond), by, factor.has_value(),
                 stream());
}

std::tuple<Tensor, Tensor> gradient(const Tensor& sum_grads, GUARD_OPS_OPERANDS, bool cond,
                                    bool uncond) {
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call(GUARD_OPS_PASS);
  checked(call, coefficients);
  Tensor grad = gradient_like(call.tensors.model_output, cond, call.model_output());
  Tensor grad_uncond = gradient_like(call.tensors.model_output_uncond, uncond, call.model_output());
  if (grad.dim() == 3 || grad_uncond.dim() == 3) {
    gradient_into(call, grad, grad_uncond, {}, sum_grads);
  }
  return {grad, grad_uncond};
}

// The gradients of `factor` times the loss, in place of those of the loss, unless factor is 1.
void scaled_(Tensor grad, Tensor grad_uncond, const Tensor& factor, const Tensor& sum_grads,
             GUARD_OPS_OPERANDS, bool cond, bool uncond) {
  if (!cond && !uncond) return;
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call(GUARD_OPS_PASS);
  checked(call, coefficients);
  const Tensor none = at::empty({0}, call.model_output().options());
  gradient_into(call, cond ? grad : none, uncond ? grad_uncond : none, factor, sum_grads);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> guard_loss(GUARD_OPS_OPERANDS,
                                                                      GUARD_OPS_LOSS_OPERANDS,
                                                                      bool cond, bool uncond) {
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call(GUARD_OPS_PASS);
  const Batch& t = checked(call, coefficients).batch;
  const LossProblem loss(call, rows, choices, numbers);
  const Tensor& v = call.model_output();
  const LossTensors out(call, gradient_like(v, cond, v),
                        gradient_like(call.tensors.model_output_uncond, uncond, v));
  const Tensor workspace = workspace_for(call);
  const cuda::LossResult result{out.loss.data_ptr<float>(),    out.per_row.data_ptr<float>(),
                                out.metrics.data_ptr<float>(), out.sum_grads.data_ptr<double>(),
                                gradient_operand(out.grad),    gradient_operand(out.grad_uncond)};
  const int64_t count = cuda::counters_needed(t);
  uint32_t* counters = cuda::counters_of(count, stream());
  Tensor zeros;
  if (counters == nullptr) {
    zeros = at::zeros({count}, v.options().dtype(at::kInt));
    counters = reinterpret_cast<uint32_t*>(zeros.data_ptr<int>());
  }
  last =
      cuda::guard_loss(t, loss.problem, result, workspace.data_ptr(), counters, forced, stream());
  return out.all();
}

Tensor workspace_for(const Problem& problem, const Tensor& sums) {
  return at::empty({cuda::rows_workspace_bytes(problem)}, sums.options().dtype(at::kByte));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> evaluate(const Tensor& sums, GUARD_OPS_OPERANDS,
                                                    GUARD_OPS_LOSS_OPERANDS) {
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call(GUARD_OPS_PASS);
  checked(call, coefficients);
  const LossProblem loss(call, rows, choices, numbers);
  const std::array<Doubles, 3> of = given_sums(sums, call);
  const LossTensors out(call, {}, {});
  const Tensor workspace = workspace_for(loss.problem, sums);
  const cuda::LossResult result{out.loss.data_ptr<float>(),
                                out.per_row.data_ptr<float>(),
                                out.metrics.data_ptr<float>(),
                                out.sum_grads.data_ptr<double>(),
                                {},
                                {}};
  cuda::evaluate(loss.problem, of.data(), result, workspace.data_ptr(), stream());
  return out.without_gradients();
}

Tensor ratio_statistics(const Tensor& sums, GUARD_OPS_OPERANDS, GUARD_OPS_LOSS_OPERANDS) {
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call(GUARD_OPS_PASS);
  const Batch& t = checked(call, coefficients).batch;
  LossProblem loss(call, rows, choices, numbers);
  loss.problem.mean = nullptr;
  const std::array<Doubles, 3> of = given_sums(sums, call);
  Tensor out = at::empty({statistic_count, t.steps}, sums.options());
  const Tensor workspace = workspace_for(loss.problem, sums);
  cuda::ratio_statistics(loss.problem, of.data(), out.data_ptr<double>(), workspace.data_ptr(),
                         stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sde_step(GUARD_OPS_OPERANDS) {
  const c10::cuda::CUDAGuard guard(device_of(latents));
  const Call call = step_call(GUARD_OPS_PASS);
  const Batch& t = checked(call, coefficients).batch;
  const Tensor& sample = *call.tensors.sample;
  Tensor prev_sample = at::empty_like(sample, at::MemoryFormat::Contiguous);
  Tensor mean = at::empty(sample.sizes(), sample.options().dtype(at::kFloat));
  Tensor square = at::empty({t.steps, t.batch}, sample.options().dtype(at::kDouble));
  const Tensor workspace = workspace_for(call);
  cuda::sde_step(t, call.table, operand(prev_sample), operand(mean), square.data_ptr<double>(),
                 workspace.data_ptr(), stream());
  return {prev_sample, mean, square};
}

TORCH_LIBRARY_IMPL(guard_ops, CUDA, m) {
  m.impl("sums", sums);
  m.impl("gradient", gradient);
  m.impl("scaled_", scaled_);
  m.impl("guard_loss", guard_loss);
  m.impl("evaluate", evaluate);
  m.impl("ratio_statistics", ratio_statistics);
  m.impl("sde_step", sde_step);
}

}  // namespace

void define_cuda(pybind11::module_& m) {
  m.def(
      "force_cuda_path", [](const std::string& name) { forced = path_named(name); },
      "How guard_loss reads the batch on CUDA from now on: automatic, cooperative, cluster or "
      "two_launches.");
  m.def(
      "leave_multiprocessors_free", cuda::leave_free,
      "How many multiprocessors of every device the cooperative launches leave to other streams.");
  m.def(
      "last_cuda_path", [] { return std::string(cuda::name_of(last)); },
      "The path that the last guard_loss took.");
  m.def(
      "cuda_unsupported",
      [](int device) {
        const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        return cuda::unsupported();
      },
      "Why this device cannot run the kernels of this build; empty where it can.");
}

}  // namespace guard_ops
