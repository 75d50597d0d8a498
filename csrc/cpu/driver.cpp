#include "driver.h"

#include <unistd.h>

#include <algorithm>
#include <vector>

namespace guard_ops::cpu {
namespace {

constexpr int64_t grain_elements = 16384;  // less work than this is not worth a thread

int64_t chunks_of(const Batch& t) { return (t.numel + chunk - 1) / chunk; }

Step<double> step_at(const Rows table[5], int64_t k, int64_t i) {
  return {*table[0].at(k, i), *table[1].at(k, i), *table[2].at(k, i)};
}

// Calls body(unit, span) for every chunk of every row, in parallel.
template <class Body>
void for_each_chunk(const Machine& machine, const Batch& t, bool backwards, Body body) {
  const int64_t chunks = chunks_of(t), units = t.steps * t.batch * chunks;
  const int64_t grain = std::max<int64_t>(1, grain_elements / std::min(t.numel, chunk));
  machine.parallel(units, grain, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      const int64_t unit = backwards ? last - 1 - (u - first) : u;
      const int64_t row = unit / chunks, begin = unit % chunks * chunk;
      body(unit, Span{row / t.batch, row % t.batch, begin, std::min(begin + chunk, t.numel)});
    }
  });
}

void add(Sums& total, const Sums& part) {
  total.s1 += part.s1;
  total.s2 += part.s2;
  total.ref += part.ref;
}

int64_t row_bytes(const Batch& t) {
  int64_t bytes = 0;
  for (const Operand* x : {&t.v, &t.uncond, &t.ref, &t.x, &t.y, &t.m, &t.v_old, &t.noise}) {
    if (*x) bytes += t.numel * size_of(x->dtype);
  }
  return bytes;
}

}  // namespace

int64_t cache_share(int threads) {
  const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE), l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::max<int64_t>(l2 > 0 ? l2 : 1 << 19, l3 > 0 ? l3 / threads : 0);
}

void sums(const Machine& machine, const Batch& t, const Rows table[5], Sums* out) {
  const int64_t chunks = chunks_of(t), rows = t.steps * t.batch;
  if (chunks == 1) {
    for_each_chunk(machine, t, false, [&](int64_t unit, const Span& at) {
      out[unit] = machine.kernels.sums(t, step_at(table, at.k, at.i), at);
    });
    return;
  }
  std::vector<Sums> partial(rows * chunks);
  for_each_chunk(machine, t, false, [&](int64_t unit, const Span& at) {
    partial[unit] = machine.kernels.sums(t, step_at(table, at.k, at.i), at);
  });
  for (int64_t row = 0; row < rows; ++row) {
    out[row] = partial[row * chunks];
    for (int64_t n = 1; n < chunks; ++n) add(out[row], partial[row * chunks + n]);
  }
}

void gradient(const Machine& machine, const Batch& t, const Rows table[5],
              const Coefficients* coefficients, const Operand& cond, const Operand& uncond) {
  for_each_chunk(machine, t, true, [&](int64_t, const Span& at) {
    machine.kernels.gradient(t, step_at(table, at.k, at.i), coefficients[at.k * t.batch + at.i], at,
                             cond, uncond);
  });
}

Evaluation guard_loss(const Machine& machine, const Batch& t, const Problem& problem,
                      const Operand& cond, const Operand& uncond) {
  const int64_t rows = t.steps * t.batch;
  std::vector<Sums> row_sums(rows);
  const bool wanted = cond || uncond;
  const bool one_pass = wanted && problem.rows_are_independent() && rows >= machine.threads &&
                        row_bytes(t) <= machine.cache_bytes;
  if (!one_pass) {
    sums(machine, t, problem.table, row_sums.data());
    Evaluation out = evaluate(problem, row_sums.data());
    if (wanted) gradient(machine, t, problem.table, out.coefficients.data(), cond, uncond);
    return out;
  }
  // As if every transition were finite; a row whose coefficients turn out otherwise is done again.
  std::vector<Coefficients> assumed(rows);
  const int64_t grain = std::max<int64_t>(1, grain_elements / t.numel);
  const auto write = [&](int64_t row, const Coefficients& c) {
    const int64_t k = row / t.batch, i = row % t.batch;
    for (int64_t end = t.numel; end > 0;) {  // backwards: the row's tail is the warmest
      const int64_t begin = (end - 1) / chunk * chunk;
      machine.kernels.gradient(t, step_at(problem.table, k, i), c, {k, i, begin, end}, cond,
                               uncond);
      end = begin;
    }
  };
  machine.parallel(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t k = row / t.batch, i = row % t.batch;
      Sums total{0, 0, 0};
      for (int64_t begin = 0; begin < t.numel; begin += chunk) {
        const Span at{k, i, begin, std::min(begin + chunk, t.numel)};
        const Sums part = machine.kernels.sums(t, step_at(problem.table, k, i), at);
        if (begin == 0) {
          total = part;
        } else {
          add(total, part);
        }
      }
      row_sums[row] = total;
      const double advantage = *problem.advantages.at(k, i);
      const Ratio r = ratio_of(problem.config, problem.scalars(k, i), total, advantage,
                               problem.old_log_prob.at(k, i));
      assumed[row] = r.finite ? own_coefficients(problem.config, problem.scalars(k, i), r,
                                                 problem.statistics(k), advantage,
                                                 problem.step_weights.at(k, i), double(t.steps),
                                                 double(t.batch))
                              : nonfinite_coefficients(problem.config);
      write(row, assumed[row]);
    }
  });
  Evaluation out = evaluate(problem, row_sums.data());
  machine.parallel(rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const bool same = assumed[row] == out.coefficients[row];
      if (!same && !std::isnan(out.coefficients[row].c1)) write(row, out.coefficients[row]);
    }
  });
  return out;
}

void sde_step(const Machine& machine, const Batch& t, const Rows table[5],
              const Operand& prev_sample, const Operand& mean, double* square) {
  const int64_t chunks = chunks_of(t);
  std::vector<double> partial(t.steps * t.batch * chunks);
  for_each_chunk(machine, t, false, [&](int64_t unit, const Span& at) {
    partial[unit] = machine.kernels.sde_step(t, step_at(table, at.k, at.i), at, prev_sample, mean);
  });
  for (int64_t row = 0; row < t.steps * t.batch; ++row) {
    square[row] = 0;
    for (int64_t n = 0; n < chunks; ++n) square[row] += partial[row * chunks + n];
  }
}

}  // namespace guard_ops::cpu
