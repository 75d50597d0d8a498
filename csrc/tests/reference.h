// The tensors of a batch of every form, and the formulas of docs/math.md in plain loops.
#pragma once

#include <string>

#include "storage.h"
#include "with_error.h"

namespace guard_ops::test {

using cpu::Batch;

constexpr Form forms[] = {Form::mean, Form::velocity, Form::noise, Form::seeded, Form::log_prob};
constexpr const char* form_names[] = {"mean", "velocity", "noise", "seeded", "log_prob"};

struct DTypes {
  const char* name;
  DType v, uncond, ref, x, y, m, v_old, noise;
};

constexpr DType f64 = DType::f64, f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
constexpr DTypes dtypes[] = {
    {"float64", f64, f64, f64, f64, f64, f64, f64, f64},
    {"float32", f32, f32, f32, f32, f32, f32, f32, f32},
    {"bfloat16", bf16, bf16, bf16, bf16, bf16, f32, bf16, bf16},
    {"float16", f16, f16, f16, f16, f16, f32, f16, f16},
    {"mixed", bf16, f32, f16, f32, bf16, f32, f16, f32},
    {"mixed16", f16, bf16, bf16, f16, bf16, bf16, bf16, f16},
    {"wide mixed", f16, f32, bf16, f64, f32, f64, bf16, f16},
    {"wide mixed32", f32, f64, f64, bf16, f64, f32, f32, f64},
};

// The tensors of a case. All of them hold numbers, and of() makes a Batch of those that a form has.
struct Operands {
  int64_t steps, batch, numel;
  Tensor v, uncond, ref, x, y, m, v_old, noise;
  std::vector<int64_t> seeds;
  double guidance_scale = 2.5;

  Operands(const DTypes& d, int64_t steps, int64_t batch, int64_t numel, bool transposed)
      : steps(steps), batch(batch), numel(numel) {
    const auto make = [&](DType dtype) {
      return Tensor(dtype, steps, batch, numel, transposed, false);
    };
    v = make(d.v);
    uncond = make(d.uncond);
    ref = make(d.ref);
    x = make(d.x);
    y = make(d.y);
    m = make(d.m);
    v_old = make(d.v_old);
    noise = make(d.noise);
    Uniform random(uint64_t(numel) * 31 + transposed);
    for (Tensor* t : {&v, &uncond, &ref, &x, &y, &m, &v_old, &noise}) t->fill(random);
    std::mt19937_64 words(uint64_t(numel) + 1);
    for (int64_t n = 0; n < 2 * steps * batch; ++n) seeds.push_back(int64_t(words()));
  }

  Batch of(Form form, bool guided, bool with_ref) const {
    Batch t{};
    t.form = form;
    t.steps = steps;
    t.batch = batch;
    t.numel = numel;
    t.guidance_scale = guidance_scale;
    t.v = v.operand();
    if (guided) t.uncond = uncond.operand();
    if (with_ref) t.ref = ref.operand();
    if (uses_sample(form)) {
      t.x = x.operand();
      t.y = y.operand();
    }
    if (form == Form::mean) t.m = m.operand();
    if (uses_old_velocity(form)) t.v_old = v_old.operand();
    if (form == Form::noise) t.noise = noise.operand();
    if (form == Form::seeded) t.seeds = {seeds.data(), 2 * batch, 2, 1};
    for (const Operand* o : {&t.v, &t.uncond, &t.ref, &t.x, &t.y, &t.m, &t.v_old, &t.noise}) {
      t.wide = t.wide || (*o && o->dtype == DType::f64);
    }
    WithError::unit = t.wide ? 0x1p-53L : 0x1p-24L;
    return t;
  }
};

inline WithError noise_at(const Operands& in, const Batch& t, int64_t k, int64_t i, int64_t j) {
  if (t.noise) return in.noise.get(k, i, j);
  const philox::Words words =
      philox::generate(t.seeds.word(k, i, 0), uint64_t(j) / 4, t.seeds.word(k, i, 1));
  const int pair = j % 4 / 2;
  double z[2];
  philox::box_muller(words.w[pair], words.w[2 + pair], z, z + 1);
  return {z[j % 2], t.wide ? 1e-14L : 1e-6L};
}

// One element's delta, e and v - v_ref.
struct Terms {
  WithError delta, e, drift;
};

inline Terms terms_of(const Operands& in, const Batch& t, const Step<double>& step, int64_t k,
                      int64_t i, int64_t j) {
  const WithError a = coefficient(step.a), b = coefficient(step.b), s = coefficient(step.s);
  WithError v = in.v.get(k, i, j);
  if (t.uncond) {
    const WithError uncond = in.uncond.get(k, i, j);
    v = uncond + coefficient(t.guidance_scale) * (v - uncond);
  }
  Terms out;
  if (t.ref) out.drift = v - in.ref.get(k, i, j);
  if (uses_noise(t.form)) {
    out.delta = b * (v - in.v_old.get(k, i, j));
    out.e = s * noise_at(in, t, k, i, j);
    return out;
  }
  const WithError x = in.x.get(k, i, j), y = in.y.get(k, i, j);
  const WithError mean = a * x + b * v;
  if (t.form == Form::velocity) {
    const WithError v_old = in.v_old.get(k, i, j);
    out.delta = b * (v - v_old);
    out.e = (y - a * x) - b * v_old;
  } else if (t.form == Form::mean) {
    out.delta = mean - in.m.get(k, i, j);
    out.e = y - in.m.get(k, i, j);
  } else {
    out.delta = mean - y;
  }
  return out;
}

struct SumsWithError {
  WithError s1, s2, ref;
};

inline SumsWithError sums_of(const std::vector<Terms>& row, const Step<double>& step) {
  const WithError b = coefficient(step.b);
  const auto add = [&](auto term_of) {
    long double value = 0, error = 0, size = 0;
    for (const Terms& x : row) {
      const WithError term = term_of(x);
      value += term.value;
      error += term.error;
      size += std::fabs(term.value) + term.error;
    }
    return sum_of(value, error, size);
  };
  return {add([](const Terms& x) { return x.delta * x.e; }),
          add([](const Terms& x) { return x.delta * x.delta; }),
          add([&](const Terms& x) { return (b * x.drift) * (b * x.drift); })};
}

// d loss / d v of one element, before guidance is applied.
inline WithError gradient_of(const Terms& x, const Step<double>& step, const Coefficients& c) {
  const WithError b = coefficient(step.b);
  return coefficient(c.c1) * (b * x.e) + coefficient(2 * c.c2) * (b * x.delta) +
         coefficient(2 * step.b * step.b * c.c3) * x.drift;
}

}  // namespace guard_ops::test
