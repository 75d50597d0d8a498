// The [K, B] objective: its coefficients against finite differences of its loss, degenerate
// statistics, and transitions that are not finite.
#include <algorithm>
#include <random>

#include "../cpu/driver.h"
#include "check.h"

namespace guard_ops::test {
namespace {

using cpu::Evaluation;
using cpu::Problem;

constexpr int64_t steps = 3, batch = 6, rows = steps * batch;
constexpr double numel = 48;

// A batch of transitions with ratios about 1 +- 0.3, and the memory that its Problem points to.
struct Batch {
  double table[5][rows], advantages[rows], old_log_prob[rows], step_weights[rows];
  double mean[steps], std[steps], floor[steps];
  std::vector<Sums> sums;
  Problem problem{};

  Batch(const Config& config, bool with_log_prob, bool with_weights) {
    std::mt19937_64 engine(11);
    const auto uniform = [&](double low, double high) {
      return low + (high - low) * std::ldexp(double(engine() >> 11), -53);
    };
    for (int64_t n = 0; n < rows; ++n) {
      const double s = uniform(0.3, 0.9), kappa = config.gaussian ? 1 / (2 * s * s) : 1.0;
      const double row[5] = {uniform(0.8, 1), uniform(-0.2, -0.1), s, kappa, uniform(-0.2, -0.1)};
      for (int c = 0; c < 5; ++c) table[c][n] = row[c];
      advantages[n] = uniform(-3, 3);
      step_weights[n] = uniform(0.2, 1);
      const double scale = config.reduction == Reduction::mean ? kappa / numel : kappa;
      const double s2 = uniform(0, 0.05) / scale, s1 = uniform(-0.15, 0.2) / scale;
      sums.push_back({s1, s2, uniform(0, 2)});
      const double constants = config.gaussian ? (config.reduction == Reduction::mean ? 1 : numel) *
                                                     (std::log(s) + log_sqrt_2pi)
                                               : 0;
      old_log_prob[n] = -scale * s2 - constants + uniform(-0.3, 0.3);
    }
    problem.config = config;
    problem.steps = steps;
    problem.batch = batch;
    problem.numel = int64_t(numel);
    for (int c = 0; c < 5; ++c) problem.table[c] = {table[c], batch, 1};
    problem.advantages = {advantages, batch, 1};
    if (with_log_prob) problem.old_log_prob = {old_log_prob, batch, 1};
    if (with_weights) problem.step_weights = {step_weights, batch, 1};
  }
  Batch(const Batch&) = delete;  // problem points into it
};

Config config_of(RatioNorm norm, Balance balance) {
  Config c{};
  c.ratio_norm = norm;
  c.balance = balance;
  c.detach_stats = c.gaussian = true;
  c.target_std = 0.5;
  c.std_floor = 1e-8;
  c.clip_low = 0.08;
  c.clip_high = 0.1;
  c.adv_clip = 2;
  c.weight_floor = 0.1;
  return c;
}

// The problem whose loss has the gradient to be checked: the weights are constants in it, and so
// are the statistics if they are detached.
Problem frozen(Batch& at, const Evaluation& base, std::vector<double>& weights) {
  Problem out = at.problem;
  weights = base.weights;
  out.step_weights = {weights.data(), batch, 1};
  if (out.config.ratio_norm == RatioNorm::standardize && out.config.detach_stats) {
    std::copy_n(base.metrics.begin(), steps, at.mean);
    std::copy_n(base.metrics.begin() + steps, steps, at.std);
    out.mean = at.mean;
    out.std = at.std;
    std::fill_n(at.floor, steps, out.config.std_floor);
    out.floor = at.floor;
  }
  return out;
}

// The slope by central differences. `step` moves log r by 4e-6, so it is good to about 1e-9.
double slope(const Problem& problem, std::vector<Sums> sums, int64_t n, double Sums::* which,
             double step) {
  const double at = sums[n].*which;
  sums[n].*which = at + step;
  const double above = cpu::evaluate(problem, sums.data()).loss;
  sums[n].*which = at - step;
  return (above - cpu::evaluate(problem, sums.data()).loss) / (2 * step);
}

void check_coefficients(Batch& at, const Evaluation& base) {
  std::vector<double> weights;
  const Problem problem = frozen(at, base, weights);
  CHECK_CLOSE(cpu::evaluate(problem, at.sums.data()).loss, base.loss, 1e-13 * std::fabs(base.loss));
  for (int64_t n = 0; n < rows; ++n) {
    if (!std::isfinite(base.excess[n])) continue;
    const double scale = scale_of(problem.config, problem.scalars(n / batch, n % batch));
    const Coefficients& c = base.coefficients[n];
    const double step = 2e-6 / scale, tolerance = 1e-8 * scale;
    // In the log-prob form e and S1 are 0, so the loss does not depend on S1, and c1 only has to
    // match c2.
    if (problem.old_log_prob.data == nullptr) {
      CHECK_CLOSE(c.c1, slope(problem, at.sums, n, &Sums::s1, step), tolerance);
    }
    // One pass relies on this: except for the reference model's part, a gradient is c1 times
    // something that is known before the sums.
    const bool closed_form = problem.config.ratio_norm == RatioNorm::closed_form;
    CHECK(c.c2 == (closed_form ? 0 : -c.c1 / 2));
    CHECK_CLOSE(c.c2, slope(problem, at.sums, n, &Sums::s2, step), tolerance);
    CHECK_CLOSE(c.c3, slope(problem, at.sums, n, &Sums::ref, 1e-2), 1e-10);
  }
}

// Calls body(batch) for every combination of what changes the gradient.
template <class Body>
void for_each_config(Body body) {
  for (int bits = 0; bits < 1 << 7; ++bits) {
    for (const RatioNorm norm : {RatioNorm::none, RatioNorm::standardize, RatioNorm::closed_form}) {
      for (const Balance balance : {Balance::none, Balance::inverse_ratio, Balance::inverse_dt}) {
        Config c = config_of(norm, balance);
        c.detach_stats = bits & 1;
        c.reduction = bits & 2 ? Reduction::mean : Reduction::sum;
        c.kl_beta = (bits & 4) ? 0.04 : 0;
        c.gaussian = !(bits & 8);
        c.nonfinite = bits & 16 ? NonFinite::drop : NonFinite::propagate;
        const bool with_log_prob = bits & 32, with_weights = bits & 64;
        if (norm == RatioNorm::closed_form && (with_log_prob || !c.gaussian)) continue;
        CONTEXT(
            "ratio_norm %d balance %d detach %d mean %d kl %g gaussian %d drop %d log_prob %d "
            "weights %d",
            int(norm), int(balance), c.detach_stats, int(c.reduction), c.kl_beta, c.gaussian,
            c.drop(), with_log_prob, with_weights);
        Batch at(c, with_log_prob, with_weights);
        body(at);
      }
    }
  }
}

void test_coefficients() {
  for_each_config([](Batch& at) {
    const Evaluation base = cpu::evaluate(at.problem, at.sums.data());
    check_coefficients(at, base);
    double clipped = 0;
    for (int64_t k = 0; k < steps; ++k) clipped += base.metrics[4 * steps + k] * double(batch);
    CHECK(clipped > 0 && clipped < rows);  // both branches of the surrogate were met
  });
}

// With a floor above every spread r_hat = 1 + u - mean(u), so the gradient goes through the mean
// only.
void test_degenerate_statistics() {
  for_each_config([](Batch& at) {
    if (at.problem.config.ratio_norm != RatioNorm::standardize) return;
    at.problem.config.std_floor = 10;
    const Evaluation base = cpu::evaluate(at.problem, at.sums.data());
    check_coefficients(at, base);
    for (int64_t n = 0; n < rows; ++n) {
      const double u = std::expm1(base.log_ratio[n]), mean = base.metrics[n / batch];
      CHECK_CLOSE(base.excess[n], u - mean, 1e-15);
    }
  });
}

// The floor that rounding makes: of a step, the root of the mean square of its samples' gains.
void test_floor_of_rounding() {
  for_each_config([](Batch& at) {
    Config& c = at.problem.config;
    if (c.ratio_norm != RatioNorm::standardize) return;
    for (int64_t n = 0; n < rows; ++n) at.sums[n].ref = 0;
    const Evaluation plain = cpu::evaluate(at.problem, at.sums.data());
    const double* const std = plain.metrics.data() + steps;
    double square = 0;
    for (int64_t i = 0; i < batch; ++i) {  // 2 kappa s |b| / sqrt(D), or times D
      const double s = at.table[2][i], kappa = at.table[3][i];
      const double gain = 2 * kappa * s * std::fabs(at.table[1][i]) / std::sqrt(numel);
      square += std::pow(c.reduction == Reduction::mean ? gain : gain * numel, 2) / double(batch);
    }
    for (const double share : {0.99, 1.01}) {
      c.rounding = share * std[0] / std::sqrt(square);
      c.target_std = 10;  // above which no rounding counts
      const Evaluation got = cpu::evaluate(at.problem, at.sums.data());
      CHECK(got.metrics[10 * steps] == (share > 1 ? 1.0 : 0.0));
      c.target_std = std[0] / 2;
      const Evaluation bounded = cpu::evaluate(at.problem, at.sums.data());
      CHECK(bounded.metrics[10 * steps] == 0.0);
    }
  });
}

// If all sums are zero, r_hat is exactly 1 and the gradient is the policy gradient and does not
// explode.
void test_on_policy() {
  for_each_config([](Batch& at) {
    const Config& c = at.problem.config;
    if (at.problem.old_log_prob.data != nullptr) return;
    at.sums.assign(rows, {0, 0, 0});
    const Evaluation got = cpu::evaluate(at.problem, at.sums.data());
    for (int64_t n = 0; n < rows; ++n) {
      CHECK(got.log_ratio[n] == 0 && got.excess[n] == 0);
      if (c.ratio_norm == RatioNorm::standardize && !c.detach_stats) continue;
      const StepScalars p = at.problem.scalars(n / batch, n % batch);
      const double a = std::clamp(at.advantages[n], -c.adv_clip, c.adv_clip);
      const double gain = c.ratio_norm == RatioNorm::closed_form ? p.s : 1;
      const double c1 = -a * got.weights[n] / batch * 2 * scale_of(c, p) * gain;
      CHECK_CLOSE(got.coefficients[n].c1, c1, 1e-14 * std::fabs(c1));
      const double c2 = c.ratio_norm == RatioNorm::closed_form ? 0 : -c1 / 2;
      CHECK_CLOSE(got.coefficients[n].c2, c2, 1e-14 * std::fabs(c1));
    }
  });
}

// The spread of one sample is zero, whatever its ratio is.
void test_single_sample_is_degenerate() {
  CONTEXT("one sample");
  Batch at(config_of(RatioNorm::standardize, Balance::inverse_ratio), false, false);
  at.problem.batch = 1;
  const Evaluation got = cpu::evaluate(at.problem, at.sums.data());
  for (int64_t k = 0; k < steps; ++k) {
    CHECK(got.excess[k] == 0 && got.metrics[steps + k] == 0);
    CHECK_CLOSE(got.weights[k], 1.0 / steps, 1e-15);
  }
}

// Makes transitions not finite, each for a different reason; sample 5 has no finite one left.
void spoil(Batch& at) {
  at.sums[1].s2 = NAN;
  at.sums[batch + 2].s2 = INFINITY;
  at.sums[2 * batch + 2].s1 = 1e9;  // a finite log-ratio whose ratio is not
  at.old_log_prob[2 * batch + 2] = -1e9;
  at.advantages[3] = NAN;
  for (int64_t k = 0; k < steps; ++k) at.sums[k * batch + 5] = {NAN, NAN, NAN};
}

bool spoiled(int64_t n) {
  return n == 1 || n == batch + 2 || n == 2 * batch + 2 || n == 3 || n % batch == 5;
}

// The loss of docs/math.md, from the excess and weights that were returned.
double loss_of(const Batch& at, const Evaluation& got, double samples, double transitions) {
  const Config& c = at.problem.config;
  double loss = 0, kl = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (spoiled(n)) continue;
    const double a = std::clamp(at.advantages[n], -c.adv_clip, c.adv_clip);
    const double bounded = std::clamp(got.excess[n], -c.clip_low, c.clip_high);
    loss += got.weights[n] * std::max(-a * (1 + got.excess[n]), -a * (1 + bounded));
    kl += got.kl[n];
  }
  return loss / samples + c.kl_beta * kl / transitions;
}

void check_statistics(const Batch& at, const Evaluation& got) {
  const Config& c = at.problem.config;
  for (int64_t k = 0; k < steps; ++k) {
    double count = 0, mean = 0, square = 0;
    for (int64_t n = k * batch; n < (k + 1) * batch; ++n) {
      if (spoiled(n)) continue;
      const double u = std::expm1(got.log_ratio[n]);
      count += 1;
      mean += u;
      square += u * u;
    }
    mean /= count;
    CHECK(got.metrics[9 * steps + k] == batch - count);
    CHECK_CLOSE(got.metrics[k], mean, 1e-13);
    CHECK_CLOSE(got.metrics[steps + k], std::sqrt(square / count - mean * mean), 1e-12);
    if (c.ratio_norm != RatioNorm::standardize) continue;
    CHECK_CLOSE(got.metrics[2 * steps + k], 0, 1e-13);
    CHECK_CLOSE(got.metrics[3 * steps + k], c.target_std, 1e-13);
  }
  if (at.problem.step_weights.data != nullptr || c.balance == Balance::inverse_dt) return;
  for (int64_t i = 0; i < batch; ++i) {
    double total = 0;
    for (int64_t k = 0; k < steps; ++k) total += got.weights[k * batch + i];
    CHECK_CLOSE(total, i == 5 ? 0 : 1, 1e-14);
  }
}

void test_nonfinite_transitions() {
  for_each_config([](Batch& at) {
    spoil(at);
    const bool drop = at.problem.config.drop();
    const Evaluation got = cpu::evaluate(at.problem, at.sums.data());
    for (int64_t n = 0; n < rows; ++n) {
      const Coefficients& c = got.coefficients[n];
      CHECK(std::isnan(got.excess[n]) == spoiled(n));
      CHECK((got.weights[n] == 0) == spoiled(n));
      if (!spoiled(n)) {
        CHECK(std::isfinite(c.c1) && std::isfinite(c.c2) && std::isfinite(c.c3));
      } else if (drop) {
        CHECK(c.c1 == 0 && c.c2 == 0 && c.c3 == 0);
      } else {
        CHECK(std::isnan(c.c1) && std::isnan(c.c2));
      }
    }
    check_statistics(at, got);
    CHECK(std::isfinite(got.loss) == drop);

    // Dropping averages over what is left, which is 5 samples and 11 transitions.
    Problem dropped = at.problem;
    dropped.config.nonfinite = NonFinite::drop;
    const Evaluation rest = cpu::evaluate(dropped, at.sums.data());
    CHECK_CLOSE(rest.loss, loss_of(at, rest, batch - 1, rows - 7), 1e-13);
    if (drop) {
      check_coefficients(at, got);
    } else {  // propagating averages over all; otherwise the finite rows' gradients are the same
      for (int64_t n = 0; n < rows; ++n) {
        if (spoiled(n)) continue;
        const Coefficients &c = got.coefficients[n], &d = rest.coefficients[n];
        CHECK_CLOSE(c.c1 * batch, d.c1 * (batch - 1), 1e-14 * std::fabs(c.c1) * batch);
        CHECK_CLOSE(c.c2 * batch, d.c2 * (batch - 1), 1e-14 * std::fabs(c.c1) * batch);
        CHECK_CLOSE(c.c3 * rows, d.c3 * (rows - 7), 1e-14 * std::fabs(c.c3) * rows);
      }
    }
  });
}

// Statistics of the same samples, formed apart and given back, are those that evaluate() forms.
void test_statistics_that_are_given_back() {
  for_each_config([](Batch& at) {
    spoil(at);
    Problem problem = at.problem;
    problem.config.rounding = 0.02;
    problem.mean = problem.std = problem.floor = nullptr;
    double found[statistic_count * steps];
    cpu::ratio_statistics(problem, at.sums.data(), found);
    const Evaluation base = cpu::evaluate(problem, at.sums.data());
    for (int64_t k = 0; k < steps; ++k) {
      CHECK(found[k] == batch - base.metrics[9 * steps + k]);
      CHECK(found[4 * steps + k] == batch);
      const double std = found[2 * steps + k] / std::sqrt(found[k]);
      CHECK_CLOSE(found[steps + k], base.metrics[k], 0);
      CHECK_CLOSE(std, base.metrics[steps + k], 1e-15 * std);
      at.mean[k] = found[steps + k];
      at.std[k] = std;
      at.floor[k] = std_floor_of(problem.config, found[3 * steps + k] / found[4 * steps + k]);
    }
    if (!problem.config.needs_statistics() || !problem.config.detach_stats) return;
    problem.mean = at.mean;
    problem.std = at.std;
    problem.floor = at.floor;
    const Evaluation got = cpu::evaluate(problem, at.sums.data());
    for (int64_t n = 0; n < rows; ++n) {
      CHECK(std::isnan(got.excess[n]) == std::isnan(base.excess[n]));
      if (std::isnan(base.excess[n])) continue;
      CHECK_CLOSE(got.excess[n], base.excess[n], 1e-14 * std::fabs(base.excess[n]));
      CHECK_CLOSE(got.coefficients[n].c1, base.coefficients[n].c1,
                  1e-14 * std::fabs(base.coefficients[n].c1));
    }
  });
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops;
  test::test_coefficients();
  test::test_degenerate_statistics();
  test::test_floor_of_rounding();
  test::test_on_policy();
  test::test_single_sample_is_degenerate();
  test::test_nonfinite_transitions();
  test::test_statistics_that_are_given_back();
  return test::finish();
}
