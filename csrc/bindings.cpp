// Operators under torch.ops.guard_ops, and build_info().
#include "bindings.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/TensorUtils.h>
#include <c10/core/CPUAllocator.h>
#include <omp.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/driver.h"

namespace guard_ops {
namespace {

// torch's own number of threads; equal contiguous shares, so memory is walked in order.
void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t useful = std::min<int64_t>(at::get_num_threads(), (n + grain - 1) / grain);
  if (useful <= 1 || omp_in_parallel()) return body(0, n);
#pragma omp parallel num_threads(useful)
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    body(n * me / threads, n * (me + 1) / threads);
  }
}

cpu::Machine machine() {
  const int threads = at::get_num_threads();
  return {cpu::kernels(), parallel, threads, cpu::cache_share(threads)};
}

Tensor sums(GUARD_OPS_OPERANDS) {
  const Batch t = batch_of(GUARD_OPS_PASS);
  Rows table[5];
  table_of(coefficients, table);
  std::vector<Sums> result(t.steps * t.batch);
  cpu::sums(machine(), t, table, result.data());
  Tensor out = at::empty({3, t.steps, t.batch}, model_output.options().dtype(at::kDouble));
  double* data = out.data_ptr<double>();
  const int64_t n = t.steps * t.batch;
  for (int64_t row = 0; row < n; ++row) {
    data[row] = result[row].s1;
    data[n + row] = result[row].s2;
    data[2 * n + row] = result[row].ref;
  }
  return out;
}

// Never destroyed: tensors may outlive whatever is.
cpu::Buffers& buffers() {
  constexpr size_t limit = size_t(256) << 20;
  static auto& kept = *new cpu::Buffers(limit);
  return kept;
}

// Uninitialized and dense, in memory that is kept for the next one when it is freed.
Tensor kept_empty(at::IntArrayRef sizes, at::IntArrayRef strides,
                  const at::TensorOptions& options) {
  struct Memory {
    void* start;
    size_t bytes;
  };
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  void* start = bytes < cpu::Buffers::smallest ? nullptr : buffers().take(bytes);
  if (!start) return at::empty_strided(sizes, strides, options);
  c10::profiledCPUMemoryReporter().New(start, bytes);  // torch.profiler counts it
  const auto give = [](void* context) {
    const std::unique_ptr<Memory> memory(static_cast<Memory*>(context));
    c10::profiledCPUMemoryReporter().Delete(memory->start);
    buffers().give(memory->start, memory->bytes);
  };
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       at::DataPtr(start, new Memory{start, bytes}, give, at::kCPU),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  return at::empty({0}, options).set_(std::move(storage), 0, sizes, strides);
}

// The gradient buffer of one branch: like it in dtype and layout, or empty when not wanted.
Tensor gradient_like(const MaybeTensor& branch, bool wanted, const Tensor& model_output) {
  if (!wanted || !branch) return at::empty({0}, model_output.options());
  const auto strides = at::infer_dense_strides(branch->sizes(), branch->strides());
  return kept_empty(branch->sizes(), strides, branch->options());
}

// Writes float64 numbers into `to` from element `at` on, in its dtype.
void fill(const Tensor& to, int64_t at, const double* from, int64_t n) {
  if (to.scalar_type() == at::kDouble) {
    std::copy(from, from + n, to.data_ptr<double>() + at);
  } else {
    std::copy(from, from + n, to.data_ptr<float>() + at);
  }
}

Operand gradient_operand(const Tensor& t) { return t.numel() ? operand(t) : Operand{}; }

std::tuple<Tensor, Tensor> gradient(const Tensor& sum_grads, GUARD_OPS_OPERANDS, bool cond,
                                    bool uncond) {
  const Batch t = batch_of(GUARD_OPS_PASS);
  Rows table[5];
  table_of(coefficients, table);
  TORCH_CHECK(sum_grads.dim() == 3 && sum_grads.size(0) == 3, "guard_ops: sum_grads [3, K, B]");
  const Rows c[3] = {rows(sum_grads.select(0, 0)), rows(sum_grads.select(0, 1)),
                     rows(sum_grads.select(0, 2))};
  std::vector<Coefficients> row_coefficients(t.steps * t.batch);
  for (int64_t k = 0; k < t.steps; ++k) {
    for (int64_t i = 0; i < t.batch; ++i) {
      row_coefficients[k * t.batch + i] = {*c[0].at(k, i), *c[1].at(k, i), *c[2].at(k, i)};
    }
  }
  Tensor grad = gradient_like(model_output, cond, model_output);
  Tensor grad_uncond = gradient_like(model_output_uncond, uncond, model_output);
  cpu::gradient(machine(), t, table, row_coefficients.data(), gradient_operand(grad),
                gradient_operand(grad_uncond));
  return {grad, grad_uncond};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> guard_loss(GUARD_OPS_OPERANDS,
                                                                      GUARD_OPS_OBJECTIVE,
                                                                      bool cond, bool uncond) {
  const Batch t = batch_of(GUARD_OPS_PASS);
  Tensor stats;
  const Problem problem = problem_of(GUARD_OPS_PASS_LOSS, &stats);
  Tensor grad = gradient_like(model_output, cond, model_output);
  Tensor grad_uncond = gradient_like(model_output_uncond, uncond, model_output);
  const cpu::Evaluation result =
      cpu::guard_loss(machine(), t, problem, gradient_operand(grad), gradient_operand(grad_uncond));
  const auto options = model_output.options().dtype(compute_type(t));
  const int64_t n = t.steps * t.batch;
  Tensor loss = at::empty({}, options), per_row = at::empty({4, t.steps, t.batch}, options);
  Tensor metrics = at::empty({cpu::metric_count, t.steps}, options);
  fill(loss, 0, &result.loss, 1);
  int64_t at = 0;
  for (const auto* x : {&result.log_ratio, &result.excess, &result.weights, &result.kl}) {
    fill(per_row, at, x->data(), n);
    at += n;
  }
  fill(metrics, 0, result.metrics.data(), metrics.numel());
  Tensor sum_grads = at::empty({3, t.steps, t.batch}, options.dtype(at::kDouble));
  double* c = sum_grads.data_ptr<double>();
  for (int64_t row = 0; row < n; ++row) {
    c[row] = result.coefficients[row].c1;
    c[n + row] = result.coefficients[row].c2;
    c[2 * n + row] = result.coefficients[row].c3;
  }
  return {loss, grad, grad_uncond, per_row, metrics, sum_grads};
}

std::tuple<Tensor, Tensor, Tensor> sde_step(const Tensor& model_output, const Tensor& sample,
                                            const Tensor& coefficients, const MaybeTensor& noise,
                                            const MaybeTensor& seed) {
  TORCH_CHECK(noise.has_value() != seed.has_value(), "guard_ops: sde_step needs noise or seed");
  const Batch t =
      batch_of(model_output, {}, {}, sample, {}, {}, {}, noise, seed, coefficients, 1.0);
  Rows table[5];
  table_of(coefficients, table);
  const auto strides = at::detail::defaultStrides(sample.sizes());
  Tensor prev_sample = kept_empty(sample.sizes(), strides, sample.options());
  Tensor mean = kept_empty(sample.sizes(), strides, sample.options().dtype(compute_type(t)));
  Tensor square = at::empty({t.steps, t.batch}, sample.options().dtype(at::kDouble));
  cpu::sde_step(machine(), t, table, operand(prev_sample), operand(mean),
                square.data_ptr<double>());
  return {prev_sample, mean, square};
}

TORCH_LIBRARY(guard_ops, m) {
  m.def("sums(" GUARD_OPS_SCHEMA ") -> Tensor");
  m.def("gradient(Tensor sum_grads, " GUARD_OPS_SCHEMA
        ", bool cond, bool uncond) -> (Tensor, Tensor)");
  m.def("guard_loss(" GUARD_OPS_SCHEMA
        ", Tensor advantages, Tensor? old_log_prob, Tensor? step_weights, Tensor? mean_std, "
        "int ratio_norm, int balance, bool detach_stats, bool mean_reduction, bool drop, "
        "bool gaussian, float target_std, float std_floor, float clip_low, float clip_high, "
        "float adv_clip, float weight_floor, float kl_beta, bool cond, bool uncond) -> "
        "(Tensor loss, Tensor grad, Tensor grad_uncond, Tensor per_row, Tensor metrics, "
        "Tensor sum_grads)");
  m.def(
      "scaled_(Tensor(a!) grad, Tensor(b!) grad_uncond, Tensor factor, Tensor "
      "sum_grads, " GUARD_OPS_SCHEMA ", bool cond, bool uncond) -> ()");
  m.def(
      "sde_step(Tensor model_output, Tensor sample, Tensor coefficients, Tensor? noise, "
      "Tensor? seed) -> (Tensor prev_sample, Tensor mean, Tensor square)");
}

TORCH_LIBRARY_IMPL(guard_ops, CPU, m) {
  m.impl("sums", sums);
  m.impl("gradient", gradient);
  m.impl("guard_loss", guard_loss);
  m.impl("sde_step", sde_step);
}

}  // namespace
}  // namespace guard_ops

namespace guard_ops {
void define_plain(pybind11::module_& m);  // bindings_plain.cpp
#if defined(GUARD_OPS_CUDA_VERSION)
void define_cuda(pybind11::module_& m);  // bindings_cuda.cpp
#endif
}  // namespace guard_ops

PYBIND11_MODULE(_C, m) {
  guard_ops::define_plain(m);
#if defined(GUARD_OPS_CUDA_VERSION)
  guard_ops::define_cuda(m);
#endif
  m.doc() = "Compiled kernels of guard_ops; the operators are under torch.ops.guard_ops.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = GUARD_OPS_VERSION;
        info["torch"] = GUARD_OPS_TORCH_VERSION;
#if defined(GUARD_OPS_CUDA_VERSION)
        info["cuda"] = GUARD_OPS_CUDA_VERSION;
        info["cuda_architectures"] = pybind11::str(GUARD_OPS_CUDA_ARCHITECTURES).attr("split")();
#else
        info["cuda"] = pybind11::none();
        info["cuda_architectures"] = pybind11::list();
#endif
        info["cpu_isa_built"] = GUARD_OPS_ISAS;
        info["cpu_isa"] = std::string(guard_ops::cpu::kernels().name);
        info["compiler"] = GUARD_OPS_COMPILER;
        info["flags"] = GUARD_OPS_FLAGS;
        return info;
      },
      "Versions, architectures, compiler and flags of this build, and the ISA in use.");
  m.def(
      "keep_buffers", [](size_t bytes) { guard_ops::buffers().limit(bytes); },
      "How many bytes of freed results the CPU operators keep for their next ones.");
  m.def(
      "release_buffers", [] { return guard_ops::buffers().release(); },
      "Gives the kept memory back to the system; returns how many bytes that were.");
}
