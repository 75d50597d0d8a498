// The gradient of every transition from its coefficients. Each operand is read once, and each
// gradient written once.
#include "launch.h"
#include "walk.h"

namespace guard_ops::cuda {
namespace {

struct GradientCall {
  Plan plan;
  Doubles coefficients[3];
  Operand cond, uncond;
  Factor factor;
  bool unless_one;
  const Coefficients* assumed;  // [K, B] by which the gradient was already formed, or null
  Range chunks;
  uint32_t slots;
};

// A row's coefficients times `factor`.
__device__ __forceinline__ Coefficients coefficients_of(const GradientCall& call, int64_t k,
                                                        int64_t i, double factor) {
  return {factor * load_fresh(call.coefficients[0].at(k, i)),
          factor * load_fresh(call.coefficients[1].at(k, i)),
          factor * load_fresh(call.coefficients[2].at(k, i))};
}

// Whether any row's coefficients differ from those by which its gradient was formed. NaN ones do
// not, as they were NaN then. Every block looks at all rows.
__device__ __forceinline__ bool changed(const GradientCall& call) {
  bool differs = false;
#pragma unroll 1
  for (uint32_t row = thread(); row < call.plan.rows; row += threads()) {
    const uint32_t k = call.plan.by_batch.divide(row), i = row - k * call.plan.batch;
    const Coefficients now = coefficients_of(call, k, i, 1);
    differs = differs || (!(call.assumed[row] == now) && now.c1 == now.c1);
  }
  return any_of_block(differs);
}

__global__ void __launch_bounds__(stream_threads, gradient_blocks)
    gradient_of_chunks(const __grid_constant__ GradientCall call) {
  let_next_start();
  await_previous();
  double factor = 1;
  if (call.factor.data != nullptr) {
    factor = call.factor.wide ? *static_cast<const double*>(call.factor.data)
                              : double(*static_cast<const float*>(call.factor.data));
  }
  if (call.unless_one && factor == 1) return;
  if (call.assumed != nullptr && !changed(call)) return;
  const Walk walk(call.plan, shared_memory() + block_header, call.slots, call.chunks.begin(block()),
                  call.chunks.begin(block() + 1), false);
  walk.gradient(call.cond, call.uncond,
                [&](const TileAt& at) { return coefficients_of(call, at.k, at.i, factor); });
}

}  // namespace

void gradient(const Batch& t, const Doubles table[5], const Doubles coefficients[3],
              const Operand& cond, const Operand& uncond, const Factor& factor, bool unless_one,
              Stream stream, GradientKind kind) {
  GradientCall call{plan_of(t, table),
                    {coefficients[0], coefficients[1], coefficients[2]},
                    cond,
                    uncond,
                    factor,
                    unless_one,
                    nullptr,
                    {0, 0},
                    0};
  call.chunks.count = call.plan.chunks;
  expect(call.plan, kind, cond);
  const Launch launch = streaming(call.plan, gradient_of_chunks, call.plan.chunks, &call.slots);
  start(gradient_of_chunks, launch, stream, call);
}

const void* gradient_kernel() { return address(gradient_of_chunks); }

void gradient_after(const Plan& p, const Doubles coefficients[3], const Operand& cond,
                    const Operand& uncond, Range chunks, bool alone, const Coefficients* assumed,
                    Stream stream) {
  GradientCall call{p,       {coefficients[0], coefficients[1], coefficients[2]},
                    cond,    uncond,
                    {},      false,
                    assumed, chunks,
                    0};
  Launch launch = alone ? streaming(p, gradient_of_chunks, chunks.count, &call.slots)
                        : beside_another(p, gradient_of_chunks, chunks.count, 1,
                                         device().shared_bytes / 4, &call.slots);
  launch.chained = true;
  start(gradient_of_chunks, launch, stream, call);
}

}  // namespace guard_ops::cuda
