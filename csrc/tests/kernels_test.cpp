// Compares sums and gradient of every instruction set with plain loops, for every form, storage
// type and awkward length, and checks what is written, what is left alone, and what has to be
// exact.
#include <optional>

#include "../cpu/driver.h"
#include "check.h"
#include "reference.h"

namespace guard_ops::test {
namespace {

using cpu::Kernels;
using cpu::Span;

constexpr Step<double> step{0.97, -0.13, 0.21};
// The first are of no loss in particular, the second of every loss but the closed form's, the third
// of that; c3 is for calls with a reference model. The kernel tells the kinds apart.
constexpr Coefficients kinds[] = {{0.7, -0.3, 0.2}, {0.7, -0.35, 0.2}, {0.7, 0, 0.2}};

// Calls body for every chunk of a row, as the driver does.
template <class Body>
void for_each_chunk(int64_t k, int64_t i, int64_t numel, Body body) {
  for (int64_t begin = 0; begin < numel; begin += cpu::chunk) {
    body(Span{k, i, begin, std::min(numel, begin + cpu::chunk)});
  }
}

// The type of the arithmetic, which is that of an early gradient.
DType compute_type(const Batch& t) { return t.wide ? f64 : f32; }

// Everything that one instruction set computes from a case.
struct Results {
  std::vector<Sums> sums;
  Tensor cond, uncond, uncond_alone, early;

  friend bool operator==(const Results& p, const Results& q) {
    return std::memcmp(p.sums.data(), q.sums.data(), p.sums.size() * sizeof(Sums)) == 0 &&
           p.cond.bytes() == q.cond.bytes() && p.uncond.bytes() == q.uncond.bytes() &&
           p.uncond_alone.bytes() == q.uncond_alone.bytes() && p.early.bytes() == q.early.bytes();
  }
};

Results run(const Kernels& kernels, const Operands& in, const Batch& t, const Coefficients& c) {
  const auto make = [&](DType dtype) { return Tensor(dtype, in.steps, in.batch, in.numel, true); };
  Results out{{}, make(t.v.dtype), make(t.uncond.dtype), make(t.v.dtype), make(compute_type(t))};
  for (int64_t k = 0; k < in.steps; ++k) {
    for (int64_t i = 0; i < in.batch; ++i) {
      Sums total{0, 0, 0};
      for_each_chunk(k, i, in.numel, [&](const Span& at) {
        const Sums part = kernels.sums(t, step, at, {out.early.operand(), GradientKind::departure});
        const Sums alone = kernels.sums(t, step, at, {});
        CHECK(part.s1 == alone.s1 && part.s2 == alone.s2 && part.ref == alone.ref);
        total.s1 += part.s1;
        total.s2 += part.s2;
        total.ref += part.ref;
        kernels.gradient(t, step, c, at, out.cond.operand(),
                         t.uncond ? out.uncond.operand() : Operand{});
        if (t.uncond) {  // one branch alone gets the same as beside the other
          kernels.gradient(t, step, c, at, {}, out.uncond_alone.operand());
        }
      });
      out.sums.push_back(total);
    }
  }
  CHECK(out.cond.guards_intact() && out.uncond.guards_intact());
  CHECK(out.uncond_alone.guards_intact() && out.early.guards_intact());
  return out;
}

// What a case should give, in every instruction set.
struct Expected {
  std::vector<SumsWithError> sums;
  std::vector<WithError> gradient, early;  // [K, B, D]

  Expected(const Operands& in, const Batch& t, const Coefficients& c) {
    std::vector<Terms> row(in.numel);
    for (int64_t k = 0; k < in.steps; ++k) {
      for (int64_t i = 0; i < in.batch; ++i) {
        for (int64_t j = 0; j < in.numel; ++j) {
          row[j] = terms_of(in, t, step, k, i, j);
          gradient.push_back(gradient_of(row[j], step, c));
          early.push_back(coefficient(step.b) * (row[j].e - row[j].delta));
        }
        sums.push_back(sums_of(row, step));
      }
    }
  }
};

void compare(const Results& got, const Operands& in, const Batch& t, const Expected& expected) {
  const WithError scale = coefficient(t.guidance_scale), rest = coefficient(1 - t.guidance_scale);
  for (int64_t row = 0; row < in.steps * in.batch; ++row) {
    const int64_t k = row / in.batch, i = row % in.batch;
    for (int64_t j = 0; j < in.numel; ++j) {
      const WithError& g = expected.gradient[row * in.numel + j];
      if (t.uncond) {
        CHECK_WITHIN_ERROR(got.cond.get(k, i, j), stored(scale * g, t.v.dtype));
        CHECK_WITHIN_ERROR(got.uncond.get(k, i, j), stored(rest * g, t.uncond.dtype));
        CHECK_WITHIN_ERROR(got.uncond_alone.get(k, i, j), stored(rest * g, t.v.dtype));
      } else {
        CHECK_WITHIN_ERROR(got.cond.get(k, i, j), stored(g, t.v.dtype));
      }
      CHECK_WITHIN_ERROR(got.early.get(k, i, j), expected.early[row * in.numel + j]);
    }
    CHECK_WITHIN_ERROR(got.sums[row].s1, expected.sums[row].s1);
    CHECK_WITHIN_ERROR(got.sums[row].s2, expected.sums[row].s2);
    CHECK_WITHIN_ERROR(got.sums[row].ref, expected.sums[row].ref);
  }
}

void test_forms() {
  for (const int64_t numel : {1, 3, 7, 127, 1023, 1024, 1025, 4097, 70000}) {
    const bool large = numel > cpu::chunk;
    for (const DTypes& d : dtypes) {
      const Operands in(d, large ? 1 : 2, large ? 1 : 2, numel, numel % 2 == 1);
      for (const Form form : forms) {
        for (int extras = 0; extras < 4; ++extras) {
          if (large && (extras == 1 || extras == 2)) continue;
          if (!is_run()) continue;
          const bool guided = extras & 1, with_ref = extras & 2;
          const Batch t = in.of(form, guided, with_ref);
          Coefficients c = kinds[(extras + int(form)) % 3];
          if (!with_ref) c.c3 = 0;
          const Expected expected(in, t, c);
          std::optional<Results> fused;  // of the sets that have a fused multiply-add
          for (const char* isa : cpu::isa_names) {
            const Kernels* kernels = cpu::kernels(isa);
            if (kernels == nullptr) continue;
            CONTEXT("%s %s D=%ld %s guided=%d ref=%d", isa, form_names[int(form)], long(numel),
                    d.name, guided, with_ref);
            const Results got = run(*kernels, in, t, c);
            if (fused) {
              CHECK(got == *fused);
              continue;
            }
            compare(got, in, t, expected);
            if (isa != std::string("baseline")) fused = got;
          }
        }
      }
    }
  }
}

// With c2 = c3 = 0 only e enters, so no operand of delta is read.
void test_closed_form_gradient(const Kernels& kernels) {
  const Coefficients c{0.7, 0, 0};
  for (const DTypes& d : dtypes) {
    Operands in(d, 1, 2, 1025, false);
    for (const Form form : forms) {
      CONTEXT("%s c1 alone, %s %s", kernels.name, form_names[int(form)], d.name);
      Batch t = in.of(form, false, false);
      Tensor out(t.v.dtype, 1, 2, 1025);
      const DType dtype = t.v.dtype;
      t.v.data = nullptr;
      if (form != Form::velocity) t.x.data = nullptr;
      if (uses_noise(form)) t.v_old.data = nullptr;
      kernels.gradient(t, step, c, {0, 1, 0, 1025}, out.operand(), {});
      for (int64_t j = 0; j < 1025; ++j) {
        const Terms x = terms_of(in, t, step, 0, 1, j);
        CHECK_WITHIN_ERROR(out.get(0, 1, j), stored(gradient_of(x, step, c), dtype));
      }
      CHECK(std::isnan(out.get(0, 0, 0)) && out.guards_intact());
    }
  }
}

// With c2 = -c1 / 2 the behaviour policy's mean or velocity is not read where the sample is.
void test_departure_gradient(const Kernels& kernels) {
  const Coefficients c{0.7, -0.35, 0};
  for (const DTypes& d : dtypes) {
    const Operands in(d, 1, 2, 1025, false);
    for (const Form form : forms) {
      CONTEXT("%s departure, %s %s", kernels.name, form_names[int(form)], d.name);
      Batch t = in.of(form, false, false);
      Tensor out(t.v.dtype, 1, 2, 1025);
      t.m.data = nullptr;
      if (!uses_noise(form)) t.v_old.data = nullptr;
      kernels.gradient(t, step, c, {0, 1, 0, 1025}, out.operand(), {});
      for (int64_t j = 0; j < 1025; ++j) {
        const Terms x = terms_of(in, t, step, 0, 1, j);
        CHECK_WITHIN_ERROR(out.get(0, 1, j), stored(gradient_of(x, step, c), t.v.dtype));
      }
      CHECK(out.guards_intact());
    }
  }
}

// The early gradient that the sums' pass writes gives, once it is scaled, the gradient bit by bit.
void test_gradient_is_the_early_one_scaled(const Kernels& kernels) {
  for (const DTypes& d : dtypes) {
    const Operands in(d, 1, 2, 1047, false);
    for (const Form form : forms) {
      const Batch t = in.of(form, false, false);
      for (const GradientKind kind : {GradientKind::departure, GradientKind::residual}) {
        CONTEXT("%s early gradient, %s %s kind %d", kernels.name, form_names[int(form)], d.name,
                int(kind));
        const Span at{0, 1, 0, 1047};
        const double c1 = 0.7;
        Tensor early(compute_type(t), 1, 2, 1047), scaled(d.v, 1, 2, 1047),
            gradient(d.v, 1, 2, 1047);
        kernels.sums(t, step, at, {early.operand(), kind});
        kernels.scale(early.operand(), scaled.operand(), c1, at);
        kernels.gradient(t, step, {c1, kind == GradientKind::departure ? -c1 / 2 : 0, 0}, at,
                         gradient.operand(), {});
        CHECK(scaled.bytes() == gradient.bytes());
        CHECK(scaled.guards_intact() && early.guards_intact());
      }
    }
  }
}

bool all_zero(const Tensor& x, int64_t numel) {
  bool zero = x.guards_intact();
  for (int64_t j = 0; j < numel; ++j) {
    zero = zero && x.get(0, 0, j) == 0 && !std::signbit(x.get(0, 0, j));
  }
  return zero;
}

void test_zero_coefficients_write_zeros(const Kernels& kernels) {
  const double values[] = {NAN, INFINITY, -INFINITY};
  for (const DTypes& d : dtypes) {
    Operands in(d, 1, 1, 1100, false);
    for (Tensor* x : {&in.v, &in.uncond, &in.ref, &in.x, &in.y, &in.m, &in.v_old, &in.noise}) {
      int n = 0;
      x->fill([&] { return values[n++ % 3]; });
    }
    for (const Form form : forms) {
      CONTEXT("%s zero coefficients, %s %s", kernels.name, form_names[int(form)], d.name);
      const Batch t = in.of(form, true, true);
      Tensor cond(d.v, 1, 1, 1100), uncond(d.uncond, 1, 1, 1100), all(d.v, 1, 1, 1100);
      const Span at{0, 0, 0, 1100};
      kernels.gradient(t, step, {0, 0, 0}, at, cond.operand(), uncond.operand());
      CHECK(all_zero(cond, 1100) && all_zero(uncond, 1100));
      all.fill([] { return NAN; });
      kernels.scale(all.operand(), all.operand(), 0, at);
      CHECK(all_zero(all, 1100));
      // Coefficients that are not finite, on the other hand, reach every element.
      kernels.gradient(t, step, {NAN, NAN, NAN}, at, cond.operand(), uncond.operand());
      for (int64_t j = 0; j < 1100; ++j) CHECK(std::isnan(cond.get(0, 0, j)));
    }
  }
}

void test_scale(const Kernels& kernels) {
  Uniform random(5);
  for (const DType dtype : {f64, f32}) {
    for (const int64_t numel : {1, 15, 16, 33, 1025}) {
      CONTEXT("%s scale of %ld", kernels.name, long(numel));
      Tensor x(dtype, 2, 2, numel);
      x.fill(random);
      const Tensor before = x;
      const double factor = 0.3;
      kernels.scale(x.operand(), x.operand(), factor, {1, 0, 0, numel});
      for (int64_t j = 0; j < numel; ++j) {
        const double old = before.get(1, 0, j);
        CHECK(x.get(1, 0, j) == (dtype == f64 ? factor * old : float(factor) * float(old)));
        CHECK(x.get(0, 1, j) == before.get(0, 1, j));
      }
      CHECK(x.guards_intact());
    }
  }
}

// If v equals v_old bit by bit, delta is exactly zero, in every type.
void test_on_policy_is_exact(const Kernels& kernels) {
  for (const DTypes& d : dtypes) {
    for (const int64_t numel : {1, 31, 1030}) {
      const Operands in(d, 1, 1, numel, false);
      for (const Form form : {Form::velocity, Form::noise, Form::seeded}) {
        CONTEXT("%s on policy, %s D=%ld %s", kernels.name, form_names[int(form)], long(numel),
                d.name);
        Batch t = in.of(form, false, false);
        t.v_old = t.v;
        const Sums sums = kernels.sums(t, step, {0, 0, 0, numel}, {});
        CHECK(sums.s1 == 0 && sums.s2 == 0 && sums.ref == 0);
      }
    }
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops;
  test::test_forms();
  for (const char* isa : cpu::isa_names) {
    const cpu::Kernels* kernels = cpu::kernels(isa);
    if (kernels == nullptr) continue;
    CHECK(std::string(kernels->name) == isa);
    test::test_closed_form_gradient(*kernels);
    test::test_departure_gradient(*kernels);
    test::test_gradient_is_the_early_one_scaled(*kernels);
    test::test_zero_coefficients_write_zeros(*kernels);
    test::test_scale(*kernels);
    test::test_on_policy_is_exact(*kernels);
  }
  return test::finish();
}
