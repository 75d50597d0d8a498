// The same operators for CUDA tensors: memory from torch's allocator, work on its current stream,
// nothing that waits for the device but its first call, for the counters.
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

// What the kernels take: every tensor on the device of the first, nothing in float64.
Batch checked(const Batch& t, const Tensor& model_output, const Tensor& coefficients) {
  TORCH_CHECK_TYPE(!t.wide, "guard_ops: the CUDA kernels have no float64");
  TORCH_CHECK(coefficients.device() == model_output.device(),
              "guard_ops: coefficients is on another device");
  TORCH_CHECK(t.steps > 0 && t.batch > 0 && t.numel > 0, "guard_ops: an operand is empty");
  TORCH_CHECK(t.steps * t.batch < int64_t(1) << 24, "guard_ops: K B has to be below 2^24");
  return t;
}

Tensor workspace_for(const Batch& t, const Tensor& like) {
  return at::empty({cuda::workspace_bytes(t)}, like.options().dtype(at::kByte));
}

Tensor gradient_like(const MaybeTensor& branch, bool wanted, const Tensor& model_output) {
  if (!wanted || !branch) return at::empty({0}, model_output.options());
  return at::empty_like(*branch);
}

Operand gradient_operand(const Tensor& t) { return t.numel() ? operand(t) : Operand{}; }

Tensor sums(GUARD_OPS_OPERANDS) {
  const c10::cuda::CUDAGuard guard(model_output.device());
  const Batch t = checked(batch_of(GUARD_OPS_PASS), model_output, coefficients);
  Rows table[5];
  table_of(coefficients, table);
  Tensor out = at::empty({3, t.steps, t.batch}, model_output.options().dtype(at::kDouble));
  const Tensor workspace = workspace_for(t, model_output);
  cuda::sums(t, table, out.data_ptr<double>(), workspace.data_ptr(), stream());
  return out;
}

void gradient_into(const Tensor& grad, const Tensor& grad_uncond, const MaybeTensor& factor,
                   const Tensor& sum_grads, GUARD_OPS_OPERANDS) {
  const Batch t = checked(batch_of(GUARD_OPS_PASS), model_output, coefficients);
  Rows table[5];
  table_of(coefficients, table);
  TORCH_CHECK(sum_grads.dim() == 3 && sum_grads.size(0) == 3, "guard_ops: sum_grads [3, K, B]");
  const Rows c[3] = {rows(sum_grads.select(0, 0)), rows(sum_grads.select(0, 1)),
                     rows(sum_grads.select(0, 2))};
  cuda::Factor by;
  if (factor) {
    TORCH_CHECK(factor->numel() == 1 && factor->device() == model_output.device() &&
                    (factor->scalar_type() == at::kFloat || factor->scalar_type() == at::kDouble),
                "guard_ops: factor needs one float32 or float64 on the device");
    by = {factor->const_data_ptr(), factor->scalar_type() == at::kDouble};
  }
  cuda::gradient(t, table, c, gradient_operand(grad), gradient_operand(grad_uncond), by,
                 factor.has_value(), stream());
}

std::tuple<Tensor, Tensor> gradient(const Tensor& sum_grads, GUARD_OPS_OPERANDS, bool cond,
                                    bool uncond) {
  const c10::cuda::CUDAGuard guard(model_output.device());
  Tensor grad = gradient_like(model_output, cond, model_output);
  Tensor grad_uncond = gradient_like(model_output_uncond, uncond, model_output);
  if (grad.dim() == 3 || grad_uncond.dim() == 3) {
    gradient_into(grad, grad_uncond, {}, sum_grads, GUARD_OPS_PASS);
  }
  return {grad, grad_uncond};
}

// The gradients of `factor` times the loss, in place of those of the loss, unless factor is 1.
void scaled_(Tensor grad, Tensor grad_uncond, const Tensor& factor, const Tensor& sum_grads,
             GUARD_OPS_OPERANDS, bool cond, bool uncond) {
  const c10::cuda::CUDAGuard guard(model_output.device());
  const Tensor none = at::empty({0}, model_output.options());
  if (cond || uncond) {
    gradient_into(cond ? grad : none, uncond ? grad_uncond : none, factor, sum_grads,
                  GUARD_OPS_PASS);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> guard_loss(GUARD_OPS_OPERANDS,
                                                                      GUARD_OPS_OBJECTIVE,
                                                                      bool cond, bool uncond) {
  const c10::cuda::CUDAGuard guard(model_output.device());
  const Batch t = checked(batch_of(GUARD_OPS_PASS), model_output, coefficients);
  Tensor stats;
  const Problem problem = problem_of(GUARD_OPS_PASS_LOSS, &stats);
  Tensor grad = gradient_like(model_output, cond, model_output);
  Tensor grad_uncond = gradient_like(model_output_uncond, uncond, model_output);
  const auto options = model_output.options().dtype(at::kFloat);
  Tensor loss = at::empty({}, options), per_row = at::empty({4, t.steps, t.batch}, options);
  Tensor metrics = at::empty({metric_count, t.steps}, options);
  Tensor sum_grads = at::empty({3, t.steps, t.batch}, options.dtype(at::kDouble));
  const Tensor workspace = workspace_for(t, model_output);
  const cuda::LossResult result{loss.data_ptr<float>(),    per_row.data_ptr<float>(),
                                metrics.data_ptr<float>(), sum_grads.data_ptr<double>(),
                                gradient_operand(grad),    gradient_operand(grad_uncond)};
  const int64_t count = cuda::counters_needed(t);
  uint32_t* counters = cuda::counters_of(count, stream());
  Tensor own;
  if (counters == nullptr) {
    own = at::zeros({count}, options.dtype(at::kInt));
    counters = reinterpret_cast<uint32_t*>(own.data_ptr<int>());
  }
  last = cuda::guard_loss(t, problem, result, workspace.data_ptr(), counters, forced, stream());
  return {loss, grad, grad_uncond, per_row, metrics, sum_grads};
}

std::tuple<Tensor, Tensor, Tensor> sde_step(const Tensor& model_output, const Tensor& sample,
                                            const Tensor& coefficients, const MaybeTensor& noise,
                                            const MaybeTensor& seed) {
  TORCH_CHECK(noise.has_value() != seed.has_value(), "guard_ops: sde_step needs noise or seed");
  const c10::cuda::CUDAGuard guard(model_output.device());
  const Batch t =
      checked(batch_of(model_output, {}, {}, sample, {}, {}, {}, noise, seed, coefficients, 1.0),
              model_output, coefficients);
  Rows table[5];
  table_of(coefficients, table);
  Tensor prev_sample = at::empty_like(sample, at::MemoryFormat::Contiguous);
  Tensor mean = at::empty(sample.sizes(), sample.options().dtype(at::kFloat));
  Tensor square = at::empty({t.steps, t.batch}, sample.options().dtype(at::kDouble));
  const Tensor workspace = workspace_for(t, sample);
  cuda::sde_step(t, table, operand(prev_sample), operand(mean), square.data_ptr<double>(),
                 workspace.data_ptr(), stream());
  return {prev_sample, mean, square};
}

TORCH_LIBRARY_IMPL(guard_ops, CUDA, m) {
  m.impl("sums", sums);
  m.impl("gradient", gradient);
  m.impl("scaled_", scaled_);
  m.impl("guard_loss", guard_loss);
  m.impl("sde_step", sde_step);
}

}  // namespace

void define_cuda(pybind11::module_& m) {
  m.def(
      "force_cuda_path", [](const std::string& name) { forced = path_named(name); },
      "How guard_loss reads the batch on CUDA from now on: automatic, cooperative, cluster, "
      "in_turn or two_launches.");
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
