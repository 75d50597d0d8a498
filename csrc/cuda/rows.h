// The rows' sums from those of their chunks.
#pragma once

#include "tiles.h"

namespace guard_ops::cuda {

// The sums of all chunks, float64 [3, chunks]: the lanes of a warp, which read neighbouring chunks,
// read adjacent numbers.
struct Partials {
  double* data;
  uint32_t chunks;
  bool with_ref;  // if not, the third sum is neither written nor read

  // The n-th sum of a chunk.
  __device__ __forceinline__ void put(uint32_t chunk, uint32_t n, double sum) const {
    data[n * size_t(chunks) + chunk] = sum;
  }
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

// A warp adds up one part of a row's sums: each lane some chunks, and a tree the lanes. Every path
// adds in this order. get(n) are the sums of the row's chunk n. A lane reads several chunks at
// once, as it would wait for the second-level cache for each if it read one after another.
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

// The sums of a row from those of its parts.
__device__ __forceinline__ Sums sum_of_parts(const Plan& p, const Sums* parts) {
  Sums total = parts[0];
#pragma unroll 1
  for (uint32_t n = 1; n < p.row_parts; ++n) total = total + parts[n];
  return total;
}

// Calls done(row, sums) for each of the rows [begin, end), in one thread of the block, which has
// synchronized when this returns. `parts`: memory for [rows, row_parts], which is overwritten.
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
    done(row, sum_of_parts(p, parts + row * p.row_parts));
  }
  sync_block();
}

}  // namespace guard_ops::cuda
