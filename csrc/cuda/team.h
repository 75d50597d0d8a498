// The blocks' joint work on [K, B] numbers: rows' sums from those of their chunks, the objective by
// one block, and who that block is.
#pragma once

#include "../evaluate.h"
#include "tiles.h"

namespace guard_ops::cuda {

constexpr uint32_t row_lanes = 16;  // add one row's chunks together

// [chunks] of each, float64; a chunk's sums lie apart so that neighbours' loads are one.
struct Partials {
  double* data;
  uint32_t chunks;
  bool with_ref;  // else the third is neither written nor read

  __device__ __forceinline__ void put(uint32_t chunk, const Sums& sums) const {
    data[chunk] = sums.s1;
    data[chunks + chunk] = sums.s2;
    if (with_ref) data[2 * chunks + chunk] = sums.ref;
  }
  __device__ __forceinline__ Sums get(uint32_t chunk) const {
    const double* const at = data + chunk;
    return {at[0], at[chunks], with_ref ? at[2 * size_t(chunks)] : 0};
  }
};

// Lane n of `row_lanes` has added up its chunks; all of the row's lanes get the total. Every path
// adds in this order.
__device__ __forceinline__ Sums row_total(Sums own) {
#pragma unroll
  for (int mask = row_lanes / 2; mask > 0; mask /= 2) {
    own.s1 += shuffle_xor(own.s1, mask);
    own.s2 += shuffle_xor(own.s2, mask);
    own.ref += shuffle_xor(own.ref, mask);
  }
  return own;
}

// Calls done(row, sums) for the rows `first + n * step`, `row_lanes` threads a row. A lane has
// several chunks under way at once: one after another, each would wait for the second-level cache.
template <class Done>
__device__ __forceinline__ void row_sums(const Plan& p, const Partials& partials, uint32_t first,
                                         uint32_t step, Done done) {
  constexpr uint32_t at_once = 4;
  const uint32_t own = thread() % row_lanes;
  for (uint32_t base = first; base < p.rows; base += step) {
    const uint32_t row = base + thread() / row_lanes;
    Sums total{0, 0, 0};
    if (row < p.rows) {
      const uint32_t begin = row * p.row_chunks;
#pragma unroll 1
      for (uint32_t n = own; n < p.row_chunks; n += at_once * row_lanes) {
        Sums part[at_once];
#pragma unroll
        for (uint32_t j = 0; j < at_once; ++j) {
          const uint32_t chunk = n + j * row_lanes;
          part[j] = partials.get(begin + (chunk < p.row_chunks ? chunk : n));
        }
#pragma unroll
        for (uint32_t j = 0; j < at_once; ++j) {
          const bool there = n + j * row_lanes < p.row_chunks;
          total.s1 = there ? total.s1 + part[j].s1 : total.s1;
          total.s2 = there ? total.s2 + part[j].s2 : total.s2;
          total.ref = there ? total.ref + part[j].ref : total.ref;
        }
      }
    }
    total = row_total(total);
    if (row < p.rows && own == 0) done(row, total);
  }
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

struct Workspace {
  uint32_t *arrived, *evaluated;  // zeroed before the launch
  double* partials;               // [3, chunks]
  Sums* sums;                     // [K, B]
  Coefficients* assumed;          // [K, B]
  Scratch scratch;
};

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
    to.sum_grads[n] = c.c1;
    to.sum_grads[rows + n] = c.c2;
    to.sum_grads[2 * rows + n] = c.c3;
  }
};

// [3, K, B] as written by Into.
__device__ __forceinline__ Coefficients coefficients_at(const double* sum_grads, uint32_t rows,
                                                        uint32_t row) {
  return {sum_grads[row], sum_grads[rows + row], sum_grads[2 * rows + row]};
}

// The block's [K, B] arithmetic on the rows' sums in `workspace`.
__device__ __forceinline__ void evaluate_by_block(const Problem& problem,
                                                  const Workspace& workspace, const LossOut& out) {
  const Sums* const sums = workspace.sums;
  evaluate(
      Block{}, problem,
      [=](int64_t n) {
        const double* const s = reinterpret_cast<const double*>(sums + n);
        return Sums{load_fresh(s), load_fresh(s + 1), load_fresh(s + 2)};
      },
      workspace.scratch, Into{out, problem.steps, problem.steps * problem.batch});
}

// Whether this block is the last to arrive: then it sees what all others wrote before. The whole
// block calls it; `shared` is a word of its shared memory. One thread's count is enough, as what
// the block's barriers order before it is ordered for whoever counts after it.
__device__ __forceinline__ bool arrives_last(uint32_t* arrived, uint32_t* shared) {
  sync_block();
  if (thread() == 0) *shared = count_up(arrived);
  sync_block();
  return *shared == blocks() - 1;
}

// A block's even share of n.
__device__ __forceinline__ uint32_t share(uint32_t n, uint32_t block) {
  return uint32_t(uint64_t(n) * block / blocks());
}

}  // namespace guard_ops::cuda
