// How a batch is cut up: the same for every kernel and path, so that all of them give the same
// bits.
//
// A tile is what a warp holds at once, 8 elements a lane. A chunk is a run of tiles of one row
// whose sums a warp forms. A part is every `row_parts`-th 32 chunks of a row, whose sums a warp
// adds up. How many tiles a chunk and parts a row has depends on the row's length alone.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "../batch.h"

namespace guard_ops::cuda {

constexpr uint32_t lane_elements = 8, warp_size = 32, tile = lane_elements * warp_size;
constexpr uint32_t run = 4;  // elements of a lane that lie beside each other: 16 bytes in float32
constexpr uint32_t most_chunk_tiles = 4, chunks_aimed_at = 256;  // of a row
constexpr uint32_t most_parts = 8, part_chunks = 256;  // of a row; of a part, where 8 suffice
constexpr uint32_t ring_slots = 4;                     // that copies go around in, at most

// Blocks that a multiprocessor has registers for. From sm_120 on the assembler wants more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int sums_blocks = 2, gradient_blocks = 1;
#else
constexpr int sums_blocks = 3, gradient_blocks = 2;
#endif

enum Role { role_v, role_uncond, role_ref, role_x, role_y, role_old, role_noise, roles };
using Roles = uint32_t;  // bit r: role r
constexpr Roles every_role = (1u << roles) - 1;
constexpr Roles bit(Role r) { return 1u << r; }

// The operands that a gradient reads whose coefficients are known to be of one kind.
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

// n / d for n < 2^31 by a multiplication.
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

struct Plan {
  Form form;
  Operand operand[roles];     // absent ones are null
  uint32_t offset[roles];     // of an operand's part of a slot
  Roles present, even, wide;  // even: whose rows all begin on 16 bytes; wide: float32
  GradientKind kind;          // of every row's coefficients, where it is known; else general
  Roles again;                // what a second pass reads
  uint32_t slot_bytes;        // of shared memory that a tile takes
  uint32_t mean_offset;       // where sde_step puts the mean
  uint32_t rows, chunk_tiles, row_chunks, row_parts, chunks;
  int64_t numel;
  Divisor by_batch, by_row_chunks, by_chunk_tiles;
  uint32_t batch;
  Seeds seeds;
  float guidance_scale, uncond_scale;  // uncond_scale: 1 - guidance_scale
  Rows table[3];                       // a, b, s
};

// How many of a warp's slots its copies go around in; the rest keep their tiles for a second pass,
// `keeps`, where not all of them fit.
GUARD_OPS_HD uint32_t ring_of(uint32_t slots, bool keeps) {
  const uint32_t most = keeps && slots < 2 * ring_slots ? 2 : ring_slots;
  return slots >= most ? most : slots >= 2 ? 2 : 1;
}

// `with_mean`: a slot has room for sde_step's float32 mean.
inline Plan plan_of(const Batch& t, const Rows* table, bool with_mean = false) {
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
    const int64_t size = size_of(x.dtype);
    const uint64_t offsets = reinterpret_cast<uintptr_t>(x.data) |
                             (t.steps > 1 ? x.stride_k * size : 0) |
                             (t.batch > 1 ? x.stride_b * size : 0);
    if (offsets % 16 == 0) p.even |= 1u << r;
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
  p.batch = uint32_t(t.batch);
  p.by_batch = Divisor(p.batch);
  p.by_row_chunks = Divisor(p.row_chunks);
  p.by_chunk_tiles = Divisor(p.chunk_tiles);
  p.seeds = t.seeds;
  p.guidance_scale = float(t.guidance_scale);
  p.uncond_scale = float(1 - t.guidance_scale);
  for (int n = 0; n < 3; ++n) p.table[n] = table[n];
  return p;
}

// For a second pass whose coefficients are all of one kind.
inline void expect(Plan& p, GradientKind kind) {
  p.kind = kind;
  p.again = roles_of(p.form, kind, bool(p.operand[role_ref]));
}

// Calls call(std::integral_constant<Form, form>). Once a tile: kernels of one form each would be
// five times as long to compile, as most of a kernel does not know the form.
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

}  // namespace guard_ops::cuda
