// The objective on a whole [K, B], with the scalars of objective.h: one algorithm for the host,
// where a team is one thread, and for the device, where it is a block.
#pragma once

#include <type_traits>

#include "batch.h"

namespace guard_ops {

constexpr int metric_count = 10;  // in the order of guard_ops.objective.Metrics

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
  Rows table[5];  // a, b, s, kappa, dt
  Numbers advantages, old_log_prob, step_weights;
  const double* mean = nullptr;  // [K] statistics from elsewhere, or null
  const double* std = nullptr;

  GUARD_OPS_HD StepScalars scalars(int64_t k, int64_t i) const {
    return {*table[2].at(k, i), *table[3].at(k, i), *table[4].at(k, i), double(numel)};
  }
  GUARD_OPS_HD Step<double> step(int64_t k, int64_t i) const {
    return {*table[0].at(k, i), *table[1].at(k, i), *table[2].at(k, i)};
  }
  // Whether a row's gradient needs only its own sums (see docs/math.md, "one pass").
  GUARD_OPS_HD bool rows_are_independent() const {
    const bool own_ratio = config.ratio_norm != RatioNorm::standardize || mean != nullptr;
    const bool own_weight =
        config.balance != Balance::inverse_ratio || steps == 1 || step_weights.data != nullptr;
    return own_ratio && own_weight;
  }
  GUARD_OPS_HD Statistics statistics(int64_t k) const {
    return mean == nullptr ? Statistics{0, 1} : Statistics{mean[k], std[k]};
  }
  GUARD_OPS_HD Ratio ratio(int64_t k, int64_t i, const Sums& sums) const {
    return ratio_of(config, scalars(k, i), sums, advantages.at(k, i), old_log_prob.read(k, i));
  }
  // A row's coefficients, if every transition of the batch is finite.
  GUARD_OPS_HD Coefficients assume(int64_t k, int64_t i, const Sums& sums) const {
    const Ratio r = ratio(k, i, sums);
    if (!r.finite) return nonfinite_coefficients(config);
    return own_coefficients(config, scalars(k, i), r, statistics(k), advantages.at(k, i),
                            step_weights.read(k, i), double(steps), double(batch));
  }
};

// What evaluate() knows of a transition.
struct RowState {
  Ratio ratio;
  Surrogate surrogate;
  double excess, weight, d_excess;
};

struct Scratch {
  RowState* rows;     // [K, B]
  Statistics* stats;  // [K]
  int64_t* finite;    // [B]: a sample's finite steps
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
  GUARD_OPS_HD double operator()(F value) const {
    const RowState* r = rows;
    return group.sum(batch, [=](int64_t i) { return r[i].ratio.finite ? value(r[i]) : 0.0; }) /
           double(count);
  }
  // About what (*this)(value) has returned.
  template <class F>
  GUARD_OPS_HD double std(F value, double mean) const {
    return sqrt((*this)([=](const RowState& r) {
      const double d = value(r) - mean;
      return d * d;
    }));
  }
};

// One of a step's metrics, of its finite transitions.
template <class Mean>
GUARD_OPS_HD double metric_of(int metric, const Mean& over) {
  const auto u = [](const RowState& r) { return r.ratio.u; };
  const auto excess = [](const RowState& r) { return r.excess; };
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
    default:
      return double(over.batch - over.count);
  }
}

// A Team has each(n, f), which calls f(0) ... f(n - 1), groups(n, f), which calls f(group, 0) ...
// f(group, n - 1), both finished by all before they return, and sum(n, f), which every thread may
// call. A Group has each(n, f), sum(n, f), the same order of additions in every run, and leader().
// Out takes what is known of a row, a step and the loss: row(n, state, coefficients),
// metric(m, k, value), loss(value).
template <class Team, class SumsOf, class Out>
GUARD_OPS_HD void evaluate(const Team& team, const Problem& problem, const SumsOf& sums,
                           const Scratch& scratch, const Out& out) {
  const Config& c = problem.config;
  const int64_t steps = problem.steps, batch = problem.batch, rows = steps * batch;
  RowState* const state = scratch.rows;
  Statistics* const stats = scratch.stats;
  int64_t* const finite = scratch.finite;

  team.each(rows, [&](int64_t n) {
    const int64_t k = quotient(n, batch);
    state[n].ratio = problem.ratio(k, n - k * batch, sums(n));
    state[n].surrogate = {0.0, 0.0, false, false, false};
    state[n].d_excess = 0.0;
  });

  team.groups(steps, [&](const auto& group, int64_t k) {
    RowState* const step = state + k * batch;
    Statistics own = problem.statistics(k);
    if (problem.mean == nullptr && c.ratio_norm == RatioNorm::standardize) {
      const FiniteMean<std::decay_t<decltype(group)>> over{group, step, batch};
      const auto u = [](const RowState& r) { return r.ratio.u; };
      own.mean = over(u);
      own.std = over.std(u, own.mean);
    }
    if (group.leader()) stats[k] = own;
    group.each(batch, [&](int64_t i) {
      RowState& r = step[i];
      r.excess = r.ratio.finite ? excess_of(c, problem.scalars(k, i), r.ratio, own) : NAN;
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
      total += inverse_rho(c, r.excess);
    }
    finite[i] = finite_steps;
    for (int64_t k = 0; k < steps; ++k) {
      RowState& r = state[k * batch + i];
      r.weight = 0;
      if (!r.ratio.finite) continue;
      if (problem.step_weights.data != nullptr) {
        r.weight = problem.step_weights.at(k, i);
      } else if (c.balance == Balance::inverse_ratio) {
        r.weight = inverse_rho(c, r.excess) / total;
      } else {
        r.weight = own_weight(c, problem.scalars(k, i), double(finite_steps));
      }
    }
  });
  const double finite_samples = team.sum(batch, [&](int64_t i) { return double(finite[i] > 0); });
  const double finite_transitions = team.sum(batch, [&](int64_t i) { return double(finite[i]); });
  const double samples = c.drop ? (finite_samples > 0 ? finite_samples : 1.0) : double(batch);
  const double transitions =
      c.drop ? (finite_transitions > 0 ? finite_transitions : 1.0) : double(rows);

  team.each(rows, [&](int64_t n) {
    RowState& r = state[n];
    if (!r.ratio.finite) return;
    const int64_t k = quotient(n, batch);
    r.surrogate = surrogate_of(c, r.excess, problem.advantages.at(k, n - k * batch));
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
      if (!c.drop && finite_transitions < double(rows)) loss = NAN;
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
    const Statistics own = stats[k];
    const double gain = c.target_std / denominator(c, own);
    double mean_d = 0, mean_dz = 0;  // the statistics' own gradients
    const bool through = c.ratio_norm == RatioNorm::standardize && !c.detach_stats;
    const bool spread = through && !degenerate(c, own);
    const auto z = [=](const RowState& r) { return (r.ratio.u - own.mean) / own.std; };
    if (through) mean_d = over([](const RowState& r) { return r.d_excess; });
    if (spread) mean_dz = over([=](const RowState& r) { return r.d_excess * z(r); });
    group.each(batch, [&](int64_t i) {
      const RowState& r = step[i];
      Coefficients row = nonfinite_coefficients(c);
      if (r.ratio.finite) {
        double d_u = r.d_excess;
        if (through) d_u -= mean_d;
        if (spread) d_u -= z(r) * mean_dz;
        if (c.ratio_norm == RatioNorm::standardize) d_u *= gain;
        row = coefficients_of(c, problem.scalars(k, i), r.ratio, r.excess, r.d_excess, d_u,
                              transitions);
      }
      out.row(k * batch + i, r, row);
    });
  });
}

}  // namespace guard_ops
