// The objective on [K, B] numbers, following guard_ops/objective.py: from the sums of each
// transition to the loss, its diagnostics, and the coefficients d loss / d sums. First what is said
// of one transition, then evaluate() and ratio_statistics(), which are one algorithm for the host,
// where a team is one thread, and for the device, where it is a block.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "transition.h"

namespace guard_ops {

// ---- what an objective is -----------------------------------------------------------------------

// GuardConfig.ratio_norm: X(name, whether it needs its step's mean and std, whether it is a
// function of log r + kl_old instead of log r). What each of them does stands in normalize() alone.
#define GUARD_OPS_RATIO_NORMS(X) \
  X(none, false, false)          \
  X(standardize, true, false)    \
  X(closed_form, false, true)
#define GUARD_OPS_BALANCES(X) X(none) X(inverse_ratio) X(inverse_dt)
#define GUARD_OPS_REDUCTIONS(X) X(mean) X(sum)
#define GUARD_OPS_NONFINITES(X) X(propagate) X(drop)

#define GUARD_OPS_ENUMERATOR(name, ...) name,
enum class RatioNorm : int { GUARD_OPS_RATIO_NORMS(GUARD_OPS_ENUMERATOR) };
enum class Balance : int { GUARD_OPS_BALANCES(GUARD_OPS_ENUMERATOR) };
enum class Reduction : int { GUARD_OPS_REDUCTIONS(GUARD_OPS_ENUMERATOR) };
enum class NonFinite : int { GUARD_OPS_NONFINITES(GUARD_OPS_ENUMERATOR) };
#undef GUARD_OPS_ENUMERATOR

struct NormNeeds {
  bool statistics, debiased;
};

GUARD_OPS_HD NormNeeds norm_needs(RatioNorm norm) {
#define GUARD_OPS_ANSWER(name, statistics, debiased) \
  if (norm == RatioNorm::name) return {statistics, debiased};
  GUARD_OPS_RATIO_NORMS(GUARD_OPS_ANSWER)
#undef GUARD_OPS_ANSWER
  return {};
}

// The fields of Config in the order in which operators take them, which is that of
// guard_ops/config.py: choices with their type, then numbers. An extension whose lists are others
// is not loaded.
#define GUARD_OPS_CHOICES(X) \
  X(RatioNorm, ratio_norm)   \
  X(Balance, balance)        \
  X(Reduction, reduction)    \
  X(NonFinite, nonfinite)    \
  X(bool, detach_stats)      \
  X(bool, gaussian)
#define GUARD_OPS_NUMBERS(X) \
  X(target_std)              \
  X(std_floor) X(clip_low) X(clip_high) X(adv_clip) X(weight_floor) X(kl_beta) X(rounding)

struct Config {
#define GUARD_OPS_FIELD(type, name) type name;
  GUARD_OPS_CHOICES(GUARD_OPS_FIELD)
#undef GUARD_OPS_FIELD
#define GUARD_OPS_FIELD(name) double name;
  GUARD_OPS_NUMBERS(GUARD_OPS_FIELD)
#undef GUARD_OPS_FIELD

  GUARD_OPS_HD bool needs_statistics() const { return norm_needs(ratio_norm).statistics; }
  GUARD_OPS_HD bool debiased() const { return norm_needs(ratio_norm).debiased; }
  GUARD_OPS_HD bool drop() const { return nonfinite == NonFinite::drop; }

  // That of every finite transition's coefficients (those that are 0 are of any kind).
  GUARD_OPS_HD GradientKind gradient_kind() const {
    return debiased() ? GradientKind::residual : GradientKind::departure;
  }
};

// ---- one transition -----------------------------------------------------------------------------

// Numbers of one step or transition that the objective needs, and D.
struct StepScalars {
  double b, s, kappa, dt, numel;
};

struct Ratio {
  double log_ratio, kl_old, kl, u;  // u = expm1(log r)
  bool finite;
};

// Whether a result can represent x, if `largest` is the largest number of its dtype. What it cannot
// represent counts as not finite.
GUARD_OPS_HD bool fits(double x, double largest) { return std::fabs(x) <= largest; }

constexpr double log_sqrt_2pi = 0.91893853320467274178;

GUARD_OPS_HD double scale_of(const Config& c, const StepScalars& p) {
  return c.reduction == Reduction::mean ? p.kappa / p.numel : p.kappa;
}

// Of a step's u. At a std up to the floor the step is degenerate.
struct Statistics {
  double mean, std, floor;

  GUARD_OPS_HD bool degenerate() const { return std <= floor; }  // and not if the std is NaN
};

// Relative to their size, what independent errors of the velocities put on log r.
GUARD_OPS_HD double rounding_gain(const Config& c, const StepScalars& p) {
  return 2 * scale_of(c, p) * p.s * std::fabs(p.b) * std::sqrt(p.numel);
}

// The floor of a step; `square`: the mean over its samples of the squared gain, which may be
// infinite.
GUARD_OPS_HD double std_floor_of(const Config& c, double square) {
  if (c.rounding == 0) return c.std_floor;
  return std::fmax(c.std_floor, std::fmin(c.rounding * std::sqrt(square), c.target_std));
}

// What a norm makes of a transition: excess = r_hat - 1, and its derivatives. By the log-ratio that
// the norm is a function of, with the statistics held constant, the derivative is outer * inner. A
// norm that needs statistics is outer * (u - mean), so that by the mean it is -outer; by the std it
// is -outer * by_std.
struct Normalized {
  double excess, outer, inner, by_std;
};

// RatioNorm: all that tells one norm from another. docs/math.md has the formulas.
GUARD_OPS_HD Normalized normalize(const Config& c, const StepScalars& p, const Ratio& r,
                                  const Statistics& of) {
  if (c.ratio_norm == RatioNorm::closed_form) {
    const double excess = std::expm1(p.s * (r.log_ratio + r.kl_old));
    return {excess, 1.0 + excess, p.s, 0.0};
  }
  if (c.ratio_norm == RatioNorm::standardize) {
    const bool degenerate = of.degenerate();
    const double distance = r.u - of.mean, denominator = degenerate ? c.target_std : of.std;
    return {c.target_std * (distance / denominator), c.target_std / denominator, 1.0 + r.u,
            degenerate ? 0.0 : distance / of.std};
  }
  if (c.ratio_norm == RatioNorm::none) return {r.u, 1.0, 1.0 + r.u, 0.0};
  return {NAN, NAN, NAN, NAN};  // a norm that is named and not written shows
}

// old_log_prob: only in the log-prob form. largest: of the results' dtype.
GUARD_OPS_HD Ratio ratio_of(const Config& c, const StepScalars& p, const Sums& sums,
                            double advantage, const Maybe& step_weight, const Maybe& old_log_prob,
                            double largest) {
  Ratio r;
  const double scale = scale_of(c, p);
  r.kl = sums.ref / (2 * p.s * p.s * p.numel);
  if (!old_log_prob.given) {
    r.log_ratio = scale * (2 * sums.s1 - sums.s2);
    r.kl_old = scale * sums.s2;
  } else {
    double log_prob = -scale * sums.s2;
    if (c.gaussian) {
      log_prob -= (c.reduction == Reduction::mean ? 1.0 : p.numel) * (std::log(p.s) + log_sqrt_2pi);
    }
    r.log_ratio = log_prob - old_log_prob.value;
    r.kl_old = NAN;
  }
  r.u = std::expm1(r.log_ratio);
  r.finite = fits(r.log_ratio, largest) && fits(r.u, largest) && std::isfinite(advantage);
  if (step_weight.given) r.finite = r.finite && std::isfinite(step_weight.value);
  if (c.kl_beta != 0) r.finite = r.finite && fits(r.kl, largest);
  return r;
}

struct Surrogate {
  double loss, slope;  // d loss / d r_hat
  bool clipped, high, low;
};

GUARD_OPS_HD Surrogate surrogate_of(const Config& c, double excess, double advantage) {
  const double a =
      advantage < -c.adv_clip ? -c.adv_clip : (advantage > c.adv_clip ? c.adv_clip : advantage);
  Surrogate out;
  out.high = excess > c.clip_high;
  out.low = excess < -c.clip_low;
  out.clipped = (a > 0 && out.high) || (a < 0 && out.low);
  const double bounded = out.high ? c.clip_high : -c.clip_low;
  out.loss = -a * (1.0 + (out.clipped ? bounded : excess));
  out.slope = out.clipped ? 0.0 : -a;
  return out;
}

// 1 / max(r_hat, floor): what inverse_ratio normalizes over a sample's steps.
GUARD_OPS_HD double inverse_rho(const Config& c, double excess) {
  const double rho = 1.0 + excess;
  return 1.0 / (rho < c.weight_floor ? c.weight_floor : rho);
}

// The balances that need no other step's ratio; `steps` counts the sample's finite ones.
GUARD_OPS_HD double independent_weight(const Config& c, const StepScalars& p, double steps) {
  return c.balance == Balance::inverse_dt ? 1.0 / (steps * std::fabs(p.dt)) : 1.0 / steps;
}

// From d loss / d r_hat, less what flows through the statistics, to d loss / d sums.
GUARD_OPS_HD Coefficients coefficients_of(const Config& c, const StepScalars& p,
                                          const Normalized& norm, double d_excess,
                                          double transitions) {
  Coefficients out{0.0, 0.0, 0.0};
  const double scale = scale_of(c, p), d_log_ratio = d_excess * norm.outer * norm.inner;
  out.c1 = d_log_ratio * 2 * scale;
  if (!c.debiased()) out.c2 = -d_log_ratio * scale;  // log r + kl_old is of S1 alone
  if (c.kl_beta != 0) out.c3 = c.kl_beta / transitions / (2 * p.s * p.s * p.numel);
  return out;
}

GUARD_OPS_HD Coefficients nonfinite_coefficients(const Config& c) {
  return c.drop() ? Coefficients{0.0, 0.0, 0.0} : Coefficients{NAN, NAN, NAN};
}

// A row's coefficients when no other row's ratio enters them: statistics known or not needed, and
// every transition of the batch finite.
GUARD_OPS_HD Coefficients independent_coefficients(const Config& c, const StepScalars& p,
                                                   const Ratio& r, const Statistics& of,
                                                   double advantage, const Maybe& step_weight,
                                                   double steps, double samples) {
  const Normalized norm = normalize(c, p, r, of);
  double weight = step_weight.given ? step_weight.value : independent_weight(c, p, steps);
  if (!step_weight.given && c.balance == Balance::inverse_ratio) weight = 1.0;  // one step
  const double d_excess = weight * surrogate_of(c, norm.excess, advantage).slope / samples;
  return coefficients_of(c, p, norm, d_excess, steps * samples);
}

// ---- all of them --------------------------------------------------------------------------------

constexpr int metric_count = 11;  // in the order of guard_ops.objective.Metrics

// Of numbers of rows, steps or samples. A device has no instruction for 64-bit division, and
// kernels take fewer rows than 2^24.
GUARD_OPS_HD int64_t quotient(int64_t n, int64_t d) {
#if defined(__CUDA_ARCH__)
  return uint32_t(n) / uint32_t(d);
#else
  return n / d;
#endif
}

struct Problem {
  Config config;
  int64_t steps, batch, numel;
  Doubles table[5];  // a, b, s, kappa, dt
  Reals advantages, old_log_prob, step_weights;
  Reals elements;                // D of each transition, or absent where it is numel
  const double* mean = nullptr;  // [K] statistics from elsewhere, or null
  const double* std = nullptr;
  const double* floor = nullptr;
  double largest = 1.7976931348623157e308;  // of the results' dtype

  GUARD_OPS_HD StepScalars scalars(int64_t k, int64_t i) const {
    return {*table[1].at(k, i), *table[2].at(k, i), *table[3].at(k, i), *table[4].at(k, i),
            elements.data == nullptr ? double(numel) : elements.at(k, i)};
  }
  GUARD_OPS_HD Step<double> step(int64_t k, int64_t i) const {
    return {*table[0].at(k, i), *table[1].at(k, i), *table[2].at(k, i)};
  }
  // Whether a row's gradient needs only its own sums (see docs/math.md, "one pass").
  GUARD_OPS_HD bool rows_are_independent() const {
    const bool ratios = !config.needs_statistics() || mean != nullptr;
    const bool weights =
        config.balance != Balance::inverse_ratio || steps == 1 || step_weights.data != nullptr;
    return ratios && weights;
  }
  GUARD_OPS_HD Statistics statistics(int64_t k) const {
    return mean == nullptr ? Statistics{0, 1, 0} : Statistics{mean[k], std[k], floor[k]};
  }
  GUARD_OPS_HD Ratio ratio(int64_t k, int64_t i, const Sums& sums) const {
    Ratio r = ratio_of(config, scalars(k, i), sums, advantages.at(k, i), step_weights.read(k, i),
                       old_log_prob.read(k, i), largest);
    if (r.finite) r.finite = loss_fits(k, i, r);
    return r;
  }
  // Whether what the loss makes of a finite ratio can be represented. It may not, for want of
  // finite statistics or because the weight is too large. Statistics that are not formed yet make
  // of no sample more than sqrt(batch) standard deviations.
  GUARD_OPS_HD bool loss_fits(int64_t k, int64_t i, const Ratio& r) const {
    const StepScalars p = scalars(k, i);
    const Maybe given = step_weights.read(k, i);
    // The weight, or what it is at most: how many of the steps are finite is not known yet.
    double weight = config.balance == Balance::inverse_dt ? 1.0 / std::fabs(p.dt) : 1.0;
    if (given.given) weight = given.value;
    if (config.needs_statistics() && mean == nullptr) {
      const double spread = std::fmax(config.target_std, config.std_floor) * std::sqrt(batch);
      const double advantage = std::fmin(std::fabs(advantages.at(k, i)), config.adv_clip);
      return fits(advantage * (1.0 + spread) * weight, largest);
    }
    const double excess = normalize(config, p, r, statistics(k)).excess;
    const double loss = surrogate_of(config, excess, advantages.at(k, i)).loss;
    return fits(excess, largest) && fits(loss * weight, largest);
  }
  // A row's coefficients, if every transition of the batch is finite.
  GUARD_OPS_HD Coefficients assume(int64_t k, int64_t i, const Sums& sums) const {
    const Ratio r = ratio(k, i, sums);
    if (!r.finite) return nonfinite_coefficients(config);
    return independent_coefficients(config, scalars(k, i), r, statistics(k), advantages.at(k, i),
                                    step_weights.read(k, i), double(steps), double(batch));
  }
};

// What evaluate() knows of a transition.
struct RowState {
  Ratio ratio;
  Normalized norm;
  Surrogate surrogate;
  double distance, weight, d_excess;  // distance: of u from the mean, in stds
  bool degenerate;                    // the step's
};

struct EvaluationScratch {
  RowState* rows;   // [K, B]
  int64_t* finite;  // [B]: a sample's finite steps
};

// Means over the finite transitions of step k, by one group of the team.
template <class Group>
struct FiniteMean {
  const Group& group;
  const RowState* rows;  // of the step
  int64_t batch, count;

  GUARD_OPS_HD FiniteMean(const Group& group, const RowState* rows, int64_t batch)
      : group(group), rows(rows), batch(batch) {
    count = int64_t(group.sum(batch, [=](int64_t i) { return double(rows[i].ratio.finite); }));
  }
  template <class F>
  GUARD_OPS_HD double sum(F value) const {
    const RowState* r = rows;
    return group.sum(batch, [=](int64_t i) { return r[i].ratio.finite ? value(r[i]) : 0.0; });
  }
  template <class F>
  GUARD_OPS_HD double operator()(F value) const {
    const double total = sum(value);
#if !defined(__CUDA_ARCH__)
    if (std::isinf(total)) {  // finite numbers have an infinite sum
      return sum([=](const RowState& r) { return value(r) / huge; }) / double(count) * huge;
    }
#endif
    return total / double(count);
  }
  // About what (*this)(value) has returned.
  template <class F>
  GUARD_OPS_HD double std(F value, double mean) const {
    const auto square = [&](double unit) {
      return sum([=](const RowState& r) {
        const double d = (value(r) - mean) / unit;
        return d * d;
      });
    };
    const double total = square(1);
#if !defined(__CUDA_ARCH__)
    if (std::isinf(total)) return sqrt(square(huge) / double(count)) * huge;
#endif
    return sqrt(total / double(count));
  }

  // By what numbers are divided whose sum or squares overflow: a power of two, which rounds
  // nothing. Results of a device are float32, whose squares float64 represents.
  static constexpr double huge = 0x1p600;
};

// One of a step's metrics, of its finite transitions.
template <class Mean>
GUARD_OPS_HD double metric_of(int metric, const Mean& over) {
  const auto u = [](const RowState& r) { return r.ratio.u; };
  const auto excess = [](const RowState& r) { return r.norm.excess; };
  switch (metric) {
    case 0:
      return over(u);
    case 1:
      return over.std(u, over(u));
    case 2:
      return over(excess);
    case 3:
      return over.std(excess, over(excess));
    case 4:
      return over([](const RowState& r) { return double(r.surrogate.clipped); });
    case 5:
      return over([](const RowState& r) { return double(r.surrogate.high); });
    case 6:
      return over([](const RowState& r) { return double(r.surrogate.low); });
    case 7:
      return over([](const RowState& r) { return r.ratio.kl_old; });
    case 8:
      return over([](const RowState& r) { return r.weight; });
    case 9:
      return double(over.batch - over.count);
    default:
      return double(over.rows[0].degenerate);
  }
}

// Of a step: how many of its transitions are finite, mean and std of their u, and over all of its
// transitions the sum of the squared gain.
struct Spread {
  double count, mean, std, square;
};

template <class Group>
GUARD_OPS_HD Spread spread_of(const Group& group, const Problem& problem, const RowState* step,
                              int64_t k) {
  const FiniteMean<Group> over{group, step, problem.batch};
  const auto u = [](const RowState& r) { return r.ratio.u; };
  const double mean = over(u), std = over.std(u, mean);
  const double square = group.sum(problem.batch, [&](int64_t i) {
    const double gain = rounding_gain(problem.config, problem.scalars(k, i));
    return gain * gain;
  });
  return {double(over.count), mean, std, square};
}

// A Team has each(n, f), which calls f(0) ... f(n - 1), groups(n, f), which calls f(group, 0) ...
// f(group, n - 1), both finished by all before they return, and sum(n, f), which every thread may
// call. A Group has each(n, f), sum(n, f), the same order of additions in every run, and leader().
// Out takes what is known of a row, a step and the loss: row(n, state, coefficients),
// metric(m, k, value), loss(value).
template <class Team, class SumsOf, class Out>
GUARD_OPS_HD void evaluate(const Team& team, const Problem& problem, const SumsOf& sums,
                           const EvaluationScratch& scratch, const Out& out) {
  const Config& c = problem.config;
  const int64_t steps = problem.steps, batch = problem.batch, rows = steps * batch;
  RowState* const state = scratch.rows;
  int64_t* const finite = scratch.finite;

  team.each(rows, [&](int64_t n) {
    const int64_t k = quotient(n, batch);
    state[n].ratio = problem.ratio(k, n - k * batch, sums(n));
    state[n].surrogate = {0.0, 0.0, false, false, false};
    state[n].d_excess = 0.0;
  });

  team.groups(steps, [&](const auto& group, int64_t k) {
    RowState* const step = state + k * batch;
    Statistics of = problem.statistics(k);
    if (problem.mean == nullptr && c.needs_statistics()) {
      const Spread found = spread_of(group, problem, step, k);
      of = {found.mean, found.std, std_floor_of(c, found.square / double(batch))};
    }
    group.each(batch, [&](int64_t i) {
      RowState& r = step[i];
      r.norm = r.ratio.finite ? normalize(c, problem.scalars(k, i), r.ratio, of)
                              : Normalized{NAN, NAN, NAN, NAN};
      r.degenerate = c.needs_statistics() && of.degenerate();
      r.distance = of.std > 0 ? (r.ratio.u - of.mean) / of.std : 0.0;
    });
  });

  // Weights over each sample's finite steps, and what the loss is a mean over.
  team.each(batch, [&](int64_t i) {
    int64_t finite_steps = 0;
    double total = 0;
    for (int64_t k = 0; k < steps; ++k) {
      const RowState& r = state[k * batch + i];
      if (!r.ratio.finite) continue;
      ++finite_steps;
      total += inverse_rho(c, r.norm.excess);
    }
    finite[i] = finite_steps;
    for (int64_t k = 0; k < steps; ++k) {
      RowState& r = state[k * batch + i];
      r.weight = 0;
      if (!r.ratio.finite) continue;
      if (problem.step_weights.data != nullptr) {
        r.weight = problem.step_weights.at(k, i);
      } else if (c.balance == Balance::inverse_ratio) {
        r.weight = inverse_rho(c, r.norm.excess) / total;
      } else {
        r.weight = independent_weight(c, problem.scalars(k, i), double(finite_steps));
      }
    }
  });
  const double finite_samples = team.sum(batch, [&](int64_t i) { return double(finite[i] > 0); });
  const double finite_transitions = team.sum(batch, [&](int64_t i) { return double(finite[i]); });
  const double samples = c.drop() ? (finite_samples > 0 ? finite_samples : 1.0) : double(batch);
  const double transitions =
      c.drop() ? (finite_transitions > 0 ? finite_transitions : 1.0) : double(rows);

  team.each(rows, [&](int64_t n) {
    RowState& r = state[n];
    if (!r.ratio.finite) return;
    const int64_t k = quotient(n, batch);
    r.surrogate = surrogate_of(c, r.norm.excess, problem.advantages.at(k, n - k * batch));
    r.d_excess = r.weight * r.surrogate.slope / samples;
  });

  // The steps' coefficients; the loss, sample by sample; the metrics. Each is a group's work: side
  // by side on a device, where the metrics of a step one after another would be the longest part.
  team.groups(steps + 1 + steps * metric_count, [&](const auto& group, int64_t n) {
    if (n == steps) {
      const auto at = [=](int64_t j) -> const RowState& {
        const int64_t i = quotient(j, steps);
        return state[(j - i * steps) * batch + i];
      };
      double loss = group.sum(rows, [=](int64_t j) {
        const RowState& r = at(j);
        return r.ratio.finite ? r.weight * r.surrogate.loss : 0.0;
      });
      const double kl =
          group.sum(rows, [=](int64_t j) { return at(j).ratio.finite ? at(j).ratio.kl : 0.0; });
      loss /= samples;
      if (c.kl_beta != 0) loss += c.kl_beta * (kl / transitions);
      if (!c.drop() && finite_transitions < double(rows)) loss = NAN;
      if (group.leader()) out.loss(loss);
      return;
    }
    const int64_t k = n < steps ? n : quotient(n - steps - 1, metric_count);
    const RowState* const step = state + k * batch;
    const FiniteMean<std::decay_t<decltype(group)>> over{group, step, batch};
    if (n > steps) {
      const int metric = int(n - steps - 1 - k * metric_count);
      const double value = metric_of(metric, over);
      if (group.leader()) out.metric(metric, k, value);
      return;
    }
    // Statistics that are not constants of the gradient have one of their own.
    const bool through = c.needs_statistics() && !c.detach_stats;
    double mean_d = 0, mean_dz = 0;
    if (through) {
      mean_d = over([](const RowState& r) { return r.d_excess; });
      mean_dz = over([](const RowState& r) { return r.d_excess * r.norm.by_std; });
    }
    group.each(batch, [&](int64_t i) {
      const RowState& r = step[i];
      Coefficients row = nonfinite_coefficients(c);
      if (r.ratio.finite) {
        double d_excess = r.d_excess;
        if (through) d_excess = d_excess - mean_d - r.distance * mean_dz;
        row = coefficients_of(c, problem.scalars(k, i), r.norm, d_excess, transitions);
      }
      out.row(k * batch + i, r, row);
    });
  });
}

constexpr int statistic_count = 5;  // in the order of guard_ops.objective.ratio_statistics

// What evaluate() needs to know of each step where its statistics go over more samples than the
// problem has: writes count, mean and root_m2 = std sqrt(count) of the finite transitions' u, the
// sum of the squared gain, and of how many transitions that is a sum, [statistic_count, K]. Which
// are finite is decided as where statistics are not known.
template <class Team, class SumsOf>
GUARD_OPS_HD void ratio_statistics(const Team& team, const Problem& problem, const SumsOf& sums,
                                   RowState* state, double* out) {
  const int64_t steps = problem.steps, batch = problem.batch;
  team.each(steps * batch, [&](int64_t n) {
    const int64_t k = quotient(n, batch);
    state[n].ratio = problem.ratio(k, n - k * batch, sums(n));
  });
  team.groups(steps, [&](const auto& group, int64_t k) {
    const Spread found = spread_of(group, problem, state + k * batch, k);
    if (!group.leader()) return;
    const bool any = found.count > 0;
    out[k] = found.count;
    out[steps + k] = any ? found.mean : 0.0;
    out[2 * steps + k] = any ? found.std * std::sqrt(found.count) : 0.0;
    out[3 * steps + k] = found.square;
    out[4 * steps + k] = double(batch);
  });
}

}  // namespace guard_ops
