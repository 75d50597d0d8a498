// The blocks' joint work on [K, B] numbers: rows' sums from those of their chunks, the objective by
// one block, and who that block is.
#pragma once

#include "../evaluate.h"
#include "tiles.h"

namespace guard_ops::cuda {

// [chunks] of each, float64; a chunk's sums lie apart so that neighbours' loads are one.
struct Partials {
  double* data;
  uint32_t chunks;
  bool with_ref;  // else the third is neither written nor read

  __device__ __forceinline__ void put(uint32_t chunk, const Sums& sums) const {
    double* const at = data + chunk;
    at[0] = sums.s1;
    at[chunks] = sums.s2;
    if (with_ref) at[2 * size_t(chunks)] = sums.ref;
  }
  __device__ __forceinline__ Sums get(uint32_t chunk) const {
    const double* const at = data + chunk;
    return {at[0], at[chunks], with_ref ? at[2 * size_t(chunks)] : 0};
  }
};

// One part of a row's sums, by a warp: each lane adds up chunks, a tree the lanes. Every path adds
// in this order. get(chunk of the row): its sums. A lane has several chunks under way at once: one
// after another, each would wait for the second-level cache.
template <class Get>
__device__ __forceinline__ Sums part_sums(const Plan& p, uint32_t part, Get get) {
  constexpr uint32_t at_once = 4;
  const uint32_t stride = p.row_parts * warp_size;
  Sums total{0, 0, 0};
#pragma unroll 1
  for (uint32_t n = part * warp_size + lane(); n < p.row_chunks; n += at_once * stride) {
    Sums some[at_once];
#pragma unroll
    for (uint32_t j = 0; j < at_once; ++j) {
      const uint32_t chunk = n + j * stride;
      some[j] = get(chunk < p.row_chunks ? chunk : n);
    }
#pragma unroll
    for (uint32_t j = 0; j < at_once; ++j) {
      if (n + j * stride < p.row_chunks) total = total + some[j];
    }
  }
  return {warp_total(total.s1), warp_total(total.s2), warp_total(total.ref)};
}

// A row's sums from those of its parts.
__device__ __forceinline__ Sums of_parts(const Plan& p, const Sums* parts) {
  Sums total = parts[0];
#pragma unroll 1
  for (uint32_t n = 1; n < p.row_parts; ++n) total = total + parts[n];
  return total;
}

// Calls done(row, sums) for the rows [begin, end), by a thread each; the block has synchronized
// when it returns. `parts`: [rows, row_parts] in global memory, whatever is in it.
template <class Done>
__device__ __forceinline__ void row_sums(const Plan& p, const Partials& partials, Sums* parts,
                                         uint32_t begin, uint32_t end, Done done) {
  const uint32_t last = end * p.row_parts;
#pragma unroll 1
  for (uint32_t n = begin * p.row_parts + warp(); n < last; n += warps()) {
    const uint32_t row = n / p.row_parts;
    const Sums sums = part_sums(p, n - row * p.row_parts, [&](uint32_t chunk) {
      return partials.get(row * p.row_chunks + chunk);
    });
    if (lane() != 0) continue;
    if (p.row_parts == 1) {
      done(row, sums);
    } else {
      parts[n] = sums;
    }
  }
  sync_block();
  if (p.row_parts == 1) return;
#pragma unroll 1
  for (uint32_t row = begin + thread(); row < end; row += threads()) {
    done(row, of_parts(p, parts + row * p.row_parts));
  }
  sync_block();
}

// evaluate()'s Group: a warp.
struct Warp {
  __device__ __forceinline__ bool leader() const { return lane() == 0; }
  template <class F>
  __device__ __forceinline__ void each(int64_t n, F body) const {
#pragma unroll 1
    for (int64_t i = lane(); i < n; i += warp_size) body(i);
    sync_warp();
  }
  template <class F>
  __device__ __forceinline__ double sum(int64_t n, F value) const {
    double total = 0;
#pragma unroll 1
    for (int64_t i = lane(); i < n; i += warp_size) total += value(i);
    return warp_total(total);
  }
};

// evaluate()'s Team: a block. Its sums are each warp's own, the same in all.
struct Block {
  template <class F>
  __device__ __forceinline__ void each(int64_t n, F body) const {
#pragma unroll 1
    for (int64_t i = thread(); i < n; i += threads()) body(i);
    sync_block();
  }
  template <class F>
  __device__ __forceinline__ void groups(int64_t n, F body) const {
#pragma unroll 1
    for (int64_t i = warp(); i < n; i += warps()) body(Warp{}, i);
    sync_block();
  }
  template <class F>
  __device__ __forceinline__ double sum(int64_t n, F value) const {
    return Warp{}.sum(n, value);
  }
};

// Where the numbers of a loss go, and what is kept between its parts.
struct LossOut {
  float *loss, *per_row, *metrics;  // [], [4, K, B], [10, K]
  double* sum_grads;                // [3, K, B]
};

// The bytes of a cluster's block for its chunks' sums.
GUARD_OPS_HD uint32_t partial_bytes(uint32_t chunks) {
  return uint32_t(chunks * sizeof(Sums) + 15) / 16 * 16;
}

inline int64_t scratch_bytes(int64_t rows, int64_t steps, int64_t batch) {
  return rows * sizeof(RowState) + steps * sizeof(Statistics) + batch * sizeof(int64_t);
}
GUARD_OPS_HD Scratch scratch_at(char* base, int64_t rows, int64_t steps) {
  char* const stats = base + rows * sizeof(RowState);
  char* const finite = stats + steps * sizeof(Statistics);
  return {reinterpret_cast<RowState*>(base), reinterpret_cast<Statistics*>(stats),
          reinterpret_cast<int64_t*>(finite)};
}

struct Workspace {
  double* partials;       // [3, chunks]
  Sums* parts;            // [K, B, row_parts]
  Sums* sums;             // [K, B]
  Coefficients* assumed;  // [K, B]
  Scratch scratch;
};

// Integers that a launch finds at 0 and leaves so, but for `evaluated`, which changes. Nobody polls
// in the cache line where others count.
struct Counters {
  uint32_t *arrived, *evaluated;
  uint32_t* of_rows;  // [K, B]
};
inline Counters counters_at(uint32_t* base) {
  return {base, base + counter_line, base + 2 * counter_line};
}

// A row's of [3, K, B].
__device__ __forceinline__ Coefficients coefficients_at(const double* sum_grads, uint32_t rows,
                                                        uint32_t row) {
  return {sum_grads[row], sum_grads[rows + row], sum_grads[2 * rows + row]};
}

__device__ __forceinline__ void put_coefficients(double* sum_grads, uint32_t rows, uint32_t row,
                                                 const Coefficients& c) {
  sum_grads[row] = c.c1;
  sum_grads[rows + row] = c.c2;
  sum_grads[2 * rows + row] = c.c3;
}

struct Into {  // evaluate()'s Out
  LossOut to;
  int64_t steps, rows;

  __device__ __forceinline__ void loss(double value) const { *to.loss = float(value); }
  __device__ __forceinline__ void metric(int m, int64_t k, double value) const {
    to.metrics[m * steps + k] = float(value);
  }
  __device__ __forceinline__ void row(int64_t n, const RowState& r, const Coefficients& c) const {
    to.per_row[n] = float(r.ratio.log_ratio);
    to.per_row[rows + n] = float(r.excess);
    to.per_row[2 * rows + n] = float(r.weight);
    to.per_row[3 * rows + n] = float(r.ratio.kl);
    put_coefficients(to.sum_grads, uint32_t(rows), uint32_t(n), c);
  }
};

// The block's [K, B] arithmetic on the rows' sums.
__device__ __forceinline__ void evaluate_by_block(const Problem& problem, const Sums* sums,
                                                  const Scratch& scratch, const LossOut& out) {
  evaluate(
      Block{}, problem, [=](int64_t n) { return sums[n]; }, scratch,
      Into{out, problem.steps, problem.steps * problem.batch});
}

// Counts this block's `by` in; whether they complete `all`, in which case the counter is 0 again
// and this block sees what the others wrote before they counted. The whole block calls it; `shared`
// is a word of its shared memory. One thread's count is enough, as what the block's barriers order
// before it is ordered for whoever counts after it.
__device__ __forceinline__ bool completes(uint32_t* counter, uint32_t by, uint32_t all,
                                          uint32_t* shared) {
  sync_block();
  if (thread() == 0) {
    *shared = count_up(counter, by) + by;
    if (*shared == all) *counter = 0;
  }
  sync_block();
  return *shared == all;
}

// A block's even share of n.
__device__ __forceinline__ uint32_t share(uint32_t n, uint32_t block) {
  return uint32_t(uint64_t(n) * block / blocks());
}

// Chunks, or rows, that follow each other: all of the batch or some.
struct Range {
  uint32_t first, count;

  __device__ __forceinline__ uint32_t begin(uint32_t block) const {
    return first + share(count, block);
  }
};

}  // namespace guard_ops::cuda
