// Loss and gradient: a kernel for each way of reading the batch. All kernels form the same sums of
// the same chunks and add them in the same order, so they give the same bits.
#include "launch.h"
#include "walk.h"

namespace guard_ops::cuda {
namespace {

// Integers that are 0 before and after every launch, except `evaluated`, which a launch changes.
// They lie in different cache lines, so that polling one does not slow down counting in another.
struct Counters {
  uint32_t *arrived, *evaluated;
  uint32_t* of_rows;  // [K, B]
};
inline Counters counters_at(uint32_t* base) {
  return {base, base + counter_line, base + 2 * counter_line};
}

struct LossCall {
  Plan plan;
  Problem problem;
  LossOut out;
  Operand cond, uncond;
  Workspace workspace;
  Partials partials;
  Counters counters;
  bool by_row;  // whether each row is added up by the block that completes it
  Room room;    // this and the next: see Choice
  uint32_t scratch_offset;
  bool sums_in_shared;
};

struct ClusterCall : LossCall {
  uint32_t block_chunks;  // chunks of a block
};

struct Header {  // at the beginning of a block's shared memory
  uint32_t arrival;
  Coefficients coefficients;  // of the cluster's row
  Sums parts[most_parts];
};
static_assert(sizeof(Header) <= block_header);

__device__ __forceinline__ Header& header() { return *reinterpret_cast<Header*>(shared_memory()); }

__device__ __forceinline__ char* slot_memory() { return shared_memory() + block_header; }

// Where evaluate() keeps its numbers between its steps: in shared memory, if that has room. The one
// block that evaluates would otherwise wait for the second-level cache after each of half a dozen
// barriers.
__device__ __forceinline__ EvaluationScratch scratch_of(const LossCall& call) {
  if (call.scratch_offset == 0) return call.workspace.scratch;
  return scratch_at(shared_memory() + call.scratch_offset, call.plan.rows);
}

// Where the rows' sums are: in shared memory behind evaluate()'s numbers, if one block forms them
// all.
__device__ __forceinline__ Sums* sums_of(const LossCall& call) {
  if (!call.sums_in_shared) return call.workspace.sums;
  return reinterpret_cast<Sums*>(scratch_of(call).finite + call.plan.batch);
}

// Adds up the rows' sums once the blocks have written those of their chunks. Returns true in one
// block, which sees all of them.
__device__ __forceinline__ bool summed_by_last(const LossCall& call) {
  const Plan& p = call.plan;
  Sums* const into = sums_of(call);
  const auto sum_rows = [&](uint32_t begin, uint32_t end) {
    row_sums(p, call.partials, call.workspace.parts, begin, end,
             [&](uint32_t row, const Sums& sums) { into[row] = sums; });
  };
  if (!call.by_row) {
    if (!completes(call.counters.arrived, 1, blocks(), &header().arrival)) return false;
    sum_rows(0, p.rows);
    return true;
  }
  const uint32_t end = share(p.chunks, block() + 1);
  uint32_t rows = 0;
#pragma unroll 1
  for (uint32_t chunk = share(p.chunks, block()), next; chunk < end; chunk = next) {
    const uint32_t row = p.by_row_chunks.divide(chunk), row_end = (row + 1) * p.row_chunks;
    next = row_end < end ? row_end : end;
    if (!completes(call.counters.of_rows + row, next - chunk, p.row_chunks, &header().arrival))
      continue;
    sum_rows(row, row + 1);
    ++rows;
  }
  return rows != 0 && completes(call.counters.arrived, rows, p.rows, &header().arrival);
}

__device__ __forceinline__ void evaluate_all(const LossCall& call) {
  evaluate_by_block(call.problem, sums_of(call), scratch_of(call), call.out);
}

// A row's coefficients from its sums alone. They change if another row, on which they depend, turns
// out not to be finite, so the caller remembers them.
__device__ __forceinline__ Coefficients assume(const LossCall& call, uint32_t row,
                                               const Sums& sums) {
  const uint32_t k = call.plan.by_batch.divide(row);
  return call.problem.assume(k, row - k * call.plan.batch, sums);
}

// The way through a block's share of all chunks.
template <bool keeps>
__device__ __forceinline__ Walk<keeps> walk_of(const Plan& p, const Room& room) {
  return Walk<keeps>(p, slot_memory(), room, share(p.chunks, block()),
                     share(p.chunks, block() + 1));
}

// The first of two launches: it forms all sums, and its last block computes what follows from them.
__global__ void __launch_bounds__(stream_threads, sums_blocks)
    loss_of_chunks(const __grid_constant__ LossCall call) {
  let_next_start();
  walk_of<false>(call.plan, call.room).sums([&](uint32_t chunk, uint32_t n, double sum) {
    call.partials.put(chunk, n, sum);
  });
  if (summed_by_last(call)) evaluate_all(call);
}

// One cooperative launch: all blocks run at once, each with its part of the batch in shared memory,
// and wait until the last one has evaluated. Tiles that fit into shared memory are read once.
__global__ void __launch_bounds__(cooperative_threads, 1)
    loss_cooperatively(const __grid_constant__ LossCall call) {
  const uint32_t before = thread() == 0 ? flag_now(call.counters.evaluated) : 0;
  const auto walk = walk_of<true>(call.plan, call.room);
  walk.sums([&](uint32_t chunk, uint32_t n, double sum) { call.partials.put(chunk, n, sum); });
  if (summed_by_last(call)) {
    evaluate_all(call);  // ends with a barrier, so what all threads wrote is released by the flag
    if (thread() == 0) set_flag(call.counters.evaluated, before + 1);
  } else if (call.cond || call.uncond) {
    if (thread() == 0) await_change(call.counters.evaluated, before);
    sync_block();
  }
  if (!call.cond && !call.uncond) return;
  walk.gradient(call.cond, call.uncond, [&](const TileAt& at) {
    return coefficients_at(call.out.sum_grads, call.plan.rows, at.row);
  });
}

// One cluster a row, for losses whose rows are independent: the row and its chunks' sums stay in
// the cluster's shared memory, and no block waits for another row. The last block of all computes
// what needs every row.
__global__ void __launch_bounds__(cluster_threads, 1)
    loss_by_clusters(const __grid_constant__ ClusterCall call) {
  let_next_start();
  const Plan& p = call.plan;
  const uint32_t size = cluster_size(), rank = cluster_rank(), row = block() / size;
  const uint32_t begin = rank * call.block_chunks;
  const uint32_t end =
      begin + call.block_chunks < p.row_chunks ? begin + call.block_chunks : p.row_chunks;
  // the sums of this block's chunks lie behind the header
  Sums* const partials = reinterpret_cast<Sums*>(slot_memory());
  const uint32_t base = row * p.row_chunks;
  const Walk<true> walk(p, slot_memory() + partial_bytes(call.block_chunks), call.room,
                        base + (begin < end ? begin : end), base + end);
  walk.sums([&](uint32_t chunk, uint32_t n, double sum) {
    (&partials[chunk - base - begin].s1)[n] = sum;
  });
  sync_cluster();
  for (uint32_t part = warp(); part < p.row_parts; part += warps()) {
    const Sums sums = part_sums(p, part, [&](uint32_t chunk) {
      const uint32_t owner = chunk / call.block_chunks;
      Sums sums = of_cluster(partials, owner)[chunk - owner * call.block_chunks];
      if (!call.partials.with_ref) sums.ref = 0;  // nobody has written it
      return sums;
    });
    if (lane() == 0) header().parts[part] = sums;
  }
  sync_block();
  if (thread() == 0) {
    const Sums sums = sum_of_parts(p, header().parts);
    header().coefficients = assume(call, row, sums);
    if (rank == 0) {
      call.workspace.sums[row] = sums;
      call.workspace.assumed[row] = header().coefficients;
    }
  }
  sync_cluster();  // no block ends, or overwrites its sums, while another reads them
  if (call.cond || call.uncond) {
    const Coefficients coefficients = header().coefficients;
    walk.gradient(call.cond, call.uncond, [&](const TileAt&) { return coefficients; });
  }
  if (completes(call.counters.arrived, 1, blocks(), &header().arrival)) evaluate_all(call);
}

// ---- the gradient alone -------------------------------------------------------------------------

struct GradientCall {
  Plan plan;
  Doubles coefficients[3];
  Operand cond, uncond;
  Factor factor;
  bool unless_one;
  const Coefficients* assumed;  // [K, B] by which the gradient was already formed, or null
  Room room;
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

// The gradient of every transition from its coefficients. Each operand is read once, and each
// gradient written once.
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
  const auto walk = walk_of<false>(call.plan, call.room);
  walk.gradient(call.cond, call.uncond,
                [&](const TileAt& at) { return coefficients_of(call, at.k, at.i, factor); });
}

// `chained`: the launch may begin while the one before it in the stream, which forms the
// coefficients, still runs.
void launch_gradient(GradientCall call, bool chained, Stream stream) {
  Launch launch = streaming(call.plan, gradient_of_chunks, &call.room);
  launch.chained = chained;
  start(gradient_of_chunks, launch, stream, call);
}

// Whether a transition that is not finite changes other rows' coefficients although rows are
// independent: it changes over how many samples, or steps of a sample, a mean is taken.
bool rows_may_change(const Problem& problem) {
  return problem.config.drop() || (problem.steps > 1 && problem.step_weights.data == nullptr);
}

}  // namespace

const void* kernel_of(Path path) {
  if (path == Path::cluster) return address(loss_by_clusters);
  return path == Path::cooperative ? address(loss_cooperatively) : address(loss_of_chunks);
}

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
                    {}};
  expect(call.plan, kind, cond);
  launch_gradient(call, false, stream);
}

int64_t counters_needed(const Batch& t) {
  return 2 * counter_line + std::min<int64_t>(t.steps * t.batch, most_counted_rows);
}

Path guard_loss(const Batch& t, const Problem& problem, const LossResult& result, void* workspace,
                uint32_t* counters, Path wanted, Stream stream) {
  ClusterCall call{};
  call.plan = plan_of(t, problem.table);
  expect(call.plan, problem.config.gradient_kind(), result.cond);
  const Plan& p = call.plan;
  call.problem = problem;
  call.out = {result.loss, result.per_row, result.metrics, result.sum_grads};
  call.cond = result.cond;
  call.uncond = result.uncond;
  workspace_layout(p, static_cast<char*>(workspace), &call.workspace);
  call.partials = {call.workspace.partials, p.chunks, bool(t.ref)};
  call.counters = counters_at(counters);
  // The launch that forms the gradient of what another has evaluated. `assumed`: only if that
  // changed the coefficients by which the gradient is there already.
  const bool any = result.cond || result.uncond;
  const auto gradient_after = [&](const Coefficients* assumed) {
    Doubles c[3];
    for (int n = 0; n < 3; ++n) c[n] = {result.sum_grads + n * p.rows, t.batch, 1};
    if (any) {
      launch_gradient({p, {c[0], c[1], c[2]}, call.cond, call.uncond, {}, false, assumed, {}}, true,
                      stream);
    }
  };
  for (;;) {
    const Choice c = choose(machine(), p, {wanted, any, problem.rows_are_independent()});
    call.room = c.room;
    call.scratch_offset = c.scratch_offset;
    call.sums_in_shared = c.sums_in_shared;
    call.block_chunks = c.block_chunks;
    call.by_row =
        adds_up_by_row(p, c.path == Path::cooperative ? cooperative_threads : stream_threads);
    const LossCall& loss = call;
    if (c.path == Path::cluster) {
      if (starts(loss_by_clusters, c.launch, stream, call)) {
        // That is rare, and the launch returns at once otherwise.
        if (rows_may_change(problem)) gradient_after(call.workspace.assumed);
        return c.path;
      }
    } else if (c.path == Path::cooperative) {
      if (starts(loss_cooperatively, c.launch, stream, loss)) return c.path;
    } else {
      const Launch launch = streaming(p, loss_of_chunks, &call.room);
      start(loss_of_chunks, launch, stream, loss);
      gradient_after(nullptr);
      return c.path;
    }
    refused_launch(c.path);
  }
}

}  // namespace guard_ops::cuda
