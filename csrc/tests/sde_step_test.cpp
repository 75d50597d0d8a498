// The rollout step of every instruction set: that the mean is rounded once, the sample, the sum in
// its log-prob, and that delta is exactly 0 in the mean form with a mean from here.
#include <optional>
#include <utility>

#include "../cpu/driver.h"
#include "check.h"
#include "reference.h"

namespace guard_ops::test {
namespace {

using cpu::Kernels;
using cpu::Span;

constexpr Step<double> step{0.97, -0.13, 0.21};

struct Result {
  Tensor prev_sample, mean;
  std::vector<double> squares;
};

Result run(const Kernels& kernels, const Operands& in, const Batch& t) {
  const auto make = [&](DType dtype) { return Tensor(dtype, in.steps, in.batch, in.numel, true); };
  Result out{make(in.x.dtype()), make(t.wide ? f64 : f32), {}};
  for (int64_t k = 0; k < in.steps; ++k) {
    for (int64_t i = 0; i < in.batch; ++i) {
      double square = 0;
      for (int64_t begin = 0; begin < in.numel; begin += cpu::chunk) {
        const Span at{k, i, begin, std::min(in.numel, begin + cpu::chunk)};
        square += kernels.sde_step(t, step, at, out.prev_sample.operand(), out.mean.operand());
      }
      out.squares.push_back(square);
    }
  }
  CHECK(out.prev_sample.guards_intact() && out.mean.guards_intact());
  return out;
}

// fma(b, v, a x) as the kernel's scalar twin rounds it.
double exact_mean(bool wide, double x, double v) {
  if (wide) return std::fma(step.b, v, step.a * x);
  return std::fma(float(step.b), float(v), float(step.a) * float(x));
}

// The velocity that enters the mean, rounded after each operator.
double velocity(const Batch& t, double cond, double uncond) {
  if (!t.uncond) return cond;
  if (t.wide) return guided(uncond, cond, t.guidance_scale);
  return guided(float(uncond), float(cond), float(t.guidance_scale));
}

void compare(const Kernels& kernels, const Result& got, const Operands& in, const Batch& t) {
  const bool fused = kernels.name != std::string("baseline") || t.wide;
  const WithError a = coefficient(step.a), b = coefficient(step.b), s = coefficient(step.s);
  for (int64_t k = 0; k < in.steps; ++k) {
    for (int64_t i = 0; i < in.batch; ++i) {
      long double square = 0, error = 0;
      for (int64_t j = 0; j < in.numel; ++j) {
        const double x = in.x.get(k, i, j);
        const double v = velocity(t, in.v.get(k, i, j), in.uncond.get(k, i, j));
        const double mean = got.mean.get(k, i, j), y = got.prev_sample.get(k, i, j);
        if (fused) {
          CHECK(mean == exact_mean(t.wide, x, v));
        } else {
          CHECK_WITHIN_ERROR(mean, a * x + b * v);
        }
        CHECK_WITHIN_ERROR(y, stored(WithError(mean) + s * noise_at(in, t, k, i, j), in.x.dtype()));
        // The sum is that of the sample and the mean as they are stored.
        const WithError term = (WithError(y) - mean) * (WithError(y) - mean);
        square += term.value;
        error += term.error;
      }
      CHECK_WITHIN_ERROR(got.squares[k * in.batch + i], sum_of(square, error, square));
    }
  }
}

Batch step_batch(const Operands& in, bool seeded, bool guided) {
  Batch t = in.of(seeded ? Form::seeded : Form::noise, guided, false);
  t.x = in.x.operand();
  t.v_old = {};
  t.wide = false;
  for (const Operand* o : {&t.v, &t.uncond, &t.x, &t.noise}) {
    t.wide = t.wide || (*o && o->dtype == f64);
  }
  WithError::unit = t.wide ? 0x1p-53L : 0x1p-24L;
  return t;
}

void test_sde_step() {
  for (const int64_t numel : {1, 3, 7, 127, 1023, 1024, 1025, 4097, 70000}) {
    for (const DTypes& d : dtypes) {
      const Operands in(d, numel > cpu::chunk ? 1 : 2, 2, numel, numel % 2 == 1);
      for (const auto [seeded, guided] : {std::pair{false, false}, {true, false}, {false, true}}) {
        const Batch t = step_batch(in, seeded, guided);
        std::optional<Result> fused;  // of the sets that have a fused multiply-add
        for (const char* isa : cpu::isa_names) {
          const Kernels* kernels = cpu::kernels(isa);
          if (kernels == nullptr) continue;
          CONTEXT("%s sde_step D=%ld %s seeded=%d guided=%d", isa, long(numel), d.name, seeded,
                  guided);
          const Result got = run(*kernels, in, t);
          compare(*kernels, got, in, t);
          if (fused) {
            CHECK(got.mean.bytes() == fused->mean.bytes());
            CHECK(got.prev_sample.bytes() == fused->prev_sample.bytes());
            CHECK(got.squares == fused->squares);
          } else if (isa != std::string("baseline")) {
            fused = got;
          }
        }
      }
    }
  }
}

// In the mean form, given the mean that sde_step returned, delta is exactly zero, whatever the
// other operands are stored as: both means come from the same expression.
void test_rollout_mean_is_exact(const Kernels& kernels) {
  for (const DTypes& d : dtypes) {
    for (const bool guided : {false, true}) {
      const Operands in(d, 2, 2, 1030, false);
      const Batch t = step_batch(in, false, guided);
      const Result rollout = run(kernels, in, t);
      Batch again = t;
      again.form = Form::mean;
      again.y = rollout.prev_sample.operand();
      again.m = rollout.mean.operand();
      again.noise = {};
      CONTEXT("%s mean form on policy, %s guided=%d", kernels.name, d.name, guided);
      const Sums sums = kernels.sums(again, step, {1, 1, 0, 1030}, {});
      CHECK(sums.s1 == 0 && sums.s2 == 0);
    }
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops;
  test::test_sde_step();
  for (const char* isa : cpu::isa_names) {
    const cpu::Kernels* kernels = cpu::kernels(isa);
    if (kernels != nullptr) test::test_rollout_mean_is_exact(*kernels);
  }
  return test::finish();
}
