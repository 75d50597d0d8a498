#include "evaluate.h"

namespace guard_ops::cpu {
namespace {

// Means over the finite transitions of one step, in batch order.
struct FiniteMean {
  const std::vector<Ratio>& ratios;
  int64_t first, batch;
  template <class F>
  double operator()(F value) const {
    double total = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < batch; ++i) {
      if (!ratios[first + i].finite) continue;
      total += value(first + i);
      ++count;
    }
    return total / double(count);
  }
  template <class F>
  double std(F value) const {
    const double mean = (*this)(value);
    return std::sqrt((*this)([&](int64_t n) {
      const double d = value(n) - mean;
      return d * d;
    }));
  }
};

}  // namespace

Evaluation evaluate(const Problem& problem, const Sums* sums) {
  const Config& c = problem.config;
  const int64_t steps = problem.steps, batch = problem.batch, rows = steps * batch;
  Evaluation out;
  out.log_ratio.resize(rows);
  out.excess.resize(rows);
  out.weights.resize(rows);
  out.kl.resize(rows);
  out.metrics.resize(metric_count * steps);
  out.coefficients.resize(rows);

  std::vector<Ratio> ratios(rows);
  std::vector<StepScalars> scalars(rows);
  std::vector<Statistics> stats(steps);
  for (int64_t k = 0; k < steps; ++k) {
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t n = k * batch + i;
      scalars[n] = problem.scalars(k, i);
      ratios[n] = ratio_of(c, scalars[n], sums[n], *problem.advantages.at(k, i),
                           problem.old_log_prob.at(k, i));
      out.log_ratio[n] = ratios[n].log_ratio;
      out.kl[n] = ratios[n].kl;
    }
    stats[k] = problem.statistics(k);
    if (problem.mean == nullptr && c.ratio_norm == RatioNorm::standardize) {
      const FiniteMean over{ratios, k * batch, batch};
      const auto u = [&](int64_t n) { return ratios[n].u; };
      stats[k] = {over(u), over.std(u)};
    }
    for (int64_t n = k * batch; n < (k + 1) * batch; ++n) {
      out.excess[n] = ratios[n].finite ? excess_of(c, scalars[n], ratios[n], stats[k]) : NAN;
    }
  }

  // Weights over each sample's finite steps, and what the loss is a mean over.
  int64_t finite_samples = 0, finite_transitions = 0;
  for (int64_t i = 0; i < batch; ++i) {
    int64_t finite_steps = 0;
    double total = 0;
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t n = k * batch + i;
      if (!ratios[n].finite) continue;
      ++finite_steps;
      total += inverse_rho(c, out.excess[n]);
    }
    finite_samples += finite_steps > 0;
    finite_transitions += finite_steps;
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t n = k * batch + i;
      double weight = 0;
      if (ratios[n].finite) {
        if (problem.step_weights.data != nullptr) {
          weight = *problem.step_weights.at(k, i);
        } else if (c.balance == Balance::inverse_ratio) {
          weight = inverse_rho(c, out.excess[n]) / total;
        } else {
          weight = own_weight(c, scalars[n], double(finite_steps));
        }
      }
      out.weights[n] = weight;
    }
  }
  const double samples = c.drop ? double(finite_samples > 0 ? finite_samples : 1) : double(batch);
  const double transitions =
      c.drop ? double(finite_transitions > 0 ? finite_transitions : 1) : double(rows);

  std::vector<Surrogate> surrogates(rows);
  std::vector<double> d_excess(rows, 0.0);
  double loss = 0, kl = 0;
  for (int64_t i = 0; i < batch; ++i) {
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t n = k * batch + i;
      if (!ratios[n].finite) continue;
      surrogates[n] = surrogate_of(c, out.excess[n], *problem.advantages.at(k, i));
      loss += out.weights[n] * surrogates[n].loss;
      kl += ratios[n].kl;
      d_excess[n] = out.weights[n] * surrogates[n].slope / samples;
    }
  }
  out.loss = loss / samples;
  if (c.kl_beta != 0) out.loss += c.kl_beta * (kl / transitions);
  if (!c.drop && finite_transitions < rows) out.loss = NAN;

  for (int64_t k = 0; k < steps; ++k) {
    const FiniteMean over{ratios, k * batch, batch};
    const double gain = c.target_std / denominator(c, stats[k]);
    double mean_d = 0, mean_dz = 0;  // the statistics' own gradients
    const bool through = c.ratio_norm == RatioNorm::standardize && !c.detach_stats;
    const bool spread = through && !degenerate(c, stats[k]);
    const auto z = [&](int64_t n) { return (ratios[n].u - stats[k].mean) / stats[k].std; };
    if (through) mean_d = over([&](int64_t n) { return d_excess[n]; });
    if (spread) mean_dz = over([&](int64_t n) { return d_excess[n] * z(n); });
    for (int64_t n = k * batch; n < (k + 1) * batch; ++n) {
      if (!ratios[n].finite) {
        out.coefficients[n] = nonfinite_coefficients(c);
        continue;
      }
      double d_u = d_excess[n];
      if (through) d_u -= mean_d;
      if (spread) d_u -= z(n) * mean_dz;
      if (c.ratio_norm == RatioNorm::standardize) d_u *= gain;
      out.coefficients[n] =
          coefficients_of(c, scalars[n], ratios[n], out.excess[n], d_excess[n], d_u, transitions);
    }
    int64_t finite = 0;
    for (int64_t n = k * batch; n < (k + 1) * batch; ++n) finite += ratios[n].finite;
    const auto u = [&](int64_t n) { return ratios[n].u; };
    const auto excess = [&](int64_t n) { return out.excess[n]; };
    const double metrics[metric_count] = {
        over(u),
        over.std(u),
        over(excess),
        over.std(excess),
        over([&](int64_t n) { return double(surrogates[n].clipped); }),
        over([&](int64_t n) { return double(surrogates[n].high); }),
        over([&](int64_t n) { return double(surrogates[n].low); }),
        over([&](int64_t n) { return ratios[n].kl_old; }),
        over([&](int64_t n) { return out.weights[n]; }),
        double(batch - finite),
    };
    for (int m = 0; m < metric_count; ++m) out.metrics[m * steps + k] = metrics[m];
  }
  return out;
}

}  // namespace guard_ops::cpu
