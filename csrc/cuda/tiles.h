// How a batch is cut up into tiles, chunks and parts, what a kernel has to know of it, and how a
// warp brings a tile into shared memory and out again, and reads its elements there.
//
// A tile is what a warp holds at once, 8 elements a lane. A chunk is a run of tiles of one row
// whose sums a warp forms. A part is every `row_parts`-th 32 chunks of a row, whose sums a warp
// adds up. How many tiles a chunk and how many parts a row has depends on the row's length alone,
// so it is the same for every kernel and path, and all of them give the same bits.
//
// A slot is the shared memory of one tile's operands, as they are stored.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "../transition.h"
#include "team.h"

namespace guard_ops::cuda {

constexpr uint32_t lane_elements = 8, tile = lane_elements * warp_size;
constexpr uint32_t run = 4;               // adjacent elements of a lane: 16 bytes in float32
constexpr uint32_t most_chunk_tiles = 4;  // a chunk's tiles, at most
constexpr uint32_t chunks_aimed_at =
    256;                               // a row's chunks, at most, where chunks of 4 tiles suffice
constexpr uint32_t most_parts = 8;     // a row's parts, at most
constexpr uint32_t part_chunks = 256;  // a part's chunks, at most, where 8 parts suffice
constexpr uint32_t ring_slots = 4;     // the slots of a warp's ring, at most

// Blocks that are to fit into a multiprocessor's registers. From sm_120 on the assembler needs more
// registers for a thread.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int sums_blocks = 2, gradient_blocks = 1;
#else
constexpr int sums_blocks = 3, gradient_blocks = 2;
#endif

enum Role { role_v, role_uncond, role_ref, role_x, role_y, role_old, role_noise, roles };
using Roles = uint32_t;  // a set of roles: bit r is set if it has role r
constexpr Roles every_role = (1u << roles) - 1;
GUARD_OPS_HD constexpr Roles bit(Role r) { return 1u << r; }

// The operands that a gradient needs whose coefficients are all of one kind.
inline Roles roles_of(Form form, GradientKind kind, bool with_ref) {
  const Roles velocity = bit(role_v) | bit(role_uncond), sample = bit(role_x) | bit(role_y);
  Roles read = with_ref ? velocity | bit(role_ref) : 0;
  if (kind == GradientKind::general) return every_role;
  if (kind == GradientKind::departure) {
    return read | velocity | (uses_noise(form) ? bit(role_old) | bit(role_noise) : sample);
  }
  if (uses_noise(form)) return read | bit(role_noise);
  if (form == Form::mean) return read | bit(role_y) | bit(role_old);
  return form == Form::velocity ? read | sample | bit(role_old) : read;
}

// Divides n < 2^31 by d by means of a multiplication, as a device has no instruction for division.
struct Divisor {
  uint32_t d = 1, shift = 31;
  uint64_t multiplier = 1;

  Divisor() = default;
  explicit Divisor(uint32_t d) : d(d) {
    while ((uint64_t(1) << (shift - 31)) < d) ++shift;
    multiplier = (uint64_t(1) << shift) / d + 1;
    if (d == 1) shift = 31, multiplier = uint64_t(1) << 31;
  }
  GUARD_OPS_HD uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>(n * multiplier >> shift);
  }
};

// What is known of a batch when its kernels are compiled, where it is one of those below: the form,
// the dtype of the latents and that of the old mean, rows that all begin on 16 bytes and end with a
// whole tile, and neither guidance, reference nor mask, and no shard. A warp then has no question
// to ask a tile. The slot is that of `Plan`.
template <Form F, DType T, DType Old>
struct FixedLayout {
  static constexpr Form form = F;
  static constexpr bool fixed = true;
  static constexpr Roles present = bit(role_v) | (uses_sample(F) ? bit(role_x) | bit(role_y) : 0) |
                                   (F == Form::log_prob ? 0 : bit(role_old)) |
                                   (F == Form::noise ? bit(role_noise) : 0);

  static GUARD_OPS_HD constexpr bool has(uint32_t r) { return present >> r & 1; }
  static GUARD_OPS_HD constexpr DType dtype(uint32_t r) {
    return r == role_old && F == Form::mean ? Old : T;
  }
  static GUARD_OPS_HD constexpr bool wide(uint32_t r) { return dtype(r) == DType::f32; }
  static GUARD_OPS_HD constexpr uint32_t tile_bytes(uint32_t r) {
    return tile * uint32_t(size_of(dtype(r)));
  }
  // Where an operand begins in a slot. This is no loop, of which the compiler would make one.
  static GUARD_OPS_HD constexpr uint32_t offset(uint32_t r) {
    static_assert(roles <= 8, "one term for each");
    return before(0, r) + before(1, r) + before(2, r) + before(3, r) + before(4, r) + before(5, r) +
           before(6, r) + before(7, r);
  }
  static GUARD_OPS_HD constexpr uint32_t slot_bytes() { return offset(roles); }

 private:
  static GUARD_OPS_HD constexpr uint32_t before(uint32_t r, uint32_t other) {
    return r < other && has(r) ? tile_bytes(r) : 0;
  }
};

// The layouts that kernels are compiled for, as X(form, dtype, dtype of the old mean).
#define GUARD_OPS_LAYOUTS(X) \
  X(mean, bf16, f32)         \
  X(mean, bf16, bf16)        \
  X(mean, f32, f32)          \
  X(velocity, bf16, bf16)    \
  X(velocity, f32, f32)      \
  X(noise, bf16, bf16)       \
  X(noise, f32, f32)         \
  X(seeded, bf16, bf16)      \
  X(seeded, f32, f32)        \
  X(log_prob, bf16, bf16)    \
  X(log_prob, f32, f32)

struct Plan {
  Form form;
  uint32_t layout;            // bit n is set if it is layout n; 0 if it is none of them
  Operand operand[roles];     // absent ones are null
  uint32_t offset[roles];     // where an operand's part of a slot begins
  Roles present, even, wide;  // even: all rows begin on 16 bytes; wide: the dtype is float32
  GradientKind kind;          // the kind of all rows' coefficients, if it is known; else general
  Roles again;                // the operands that a second pass reads
  uint32_t slot_bytes;
  uint32_t mean_offset;  // where in a slot sde_step puts the mean
  uint32_t rows, chunk_tiles, row_chunks, row_parts, chunks;
  uint32_t row_tiles;
  int64_t numel;
  Divisor by_batch, by_row_chunks, by_chunk_tiles;
  uint32_t batch;
  Seeds seeds;
  float guidance_scale, uncond_scale;  // uncond_scale: 1 - guidance_scale
  Doubles table[3];                    // a, b, s
  Mask mask;
};

// Calls call(layout) with the plan's FixedLayout and returns true, or false if it has none. The
// bits keep the compiler from making a table of jumps of this.
template <class Call>
GUARD_OPS_HD bool by_layout(const Plan& p, Call call) {
  uint32_t n = 0;
#define GUARD_OPS_CALL(form, dtype, old)                       \
  if (p.layout >> n++ & 1) {                                   \
    call(FixedLayout<Form::form, DType::dtype, DType::old>{}); \
    return true;                                               \
  }
  GUARD_OPS_LAYOUTS(GUARD_OPS_CALL)
#undef GUARD_OPS_CALL
  return false;
}

// The bit of the layout that a plan is of, or 0.
inline uint32_t layout_of(const Plan& p) {
  const uint64_t tiles = uint64_t(p.chunks) * p.chunk_tiles;
  if (p.even != p.present || p.numel % tile != 0 || tiles >= uint64_t(1) << 31) return 0;
  const DType old = p.form == Form::mean ? p.operand[role_old].dtype : p.operand[role_v].dtype;
  uint32_t n = 0;
  const auto matches = [&](auto layout) {
    using L = decltype(layout);
    if (p.form != L::form || p.present != L::present || old != L::dtype(role_old)) return false;
    for (uint32_t r = 0; r < roles; ++r) {
      if (L::has(r) && p.operand[r].dtype != L::dtype(r)) return false;
    }
    return true;
  };
#define GUARD_OPS_CALL(form, dtype, old)                                                     \
  if (matches(FixedLayout<Form::form, DType::dtype, DType::old>{})) return uint32_t(1) << n; \
  ++n;
  GUARD_OPS_LAYOUTS(GUARD_OPS_CALL)
#undef GUARD_OPS_CALL
  return 0;
}

// How many of a warp's slots are a ring that its tiles take turns in. `keeps`: whether the others
// keep their tiles for a second pass, because there are more tiles than slots.
GUARD_OPS_HD uint32_t ring_of(uint32_t slots, bool keeps) {
  const uint32_t most = keeps && slots < 2 * ring_slots ? 2 : ring_slots;
  return slots >= most ? most : slots >= 2 ? 2 : 1;
}

// The shared memory of a warp: slots, and, where a second pass comes and the layout is known, room
// for the directions of tiles, all that the gradient needs of them: 4 bytes an element, where
// operands are 6 to 20. Then all slots are the ring.
struct Room {
  uint32_t slots, directions;
};
constexpr uint32_t direction_bytes = tile * sizeof(float);

GUARD_OPS_HD uint32_t bytes_of(const Plan& p, const Room& room) {
  return room.slots * p.slot_bytes + room.directions * direction_bytes;
}

// How many of a warp's tiles stay for the second pass.
GUARD_OPS_HD uint32_t resident_of(const Room& room, uint32_t tiles) {
  if (room.directions != 0) return tiles < room.directions ? tiles : room.directions;
  return tiles <= room.slots ? tiles : room.slots - ring_of(room.slots, true);
}

// The room of a warp in so many bytes that keeps most of `tiles` tiles.
inline Room room_to_keep(const Plan& p, int64_t bytes, uint32_t tiles) {
  const uint32_t slots = uint32_t(bytes / p.slot_bytes);
  const bool known = p.layout != 0 && p.kind != GradientKind::general;
  if (!known || slots < 2 || tiles <= slots) return {tiles < slots ? tiles : slots, 0};
  const uint32_t ring = ring_of(slots, true);
  const int64_t directions = (bytes - ring * p.slot_bytes) / direction_bytes;
  return {ring, uint32_t(directions < tiles ? directions : tiles)};
}

// Whether all rows of an operand begin on 16 bytes.
inline bool rows_are_aligned(const Operand& x, int64_t steps, int64_t batch) {
  const int64_t size = size_of(x.dtype);
  const uint64_t offsets = reinterpret_cast<uintptr_t>(x.data) |
                           (steps > 1 ? x.stride_k * size : 0) |
                           (batch > 1 ? x.stride_b * size : 0);
  return offsets % 16 == 0;
}

// The plan of a batch. `with_mean`: whether a slot has room for sde_step's float32 mean.
inline Plan plan_of(const Batch& t, const Doubles* table, bool with_mean = false) {
  Plan p{};
  p.form = t.form;
  p.kind = GradientKind::general;
  p.again = every_role;
  const Operand* const operands[roles] = {
      &t.v, &t.uncond, &t.ref, &t.x, &t.y, t.m ? &t.m : &t.v_old, &t.noise};
  for (int r = 0; r < roles; ++r) {
    p.operand[r] = *operands[r];
    p.offset[r] = p.slot_bytes;
    if (!p.operand[r]) continue;
    p.present |= 1u << r;
    const Operand& x = p.operand[r];
    if (rows_are_aligned(x, t.steps, t.batch)) p.even |= 1u << r;
    if (x.dtype == DType::f32) p.wide |= 1u << r;
    p.slot_bytes += uint32_t(tile * size_of(p.operand[r].dtype));
  }
  p.mean_offset = p.slot_bytes;
  if (with_mean) p.slot_bytes += tile * sizeof(float);
  const int64_t tiles = (t.numel + tile - 1) / tile;
  const int64_t aimed = (tiles + chunks_aimed_at - 1) / chunks_aimed_at;
  p.chunk_tiles = uint32_t(aimed < most_chunk_tiles ? aimed : most_chunk_tiles);
  p.row_chunks = uint32_t((tiles + p.chunk_tiles - 1) / p.chunk_tiles);
  p.row_parts = 1;
  while (p.row_parts < most_parts && p.row_parts * part_chunks < p.row_chunks) p.row_parts *= 2;
  p.rows = uint32_t(t.steps * t.batch);
  if (t.steps * t.batch * p.row_chunks >= int64_t(1) << 30) {
    throw std::runtime_error("guard_ops: model_output has too many elements for one CUDA call");
  }
  p.chunks = p.rows * p.row_chunks;
  p.numel = t.numel;
  p.row_tiles = uint32_t(tiles);
  p.batch = uint32_t(t.batch);
  p.by_batch = Divisor(p.batch);
  p.by_row_chunks = Divisor(p.row_chunks);
  p.by_chunk_tiles = Divisor(p.chunk_tiles);
  p.seeds = t.seeds;
  p.guidance_scale = float(t.guidance_scale);
  p.uncond_scale = float(1 - t.guidance_scale);
  for (int n = 0; n < 3; ++n) p.table[n] = table[n];
  p.mask = t.mask;
  p.layout = with_mean || t.mask || t.seeds.of_shard ? 0 : layout_of(p);
  return p;
}

// Prepares the plan for a second pass over coefficients that are all of one kind, which writes the
// gradient into `out`.
inline void expect(Plan& p, GradientKind kind, const Operand& out) {
  if (out && !rows_are_aligned(out, p.rows / p.batch, p.batch)) p.layout = 0;
  p.kind = kind;
  p.again = roles_of(p.form, kind, bool(p.operand[role_ref]));
}

// ---- a tile in global and in shared memory ------------------------------------------------------
//
// Only copies touch global memory: 16 bytes a lane where a row is so aligned, element by element
// where it is not. What reads a slot tells dtypes apart, once for 8 elements, unless the compiler
// knows the dtype.

// Where in the batch a tile lies.
struct TileAt {
  int64_t begin;              // its first element, counted from the row's
  uint32_t k, i, row, chunk;  // row = k B + i
  uint32_t count;             // how many elements it has; 0 behind the row's end
};

// The place in a tile of this lane's element `e`. A lane has two runs, so that a warp reads 512
// consecutive bytes of float32, or 256 of a 16-bit type. If its eight elements were all adjacent,
// lanes would want the same banks of shared memory.
__device__ __forceinline__ uint32_t place_in_lane(uint32_t e) {
  return e / run * (run * warp_size) + e % run;
}
__device__ __forceinline__ uint32_t place_of(uint32_t e) { return place_in_lane(e) + lane() * run; }

template <class T>
__device__ __forceinline__ void copy_elements(char* to, const char* from, uint32_t first,
                                              uint32_t count) {
#pragma unroll 1
  for (uint32_t e = first + lane(); e < count; e += warp_size) {
    reinterpret_cast<T*>(to)[e] = reinterpret_cast<const T*>(from)[e];
  }
}

__device__ __forceinline__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Bytes16) == 0;
}

// Copies the elements behind the first `vectors` units of 16 bytes one by one.
__device__ __forceinline__ void copy_rest(char* to, const char* from, uint32_t vectors,
                                          uint32_t count, bool wide) {
  if (wide) {
    copy_elements<uint32_t>(to, from, vectors * 4, count);
  } else {
    copy_elements<uint16_t>(to, from, vectors * 8, count);
  }
}

// Loads an operand's part of a tile that is cut off by the row's end, or whose row does not begin
// on 16 bytes. Elements behind the row's end become 0, and add 0 to every sum.
__device__ __forceinline__ void load_uneven(const char* from, bool wide, char* to, uint32_t count) {
  const uint32_t vectors = aligned(from) ? count / (wide ? 4 : 8) : 0;
  const SharedAddress address = address_of(to);
#pragma unroll 1
  for (uint32_t v = lane(); v < vectors; v += warp_size) {
    copy_async(address + v * sizeof(Bytes16), from + v * sizeof(Bytes16));
  }
  copy_rest(to, from, vectors, count, wide);
#pragma unroll 1
  for (uint32_t e = count + lane(); e < tile; e += warp_size) {
    if (wide) {
      reinterpret_cast<uint32_t*>(to)[e] = 0;
    } else {
      reinterpret_cast<uint16_t*>(to)[e] = 0;
    }
  }
}

// Starts the copies of a tile's wanted operands; they belong to the group that is committed next.
// `lane_address`: lane r has the address of role r's part.
__device__ __forceinline__ void load_tile(const Plan& p, Roles wanted, char* slot,
                                          char* lane_address, uint32_t count) {
  const Roles even = count == tile ? p.even & wanted : 0, uneven = p.present & wanted & ~even;
  const uint32_t offset = lane() * sizeof(Bytes16);
  const SharedAddress to = address_of(slot) + offset;
#pragma unroll
  for (uint32_t r = 0; r < roles; ++r) {
    if (!(even >> r & 1)) continue;
    const char* const from = broadcast(lane_address, r) + offset;
    constexpr uint32_t round = warp_size * sizeof(Bytes16);
    copy_async(to + p.offset[r], from);
    if (p.wide >> r & 1) copy_async(to + p.offset[r] + round, from + round);
  }
  if (uneven == 0) return;
#pragma unroll 1
  for (uint32_t r = 0; r < roles; ++r) {
    if (!(uneven >> r & 1)) continue;
    load_uneven(broadcast(lane_address, r), p.wide >> r & 1, slot + p.offset[r], count);
  }
}

// Copies an operand's part of a slot to global memory. The warp has to have synchronized since it
// was written.
__device__ __forceinline__ void store_tile(char* to, bool wide, const char* from, uint32_t count) {
  const uint32_t vectors = aligned(to) ? count / (wide ? 4 : 8) : 0;
#pragma unroll
  for (uint32_t n = 0; n < 2; ++n) {
    const uint32_t v = n * warp_size + lane();
    if (v < vectors) {
      store_global(to + v * sizeof(Bytes16), reinterpret_cast<const Bytes16*>(from)[v]);
    }
  }
  if (vectors * (wide ? 4 : 8) < count) copy_rest(to, from, vectors, count, wide);
}

// Reads this lane's 8 elements of an operand. The dtype is asked for once for all of them:
// converting both ways and choosing afterwards would be half of what a warp does.
__device__ __forceinline__ void read(const char* from, DType dtype, float out[lane_elements]) {
  constexpr uint32_t runs = lane_elements / run;
  if (dtype == DType::f32) {
#pragma unroll
    for (uint32_t n = 0; n < runs; ++n) {
      const Bytes16 x = reinterpret_cast<const Bytes16*>(from)[n * warp_size + lane()];
#pragma unroll
      for (uint32_t e = 0; e < run; ++e) out[n * run + e] = from_bits(x.w[e]);
    }
    return;
  }
  Bytes8 x[runs];
#pragma unroll
  for (uint32_t n = 0; n < runs; ++n) {
    x[n] = reinterpret_cast<const Bytes8*>(from)[n * warp_size + lane()];
  }
  const auto convert = [&](auto one_word) {
#pragma unroll
    for (uint32_t w = 0; w < lane_elements / 2; ++w) {
      one_word(x[w / (run / 2)].w[w % (run / 2)], out + 2 * w, out + 2 * w + 1);
    }
  };
  if (dtype == DType::bf16) {
    convert([](uint32_t word, float* low, float* high) { from_bfloats(word, low, high); });
  } else {
    convert([](uint32_t word, float* low, float* high) { from_halves(word, low, high); });
  }
}

// A lane's run of 4 elements, each rounded once.
__device__ __forceinline__ Bytes16 wide_run(const float in[run]) {
  Bytes16 x;
#pragma unroll
  for (uint32_t e = 0; e < run; ++e) x.w[e] = bits_of(in[e]);
  return x;
}
__device__ __forceinline__ Bytes8 narrow_run(DType dtype, const float in[run]) {
  Bytes8 x;
#pragma unroll
  for (uint32_t w = 0; w < run / 2; ++w) {
    const float* const two = in + 2 * w;
    x.w[w] = dtype == DType::bf16 ? to_bfloats(two[0], two[1]) : to_halves(two[0], two[1]);
  }
  return x;
}

// Writes this lane's 8 elements into a slot.
__device__ __forceinline__ void write(char* to, DType dtype, const float in[lane_elements]) {
#pragma unroll
  for (uint32_t n = 0; n < lane_elements / run; ++n) {
    const uint32_t at = n * warp_size + lane();
    if (dtype == DType::f32) {
      reinterpret_cast<Bytes16*>(to)[at] = wide_run(in + n * run);
    } else {
      reinterpret_cast<Bytes8*>(to)[at] = narrow_run(dtype, in + n * run);
    }
  }
}

// Stores this lane's 8 elements of a whole tile in global memory. `to`: this lane's first one, at
// a multiple of a run's bytes. The lanes of a warp store adjacent runs.
__device__ __forceinline__ void store_lane(char* to, DType dtype, const float in[lane_elements]) {
#pragma unroll
  for (uint32_t n = 0; n < lane_elements / run; ++n) {
    if (dtype == DType::f32) {
      store_global(to + n * warp_size * sizeof(Bytes16), wide_run(in + n * run));
    } else {
      store_global(to + n * warp_size * sizeof(Bytes8), narrow_run(dtype, in + n * run));
    }
  }
}

}  // namespace guard_ops::cuda
