// Prints what the kernels of this processor make of many cases, a line of checksums for each.
// scripts/arm.py compares the lines of one architecture with those of another.
//
// Inputs and kernels use exact arithmetic alone: IEEE operations and integers. Two things do not,
// and are left out: the float64 noise of a seed, and the objective on [K, B], which call the C
// library's log, sin, cos and expm1.
#include <cstdio>

#include "../cpu/driver.h"
#include "reference.h"

namespace guard_ops::test {
namespace {

constexpr Step<double> step{0.97, -0.13, 0.21};
constexpr Coefficients kinds[] = {{0.7, -0.3, 0.2}, {0.7, -0.35, 0}, {0.7, 0, 0}};

// FNV-1a.
uint64_t checksum(const void* data, size_t bytes) {
  uint64_t sum = 0xCBF29CE484222325;
  for (size_t n = 0; n < bytes; ++n) {
    sum = (sum ^ static_cast<const unsigned char*>(data)[n]) * 0x100000001B3;
  }
  return sum;
}

void print(const void* data, size_t bytes) {
  std::printf(" %016llx", static_cast<unsigned long long>(checksum(data, bytes)));
}
void print(const Tensor& x) { print(x.bytes().data(), x.bytes().size()); }

void print_gradients(const cpu::Kernels& kernels, const Operands& in, const Batch& t) {
  const cpu::Span at{0, 0, 0, in.numel};
  Tensor early(t.wide ? f64 : f32, 1, 1, in.numel);
  const Sums sums = kernels.sums(t, step, at, {early.operand(), {}});
  const double values[] = {sums.s1, sums.s2, sums.ref};
  print(values, sizeof values);
  kernels.scale(early.operand(), early.operand(), 0.7, at);
  print(early);
  for (const Coefficients& c : kinds) {
    Tensor cond(t.v.dtype, 1, 1, in.numel), uncond(t.uncond.dtype, 1, 1, in.numel);
    kernels.gradient(t, step, c, at, cond.operand(), t.uncond ? uncond.operand() : Operand{});
    print(cond);
    print(uncond);
  }
}

void print_sde_step(const cpu::Kernels& kernels, const Operands& in, Batch t) {
  t.x = in.x.operand();
  t.wide = t.wide || in.x.dtype() == f64;
  if (t.wide && t.form == Form::seeded) return;
  Tensor sample(in.x.dtype(), 1, 1, in.numel), mean(t.wide ? f64 : f32, 1, 1, in.numel);
  const double square =
      kernels.sde_step(t, step, {0, 0, 0, in.numel}, sample.operand(), mean.operand());
  print(&square, sizeof square);
  print(sample);
  print(mean);
}

void print_all(const cpu::Kernels& kernels) {
  for (const int64_t numel : {1, 7, 127, 1024, 4097}) {
    for (const DTypes& d : dtypes) {
      const Operands in(d, 1, 1, numel, false);
      for (const Form form : forms) {
        for (const bool full : {false, true}) {  // with guidance and a reference model
          const Batch t = in.of(form, full, full);
          if (t.wide && form == Form::seeded) continue;
          std::printf("D=%ld %s %s full=%d", long(numel), d.name, form_names[int(form)], full);
          print_gradients(kernels, in, t);
          if (uses_noise(form)) print_sde_step(kernels, in, t);
          std::printf("\n");
        }
      }
    }
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  const guard_ops::cpu::Kernels& kernels = guard_ops::cpu::kernels();
  std::printf("%s\n", kernels.name);
  guard_ops::test::print_all(kernels);
}
