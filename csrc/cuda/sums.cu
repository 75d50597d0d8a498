// The sums of every transition. Each operand is read once, and 24 bytes a chunk are written.
#include "launch.h"
#include "walk.h"

namespace guard_ops::cuda {
namespace {

struct SumsCall {
  Plan plan;
  Partials partials;
  Sums* parts;
  Room room;
  double* out;  // [3, K, B]
};

__global__ void __launch_bounds__(stream_threads, sums_blocks)
    sums_of_chunks(const __grid_constant__ SumsCall call) {
  let_next_start();
  const Walk<false> walk(call.plan, shared_memory() + block_header, call.room,
                         share(call.plan.chunks, block()), share(call.plan.chunks, block() + 1));
  walk.sums([&](uint32_t chunk, uint32_t n, double sum) { call.partials.put(chunk, n, sum); });
}

__global__ void __launch_bounds__(stream_threads)
    sums_of_rows(const __grid_constant__ SumsCall call) {
  await_previous();
  const uint32_t rows = call.plan.rows;
  row_sums(call.plan, call.partials, call.parts, share(rows, block()), share(rows, block() + 1),
           [&](uint32_t row, const Sums& sums) {
             call.out[row] = sums.s1;
             call.out[rows + row] = sums.s2;
             call.out[2 * rows + row] = sums.ref;
           });
}

}  // namespace

void sums(const Batch& t, const Doubles table[5], double* out, void* workspace, Stream stream) {
  SumsCall call{plan_of(t, table), {}, {}, {}, out};
  Workspace w{};
  workspace_layout(call.plan, static_cast<char*>(workspace), &w);
  call.partials = {w.partials, call.plan.chunks, bool(t.ref)};
  call.parts = w.parts;
  const Launch launch = streaming(call.plan, sums_of_chunks, &call.room);
  start(sums_of_chunks, launch, stream, call);
  start(sums_of_rows, after_chunks(call.plan, sums_of_rows), stream, call);
}

}  // namespace guard_ops::cuda
