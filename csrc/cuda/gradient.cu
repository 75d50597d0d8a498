// The gradient of every transition from its coefficients: each operand is read once, each gradient
// written once.
#include "launch.h"
#include "walk.h"

namespace guard_ops::cuda {
namespace {

struct GradientCall {
  Plan plan;
  Rows coefficients[3];
  Operand cond, uncond;
  Factor factor;
  bool unless_one;
  uint32_t slots;
};

__global__ void __launch_bounds__(stream_threads, 2)
    gradient_of_chunks(const __grid_constant__ GradientCall call) {
  double factor = 1;
  if (call.factor.data != nullptr) {
    factor = call.factor.wide ? *static_cast<const double*>(call.factor.data)
                              : double(*static_cast<const float*>(call.factor.data));
  }
  if (call.unless_one && factor == 1) return;
  const Walk walk(call.plan, shared_memory() + block_header, call.slots,
                  share(call.plan.chunks, block()), share(call.plan.chunks, block() + 1), false);
  walk.gradient(call.cond, call.uncond, [&](const At& at) {
    return Coefficients{factor * *call.coefficients[0].at(at.k, at.i),
                        factor * *call.coefficients[1].at(at.k, at.i),
                        factor * *call.coefficients[2].at(at.k, at.i)};
  });
}

}  // namespace

void gradient(const Batch& t, const Rows table[5], const Rows coefficients[3], const Operand& cond,
              const Operand& uncond, const Factor& factor, bool unless_one, Stream stream,
              Shape shape) {
  GradientCall call{plan_of(t, table),
                    {coefficients[0], coefficients[1], coefficients[2]},
                    cond,
                    uncond,
                    factor,
                    unless_one,
                    0};
  expect(call.plan, shape);
  const Launch launch = streaming(call.plan, gradient_of_chunks, &call.slots);
  start(gradient_of_chunks, launch, stream, call);
}

}  // namespace guard_ops::cuda
