// The row kernels of one instruction set, and the operands they take.
#pragma once

#include "../batch.h"

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

// Where sums may also write the gradient up to the factor c1: b times the departure, or the
// residual.
struct Direction {
  Operand to;  // of v's dtype, which has to be the compute type; or absent
  GradientKind kind = GradientKind::departure;
};

constexpr int64_t tile = 1024;        // staged in L1, summed in the compute type
constexpr int64_t chunk = 64 * tile;  // unit of parallel work; partial sums are float64

struct Kernels {
  const char* name;
  Sums (*sums)(const Batch&, const Step<double>&, const Span&, const Direction&);
  // Either may be absent; they have the dtypes of v and uncond.
  void (*gradient)(const Batch&, const Step<double>&, const Coefficients&, const Span&,
                   const Operand& cond, const Operand& uncond);
  void (*scale)(const Operand&, double factor, const Span&);  // in place; 0 gives zeros always
  // prev_sample, mean; returns sum((prev_sample - mean)^2).
  double (*sde_step)(const Batch&, const Step<double>&, const Span&, const Operand& prev_sample,
                     const Operand& mean);
};

}  // namespace guard_ops::cpu
