// A warp's way through its tiles, once for the sums and once, backwards, for the gradient; and the
// rows' sums from those of their chunks.
#pragma once

#include "tile_math.h"

namespace guard_ops::cuda {

// ---- tiles of a known layout --------------------------------------------------------------------
//
// The way of a warp where the layout was known when the kernel was compiled and every tile is
// whole. It reads the same tiles as Walk does otherwise, and forms the same bits; but it asks
// nothing of a tile, knows a row's addresses until the row changes, and stores a gradient from
// registers.

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
// `keeps`: the directions of the first `resident` tiles stay behind the ring.
template <class L, bool keeps, class Done>
__device__ __forceinline__ void sums_of(const Plan& p, const Way& way, Done done) {
  const Slots& slots = way.slots;
  const SharedAddress memory = same_for_warp(address_of(slots.memory));
  SharedRing read{memory, memory + slots.ring * L::slot_bytes(), memory};
  SharedAddress kept = read.end;
  uint32_t to_keep = slots.resident;
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
      add_sums_of(L{}, p, row, at, pointer_of(read.slot), total, [&](const auto& in) {
        if (!keeps || to_keep == 0) return;
        float direction[lane_elements];
        direction_of<L::form>(p.kind, row, in, direction);
        write(pointer_of(kept), DType::f32, direction);
      });
    }
    if (keeps && to_keep != 0) --to_keep, kept += direction_bytes;
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
template <class L, bool keeps, class CoefficientsOf>
__device__ __forceinline__ void gradient_of(const Plan& p, const Way& way, const Operand& out,
                                            CoefficientsOf coefficients_of) {
  constexpr uint32_t run_bytes = run * L::tile_bytes(role_v) / tile;
  const Slots& slots = way.slots;
  const SharedAddress memory = same_for_warp(address_of(slots.memory));
  SharedRing read{memory, memory + slots.ring * L::slot_bytes(), memory};
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
    if (here.in_row < p.row_tiles) {
      const TileAt at{int64_t(here.in_row) * tile, 0, 0, 0, 0, tile};
      float g[lane_elements];
      if (keeps && left < slots.resident) {
        gradient_of_direction(gradient, pointer_of(read.end + left * direction_bytes), g);
      } else {
        gradient_of_tile(L{}, p, row, gradient, at, pointer_of(read.slot), g);
      }
      store_lane(to_row + uint64_t(here.in_row) * L::tile_bytes(role_v), L::dtype(role_v), g);
    }
    read.move(L::slot_bytes());
    here.move(p);
  }
  wait_copies<0>();
  sync_warp();
}

// ---- the way through all tiles ------------------------------------------------------------------
//
// The warps of a block take its chunks in turn. The first tiles of a warp stay for the second pass:
// in their slots, or, where the layout is known and not all of them fit, as directions. What does
// not fit goes through a ring of slots and is read again, the last tile first, as that is still in
// the L2 cache. Copies are started `ahead` tiles before their tile's
// turn.

// A position at one of a warp's tiles. What depends on row and chunk alone is computed when those
// change. Each lane computes the address of one operand: 64-bit products for all operands would be
// most of what a warp does.
struct Cursor {
  TileAt at;
  char* lane_chunk;    // where the chunk begins in this lane's operand
  char* lane_address;  // where the tile begins in it

  __device__ __forceinline__ Cursor() { at.chunk = ~0u; }
};

// `keeps`: whether tiles are to stay, for a second pass.
template <bool keeps>
struct Walk {
  const Plan& p;
  uint32_t first;  // this warp's first chunk
  uint32_t tiles;  // how many all its chunks have
  Slots slots;

  // The way through the chunks [begin, end) of a block.
  __device__ __forceinline__ Walk(const Plan& p, char* memory, const Room& room, uint32_t begin,
                                  uint32_t end)
      : p(p), first(begin + warp()) {
    tiles = first < end ? ((end - first - 1) / warps() + 1) * p.chunk_tiles : 0;
    slots.memory = memory + warp() * bytes_of(p, room);
    slots.directions = keeps && room.directions != 0;
    slots.ring = slots.directions ? room.slots : ring_of(room.slots, keeps && tiles > room.slots);
    slots.resident = keeps ? resident_of(room, tiles) : 0;
  }

  // Where the cursor's chunk begins in its row. To keep this would cost registers that are needed.
  __device__ __forceinline__ int64_t begin_of(const Cursor& c) const {
    return int64_t(c.at.chunk - c.at.row * p.row_chunks) * (p.chunk_tiles * tile);
  }

  // Moves to tile t, and returns whether it is of another chunk. `operand`: the one of which this
  // lane computes the address; may be absent.
  __device__ __forceinline__ bool move(Cursor& c, uint32_t t, const Operand& operand) const {
    const uint32_t number = p.by_chunk_tiles.divide(t), sub = t - number * p.chunk_tiles;
    const uint32_t chunk = first + number * (computed_anew(threads()) / warp_size);
    const bool changed_chunk = chunk != c.at.chunk;
    if (changed_chunk) {
      c.at.chunk = chunk;
      c.at.row = p.by_row_chunks.divide(c.at.chunk);
      c.at.k = p.by_batch.divide(c.at.row);
      c.at.i = c.at.row - c.at.k * p.batch;
      c.lane_chunk = operand.row(c.at.k, c.at.i) + begin_of(c) * size_of(operand.dtype);
    }
    const uint32_t skipped = sub * tile;
    c.at.begin = begin_of(c) + skipped;
    const int64_t rest = p.numel - c.at.begin;
    c.at.count = rest <= 0 ? 0 : rest < tile ? uint32_t(rest) : tile;
    c.lane_address = c.lane_chunk + skipped * uint32_t(size_of(operand.dtype));
    return changed_chunk;
  }

  // by_layout, where the layout decides the way: operands that stay are looked up.
  template <class Call>
  __device__ __forceinline__ bool by_known_layout(Call call) const {
    return slots.ring > 1 && (!keeps || slots.directions) && by_layout(p, call);
  }

  __device__ __forceinline__ bool ends_chunk(uint32_t t) const {
    return p.by_chunk_tiles.divide(t + 1) * p.chunk_tiles == t + 1;
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

  // Calls body(row, cursor, slot, t) for every tile t, in order. In the cursor lane 0 has the
  // tile's address in `out`, and lane 1 in `more_out`.
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
    for (uint32_t t = 0; t < tiles; ++t) {
      start(t + slots.ahead());
      if (move(here, t, lane() == 0 ? out : more_out)) row = numbers_of(p, here.at);
      slots.wait();
      body(row, here, slot(t), t);
      sync_warp();  // every lane has read the slot before it is filled anew
    }
    wait_copies<0>();
  }

  // Forms the sums of every chunk. Calls done(chunk, n, sum) in one lane for each n, of S1, S2 and,
  // where there is a reference, its sum.
  template <class Done>
  __device__ __forceinline__ void sums(Done done) const {
    const Way way{first, tiles, slots};
    if (by_known_layout([&](auto layout) { sums_of<decltype(layout), keeps>(p, way, done); })) {
      return;
    }
    Sums total{0, 0, 0};
    each({}, {}, [&](const RowNumbers& row, const Cursor& here, const char* slot, uint32_t t) {
      if (here.at.count != 0) add_sums(p, row, here.at, slot, total);
      if (!ends_chunk(t)) return;
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
    if (by_known_layout([&](auto layout) {
          gradient_of<decltype(layout), keeps>(p, way, cond, coefficients_of);
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
