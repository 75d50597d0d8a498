// Loss and gradient: a kernel for each way of reading the batch, and the choice of one. All kernels
// form the same sums of the same chunks and add them in the same order, so they give the same bits.
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
  Range chunks, rows;  // what this launch reads
  bool all;            // whether all rows of the batch have their sums after this launch
  bool by_row;         // whether each row is added up by the block that completes it
  uint32_t slots;
  uint32_t scratch_offset;  // where shared memory has room for evaluate()'s numbers; else 0
  bool sums_in_shared;      // whether the rows' sums are there too
  uint32_t block_chunks;    // chunks of a block, in a cluster
};

struct Header {  // at the beginning of a block's shared memory
  uint32_t arrival;
  Coefficients coefficients;  // of the cluster's row
  Sums parts[most_parts];
};
static_assert(sizeof(Header) <= block_header);

__device__ __forceinline__ Header& header() { return *reinterpret_cast<Header*>(shared_memory()); }

__device__ __forceinline__ char* slot_memory() { return shared_memory() + block_header; }

// How many bytes the sums of a block's chunks take, in a cluster.
GUARD_OPS_HD uint32_t partial_bytes(uint32_t chunks) {
  return uint32_t(chunks * sizeof(Sums) + 15) / 16 * 16;
}

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
    sum_rows(call.rows.first, call.rows.first + call.rows.count);
    return true;
  }
  const uint32_t end = call.chunks.begin(block() + 1);
  uint32_t rows = 0;
#pragma unroll 1
  for (uint32_t chunk = call.chunks.begin(block()), next; chunk < end; chunk = next) {
    const uint32_t row = p.by_row_chunks.divide(chunk), row_end = (row + 1) * p.row_chunks;
    next = row_end < end ? row_end : end;
    uint32_t* const counter = call.counters.of_rows + (row - call.rows.first);
    if (!completes(counter, next - chunk, p.row_chunks, &header().arrival)) continue;
    sum_rows(row, row + 1);
    ++rows;
  }
  return rows != 0 && completes(call.counters.arrived, rows, call.rows.count, &header().arrival);
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

// The first of two launches: it forms the sums of some rows or all, and its last block computes
// what follows from them. The second launch is the kernel of gradient.cu, which reads the operands
// again.
__global__ void __launch_bounds__(stream_threads, sums_blocks)
    loss_of_chunks(const __grid_constant__ LossCall call) {
  let_next_start();
  const Walk walk(call.plan, slot_memory(), call.slots, call.chunks.begin(block()),
                  call.chunks.begin(block() + 1), false);
  walk.sums([&](uint32_t chunk, uint32_t n, double sum) { call.partials.put(chunk, n, sum); });
  await_previous();
  if (!summed_by_last(call)) return;
  if (call.rows.count < call.plan.rows) {
#pragma unroll 1
    for (uint32_t n = thread(); n < call.rows.count; n += threads()) {
      const uint32_t row = call.rows.first + n;
      const Coefficients c = assume(call, row, call.workspace.sums[row]);
      call.workspace.assumed[row] = c;
      put_coefficients(call.out.sum_grads, call.plan.rows, row, c);
    }
    sync_block();
  }
  if (call.all) evaluate_all(call);
}

// One cooperative launch: all blocks run at once, each with its part of the batch in shared memory,
// and wait until the last one has evaluated. Tiles that fit into shared memory are read once.
__global__ void __launch_bounds__(cooperative_threads, 1)
    loss_cooperatively(const __grid_constant__ LossCall call) {
  const uint32_t before = thread() == 0 ? flag_now(call.counters.evaluated) : 0;
  const Walk walk(call.plan, slot_memory(), call.slots, call.chunks.begin(block()),
                  call.chunks.begin(block() + 1), true);
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
    loss_by_clusters(const __grid_constant__ LossCall call) {
  let_next_start();
  const Plan& p = call.plan;
  const uint32_t size = cluster_size(), rank = cluster_rank(), row = block() / size;
  const uint32_t begin = rank * call.block_chunks;
  const uint32_t end =
      begin + call.block_chunks < p.row_chunks ? begin + call.block_chunks : p.row_chunks;
  // the sums of this block's chunks lie behind the header
  Sums* const partials = reinterpret_cast<Sums*>(slot_memory());
  const uint32_t base = row * p.row_chunks;
  const Walk walk(p, slot_memory() + partial_bytes(call.block_chunks), call.slots,
                  base + (begin < end ? begin : end), base + end, true);
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

// ---- which kernel, and how large a launch
// --------------------------------------------------------

constexpr int most_cluster = 16;  // blocks; every device with clusters runs 8, and some 16

// How many tiles the busiest warp of a block has.
uint32_t tiles_of(uint32_t chunks, int threads, const Plan& p) {
  const uint32_t warps = threads / warp_size;
  return (chunks + warps - 1) / warps * p.chunk_tiles;
}

// Makes room in a launch's shared memory, behind the slots, for evaluate()'s numbers and the rows'
// sums, if at least `least` blocks, or clusters, still run at once. Returns where that is, or 0.
// `running`: how many run at once then.
template <class Kernel>
uint32_t make_room(const LossCall& call, Kernel* kernel, int least, Launch* launch, int* running) {
  *running = at_once(address(kernel), *launch);
  const int64_t rows = call.plan.rows, at = (launch->shared_bytes + 15) / 16 * 16;
  const int64_t end = at + scratch_bytes(rows, call.plan.batch) + rows * sizeof(Sums);
  if (*running == 0 || end > device().shared_bytes) return 0;
  Launch larger = *launch;
  larger.shared_bytes = int(end);
  const int still = at_once(address(kernel), larger);
  if (still < std::min(least, *running)) return 0;
  *launch = larger;
  *running = still;
  return uint32_t(at);
}

// Plans the smallest clusters that hold a row, or larger ones until every multiprocessor has a
// block, as long as all clusters run at once. Returns false where none hold a row.
template <class Kernel>
bool plan_clusters(LossCall& call, Kernel* kernel, Launch* launch) {
  const Plan& p = call.plan;
  bool found = false;
  for (int size = 1; size <= (device().clusters ? most_cluster : 1); size *= 2) {
    if (uint32_t(size) > p.row_chunks) break;  // there would be blocks without a chunk
    const uint32_t block_chunks = (p.row_chunks + size - 1) / size;
    const uint32_t tiles = tiles_of(block_chunks, cluster_threads, p);
    Launch candidate{int(p.rows) * size, cluster_threads,
                     shared_bytes(p, cluster_threads, tiles) + int(partial_bytes(block_chunks))};
    candidate.cluster = size;
    // compared in 64 bits first, as shared_bytes may have overflowed for a long row
    if (int64_t(tiles) * p.slot_bytes * (cluster_threads / warp_size) > device().shared_bytes ||
        candidate.shared_bytes > device().shared_bytes) {
      continue;
    }
    int running = 0;
    const uint32_t scratch_offset = make_room(call, kernel, int(p.rows), &candidate, &running);
    if (running == 0 || (found && running < int(p.rows))) continue;
    *launch = candidate;
    call.scratch_offset = scratch_offset;
    call.block_chunks = block_chunks;
    call.slots = tiles;
    found = true;
    if (candidate.blocks >= device().multiprocessors) break;
  }
  return found;
}

// Plans one block a multiprocessor with all its shared memory, and returns whether that holds at
// least one `fraction`-th of the batch; the rest is read twice. A fraction of 0 asks for nothing.
template <class Kernel>
bool plan_cooperative(LossCall& call, Kernel* kernel, uint32_t fraction, Launch* launch) {
  const Plan& p = call.plan;
  if (!device().cooperative) return false;
  Launch candidate{device().multiprocessors, cooperative_threads, 0};
  const uint32_t block_chunks = (p.chunks + candidate.blocks - 1) / candidate.blocks;
  const uint32_t tiles = tiles_of(block_chunks, cooperative_threads, p);
  call.slots = slots_a_warp(p, cooperative_threads, tiles);
  if (call.slots == 0) return false;
  const uint32_t kept = tiles <= call.slots ? tiles : call.slots - ring_of(call.slots, true);
  if (fraction != 0 && tiles > fraction * kept) return false;
  candidate.shared_bytes = shared_bytes(p, cooperative_threads, call.slots);
  candidate.cooperative = true;
  int running = 0;
  call.scratch_offset = make_room(call, kernel, candidate.blocks, &candidate, &running);
  call.sums_in_shared = call.scratch_offset != 0 && !call.by_row;
  candidate.blocks = std::min({candidate.blocks, running, int(p.chunks)});
  *launch = candidate;
  return running > 0;
}

// How many bytes a row's operands take, and how many rows are read a turn: as many as a third of
// the second-level cache holds, since the next rows are read while the gradient of these is formed.
// There are at least two turns, of the same length if possible.
int64_t row_bytes(const Plan& p) { return (p.numel + tile - 1) / tile * p.slot_bytes; }
uint32_t rows_a_turn(const Plan& p) {
  const int64_t fit = std::clamp<int64_t>(device().cache_bytes / 3 / row_bytes(p), 1, p.rows);
  const int64_t turns = std::max<int64_t>((p.rows + fit - 1) / fit, 2);
  return uint32_t((p.rows + turns - 1) / turns);
}

constexpr int sums_beside_a_gradient = 2;  // blocks a multiprocessor

bool turns_overlap() {
  return overlap(address(loss_of_chunks), sums_beside_a_gradient, gradient_kernel(),
                 stream_threads);
}

bool turns_pay(const Plan& p) {
  const int64_t cache = device().cache_bytes;
  return row_bytes(p) <= cache / 2 && p.rows * row_bytes(p) > cache / 3 && turns_overlap();
}

// Forms sums and gradient of some rows a turn, by two launches. Launches overlap: while the
// gradient of these rows is formed from the cache, the sums of the next ones are read from memory.
void launch_turns(LossCall call, const Doubles coefficients[3], uint32_t rows, Stream stream) {
  const Plan& p = call.plan;
  const uint32_t turns = (p.rows + rows - 1) / rows;
  const bool alone = turns == 1 || !turns_overlap();
  call.scratch_offset = 0;
  call.sums_in_shared = false;
  for (uint32_t turn = 0; turn < turns; ++turn) {
    const uint32_t first = turn * rows;
    call.rows = {first, std::min(rows, p.rows - first)};
    call.chunks = {first * p.row_chunks, call.rows.count * p.row_chunks};
    call.all = turn + 1 == turns;
    call.by_row = adds_up_by_row(call.rows.count, p, stream_threads);
    Launch launch =
        alone ? streaming(p, loss_of_chunks, call.chunks.count, &call.slots)
              : beside_another(p, loss_of_chunks, call.chunks.count, sums_beside_a_gradient,
                               device().shared_bytes * 3 / 8, &call.slots);
    launch.chained = turn > 0;
    start(loss_of_chunks, launch, stream, call);
    if (call.cond || call.uncond) {
      gradient_after(p, coefficients, call.cond, call.uncond, call.chunks, alone, nullptr, stream);
    }
  }
}

// Whether a transition that is not finite changes other rows' coefficients although rows are
// independent: it changes over how many samples, or steps of a sample, a mean is taken.
bool rows_may_change(const Problem& problem) {
  return problem.config.drop() || (problem.steps > 1 && problem.step_weights.data == nullptr);
}

[[noreturn]] void refuse(Path path) {
  throw std::runtime_error(std::string("guard_ops: this device cannot run this loss by the path ") +
                           name_of(path) + "; unset it");
}

}  // namespace

int64_t counters_needed(const Batch& t) {
  return 2 * counter_line + std::min<int64_t>(t.steps * t.batch, most_counted_rows);
}

Path guard_loss(const Batch& t, const Problem& problem, const LossResult& result, void* workspace,
                uint32_t* counters, Path wanted, Stream stream) {
  LossCall call{};
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
  call.chunks = {0, p.chunks};
  call.rows = {0, p.rows};
  call.all = true;
  Doubles coefficients[3];
  for (int n = 0; n < 3; ++n) coefficients[n] = {result.sum_grads + n * p.rows, t.batch, 1};

  const bool any = result.cond || result.uncond, independent = problem.rows_are_independent();
  const auto may = [&](Path path) { return wanted == path || (wanted == Path::automatic && any); };
  // Forms the gradient again if a row has changed another row's coefficients. That is rare, and the
  // launch returns at once otherwise.
  const auto mend = [&] {
    if (!any || !rows_may_change(problem)) return;
    gradient_after(p, coefficients, result.cond, result.uncond, call.chunks, true,
                   call.workspace.assumed, stream);
  };
  const bool take_turns = independent && wanted == Path::automatic && turns_pay(p);
  Launch launch;
  if (may(Path::cluster) && independent && plan_clusters(call, loss_by_clusters, &launch) &&
      starts(loss_by_clusters, launch, stream, call)) {
    mend();
    return Path::cluster;
  }
  if (wanted == Path::cluster) refuse(wanted);
  call.by_row = adds_up_by_row(p.rows, p, cooperative_threads);
  const uint32_t fraction = wanted == Path::cooperative ? 0 : take_turns ? 2 : 8;
  if (may(Path::cooperative) && plan_cooperative(call, loss_cooperatively, fraction, &launch) &&
      starts(loss_cooperatively, launch, stream, call)) {
    return Path::cooperative;
  }
  if (wanted == Path::cooperative) refuse(wanted);
  if (wanted == Path::in_turn || (take_turns && any)) {
    if (!independent) refuse(Path::in_turn);
    launch_turns(call, coefficients, rows_a_turn(p), stream);
    if (rows_a_turn(p) < p.rows) mend();
    return Path::in_turn;
  }
  launch_turns(call, coefficients, p.rows, stream);
  return Path::two_launches;
}

}  // namespace guard_ops::cuda
