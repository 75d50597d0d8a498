// One rollout step: it reads v, x and the noise, or generates the noise, with guidance also the
// unconditional velocity, and writes the sample and its mean.
#include "launch.h"
#include "walk.h"

namespace guard_ops::cuda {
namespace {

struct StepCall {
  Plan plan;
  Operand prev_sample, mean;
  Partials partials;
  Sums* parts;
  Room room;
  double* square;  // [K, B]
};

template <bool seeded>
__device__ __forceinline__ float step_in_place(const Plan& p, const RowNumbers& row,
                                               const TileAt& at, char* slot) {
  const DType stored = p.operand[role_x].dtype;
  float v[lane_elements], x[lane_elements], noise[lane_elements], sampled[lane_elements];
  read_velocity(p, slot, v);
  read(slot + p.offset[role_x], stored, x);
  if constexpr (seeded) {
    normals<float>(row, in_whole_latent(p, at), noise);
  } else {
    read(slot + p.offset[role_noise], p.operand[role_noise].dtype, noise);
  }
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    v[e] = mean(row.step, x[e], v[e]);
    sampled[e] = fma(row.step.s, noise[e], v[e]);
  }
  write(slot + p.mean_offset, DType::f32, v);
  write(slot + p.offset[role_x], stored, sampled);
  read(slot + p.offset[role_x], stored, sampled);  // log_prob is that of the sample as it is stored
  const uint32_t counted = mask_bits(p, at);
  float square = 0;
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    if (!(counted >> e & 1)) continue;
    const float d = sampled[e] - v[e];
    if (!seeded || place_of(e) < at.count)
      square = fma(d, d, square);  // noise that is read is 0 there
  }
  return square;
}

template <bool seeded>
__global__ void __launch_bounds__(stream_threads, 2)
    step_chunks(const __grid_constant__ StepCall call) {
  let_next_start();
  const Walk<false> walk(call.plan, shared_memory() + block_header, call.room,
                         share(call.plan.chunks, block()), share(call.plan.chunks, block() + 1));
  double total = 0;
  const Plan& p = call.plan;
  walk.each(call.prev_sample, call.mean,
            [&](const RowNumbers& row, const Cursor& here, char* slot, uint32_t t) {
              const uint32_t count = here.at.count;
              if (count != 0) {
                total += double(step_in_place<seeded>(p, row, here.at, slot));
                sync_warp();
                store_tile(broadcast(here.lane_address, 0), p.wide >> role_x & 1,
                           slot + p.offset[role_x], count);
                store_tile(broadcast(here.lane_address, 1), true, slot + p.mean_offset, count);
              }
              if (!walk.ends_chunk(t)) return;
              total = warp_total(total);
              if (lane() == 0) call.partials.put(here.at.chunk, {total, 0, 0});
              total = 0;
            });
}

__global__ void __launch_bounds__(stream_threads)
    squares_of_rows(const __grid_constant__ StepCall call) {
  await_previous();
  const uint32_t rows = call.plan.rows;
  row_sums(call.plan, call.partials, call.parts, share(rows, block()), share(rows, block() + 1),
           [&](uint32_t row, const Sums& sums) { call.square[row] = sums.s1; });
}

}  // namespace

void sde_step(const Batch& t, const Doubles table[5], const Operand& prev_sample,
              const Operand& mean, double* square, void* workspace, Stream stream) {
  StepCall call{plan_of(t, table, true), prev_sample, mean, {}, {}, {}, square};
  Workspace w{};
  workspace_layout(call.plan, static_cast<char*>(workspace), &w);
  call.partials = {w.partials, call.plan.chunks, false};
  call.parts = w.parts;
  const auto kernel = t.seeds.data != nullptr ? step_chunks<true> : step_chunks<false>;
  const Launch launch = streaming(call.plan, kernel, &call.room);
  start(kernel, launch, stream, call);
  start(squares_of_rows, after_chunks(call.plan, squares_of_rows), stream, call);
}

}  // namespace guard_ops::cuda
