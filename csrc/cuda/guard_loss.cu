// Loss and gradient, one way of reading the batch a kernel. All of them form the same partial sums
// of the same chunks and add them in the same order: the same bits.
#include "launch.h"
#include "walk.h"

namespace guard_ops::cuda {
namespace {

struct LossCall {
  Plan plan;
  Problem problem;
  LossOut out;
  Operand cond, uncond;
  Workspace workspace;
  Partials partials;
  uint32_t slots;
  uint32_t block_chunks;  // of a cluster's block
};

struct Header {  // at the beginning of a block's shared memory
  uint32_t arrival;
  Coefficients row;
};
static_assert(sizeof(Header) <= block_header);

__device__ __forceinline__ Header& header() { return *reinterpret_cast<Header*>(shared_memory()); }

__device__ __forceinline__ char* slot_memory() { return shared_memory() + block_header; }

// The last block to have written its partial sums forms the rows' and evaluates the objective.
__device__ __forceinline__ bool evaluated_by_last(const LossCall& call) {
  if (!arrives_last(call.workspace.arrived, &header().arrival)) return false;
  row_sums(call.plan, call.partials, 0, threads() / row_lanes,
           [&](uint32_t row, const Sums& sums) { call.workspace.sums[row] = sums; });
  sync_block();
  evaluate_by_block(call.problem, call.workspace, call.out);
  return true;
}

__device__ __forceinline__ void write_gradient(const LossCall& call, const Walk& walk) {
  walk.gradient(call.cond, call.uncond, [&](const At& at) {
    return coefficients_at(call.out.sum_grads, call.plan.rows, at.row);
  });
}

// The first of two launches: the sums and, by the last block, everything [K, B]. With gradient.cu's
// kernel after it, every operand is read twice.
__global__ void __launch_bounds__(stream_threads, 2)
    loss_of_chunks(const __grid_constant__ LossCall call) {
  const Walk walk(call.plan, slot_memory(), call.slots, share(call.plan.chunks, block()),
                  share(call.plan.chunks, block() + 1), false);
  walk.sums([&](const At& at, const Sums& sums) {
    if (lane() == 0) call.partials.put(at.chunk, sums);
  });
  evaluated_by_last(call);
}

// One cooperative launch: all blocks are there at once, each with its part of the batch in shared
// memory, and wait for the last one's evaluation. What fits there is read once.
__global__ void __launch_bounds__(cooperative_threads, 1)
    loss_cooperatively(const __grid_constant__ LossCall call) {
  const Walk walk(call.plan, slot_memory(), call.slots, share(call.plan.chunks, block()),
                  share(call.plan.chunks, block() + 1), true);
  walk.sums([&](const At& at, const Sums& sums) {
    if (lane() == 0) call.partials.put(at.chunk, sums);
  });
  if (evaluated_by_last(call)) {  // it ends with a barrier, and the flag is a release
    if (thread() == 0) raise_flag(call.workspace.evaluated);
  } else if (call.cond || call.uncond) {
    if (thread() == 0) await_flag(call.workspace.evaluated);
    sync_block();
  }
  if (call.cond || call.uncond) write_gradient(call, walk);
}

// A cluster a row, for losses whose rows are independent: the row stays in the cluster's shared
// memory and so do its partial sums; no block waits for another row's. The last block of all forms
// what needs every row, and corrects the rows whose coefficients another, not finite one changes.
__global__ void __launch_bounds__(cluster_threads, 1)
    loss_by_clusters(const __grid_constant__ LossCall call) {
  const Plan& p = call.plan;
  const uint32_t size = cluster_size(), rank = cluster_rank(), row = block() / size;
  const uint32_t begin = rank * call.block_chunks;
  const uint32_t end =
      begin + call.block_chunks < p.row_chunks ? begin + call.block_chunks : p.row_chunks;
  // this block's partial sums lie behind the header
  Sums* const partials = reinterpret_cast<Sums*>(slot_memory());
  const uint32_t partial_bytes = uint32_t(call.block_chunks * sizeof(Sums) + 15) / 16 * 16;
  const uint32_t base = row * p.row_chunks;
  const Walk walk(p, slot_memory() + partial_bytes, call.slots, base + (begin < end ? begin : end),
                  base + end, true);
  walk.sums([&](const At& at, const Sums& sums) {
    if (lane() == 0) partials[at.chunk - base - begin] = sums;
  });
  sync_cluster();
  if (warp() == 0) {
    Sums total{0, 0, 0};
    if (lane() < row_lanes) {
      for (uint32_t n = lane(); n < p.row_chunks; n += row_lanes) {
        const uint32_t owner = n / call.block_chunks;
        const Sums& part = of_cluster(partials, owner)[n - owner * call.block_chunks];
        total.s1 += part.s1;
        total.s2 += part.s2;
        total.ref += part.ref;
      }
    }
    total = row_total(total);
    if (lane() == 0) {
      const uint32_t k = p.by_batch.divide(row);
      header().row = call.problem.assume(k, row - k * p.batch, total);
      if (rank == 0) {
        call.workspace.sums[row] = total;
        call.workspace.assumed[row] = header().row;
      }
    }
  }
  sync_cluster();  // no block leaves, or writes over, what another reads
  if (call.cond || call.uncond) {
    const Coefficients own = header().row;
    walk.gradient(call.cond, call.uncond, [&](const At&) { return own; });
  }
  if (!arrives_last(call.workspace.arrived, &header().arrival)) return;
  evaluate_by_block(call.problem, call.workspace, call.out);
  if (!call.cond && !call.uncond) return;
  const auto corrected = [&](uint32_t n) {
    const Coefficients c = coefficients_at(call.out.sum_grads, p.rows, n);
    const double* const was = reinterpret_cast<const double*>(call.workspace.assumed + n);
    const Coefficients assumed{load_fresh(was), load_fresh(was + 1), load_fresh(was + 2)};
    return !(assumed == c) && c.c1 == c.c1;
  };
  // All rows at once, as hardly ever one is: row after row this would be the longest part.
  if (thread() == 0) header().arrival = 0;
  sync_block();
  for (uint32_t n = thread(); n < p.rows; n += threads()) {
    if (corrected(n)) header().arrival = 1;
  }
  sync_block();
  if (header().arrival == 0) return;
  for (uint32_t n = 0; n < p.rows; ++n) {
    if (!corrected(n)) continue;
    const Coefficients c = coefficients_at(call.out.sum_grads, p.rows, n);
    const Walk again(p, slot_memory() + partial_bytes, call.slots, n * p.row_chunks,
                     (n + 1) * p.row_chunks, false);
    again.gradient(call.cond, call.uncond, [&](const At&) { return c; });
  }
}

// ---- which of them, and how large ---------------------------------------------------------------

constexpr int most_cluster = 8;  // what every device with clusters can have

uint32_t tiles_of(uint32_t chunks, int threads, const Plan& p) {  // of a block's busiest warp
  const uint32_t warps = threads / warp_size;
  return (chunks + warps - 1) / warps * p.chunk_tiles;
}

// The smallest cluster that holds a row and, with the others, gives every multiprocessor a block.
template <class Kernel>
bool plan_clusters(LossCall& call, Kernel* kernel, Launch* launch) {
  const Plan& p = call.plan;
  bool found = false;
  for (int size = 1; size <= (device().clusters ? most_cluster : 1); size *= 2) {
    if (uint32_t(size) > p.row_chunks) break;  // blocks without a chunk
    const uint32_t block_chunks = (p.row_chunks + size - 1) / size;
    const uint32_t tiles = tiles_of(block_chunks, cluster_threads, p);
    const int partial_bytes = int((block_chunks * sizeof(Sums) + 15) / 16 * 16);
    Launch candidate{int(p.rows) * size, cluster_threads,
                     shared_bytes(p, cluster_threads, tiles) + partial_bytes};
    candidate.cluster = size;
    if (int64_t(tiles) * p.slot_bytes * (cluster_threads / warp_size) > device().shared_bytes ||
        candidate.shared_bytes > device().shared_bytes ||
        at_once(address(kernel), candidate) == 0) {
      continue;
    }
    *launch = candidate;
    call.block_chunks = block_chunks;
    call.slots = tiles;
    found = true;
    if (candidate.blocks >= device().multiprocessors) break;
  }
  return found;
}

// As many blocks as run at once, with all their shared memory. Whether that is of use: how much of
// the batch it holds decides how much is not read twice.
template <class Kernel>
bool plan_cooperative(LossCall& call, Kernel* kernel, bool forced, Launch* launch) {
  const Plan& p = call.plan;
  if (!device().cooperative) return false;
  Launch candidate{device().multiprocessors, cooperative_threads, 0};
  const uint32_t block_chunks = (p.chunks + candidate.blocks - 1) / candidate.blocks;
  const uint32_t tiles = tiles_of(block_chunks, cooperative_threads, p);
  call.slots = slots_a_warp(p, cooperative_threads, tiles);
  if (call.slots == 0) return false;
  constexpr uint32_t worth = 8;  // an eighth of the batch on chip
  const uint32_t kept = tiles <= call.slots ? tiles : call.slots - ring_of(call.slots, true);
  if (!forced && tiles > worth * kept) return false;
  candidate.shared_bytes = shared_bytes(p, cooperative_threads, call.slots);
  candidate.cooperative = true;
  const int most = at_once(address(kernel), candidate);
  candidate.blocks = std::min({candidate.blocks, most, int(p.chunks)});
  *launch = candidate;
  return most > 0;
}

[[noreturn]] void refuse(Path path) {
  throw std::runtime_error(std::string("guard_ops: this device cannot run this loss by the path ") +
                           name_of(path) + "; unset it");
}

}  // namespace

Path guard_loss(const Batch& t, const Problem& problem, const LossResult& result, void* workspace,
                Path wanted, Stream stream) {
  LossCall call{plan_of(t, problem.table),
                problem,
                {result.loss, result.per_row, result.metrics, result.sum_grads},
                result.cond,
                result.uncond,
                {},
                {},
                0,
                0};
  workspace_layout(call.plan, t.steps, static_cast<char*>(workspace), &call.workspace);
  const Shape shape = problem.config.shape();
  expect(call.plan, shape);
  call.partials = {call.workspace.partials, call.plan.chunks, bool(t.ref)};
  const bool any = result.cond || result.uncond, automatic = wanted == Path::automatic;
  zero(workspace, 256, stream);
  Launch launch;
  if ((wanted == Path::cluster || (automatic && any)) && problem.rows_are_independent() &&
      plan_clusters(call, loss_by_clusters, &launch) &&
      starts(loss_by_clusters, launch, stream, call)) {
    return Path::cluster;
  }
  if (wanted == Path::cluster) refuse(wanted);
  if ((wanted == Path::cooperative || (automatic && any)) &&
      plan_cooperative(call, loss_cooperatively, !automatic, &launch) &&
      starts(loss_cooperatively, launch, stream, call)) {
    return Path::cooperative;
  }
  if (wanted == Path::cooperative) refuse(wanted);
  launch = streaming(call.plan, loss_of_chunks, &call.slots);
  start(loss_of_chunks, launch, stream, call);
  if (!any) return Path::two_launches;
  Rows coefficients[3];
  for (int n = 0; n < 3; ++n) {
    coefficients[n] = {result.sum_grads + n * t.steps * t.batch, t.batch, 1};
  }
  gradient(t, problem.table, coefficients, result.cond, result.uncond, {}, false, stream, shape);
  return Path::two_launches;
}

}  // namespace guard_ops::cuda
