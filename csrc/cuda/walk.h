// A warp's way through its tiles, once for the sums and once, backwards, for the gradient.
#pragma once

#include "fixed.h"
#include "rows.h"

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

}  // namespace guard_ops::cuda
