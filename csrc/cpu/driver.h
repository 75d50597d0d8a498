// Whole batches on the CPU: which instruction set runs, what is parallel, in which order sums
// combine, what is read how often, and the objective on [K, B].
#pragma once

#include <functional>
#include <vector>

#include "../objective.h"
#include "kernels.h"

namespace guard_ops::cpu {

using guard_ops::Doubles;
using guard_ops::metric_count;
using guard_ops::Problem;

// The instruction sets that this build has kernels for. Every processor that it is for has the
// first; the last that this one has is the best.
#if defined(__x86_64__)
inline constexpr const char* isa_names[] = {"baseline", "avx2", "avx512"};
#else
inline constexpr const char* isa_names[] = {"neon"};
#endif

// The kernels of the best instruction set that this processor has, or of the one that the
// environment asks for by its name: GUARD_OPS_CPU_ISA=baseline.
const Kernels& kernels();
// Those of a named instruction set, or null when this processor lacks it.
const Kernels* kernels(const char* name);

// parallel(n, grain, body) runs body(first, last) over all of [0, n) on some number of threads;
// less than `grain` of it is not worth a thread.
using Parallel = std::function<void(int64_t n, int64_t grain,
                                    const std::function<void(int64_t, int64_t)>& body)>;

struct Machine {
  const Kernels& kernels;
  Parallel parallel;
  int threads;
  int64_t cache_bytes;  // the largest row that stays cached for the thread that works on it
};

// Bytes of cache that one of `threads` threads may count on.
int64_t cache_share(int threads);

struct Evaluation {
  double loss;
  std::vector<double> log_ratio, excess, weights, kl;  // [K, B]
  std::vector<double> metrics;                         // [metric_count, K]
  std::vector<Coefficients> coefficients;              // [K, B]
};

Evaluation evaluate(const Problem& problem, const Sums* sums);  // sums: [K, B]

// Writes what guard_ops::ratio_statistics does, [statistic_count, K].
void ratio_statistics(const Problem& problem, const Sums* sums, double* out);

// Each row's sums [K, B] and, where `early` says so, its gradient up to a factor. The number of
// threads does not change a bit.
void sums(const Machine&, const Batch&, const Doubles table[5], Sums* out,
          const EarlyGradient& early = {});

// The gradient of every row, whose coefficients are [K, B], into `cond` and `uncond`; either may be
// absent.
void gradient(const Machine&, const Batch&, const Doubles table[5],
              const Coefficients* coefficients, const Operand& cond, const Operand& uncond);

// Loss and gradient. Where the gradient is known up to a factor before the sums are
// (EarlyGradient), the pass that forms the sums writes it, and it only remains to scale it: while
// the row is still cached, if the factor needs no other row's sums, else after the whole batch is
// read. A gradient of 16 bits cannot hold it unrounded; the seeded form, which would make the noise
// twice, then keeps it in float32 where that fits into the cache. Otherwise the operands are read
// twice, the second time backwards, so that what the first left cached is used.
Evaluation guard_loss(const Machine&, const Batch&, const Problem&, const Operand& cond,
                      const Operand& uncond);

// Writes prev_sample, mean and square [K, B] = sum((prev_sample - mean)^2).
void sde_step(const Machine&, const Batch&, const Doubles table[5], const Operand& prev_sample,
              const Operand& mean, double* square);

}  // namespace guard_ops::cpu
