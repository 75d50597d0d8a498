// A warp's way through its tiles, once for the sums and once, backwards, for the gradient: what it
// computes from one tile, the way itself, and the rows' sums from those of their chunks.
#pragma once

#include "tiles.h"

namespace guard_ops::cuda {

// ---- one tile -----------------------------------------------------------------------------------

// What the arithmetic needs to know of a row.
struct RowNumbers {
  Step<float> step;
  double b;  // not rounded
  uint64_t key, transition;
};

__device__ __forceinline__ RowNumbers numbers_of(const Plan& p, const TileAt& at) {
  RowNumbers n{};
  n.b = *p.table[1].at(at.k, at.i);
  n.step = {float(*p.table[0].at(at.k, at.i)), float(n.b), float(*p.table[2].at(at.k, at.i))};
  if (p.seeds.data != nullptr) {
    n.key = p.seeds.word(at.k, at.i, 0);
    n.transition = p.seeds.word(at.k, at.i, 1);
  }
  return n;
}

// A lane's eight elements of every operand that the form reads.
template <Form F>
struct Elements {
  float v[lane_elements], x[lane_elements], y[lane_elements], old[lane_elements],
      noise[lane_elements];

  __device__ __forceinline__ Element<float> at(uint32_t e) const {
    Element<float> out{};
    out.v = v[e];
    if constexpr (uses_sample(F)) out.x = x[e], out.y = y[e];
    if constexpr (F == Form::mean) out.m = old[e];
    if constexpr (uses_old_velocity(F)) out.v_old = old[e];
    if constexpr (uses_noise(F)) out.noise = noise[e];
    return out;
  }
};

__device__ __forceinline__ void normals(const RowNumbers& row, const TileAt& at,
                                        float out[lane_elements]) {
  static_assert(run == 4, "the numbers of one counter");
#pragma unroll
  for (uint32_t q = 0; q < lane_elements / run; ++q) {
    const uint64_t counter = uint64_t(at.begin + place_of(q * run)) / run;
    const philox::Words words = philox::generate(row.key, counter, row.transition);
    philox::box_muller(words.w[0], words.w[2], out + 4 * q, out + 4 * q + 1);
    philox::box_muller(words.w[1], words.w[3], out + 4 * q + 2, out + 4 * q + 3);
  }
}

__device__ __forceinline__ void read_velocity(const Plan& p, const char* slot,
                                              float out[lane_elements]) {
  read(slot + p.offset[role_v], p.operand[role_v].dtype, out);
  if (!p.operand[role_uncond]) return;
  float uncond[lane_elements];
  read(slot + p.offset[role_uncond], p.operand[role_uncond].dtype, uncond);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) out[e] = guided(uncond[e], out[e], p.guidance_scale);
}

template <Form F>
__device__ __forceinline__ Elements<F> read_tile(const Plan& p, const RowNumbers& row,
                                                 const TileAt& at, const char* slot) {
  Elements<F> in;
  read_velocity(p, slot, in.v);
  if constexpr (uses_sample(F)) {
    read(slot + p.offset[role_x], p.operand[role_x].dtype, in.x);
    read(slot + p.offset[role_y], p.operand[role_y].dtype, in.y);
  }
  if constexpr (F != Form::log_prob) {
    read(slot + p.offset[role_old], p.operand[role_old].dtype, in.old);
  }
  if constexpr (F == Form::noise) {
    read(slot + p.offset[role_noise], p.operand[role_noise].dtype, in.noise);
  }
  if constexpr (F == Form::seeded) normals(row, at, in.noise);
  return in;
}

// Calls call(std::integral_constant<Form, form>). This is done once a tile: a kernel for each form
// would take five times as long to compile, as most of a kernel does not depend on the form.
template <class Call>
GUARD_OPS_HD void by_form(Form form, Call call) {
  if (form == Form::mean) {
    call(std::integral_constant<Form, Form::mean>{});
  } else if (form == Form::velocity) {
    call(std::integral_constant<Form, Form::velocity>{});
  } else if (form == Form::noise) {
    call(std::integral_constant<Form, Form::noise>{});
  } else if (form == Form::seeded) {
    call(std::integral_constant<Form, Form::seeded>{});
  } else {
    call(std::integral_constant<Form, Form::log_prob>{});
  }
}

// Adds this lane's part of the tile's sums to `total`. It is summed in float32, and added in
// float64.
template <Form F>
__device__ __forceinline__ void add_sums_of(const Plan& p, const RowNumbers& row, const TileAt& at,
                                            const char* slot, Sums& total) {
  const Elements<F> in = read_tile<F>(p, row, at, slot);
  float s1 = 0, s2 = 0;
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const Element<float> x = in.at(e);
    const float d = delta<F>(row.step, x);
    if constexpr (F != Form::log_prob) s1 = fma(d, residual<F>(row.step, x), s1);
    s2 = fma(d, d, s2);
  }
  total.s1 += double(s1);
  total.s2 += double(s2);
  if (!p.operand[role_ref]) return;
  float ref[lane_elements], drift = 0;
  read(slot + p.offset[role_ref], p.operand[role_ref].dtype, ref);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const float d = row.step.b * (in.v[e] - ref[e]);
    drift = fma(d, d, drift);
  }
  total.ref += double(drift);
}

__device__ __forceinline__ void add_sums(const Plan& p, const RowNumbers& row, const TileAt& at,
                                         const char* slot, Sums& total) {
  by_form(p.form, [&](auto form) { add_sums_of<decltype(form)::value>(p, row, at, slot, total); });
}

// What the gradient of a row is made of: its factors, and which of its terms there are.
struct RowGradient {
  Factors<float> k;
  GradientKind kind;
  bool silent, nan, with_ref;  // silent: c1 and c2 are 0
};

__device__ __forceinline__ RowGradient row_gradient_of(const Plan& p, const RowNumbers& row,
                                                       const Coefficients& c) {
  const Factors<double> exact = factors_of(row.b, c);
  return {{float(exact.k1), float(exact.k2), float(exact.k3)},
          p.kind == GradientKind::general ? gradient_kind_of(c.c1, c.c2) : p.kind,
          c.c1 == 0 && c.c2 == 0,
          c.c1 != c.c1,
          p.operand[role_ref] && c.c3 != 0};
}

// Writes the gradient of a tile into its slot, in place of v, and of uncond. Coefficients that are
// 0 give 0, and NaN ones NaN, whatever the operands hold, as some may not have been read.
template <Form F>
__device__ __forceinline__ void gradient_of(const Plan& p, const RowNumbers& row,
                                            const RowGradient& gradient, const TileAt& at,
                                            char* slot) {
  const Elements<F> in = read_tile<F>(p, row, at, slot);
  float g[lane_elements], ref[lane_elements];
  if (gradient.with_ref) read(slot + p.offset[role_ref], p.operand[role_ref].dtype, ref);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const Element<float> x = in.at(e);
    if (gradient.silent || gradient.nan) {
      g[e] = gradient.nan ? gradient.k.k1 : 0;
    } else if (gradient.kind == GradientKind::departure) {
      g[e] = gradient.k.k1 * departure<F>(row.step, x);
    } else if (gradient.kind == GradientKind::residual) {
      g[e] = gradient.k.k1 * residual<F>(row.step, x);
    } else {
      g[e] = velocity_gradient<F>(gradient.k, row.step, x);
    }
    if (gradient.with_ref) g[e] = fma(gradient.k.k3, in.v[e] - ref[e], g[e]);
  }
  if (p.operand[role_uncond]) {
    float rest[lane_elements];
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) {
      rest[e] = p.uncond_scale * g[e];
      g[e] = p.guidance_scale * g[e];
    }
    write(slot + p.offset[role_uncond], p.operand[role_uncond].dtype, rest);
  }
  write(slot + p.offset[role_v], p.operand[role_v].dtype, g);
}

__device__ __forceinline__ void gradient_in_place(const Plan& p, const RowNumbers& row,
                                                  const RowGradient& gradient, const TileAt& at,
                                                  char* slot) {
  by_form(p.form,
          [&](auto form) { gradient_of<decltype(form)::value>(p, row, gradient, at, slot); });
}

// ---- the way through all tiles ------------------------------------------------------------------
//
// The warps of a block take its chunks in turn. The first tiles of a warp stay in their slots for
// the second pass. What does not fit goes through a ring of slots and is read again, the last tile
// first, as that is still in the L2 cache. Copies are started `ahead` tiles before their tile's
// turn.

struct Slots {
  char* memory;       // where this warp's slots begin
  uint32_t count;     // how many it has
  uint32_t ring;      // how many of them are the ring: 1, 2 or 4
  uint32_t resident;  // how many tiles stay

  __device__ __forceinline__ uint32_t ahead() const { return ring - 1; }
};

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

  // Waits until the oldest tile's copies have landed, those of all lanes.
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
      wait();
      const bool last = ++sub == p.chunk_tiles;
      body(row, here, slot(t), last);
      sync_warp();  // every lane has read the slot before it is filled anew
      if (last) sub = 0;
    }
    wait_copies<0>();
  }

  // Forms the sums of every chunk; every lane calls done(at, sums).
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

  // Writes the gradient of every tile into `cond` and `uncond` (either may be absent);
  // coefficients_of(at) are those of a row.
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
    RowGradient gradient{};
    for (uint32_t q = 0; q < tiles; ++q) {
      const uint32_t t = tiles - 1 - q;
      restart(q + slots.ahead());
      if (move(here, t, lane() == 0 ? cond : uncond)) {
        row = numbers_of(p, here.at);
        gradient = row_gradient_of(p, row, coefficients_of(here.at));
      }
      char* const at_slot = t < slots.resident ? slot(t) : ring_slot(q);
      wait();
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
