// The whole [K, B] objective on the host.
#pragma once

#include <vector>

#include "../evaluate.h"

namespace guard_ops::cpu {

using guard_ops::metric_count;
using guard_ops::Problem;
using guard_ops::Rows;

struct Evaluation {
  double loss;
  std::vector<double> log_ratio, excess, weights, kl;  // [K, B]
  std::vector<double> metrics;                         // [metric_count, K]
  std::vector<Coefficients> coefficients;              // [K, B]
};

Evaluation evaluate(const Problem& problem, const Sums* sums);  // sums [K, B]

}  // namespace guard_ops::cpu
