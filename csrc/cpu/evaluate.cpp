#include "evaluate.h"

namespace guard_ops::cpu {
namespace {

// A team, and its only group, of one thread: sums in the order of their terms.
struct Alone {
  bool leader() const { return true; }
  template <class F>
  void each(int64_t n, F body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <class F>
  void groups(int64_t n, F body) const {
    for (int64_t i = 0; i < n; ++i) body(*this, i);
  }
  template <class F>
  double sum(int64_t n, F value) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += value(i);
    return total;
  }
};

struct Into {
  Evaluation& to;
  int64_t steps;
  void loss(double value) const { to.loss = value; }
  void metric(int m, int64_t k, double value) const { to.metrics[m * steps + k] = value; }
  void row(int64_t n, const RowState& r, const Coefficients& coefficients) const {
    to.log_ratio[n] = r.ratio.log_ratio;
    to.excess[n] = r.excess;
    to.weights[n] = r.weight;
    to.kl[n] = r.ratio.kl;
    to.coefficients[n] = coefficients;
  }
};

}  // namespace

Evaluation evaluate(const Problem& problem, const Sums* sums) {
  const int64_t steps = problem.steps, rows = steps * problem.batch;
  Evaluation out;
  for (auto* x : {&out.log_ratio, &out.excess, &out.weights, &out.kl}) x->resize(rows);
  out.metrics.resize(metric_count * steps);
  out.coefficients.resize(rows);
  std::vector<RowState> state(rows);
  std::vector<Statistics> stats(steps);
  std::vector<int64_t> finite(problem.batch);
  guard_ops::evaluate(
      Alone{}, problem, [=](int64_t n) { return sums[n]; },
      Scratch{state.data(), stats.data(), finite.data()}, Into{out, steps});
  return out;
}

}  // namespace guard_ops::cpu
