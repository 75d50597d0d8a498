// Prints what the kernels are launched with, for scripts/sass.py, which follows their machine code:
// `launches FORM DTYPE OLD_DTYPE NUMEL` prints a line for each launch, the name of the kernel and
// its argument in hexadecimal. Operands lie where no memory is: nothing runs.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../cuda/kernels.h"
#include "emulate_runtime.h"

namespace guard_ops::test {
namespace {

const char* kernel = "";

void print(const void* argument, size_t bytes) {
  if (kernel == nullptr) return;
  std::printf("%s ", kernel);
  for (size_t n = 0; n < bytes; ++n) {
    std::printf("%02x", static_cast<const unsigned char*>(argument)[n]);
  }
  std::printf("\n");
  kernel = kernel == std::string("loss_of_chunks") ? "gradient_of_chunks" : nullptr;
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::runtime_error("no dtype of latents is called " + name);
}

Form form_of(const std::string& name) {
  const char* const names[] = {"mean", "velocity", "noise", "seeded", "log_prob"};
  for (int f = 0; f < 5; ++f) {
    if (name == names[f]) return Form(f);
  }
  throw std::runtime_error("no form is called " + name);
}

template <class T = void>
T* somewhere(uintptr_t n) {
  return reinterpret_cast<T*>(uintptr_t(0x7F00) << 32 | n << 28);
}

void print_launches(Form form, DType dtype, DType old, int64_t numel) {
  constexpr int64_t steps = 16, batch = 16;
  Batch t{};
  t.form = form;
  t.steps = steps;
  t.batch = batch;
  t.numel = numel;
  t.guidance_scale = 1;
  const auto latents = [&](uintptr_t n, DType of) {
    return Operand{somewhere(n), of, batch * numel, numel};
  };
  t.v = latents(1, dtype);
  if (uses_sample(form)) t.x = latents(2, dtype), t.y = latents(3, dtype);
  if (form == Form::mean) t.m = latents(4, old);
  if (uses_old_velocity(form)) t.v_old = latents(4, dtype);
  if (form == Form::noise) t.noise = latents(5, dtype);
  if (form == Form::seeded) t.seeds = {somewhere<int64_t>(6), 2 * batch, 2, 1};
  const Operand grad = latents(7, dtype);
  Doubles table[5];
  for (Doubles& x : table) x = {somewhere<double>(8), batch, 1};

  cuda::emulation::become({.multiprocessors = 132, .shared_bytes = 227 << 10, .threads = 2048});
  kernel = "sums_of_chunks";
  cuda::sums(t, table, somewhere<double>(9), somewhere(10), nullptr);
  Problem problem{};
  problem.config.ratio_norm = RatioNorm::standardize;
  problem.config.balance = Balance::inverse_ratio;
  problem.steps = steps;
  problem.batch = batch;
  problem.numel = numel;
  for (int n = 0; n < 5; ++n) problem.table[n] = table[n];
  const cuda::LossResult result{somewhere<float>(11),
                                somewhere<float>(12),
                                somewhere<float>(13),
                                somewhere<double>(14),
                                grad,
                                {}};
  kernel = "loss_of_chunks";
  cuda::guard_loss(t, problem, result, somewhere(10), somewhere<uint32_t>(15),
                   cuda::Path::two_launches, nullptr);
  kernel = "loss_cooperatively";
  cuda::guard_loss(t, problem, result, somewhere(10), somewhere<uint32_t>(15),
                   cuda::Path::cooperative, nullptr);
}

}  // namespace
}  // namespace guard_ops::test

int main(int count, char** words) {
  using namespace guard_ops;
  if (count != 5) {
    std::fprintf(stderr, "launches FORM DTYPE OLD_DTYPE NUMEL\n");
    return 2;
  }
  try {
    cuda::emulation::recorder = test::print;
    test::print_launches(test::form_of(words[1]), test::dtype_of(words[2]),
                         test::dtype_of(words[3]), std::atoll(words[4]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "launches: %s\n", error.what());
    return 1;
  }
  return 0;
}
