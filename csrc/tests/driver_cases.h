// Batches for the driver's tests: every form, and objectives of every kind.
#pragma once

#include "../cpu/driver.h"
#include "check.h"
#include "reference.h"

namespace guard_ops::test {

using cpu::Problem;

constexpr int64_t steps = 3, batch = 4, rows = steps * batch;

// The numbers that a Problem of [steps, batch] points to.
struct Scalars {
  double table[5][rows], advantages[rows], old_log_prob[rows], step_weights[rows];
  double mean[steps] = {-0.1, 0.02, 0.05}, std[steps] = {0.1, 0.2, 0},
         floor[steps] = {1e-8, 0.3, 1e-8};

  Scalars() {
    Uniform random(8, 1);
    for (int64_t n = 0; n < rows; ++n) {
      // The operands are no policy's; this kappa keeps their ratios about 1.
      const double row[5] = {0.97, -0.13, 0.21, 0.02, -0.1};
      for (int c = 0; c < 5; ++c) table[c][n] = row[c] * (1 + 0.1 * random());
      advantages[n] = 2 * random();
      old_log_prob[n] = 0.5 + 0.2 * random();
      step_weights[n] = 1 + 0.5 * random();
    }
  }

  Problem problem(const Config& config, Form form, int64_t numel) const {
    Problem out{};
    out.config = config;
    out.steps = steps;
    out.batch = batch;
    out.numel = numel;
    for (int c = 0; c < 5; ++c) out.table[c] = {table[c], batch, 1};
    out.advantages = {advantages, batch, 1};
    if (form == Form::log_prob) out.old_log_prob = {old_log_prob, batch, 1};
    return out;
  }
};
inline const Scalars scalars;

inline Config config_of(RatioNorm norm, Balance balance, double kl_beta = 0) {
  Config c{};
  c.ratio_norm = norm;
  c.balance = balance;
  c.detach_stats = c.gaussian = true;
  c.nonfinite = balance == Balance::none ? NonFinite::drop : NonFinite::propagate;
  c.target_std = 1;
  c.std_floor = 1e-8;
  c.clip_low = c.clip_high = 0.2;
  c.adv_clip = 5;
  c.weight_floor = 0.1;
  c.kl_beta = kl_beta;
  return c;
}

// Calls body(problem, independent) for objectives of every kind; `independent` ones need no other
// row's ratio, and can be done in one pass.
template <class Body>
void for_each_problem(Form form, int64_t numel, Body body) {
  const auto of = [&](const Config& config) { return scalars.problem(config, form, numel); };
  body(of(config_of(RatioNorm::none, Balance::none)), true);
  body(of(config_of(RatioNorm::none, Balance::inverse_dt, 0.04)), true);
  body(of(config_of(RatioNorm::standardize, Balance::none)), false);
  body(of(config_of(RatioNorm::none, Balance::inverse_ratio)), false);
  body(of(config_of(RatioNorm::standardize, Balance::inverse_ratio, 0.04)), false);
  Problem known = of(config_of(RatioNorm::standardize, Balance::inverse_ratio));
  known.mean = scalars.mean;
  known.std = scalars.std;
  known.floor = scalars.floor;
  body(known, false);
  known.step_weights = {scalars.step_weights, batch, 1};
  body(known, true);
  if (form == Form::log_prob) return;
  body(of(config_of(RatioNorm::closed_form, Balance::inverse_dt)), true);
  body(of(config_of(RatioNorm::closed_form, Balance::none, 0.04)), true);
}

// Calls body(operands, batch, problem, independent) for every form, with and without guidance, of
// several dtypes.
template <class Body>
void for_each_case(int64_t numel, Body body) {
  for (const int n : {0, 1, 2, 6}) {  // float64, float32, bfloat16 and a mixture
    Operands in(dtypes[n], steps, batch, numel, true);
    for (const Form form : forms) {
      for (const bool guided : {false, true}) {
        for_each_problem(form, numel, [&](const Problem& problem, bool independent) {
          if (!is_run()) return;
          CONTEXT("%s D=%ld %s guided %d ratio_norm %d balance %d kl %g", form_names[int(form)],
                  long(numel), dtypes[n].name, guided, int(problem.config.ratio_norm),
                  int(problem.config.balance), problem.config.kl_beta);
          body(in, in.of(form, guided, problem.config.kl_beta != 0), problem, independent);
        });
      }
    }
  }
}

}  // namespace guard_ops::test
