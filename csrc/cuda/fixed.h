// A warp's way through its tiles where their layout was known when the kernel was compiled and
// every tile is whole. It reads the same tiles as Walk does otherwise, and forms the same bits; but
// it asks nothing of a tile, knows a row's addresses until the row changes, and stores a gradient
// from registers.
#pragma once

#include "tile_math.h"

namespace guard_ops::cuda {

// What a warp walks through, and where it keeps its tiles: see Walk.
struct Way {
  uint32_t first;  // the first of its chunks, which are `warps()` apart
  uint32_t tiles;  // how many all of them have
  Slots slots;
};

// The position of one of a warp's tiles, which moves forwards or backwards by one tile.
template <int direction>
struct Position {
  uint32_t row;
  uint32_t in_row;  // the tile's number in the row
  uint32_t sub;     // and in its chunk
  uint32_t lost;    // 1 if `in_row` may lie behind the row's end; 0 if it does not

  // Takes the place of the warp's first tile, or of its last one.
  __device__ __forceinline__ Position(const Plan& p, const Way& way)
      : row(0), in_row(way.first * p.chunk_tiles), sub(0), lost(1) {
    if (direction > 0) return;
    sub = p.chunk_tiles - 1;
    in_row += (p.by_chunk_tiles.divide(way.tiles) - 1) * warps() * p.chunk_tiles + sub;
  }

  __device__ __forceinline__ void find_row(const Plan& p) {
    const uint32_t rows = p.by_row_chunks.divide(p.by_chunk_tiles.divide(in_row));
    row += rows;
    in_row -= rows * (p.row_chunks * p.chunk_tiles);
    lost = 0;
  }

  // Moves to the next tile.
  __device__ __forceinline__ void move(const Plan& p) {
    const uint32_t others = (warps() - 1) * p.chunk_tiles;  // tiles that other warps have
    if (direction > 0) {
      ++in_row;
      if (++sub == p.chunk_tiles) sub = 0, in_row += others;
      lost = in_row >= p.row_chunks * p.chunk_tiles;
    } else {
      --in_row;
      if (sub-- == 0) sub = p.chunk_tiles - 1, in_row -= others;
      lost = int32_t(in_row) < 0;
      if (lost) in_row += row * (p.row_chunks * p.chunk_tiles), row = 0;
    }
  }

  __device__ __forceinline__ TileAt tile_at(const Plan& p) const {
    const uint32_t k = p.by_batch.divide(row);
    return {int64_t(in_row) * tile, k, row - k * p.batch, row, 0, tile};
  }
};

// Copies a warp's tiles into its slots, ahead of what is computed from them.
template <class L, int direction>
struct Feed {
  const Plan& p;
  const Roles wanted;
  Position<direction> at;
  uint32_t left;  // how many tiles are still to be copied
  SharedRing ring;
  const char* row[roles];  // where this lane's part of the row begins in each operand

  // The first of `tiles` tiles goes to the slot that `ring` is at.
  __device__ __forceinline__ Feed(const Plan& p, Roles wanted, const Way& way, uint32_t tiles,
                                  SharedRing ring)
      : p(p), wanted(wanted), at(p, way), left(tiles), ring(ring) {}

  // Starts the copies of the next tile's wanted operands, if there is a tile left.
  __device__ __forceinline__ void next() {
    if (left != 0) {
      --left;
      if (at.lost) find_row();
      if (at.in_row < p.row_tiles) copy();
      at.move(p);
      ring.move(L::slot_bytes());
    }
    commit_copies();
  }

 private:
  __device__ __forceinline__ void find_row() {
    at.find_row(p);
    const TileAt tile = at.tile_at(p);
#pragma unroll
    for (uint32_t r = 0; r < roles; ++r) {
      if (L::has(r)) row[r] = p.operand[r].row(tile.k, tile.i) + lane() * sizeof(Bytes16);
    }
  }

  __device__ __forceinline__ void copy() const {
    constexpr uint32_t round = warp_size * sizeof(Bytes16);
    const SharedAddress to = ring.slot + lane() * sizeof(Bytes16);
#pragma unroll
    for (uint32_t r = 0; r < roles; ++r) {
      if (!L::has(r) || !(wanted >> r & 1)) continue;
      const char* const from = row[r] + uint64_t(at.in_row) * L::tile_bytes(r);
      copy_async(to + L::offset(r), from);
      if (L::wide(r)) copy_async(to + L::offset(r) + round, from + round);
    }
  }
};

// Forms the sums of every chunk. Calls done(chunk, n, sum) in one lane for each n, of S1 and S2.
template <class L, class Done>
__device__ __forceinline__ void sums_of(const Plan& p, const Way& way, Done done) {
  const Slots& slots = way.slots;
  const SharedAddress memory = same_for_warp(address_of(slots.memory));
  // tiles take the slots one after another, and the last `ring` of them again and again
  SharedRing read{memory + slots.resident * L::slot_bytes(),
                  memory + (slots.resident + slots.ring) * L::slot_bytes(), memory};
  Feed<L, 1> feed(p, every_role, way, way.tiles, read);
#pragma unroll 1
  for (uint32_t n = 0; n < slots.ahead(); ++n) feed.next();
  Position<1> here(p, way);
  RowNumbers row{};
  Sums total{0, 0, 0};
  uint32_t chunk = way.first;
#pragma unroll 1
  for (uint32_t left = way.tiles; left != 0; --left) {
    slots.wait_before_next();
    feed.next();  // into the slot that every lane has read before it came here
    if (here.lost) {
      here.find_row(p);
      row = numbers_of(p, here.tile_at(p));
    }
    if (here.in_row < p.row_tiles) {
      const TileAt at{int64_t(here.in_row) * tile, 0, 0, 0, 0, tile};
      add_sums_of(L{}, p, row, at, pointer_of(read.slot), total);
    }
    read.move(L::slot_bytes());
    here.move(p);
    if (here.sub != 0) continue;
    const double sum = warp_totals(total.s1, total.s2);
    if (lane() % (warp_size / 2) == 0) done(chunk, lane() / (warp_size / 2), sum);
    total = {0, 0, 0};
    chunk += warps();
  }
  wait_copies<0>();
  sync_warp();
}

// Writes the gradient of every tile, the last one first, into `out`; coefficients_of(at) are those
// of a row.
template <class L, class CoefficientsOf>
__device__ __forceinline__ void gradient_of(const Plan& p, const Way& way, const Operand& out,
                                            CoefficientsOf coefficients_of) {
  constexpr uint32_t run_bytes = run * L::tile_bytes(role_v) / tile;
  const Slots& slots = way.slots;
  const SharedAddress memory = same_for_warp(address_of(slots.memory));
  const SharedAddress ring = memory + slots.resident * L::slot_bytes();
  SharedRing read{ring, ring + slots.ring * L::slot_bytes(), ring};
  Feed<L, -1> feed(p, p.again, way, way.tiles - slots.resident, read);
#pragma unroll 1
  for (uint32_t n = 0; n < slots.ahead(); ++n) feed.next();
  Position<-1> here(p, way);
  RowNumbers row{};
  RowGradient gradient{};
  char* to_row = nullptr;  // where this lane's part of the row begins in `out`
#pragma unroll 1
  for (uint32_t left = way.tiles; left-- != 0;) {
    slots.wait_before_next();
    feed.next();
    if (here.lost) {
      here.find_row(p);
      const TileAt at = here.tile_at(p);
      row = numbers_of(p, at);
      gradient = row_gradient_of(p, row, coefficients_of(at));
      to_row = out.row(at.k, at.i) + lane() * run_bytes;
    }
    if (left < slots.resident) read.slot = memory + left * L::slot_bytes();
    if (here.in_row < p.row_tiles) {
      const TileAt at{int64_t(here.in_row) * tile, 0, 0, 0, 0, tile};
      float g[lane_elements];
      gradient_of_tile(L{}, p, row, gradient, at, pointer_of(read.slot), g);
      store_lane(to_row + uint64_t(here.in_row) * L::tile_bytes(role_v), L::dtype(role_v), g);
    }
    read.move(L::slot_bytes());
    here.move(p);
  }
  wait_copies<0>();
  sync_warp();
}

}  // namespace guard_ops::cuda
