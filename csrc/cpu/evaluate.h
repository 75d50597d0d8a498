// The whole [K, B] objective on the host, with the scalars of ../objective.h.
#pragma once

#include <vector>

#include "../objective.h"

namespace guard_ops::cpu {

constexpr int metric_count = 10;  // in the order of guard_ops.objective.Metrics

// Where [K, B] inputs lie: element (k, i) at data[k * stride_k + i * stride_b].
struct Rows {
  const double* data = nullptr;
  int64_t stride_k = 0, stride_b = 0;
  const double* at(int64_t k, int64_t i) const {
    return data == nullptr ? nullptr : data + k * stride_k + i * stride_b;
  }
};

struct Problem {
  Config config;
  int64_t steps, batch, numel;
  Rows table[5];  // a, b, s, kappa, dt
  Rows advantages, old_log_prob, step_weights;
  const double* mean = nullptr;  // [K] statistics from elsewhere, or null
  const double* std = nullptr;

  StepScalars scalars(int64_t k, int64_t i) const {
    return {*table[2].at(k, i), *table[3].at(k, i), *table[4].at(k, i), double(numel)};
  }
  // Whether a row's gradient needs only its own sums (see docs/math.md, "one pass").
  bool rows_are_independent() const {
    const bool own_ratio = config.ratio_norm != RatioNorm::standardize || mean != nullptr;
    const bool own_weight =
        config.balance != Balance::inverse_ratio || steps == 1 || step_weights.data != nullptr;
    return own_ratio && own_weight;
  }
  Statistics statistics(int64_t k) const {
    return mean == nullptr ? Statistics{0, 1} : Statistics{mean[k], std[k]};
  }
};

struct Evaluation {
  double loss;
  std::vector<double> log_ratio, excess, weights, kl;  // [K, B]
  std::vector<double> metrics;                         // [metric_count, K]
  std::vector<Coefficients> coefficients;              // [K, B]
};

Evaluation evaluate(const Problem& problem, const Sums* sums);  // sums [K, B]

}  // namespace guard_ops::cpu
