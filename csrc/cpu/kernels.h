// The row kernels of one instruction set, and what they take besides a Batch.
#pragma once

#include "../transition.h"

namespace guard_ops::cpu {

using guard_ops::Batch;
using guard_ops::DType;
using guard_ops::Operand;
using guard_ops::Seeds;
using guard_ops::size_of;

// Elements [begin, end) of row (k, i); begin is a multiple of `tile`.
struct Span {
  int64_t k, i, begin, end;
};

// Where sums may already write the gradient up to the factor c1, which is known only when all sums
// are: b times the departure, or b times the residual. Where a mask is given, sums write none.
struct EarlyGradient {
  Operand to;  // of the compute type; or absent
  GradientKind kind = GradientKind::departure;
};

constexpr int64_t tile = 1024;        // staged in L1, summed in the compute type
constexpr int64_t chunk = 64 * tile;  // the unit of parallel work; its sums are float64

struct Kernels {
  const char* name;
  Sums (*sums)(const Batch&, const Step<double>&, const Span&, const EarlyGradient&);
  // Writes the gradients; either may be absent, and they have the dtypes of v and uncond.
  void (*gradient)(const Batch&, const Step<double>&, const Coefficients&, const Span&,
                   const Operand& cond, const Operand& uncond);
  // Writes `factor` times `from`, which has a compute type, into `to`, which may be the same. A
  // factor of 0 gives zeros, also where `from` is not finite.
  void (*scale)(const Operand& from, const Operand& to, double factor, const Span&);
  // Writes prev_sample and mean, and returns sum((prev_sample - mean)^2).
  double (*sde_step)(const Batch&, const Step<double>&, const Span&, const Operand& prev_sample,
                     const Operand& mean);
};

}  // namespace guard_ops::cpu
