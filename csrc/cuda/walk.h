// A warp's way through its tiles, once for the sums and once, backwards, for the gradient; and the
// rows' sums from those of their chunks.
#pragma once

#include "fixed.h"

namespace guard_ops::cuda {

// ---- the way through all tiles ------------------------------------------------------------------
//
// The warps of a block take its chunks in turn. The first tiles of a warp stay in their slots for
// the second pass. What does not fit goes through a ring of slots and is read again, the last tile
// first, as that is still in the L2 cache. Copies are started `ahead` tiles before their tile's
// turn.

// A position at one of a warp's tiles. What depends on row and chunk alone is computed when those
// change. Each lane computes the address of one operand: 64-bit products for all operands would be
// most of what a warp does.
struct Cursor {
  TileAt at;
  uint32_t number;  // the chunk's number among this warp's
  uint32_t rest;    // elements from the chunk's begin to the row's end, at most those of 4 tiles
  int64_t chunk_begin;
  char* lane_chunk;             // where the chunk begins in this lane's operand
  uint32_t lane_element_bytes;  // the size of that operand's elements
  char* lane_address;           // where the tile begins in it

  __device__ __forceinline__ Cursor() : number(~0u) {}
};

struct Walk {
  const Plan& p;
  uint32_t first;  // this warp's first chunk
  uint32_t tiles;  // how many all its chunks have
  Slots slots;

  // The way through the chunks [begin, end) of a block. `keep`: whether tiles are to stay in their
  // slots, for a second pass.
  __device__ __forceinline__ Walk(const Plan& p, char* memory, uint32_t slots_a_warp,
                                  uint32_t begin, uint32_t end, bool keep)
      : p(p), first(begin + warp()) {
    tiles = first < end ? ((end - first - 1) / warps() + 1) * p.chunk_tiles : 0;
    slots.count = slots_a_warp;
    slots.memory = memory + warp() * slots_a_warp * p.slot_bytes;
    slots.ring = ring_of(slots_a_warp, keep && tiles > slots_a_warp);
    slots.resident = !keep ? 0 : tiles <= slots_a_warp ? tiles : slots_a_warp - slots.ring;
  }

  // Moves to tile t, and returns whether it is of another chunk. `operand`: the one of which this
  // lane computes the address; may be absent.
  __device__ __forceinline__ bool move(Cursor& c, uint32_t t, const Operand& operand) const {
    const uint32_t number = p.by_chunk_tiles.divide(t), sub = t - number * p.chunk_tiles;
    const bool changed_chunk = number != c.number;
    if (changed_chunk) {
      c.number = number;
      c.at.chunk = first + number * warps();
      c.at.row = p.by_row_chunks.divide(c.at.chunk);
      c.at.k = p.by_batch.divide(c.at.row);
      c.at.i = c.at.row - c.at.k * p.batch;
      c.chunk_begin = int64_t(c.at.chunk - c.at.row * p.row_chunks) * (p.chunk_tiles * tile);
      const int64_t rest = p.numel - c.chunk_begin;
      c.rest = rest < most_chunk_tiles * tile ? uint32_t(rest) : most_chunk_tiles * tile;
      c.lane_element_bytes = uint32_t(size_of(operand.dtype));
      c.lane_chunk = operand.row(c.at.k, c.at.i) + c.chunk_begin * c.lane_element_bytes;
    }
    const uint32_t skipped = sub * tile;
    c.at.begin = c.chunk_begin + skipped;
    c.at.count = c.rest < skipped ? 0 : c.rest - skipped < tile ? c.rest - skipped : tile;
    c.lane_address = c.lane_chunk + skipped * c.lane_element_bytes;
    return changed_chunk;
  }

  __device__ __forceinline__ char* slot(uint32_t t) const {
    const uint32_t n =
        t < slots.resident ? t : slots.resident + ((t - slots.resident) & (slots.ring - 1));
    return slots.memory + n * p.slot_bytes;
  }

  __device__ __forceinline__ void load(Cursor& c, uint32_t t, Roles wanted, char* slot) const {
    move(c, t, p.operand[lane() < roles ? lane() : 0]);
    if (c.at.count != 0) load_tile(p, wanted, slot, c.lane_address, c.at.count);
  }

  // Calls body(row, cursor, slot, last) for every tile, in order; `last`: whether it is its chunk's
  // last one. In the cursor lane 0 has the tile's address in `out`, and lane 1 in `more_out`.
  template <class Body>
  __device__ __forceinline__ void each(const Operand& out, const Operand& more_out,
                                       Body body) const {
    Cursor coming, here;
    const auto start = [&](uint32_t t) {
      if (t < tiles) load(coming, t, every_role, slot(t));
      commit_copies();
    };
    for (uint32_t t = 0; t < slots.ahead(); ++t) start(t);
    RowNumbers row{};
    uint32_t sub = 0;
    for (uint32_t t = 0; t < tiles; ++t) {
      start(t + slots.ahead());
      if (move(here, t, lane() == 0 ? out : more_out)) row = numbers_of(p, here.at);
      slots.wait();
      const bool last = ++sub == p.chunk_tiles;
      body(row, here, slot(t), last);
      sync_warp();  // every lane has read the slot before it is filled anew
      if (last) sub = 0;
    }
    wait_copies<0>();
  }

  // Forms the sums of every chunk. Calls done(chunk, n, sum) in one lane for each n, of S1, S2 and,
  // where there is a reference, its sum.
  template <class Done>
  __device__ __forceinline__ void sums(Done done) const {
    const Way way{first, tiles, slots};
    if (slots.ring > 1 &&
        by_layout(p, [&](auto layout) { sums_of<decltype(layout)>(p, way, done); })) {
      return;
    }
    Sums total{0, 0, 0};
    each({}, {}, [&](const RowNumbers& row, const Cursor& here, const char* slot, bool last) {
      if (here.at.count != 0) add_sums(p, row, here.at, slot, total);
      if (!last) return;
      total.s1 = warp_total(total.s1);
      total.s2 = warp_total(total.s2);
      if (p.operand[role_ref]) total.ref = warp_total(total.ref);
      if (lane() == 0) {
        done(here.at.chunk, 0, total.s1);
        done(here.at.chunk, 1, total.s2);
        if (p.operand[role_ref]) done(here.at.chunk, 2, total.ref);
      }
      total = {0, 0, 0};
    });
  }

  // Writes the gradient of every tile into `cond` and `uncond` (either may be absent);
  // coefficients_of(at) are those of a row.
  template <class CoefficientsOf>
  __device__ __forceinline__ void gradient(const Operand& cond, const Operand& uncond,
                                           CoefficientsOf coefficients_of) const {
    const Way way{first, tiles, slots};
    if (slots.ring > 1 && by_layout(p, [&](auto layout) {
          gradient_of<decltype(layout)>(p, way, cond, coefficients_of);
        })) {
      return;
    }
    const uint32_t streamed = tiles - slots.resident;
    // streamed tile q of this pass is tile tiles - 1 - q, in slot q of the ring
    const auto ring_slot = [&](uint32_t q) {
      return slots.memory + (slots.resident + (q & (slots.ring - 1))) * p.slot_bytes;
    };
    Cursor coming, here;
    const auto restart = [&](uint32_t q) {
      if (q < streamed) load(coming, tiles - 1 - q, p.again, ring_slot(q));
      commit_copies();
    };
    for (uint32_t q = 0; q < slots.ahead(); ++q) restart(q);
    RowNumbers row{};
    RowGradient gradient{};
    for (uint32_t q = 0; q < tiles; ++q) {
      const uint32_t t = tiles - 1 - q;
      restart(q + slots.ahead());
      if (move(here, t, lane() == 0 ? cond : uncond)) {
        row = numbers_of(p, here.at);
        gradient = row_gradient_of(p, row, coefficients_of(here.at));
      }
      char* const at_slot = t < slots.resident ? slot(t) : ring_slot(q);
      slots.wait();
      const uint32_t count = here.at.count;
      if (count != 0) {
        gradient_in_place(p, row, gradient, here.at, at_slot);
        sync_warp();
        if (cond) {
          store_tile(broadcast(here.lane_address, 0), p.wide >> role_v & 1,
                     at_slot + p.offset[role_v], count);
        }
        if (uncond) {
          store_tile(broadcast(here.lane_address, 1), p.wide >> role_uncond & 1,
                     at_slot + p.offset[role_uncond], count);
        }
      }
      sync_warp();
    }
    wait_copies<0>();
  }
};

// ---- rows ---------------------------------------------------------------------------------------

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
