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

  __device__ __forceinline__ At at(uint32_t t) const {
    const uint32_t n = p.by_chunk_tiles.divide(t);
    return locate(p, first + n * warps(), t - n * p.chunk_tiles);
  }

  __device__ __forceinline__ char* slot(uint32_t t) const {
    const uint32_t n =
        t < slots.resident ? t : slots.resident + ((t - slots.resident) & (slots.ring - 1));
    return slots.memory + n * p.slot_bytes;
  }

  __device__ __forceinline__ void start(uint32_t t) const {
    if (t < tiles) load_tile(p, every_role, slot(t), at(t));
    commit_copies();
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

  // Calls body(row, at, slot, last) for every tile, in order; last: of its chunk.
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    for (uint32_t t = 0; t < slots.ahead(); ++t) start(t);
    RowNumbers row{};
    uint32_t sub = 0;
    for (uint32_t t = 0; t < tiles; ++t) {
      start(t + slots.ahead());
      const At here = at(t);
      if (sub == 0) row = numbers_of(p, here);
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
    each([&](const RowNumbers& row, const At& here, const char* tile_slot, bool last) {
      if (here.count != 0) add_sums(p, row, here, tile_slot, total);
      if (!last) return;
      total.s1 = warp_total(total.s1);
      total.s2 = warp_total(total.s2);
      if (p.operand[role_ref]) total.ref = warp_total(total.ref);
      done(here, total);
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
    const auto restart = [&](uint32_t q) {
      if (q < streamed) load_tile(p, p.again, ring_slot(q), at(tiles - 1 - q));
      commit_copies();
    };
    for (uint32_t q = 0; q < slots.ahead(); ++q) restart(q);
    RowNumbers row{};
    Coefficients c{};
    uint32_t chunk = ~0u;
    for (uint32_t q = 0; q < tiles; ++q) {
      const uint32_t t = tiles - 1 - q;
      restart(q + slots.ahead());
      const At here = at(t);
      if (here.chunk != chunk) {
        chunk = here.chunk;
        row = numbers_of(p, here);
        c = coefficients_of(here);
      }
      char* const at_slot = t < slots.resident ? slot(t) : ring_slot(q);
      wait();
      if (here.count != 0) {
        gradient_in_place(p, row, c, here, at_slot);
        sync_warp();
        if (cond) store_tile(cond, at_slot + p.offset[role_v], here);
        if (uncond) store_tile(uncond, at_slot + p.offset[role_uncond], here);
      }
      sync_warp();
    }
    wait_copies<0>();
  }
};

}  // namespace guard_ops::cuda
