// Whole batches on the CPU: what is parallel, in which order sums combine, what is read how often.
#pragma once

#include <functional>
#include <vector>

#include "../evaluate.h"
#include "kernels.h"

namespace guard_ops::cpu {

using guard_ops::metric_count;
using guard_ops::Problem;
using guard_ops::Rows;

// The best instruction set of this processor; GUARD_OPS_CPU_ISA=baseline|avx2|avx512 overrides.
const Kernels& kernels();
// One by name, or null when this processor lacks it.
const Kernels* kernels(const char* name);

// parallel(n, grain, body) runs body(first, last) over [0, n) on some number of threads.
using Parallel = std::function<void(int64_t n, int64_t grain,
                                    const std::function<void(int64_t, int64_t)>& body)>;

struct Machine {
  const Kernels& kernels;
  Parallel parallel;
  int threads;
  int64_t cache_bytes;  // of a row, per thread, up to which a row is worked on while it is cached
};

// Bytes of cache that one of `threads` threads may count on.
int64_t cache_share(int threads);

struct Evaluation {
  double loss;
  std::vector<double> log_ratio, excess, weights, kl;  // [K, B]
  std::vector<double> metrics;                         // [metric_count, K]
  std::vector<Coefficients> coefficients;              // [K, B]
};

Evaluation evaluate(const Problem& problem, const Sums* sums);  // sums [K, B]

// Each row's sums [K, B], and on the way a direction; the same bits for any number of threads.
void sums(const Machine&, const Batch&, const Rows table[5], Sums* out,
          const Direction& direction = {});

// The gradient of every row into `cond` and `uncond` (either may be absent), given [K, B].
void gradient(const Machine&, const Batch&, const Rows table[5], const Coefficients* coefficients,
              const Operand& cond, const Operand& uncond);

// Loss and gradient. Where the gradient is a multiple of a direction known beforehand (Direction),
// the pass that forms the sums writes that, and what remains is to scale it: at once while the row
// is cached when the gradient needs only its own sums, else after the batch is read. Otherwise the
// operands are read twice, the second time backwards, so that what the first left cached is used.
Evaluation guard_loss(const Machine&, const Batch&, const Problem&, const Operand& cond,
                      const Operand& uncond);

// prev_sample and mean; square [K, B] = sum((prev_sample - mean)^2).
void sde_step(const Machine&, const Batch&, const Rows table[5], const Operand& prev_sample,
              const Operand& mean, double* square);

}  // namespace guard_ops::cpu
