// Operators under torch.ops.guard_ops, and the extension's module.
#include "bindings.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/TensorUtils.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <omp.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "cpu/buffers.h"
#include "cpu/driver.h"

namespace guard_ops {
namespace {

// Whether this process was forked from one that had threads. OpenMP then believes that its threads
// are here as well, and waits for them forever.
bool forked_from_threads = false;

const int watching_forks = [] {
  static bool had_threads;  // whether the process that forks has any but the one that forks it
  const auto before = [] {
    std::error_code failed;
    std::filesystem::directory_iterator task("/proc/self/task", failed);
    int count = 0;
    while (!failed && task != std::filesystem::directory_iterator()) {
      ++count;
      task.increment(failed);
    }
    had_threads = failed || count > 1;
  };
  return pthread_atfork(before, nullptr, [] { forked_from_threads |= had_threads; });
}();

// torch's own number of threads, and one in a process whose threads are gone.
int threads() {
  if (forked_from_threads && at::get_num_threads() > 1) {
    TORCH_WARN(
        "guard_ops: this process was forked from one with threads, which OpenMP would wait for; "
        "torch is set to one thread here. Start processes by spawn instead of fork.");
    at::set_num_threads(1);
  }
  return at::get_num_threads();
}

// Equal contiguous shares, so that memory is walked in order.
void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t useful = std::min<int64_t>(threads(), (n + grain - 1) / grain);
  if (useful <= 1 || omp_in_parallel()) return body(0, n);
#pragma omp parallel num_threads(useful)
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    body(n * me / threads, n * (me + 1) / threads);
  }
}

cpu::Machine machine() {
  const int count = threads();
  return {cpu::kernels(), parallel, count, cpu::cache_share(count)};
}

Tensor sums(GUARD_OPS_OPERANDS) {
  const Call call(GUARD_OPS_PASS);
  const int64_t n = call.batch.steps * call.batch.batch;
  std::vector<Sums> result(n);
  cpu::sums(machine(), call.batch, call.table, result.data());
  const auto options = call.model_output().options().dtype(at::kDouble);
  Tensor out = at::empty({3, call.batch.steps, call.batch.batch}, options);
  double* data = out.data_ptr<double>();
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

std::vector<Coefficients> coefficients_of(const Call& call, const Tensor& sum_grads,
                                          double factor) {
  const std::array<Doubles, 3> c = triple_of(sum_grads, "sum_grads");
  std::vector<Coefficients> out;
  for (int64_t k = 0; k < call.batch.steps; ++k) {
    for (int64_t i = 0; i < call.batch.batch; ++i) {
      out.push_back({factor * *c[0].at(k, i), factor * *c[1].at(k, i), factor * *c[2].at(k, i)});
    }
  }
  return out;
}

std::tuple<Tensor, Tensor> gradient(const Tensor& sum_grads, GUARD_OPS_OPERANDS, bool cond,
                                    bool uncond) {
  const Call call(GUARD_OPS_PASS);
  Tensor grad = gradient_like(call.tensors.model_output, cond, call.model_output());
  Tensor grad_uncond = gradient_like(call.tensors.model_output_uncond, uncond, call.model_output());
  const auto coefficients_by_row = coefficients_of(call, sum_grads, 1);
  cpu::gradient(machine(), call.batch, call.table, coefficients_by_row.data(),
                gradient_operand(grad), gradient_operand(grad_uncond));
  return {grad, grad_uncond};
}

// The gradients of `factor` times the loss, in place of those of the loss. A 16-bit one, which
// would be rounded a second time, is formed anew.
void scaled_(Tensor grad, Tensor grad_uncond, const Tensor& factor, const Tensor& sum_grads,
             GUARD_OPS_OPERANDS, bool cond, bool uncond) {
  const double value = factor.item<double>();
  if (value == 1) return;
  const Call call(GUARD_OPS_PASS);
  const Tensor none = at::empty({0}, call.model_output().options());
  if (!cond) grad = none;
  if (!uncond) grad_uncond = none;
  const auto narrow = [](const Tensor& t) { return t.numel() > 0 && t.element_size() == 2; };
  if (narrow(grad) || narrow(grad_uncond)) {
    const auto coefficients_by_row = coefficients_of(call, sum_grads, value);
    cpu::gradient(machine(), call.batch, call.table, coefficients_by_row.data(),
                  gradient_operand(grad), gradient_operand(grad_uncond));
    return;
  }
  if (cond) grad.mul_(value);
  if (uncond) grad_uncond.mul_(value);
}

void put(const cpu::Evaluation& result, const LossTensors& out) {
  const int64_t n = int64_t(result.coefficients.size());
  fill(out.loss, 0, &result.loss, 1);
  int64_t at = 0;
  for (const auto* x : {&result.log_ratio, &result.excess, &result.weights, &result.kl}) {
    fill(out.per_row, at, x->data(), n);
    at += n;
  }
  fill(out.metrics, 0, result.metrics.data(), out.metrics.numel());
  double* c = out.sum_grads.data_ptr<double>();
  for (int64_t row = 0; row < n; ++row) {
    c[row] = result.coefficients[row].c1;
    c[n + row] = result.coefficients[row].c2;
    c[2 * n + row] = result.coefficients[row].c3;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> guard_loss(GUARD_OPS_OPERANDS,
                                                                      GUARD_OPS_LOSS_OPERANDS,
                                                                      bool cond, bool uncond) {
  const Call call(GUARD_OPS_PASS);
  const LossProblem loss(call, rows, choices, numbers);
  const Tensor& v = call.model_output();
  const LossTensors out(call, gradient_like(v, cond, v),
                        gradient_like(call.tensors.model_output_uncond, uncond, v));
  const cpu::Evaluation result =
      cpu::guard_loss(machine(), call.batch, loss.problem, gradient_operand(out.grad),
                      gradient_operand(out.grad_uncond));
  put(result, out);
  return out.all();
}

std::vector<Sums> listed(const std::array<Doubles, 3>& sums, const Batch& t) {
  std::vector<Sums> out;
  for (int64_t k = 0; k < t.steps; ++k) {
    for (int64_t i = 0; i < t.batch; ++i) {
      out.push_back({*sums[0].at(k, i), *sums[1].at(k, i), *sums[2].at(k, i)});
    }
  }
  return out;
}

// What guard_loss does with the sums that it forms, without the gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> evaluate(const Tensor& sums, GUARD_OPS_OPERANDS,
                                                    GUARD_OPS_LOSS_OPERANDS) {
  const Call call(GUARD_OPS_PASS);
  const LossProblem loss(call, rows, choices, numbers);
  const LossTensors out(call, {}, {});
  put(cpu::evaluate(loss.problem, listed(given_sums(sums, call), call.batch).data()), out);
  return out.without_gradients();
}

Tensor ratio_statistics(const Tensor& sums, GUARD_OPS_OPERANDS, GUARD_OPS_LOSS_OPERANDS) {
  const Call call(GUARD_OPS_PASS);
  LossProblem loss(call, rows, choices, numbers);
  loss.problem.mean = nullptr;
  const std::vector<Sums> of = listed(given_sums(sums, call), call.batch);
  Tensor out = at::empty({statistic_count, call.batch.steps}, sums.options());
  cpu::ratio_statistics(loss.problem, of.data(), out.data_ptr<double>());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sde_step(GUARD_OPS_OPERANDS) {
  const Call call = step_call(GUARD_OPS_PASS);
  const Tensor& sample = *call.tensors.sample;
  const auto strides = at::detail::defaultStrides(sample.sizes());
  Tensor prev_sample = kept_empty(sample.sizes(), strides, sample.options());
  Tensor mean = kept_empty(sample.sizes(), strides, sample.options().dtype(call.compute_type()));
  Tensor square =
      at::empty({call.batch.steps, call.batch.batch}, sample.options().dtype(at::kDouble));
  cpu::sde_step(machine(), call.batch, call.table, operand(prev_sample), operand(mean),
                square.data_ptr<double>());
  return {prev_sample, mean, square};
}

TORCH_LIBRARY(guard_ops, m) {
  m.def("sums(" GUARD_OPS_SCHEMA ") -> Tensor");
  m.def("gradient(Tensor sum_grads, " GUARD_OPS_SCHEMA
        ", bool cond, bool uncond) -> (Tensor, Tensor)");
  m.def("guard_loss(" GUARD_OPS_SCHEMA ", " GUARD_OPS_LOSS_SCHEMA
        ", bool cond, bool uncond) -> (Tensor loss, Tensor grad, Tensor grad_uncond, "
        "Tensor per_row, Tensor metrics, Tensor sum_grads)");
  m.def("evaluate(Tensor sums, " GUARD_OPS_SCHEMA ", " GUARD_OPS_LOSS_SCHEMA
        ") -> (Tensor loss, Tensor per_row, Tensor metrics, Tensor sum_grads)");
  m.def("ratio_statistics(Tensor sums, " GUARD_OPS_SCHEMA ", " GUARD_OPS_LOSS_SCHEMA ") -> Tensor");
  m.def(
      "scaled_(Tensor(a!) grad, Tensor(b!) grad_uncond, Tensor factor, Tensor "
      "sum_grads, " GUARD_OPS_SCHEMA ", bool cond, bool uncond) -> ()");
  m.def("sde_step(" GUARD_OPS_SCHEMA ") -> (Tensor prev_sample, Tensor mean, Tensor square)");
}

TORCH_LIBRARY_IMPL(guard_ops, CPU, m) {
  m.impl("sums", sums);
  m.impl("gradient", gradient);
  m.impl("scaled_", scaled_);
  m.impl("guard_loss", guard_loss);
  m.impl("evaluate", evaluate);
  m.impl("ratio_statistics", ratio_statistics);
  m.impl("sde_step", sde_step);
}

// The names of what the operators take, in their order, as guard_ops/backends/compiled.py has them.
pybind11::dict layout() {
  namespace py = pybind11;
  py::dict out, norms;
#define GUARD_OPS_NAME(name, ...) #name,
#define GUARD_OPS_SECOND(first, name) #name,
  const auto names = [](std::initializer_list<const char*> list) {
    py::list out;
    for (const char* name : list) out.append(name);
    return py::tuple(out);
  };
  out["latents"] = names({GUARD_OPS_LATENTS(GUARD_OPS_SECOND) "mask"});
  out["step_latents"] = names({GUARD_OPS_STEP_LATENTS(GUARD_OPS_SECOND) "mask"});
  out["rows"] = names({GUARD_OPS_ROWS(GUARD_OPS_NAME)});
  out["choices"] = names({GUARD_OPS_CHOICES(GUARD_OPS_SECOND)});
  out["numbers"] = names({GUARD_OPS_NUMBERS(GUARD_OPS_NAME)});
  out["balance"] = names({GUARD_OPS_BALANCES(GUARD_OPS_NAME)});
  out["reduction"] = names({GUARD_OPS_REDUCTIONS(GUARD_OPS_NAME)});
  out["nonfinite"] = names({GUARD_OPS_NONFINITES(GUARD_OPS_NAME)});
#define GUARD_OPS_NORM(name, statistics, debiased) \
  norms[#name] = py::make_tuple(statistics, debiased);
  GUARD_OPS_RATIO_NORMS(GUARD_OPS_NORM)
#undef GUARD_OPS_NORM
#undef GUARD_OPS_SECOND
#undef GUARD_OPS_NAME
  out["ratio_norm"] = py::list(norms.attr("items")());
  return out;
}

}  // namespace
}  // namespace guard_ops

PYBIND11_MODULE(_C, m) {
  if (guard_ops::build.define_cuda != nullptr) guard_ops::build.define_cuda(m);
  m.doc() = "Compiled kernels of guard_ops; the operators are under torch.ops.guard_ops.";
  m.def(
      "build_info",
      [] {
        const guard_ops::Build& build = guard_ops::build;
        std::string isas;
        for (const char* isa : guard_ops::cpu::isa_names) {
          isas += (isas.empty() ? "" : " ") + std::string(isa);
        }
        pybind11::dict info;
        info["version"] = build.version;
        info["torch"] = build.torch;
        info["cuda"] = build.cuda;  // a null pointer is None
        info["cuda_architectures"] = pybind11::str(build.cuda_architectures).attr("split")();
        info["cpu_isa_built"] = isas;
        info["cpu_isa"] = std::string(guard_ops::cpu::kernels().name);
        info["compiler"] = build.compiler;
        info["flags"] = build.flags;
        return info;
      },
      "Versions, architectures, compiler and flags of this build, and the ISA in use.");
  m.def("layout", guard_ops::layout,
        "As guard_ops.backends.compiled.layout: what the operators take, by name and in order.");
  m.def(
      "keep_buffers", [](size_t bytes) { guard_ops::buffers().limit(bytes); },
      "How many bytes of freed results the CPU operators keep for their next ones.");
  m.def(
      "release_buffers", [] { return guard_ops::buffers().release(); },
      "Gives the kept memory back to the system; returns how many bytes that were.");
}
