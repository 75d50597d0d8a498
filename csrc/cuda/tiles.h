// One tile, by one warp: its operands into shared memory, its sums, its gradient in place of v, and
// that out again.
//
// Global memory is touched by copies alone, 16 bytes a lane where a row is so aligned and element
// by element where not; dtypes are told apart once for 8 elements. So neither multiplies the
// kernels.
#pragma once

#include "device.h"
#include "plan.h"

namespace guard_ops::cuda {

__device__ __forceinline__ uint32_t lane() { return thread() % warp_size; }
__device__ __forceinline__ uint32_t warp() { return thread() / warp_size; }
__device__ __forceinline__ uint32_t warps() { return threads() / warp_size; }

// Where a tile lies.
struct At {
  int64_t k, i, begin;         // of the row, from this element on
  uint32_t row, chunk, count;  // count: its elements, 0 behind the row's end
};

// Tile `sub` of a chunk.
__device__ __forceinline__ At locate(const Plan& p, uint32_t chunk, uint32_t sub) {
  At at;
  at.chunk = chunk;
  at.row = p.by_row_chunks.divide(chunk);
  const uint32_t k = p.by_batch.divide(at.row);
  at.k = k;
  at.i = at.row - k * p.batch;
  at.begin = (int64_t(chunk - at.row * p.row_chunks) * p.chunk_tiles + sub) * tile;
  const int64_t rest = p.numel - at.begin;
  at.count = uint32_t(rest < 0 ? 0 : rest < tile ? rest : tile);
  return at;
}

struct alignas(16) Bytes16 {
  uint32_t w[4];
};

__device__ __forceinline__ char* row_of(const Operand& x, const At& at) {
  return x.row(at.k, at.i) + at.begin * size_of(x.dtype);
}

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

// What does not go in units of 16 bytes.
__device__ __forceinline__ void copy_rest(char* to, const char* from, uint32_t vectors,
                                          uint32_t count, bool wide) {
  if (wide) {
    copy_elements<uint32_t>(to, from, vectors * 4, count);
  } else {
    copy_elements<uint16_t>(to, from, vectors * 8, count);
  }
}

// A tile's part of an operand, where it or its row is not whole in units of 16 bytes.
__device__ __forceinline__ void load_uneven(const Operand& x, char* to, const At& at) {
  const bool wide = x.dtype == DType::f32;
  const char* const from = row_of(x, at);
  const uint32_t vectors = aligned(from) ? at.count / (wide ? 4 : 8) : 0;
#pragma unroll 1
  for (uint32_t v = lane(); v < vectors; v += warp_size) {
    copy_async(to + v * sizeof(Bytes16), from + v * sizeof(Bytes16));
  }
  if (vectors * (wide ? 4 : 8) < at.count) copy_rest(to, from, vectors, at.count, wide);
}

// Starts the copies of a tile's wanted operands; they belong to the group that is committed next.
// Unrolled where it matters: a loop looks each operand up in the arguments, loads that wait for
// one another.
__device__ __forceinline__ void load_tile(const Plan& p, Roles wanted, char* slot, const At& at) {
  const Roles even = at.count == tile ? p.even & wanted : 0, uneven = p.present & wanted & ~even;
#pragma unroll
  for (uint32_t r = 0; r < roles; ++r) {
    if (!(even >> r & 1)) continue;
    const Operand& x = p.operand[r];
    const char* const from = row_of(x, at) + lane() * sizeof(Bytes16);
    char* const to = slot + p.offset[r] + lane() * sizeof(Bytes16);
    constexpr uint32_t round = warp_size * sizeof(Bytes16);
    copy_async(to, from);
    if (x.dtype == DType::f32) copy_async(to + round, from + round);
  }
  if (uneven == 0) return;
#pragma unroll 1
  for (uint32_t r = 0; r < roles; ++r) {
    if (uneven >> r & 1) load_uneven(p.operand[r], slot + p.offset[r], at);
  }
}

// A tile's part of a slot to global memory; the warp has synchronized since it was written.
__device__ __forceinline__ void store_tile(const Operand& x, const char* from, const At& at) {
  const bool wide = x.dtype == DType::f32;
  char* const to = row_of(x, at);
  const uint32_t vectors = aligned(to) ? at.count / (wide ? 4 : 8) : 0;
#pragma unroll
  for (uint32_t n = 0; n < 2; ++n) {
    const uint32_t v = n * warp_size + lane();
    if (v < vectors) {
      reinterpret_cast<Bytes16*>(to)[v] = reinterpret_cast<const Bytes16*>(from)[v];
    }
  }
  if (vectors * (wide ? 4 : 8) < at.count) copy_rest(to, from, vectors, at.count, wide);
}

// This lane's 8 elements of an operand.
__device__ __forceinline__ void read(const char* from, DType dtype, float out[lane_elements]) {
  if (dtype == DType::f32) {
    const float* const x = reinterpret_cast<const float*>(
        __builtin_assume_aligned(from + lane() * lane_elements * 4, 16));
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) out[e] = x[e];
    return;
  }
  const Bytes16 x = reinterpret_cast<const Bytes16*>(from)[lane()];
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const uint16_t bits = uint16_t(x.w[e / 2] >> (e % 2 * 16));
    out[e] = dtype == DType::bf16 ? from_bfloat(bits) : from_half(bits);
  }
}

// And its 8 elements back, each rounded once.
__device__ __forceinline__ void write(char* to, DType dtype, const float in[lane_elements]) {
  if (dtype == DType::f32) {
    float* const x =
        reinterpret_cast<float*>(__builtin_assume_aligned(to + lane() * lane_elements * 4, 16));
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) x[e] = in[e];
    return;
  }
  Bytes16 x;
#pragma unroll
  for (uint32_t w = 0; w < 4; ++w) {
    const float low = in[2 * w], high = in[2 * w + 1];
    x.w[w] = dtype == DType::bf16 ? to_bfloat(low) | uint32_t(to_bfloat(high)) << 16
                                  : to_half(low) | uint32_t(to_half(high)) << 16;
  }
  reinterpret_cast<Bytes16*>(to)[lane()] = x;
}

// One row's numbers, as the arithmetic takes them.
struct RowNumbers {
  Step<double> exact;
  Step<float> step;
  uint64_t key, transition;
};

__device__ __forceinline__ RowNumbers numbers_of(const Plan& p, const At& at) {
  RowNumbers n{};
  n.exact = {*p.table[0].at(at.k, at.i), *p.table[1].at(at.k, at.i), *p.table[2].at(at.k, at.i)};
  n.step = {float(n.exact.a), float(n.exact.b), float(n.exact.s)};
  if (p.seeds.data != nullptr) {
    n.key = p.seeds.word(at.k, at.i, 0);
    n.transition = p.seeds.word(at.k, at.i, 1);
  }
  return n;
}

// Eight elements of every operand that the form reads.
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

__device__ __forceinline__ void normals(const RowNumbers& row, int64_t first,
                                        float out[lane_elements]) {
#pragma unroll
  for (uint32_t q = 0; q < lane_elements / 4; ++q) {
    const philox::Words words = philox::generate(row.key, uint64_t(first) / 4 + q, row.transition);
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
__device__ __forceinline__ Elements<F> read_tile(const Plan& p, const RowNumbers& row, const At& at,
                                                 const char* slot) {
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
  if constexpr (F == Form::seeded) normals(row, at.begin + lane() * lane_elements, in.noise);
  return in;
}

// How many of this lane's elements the tile has.
__device__ __forceinline__ uint32_t own_elements(const At& at) {
  const uint32_t first = lane() * lane_elements;
  return at.count < first ? 0 : at.count - first;
}

// Adds this lane's part of the tile's sums: in float32 within it, in float64 to `total`.
template <Form F>
__device__ __forceinline__ void add_sums_of(const Plan& p, const RowNumbers& row, const At& at,
                                            const char* slot, Sums& total) {
  const Elements<F> in = read_tile<F>(p, row, at, slot);
  const uint32_t own = own_elements(at);
  float s1 = 0, s2 = 0;
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const Element<float> x = in.at(e);
    const float d = delta<F>(row.step, x);
    if (e < own) {
      if constexpr (F != Form::log_prob) s1 = fma(d, residual<F>(row.step, x), s1);
      s2 = fma(d, d, s2);
    }
  }
  total.s1 += double(s1);
  total.s2 += double(s2);
  if (!p.operand[role_ref]) return;
  float ref[lane_elements], drift = 0;
  read(slot + p.offset[role_ref], p.operand[role_ref].dtype, ref);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const float d = row.step.b * (in.v[e] - ref[e]);
    if (e < own) drift = fma(d, d, drift);
  }
  total.ref += double(drift);
}

__device__ __forceinline__ void add_sums(const Plan& p, const RowNumbers& row, const At& at,
                                         const char* slot, Sums& total) {
  by_form(p.form, [&](auto form) { add_sums_of<decltype(form)::value>(p, row, at, slot, total); });
}

// A warp's total of a number that each lane has, by a tree; every lane gets it.
__device__ __forceinline__ double warp_total(double x) {
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The gradient of a tile in place of v, and of uncond, in the slot. Coefficients of 0 give 0, and
// NaN ones NaN, whatever the operands hold, as some may not have been read.
template <Form F>
__device__ __forceinline__ void gradient_of(const Plan& p, const RowNumbers& row,
                                            const Coefficients& c, const At& at, char* slot) {
  const Factors<double> exact = factors_of(row.exact.b, c);
  const Factors<float> k{float(exact.k1), float(exact.k2), float(exact.k3)};
  const bool with_ref = p.operand[role_ref] && c.c3 != 0;
  const Shape shape = p.shape == Shape::general ? shape_of(c.c1, c.c2) : p.shape;
  const bool silent = c.c1 == 0 && c.c2 == 0, nan = c.c1 != c.c1;
  const Elements<F> in = read_tile<F>(p, row, at, slot);
  float g[lane_elements], ref[lane_elements];
  if (with_ref) read(slot + p.offset[role_ref], p.operand[role_ref].dtype, ref);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const Element<float> x = in.at(e);
    if (silent || nan) {
      g[e] = nan ? k.k1 : 0;
    } else if (shape == Shape::departure) {
      g[e] = k.k1 * departure<F>(row.step, x);
    } else if (shape == Shape::residual) {
      g[e] = k.k1 * residual<F>(row.step, x);
    } else {
      g[e] = velocity_gradient<F>(k, row.step, x);
    }
    if (with_ref) g[e] = fma(k.k3, in.v[e] - ref[e], g[e]);
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
                                                  const Coefficients& c, const At& at, char* slot) {
  by_form(p.form, [&](auto form) { gradient_of<decltype(form)::value>(p, row, c, at, slot); });
}

}  // namespace guard_ops::cuda
