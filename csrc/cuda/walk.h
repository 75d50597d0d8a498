// A warp's way through its tiles, once for the sums and once, backwards, for the gradient.
//
// Block b has the chunks [first, last), its warps take them in turn. The first tiles of a warp stay
// in their slots of shared memory for the second pass; what does not fit goes through a ring of
// slots and is read again, the last first, as that is still in the L2 cache. Copies run `ahead`
// tiles ahead.
#pragma once

#include "tiles.h"

namespace guard_ops::cuda {

struct Slots {
  char* memory;       // of this warp
  uint32_t count;     // slots it has
  uint32_t ring;      // 1, 2 or 4 of them where not every tile fits
  uint32_t resident;  // tiles that stay

  __device__ __forceinline__ uint32_t ahead() const { return ring - 1; }
};

// At one of a warp's tiles. What follows from its row and chunk is worked out when those change;
// addresses by a lane for each operand, as 64-bit products for all of them would be most of what a
// warp does.
struct Cursor {
  At at;
  uint32_t number;  // of the chunk, among the warp's
  uint32_t rest;    // elements from the chunk's beginning to the row's end, or more than it has
  int64_t chunk_begin;
  char* own_chunk;    // this lane's operand at the chunk's beginning
  uint32_t own_size;  // of its elements
  char* own;          // at the tile

  __device__ __forceinline__ Cursor() : number(~0u) {}
};

struct Walk {
  const Plan& p;
  uint32_t first;  // chunk of this warp
  uint32_t tiles;  // of all its chunks
  Slots slots;

  // `keep`: whether there is a second pass that wants the tiles to stay.
  __device__ __forceinline__ Walk(const Plan& p, char* memory, uint32_t slots_a_warp,
                                  uint32_t begin, uint32_t end, bool keep)
      : p(p), first(begin + warp()) {
    tiles = first < end ? ((end - first - 1) / warps() + 1) * p.chunk_tiles : 0;
    slots.count = slots_a_warp;
    slots.memory = memory + warp() * slots_a_warp * p.slot_bytes;
    slots.ring = ring_of(slots_a_warp, keep && tiles > slots_a_warp);
    slots.resident = !keep ? 0 : tiles <= slots_a_warp ? tiles : slots_a_warp - slots.ring;
  }

  // Moves to tile t; whether that is of another chunk. `operand`: this lane's, may be absent.
  __device__ __forceinline__ bool move(Cursor& c, uint32_t t, const Operand& operand) const {
    const uint32_t number = p.by_chunk_tiles.divide(t), sub = t - number * p.chunk_tiles;
    const bool other = number != c.number;
    if (other) {
      c.number = number;
      c.at.chunk = first + number * warps();
      c.at.row = p.by_row_chunks.divide(c.at.chunk);
      c.at.k = p.by_batch.divide(c.at.row);
      c.at.i = c.at.row - c.at.k * p.batch;
      c.chunk_begin = int64_t(c.at.chunk - c.at.row * p.row_chunks) * (p.chunk_tiles * tile);
      const int64_t rest = p.numel - c.chunk_begin;
      c.rest = rest < most_chunk_tiles * tile ? uint32_t(rest) : most_chunk_tiles * tile;
      c.own_size = uint32_t(size_of(operand.dtype));
      c.own_chunk = operand.row(c.at.k, c.at.i) + c.chunk_begin * c.own_size;
    }
    const uint32_t skipped = sub * tile;
    c.at.begin = c.chunk_begin + skipped;
    c.at.count = c.rest < skipped ? 0 : c.rest - skipped < tile ? c.rest - skipped : tile;
    c.own = c.own_chunk + skipped * c.own_size;
    return other;
  }

  __device__ __forceinline__ char* slot(uint32_t t) const {
    const uint32_t n =
        t < slots.resident ? t : slots.resident + ((t - slots.resident) & (slots.ring - 1));
    return slots.memory + n * p.slot_bytes;
  }

  __device__ __forceinline__ void load(Cursor& c, uint32_t t, Roles wanted, char* slot) const {
    move(c, t, p.operand[lane() < roles ? lane() : 0]);
    if (c.at.count != 0) load_tile(p, wanted, slot, c.own, c.at.count);
  }

  // Until the oldest copies have landed, for all lanes.
  __device__ __forceinline__ void wait() const {
    if (slots.ring == 4) {
      wait_copies<3>();
    } else if (slots.ring == 2) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    sync_warp();
  }

  // Calls body(row, cursor, slot, last) for every tile, in order; last: of its chunk. Lane 0 of the
  // cursor has the address of the tile in `out`, lane 1 in `more_out`.
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
      wait();
      const bool last = ++sub == p.chunk_tiles;
      body(row, here, slot(t), last);
      sync_warp();  // before the slot is filled anew
      if (last) sub = 0;
    }
    wait_copies<0>();
  }

  // The sums of every chunk; done(at, sums) by every lane.
  template <class Done>
  __device__ __forceinline__ void sums(Done done) const {
    Sums total{0, 0, 0};
    each({}, {}, [&](const RowNumbers& row, const Cursor& here, const char* slot, bool last) {
      if (here.at.count != 0) add_sums(p, row, here.at, slot, total);
      if (!last) return;
      total.s1 = warp_total(total.s1);
      total.s2 = warp_total(total.s2);
      if (p.operand[role_ref]) total.ref = warp_total(total.ref);
      done(here.at, total);
      total = {0, 0, 0};
    });
  }

  // The gradient of every tile into `cond` and `uncond` (either may be absent), given each row's
  // coefficients_of(at).
  template <class CoefficientsOf>
  __device__ __forceinline__ void gradient(const Operand& cond, const Operand& uncond,
                                           CoefficientsOf coefficients_of) const {
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
    Direction to{};
    for (uint32_t q = 0; q < tiles; ++q) {
      const uint32_t t = tiles - 1 - q;
      restart(q + slots.ahead());
      if (move(here, t, lane() == 0 ? cond : uncond)) {
        row = numbers_of(p, here.at);
        to = direction_of(p, row, coefficients_of(here.at));
      }
      char* const at_slot = t < slots.resident ? slot(t) : ring_slot(q);
      wait();
      const uint32_t count = here.at.count;
      if (count != 0) {
        gradient_in_place(p, row, to, here.at, at_slot);
        sync_warp();
        if (cond) {
          store_tile(broadcast(here.own, 0), p.wide >> role_v & 1, at_slot + p.offset[role_v],
                     count);
        }
        if (uncond) {
          store_tile(broadcast(here.own, 1), p.wide >> role_uncond & 1,
                     at_slot + p.offset[role_uncond], count);
        }
      }
      sync_warp();
    }
    wait_copies<0>();
  }
};

}  // namespace guard_ops::cuda
