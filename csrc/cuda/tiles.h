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
  int64_t begin;              // from this element of the row on
  uint32_t k, i, row, chunk;  // row = k B + i
  uint32_t count;             // its elements, 0 behind the row's end
};

struct alignas(8) Bytes8 {
  uint32_t w[2];
};

// Where element `e` of this lane lies in a tile: in runs, so that a warp reads 512 bytes of float32
// that follow each other, and 256 of 16 bits. A lane with eight elements beside each other would
// have the shared memory's banks in conflict.
__device__ __forceinline__ uint32_t place_of(uint32_t e) {
  return e / run * (run * warp_size) + lane() * run + e % run;
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

// A tile's part of an operand, where it or its row is not whole in units of 16 bytes. What is not
// of the row becomes 0, and so does its part of every sum.
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
// Lane r has the address of role r's part, `own`.
__device__ __forceinline__ void load_tile(const Plan& p, Roles wanted, char* slot, char* own,
                                          uint32_t count) {
  const Roles even = count == tile ? p.even & wanted : 0, uneven = p.present & wanted & ~even;
  const uint32_t offset = lane() * sizeof(Bytes16);
  const SharedAddress to = address_of(slot) + offset;
#pragma unroll
  for (uint32_t r = 0; r < roles; ++r) {
    if (!(even >> r & 1)) continue;
    const char* const from = broadcast(own, r) + offset;
    constexpr uint32_t round = warp_size * sizeof(Bytes16);
    copy_async(to + p.offset[r], from);
    if (p.wide >> r & 1) copy_async(to + p.offset[r] + round, from + round);
  }
  if (uneven == 0) return;
#pragma unroll 1
  for (uint32_t r = 0; r < roles; ++r) {
    if (!(uneven >> r & 1)) continue;
    load_uneven(broadcast(own, r), p.wide >> r & 1, slot + p.offset[r], count);
  }
}

// A tile's part of a slot to global memory; the warp has synchronized since it was written.
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

// This lane's 8 elements of an operand. Its type is asked for once: two conversions of which one is
// not wanted would be half of what a warp does.
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

// And its 8 elements back, each rounded once.
__device__ __forceinline__ void write(char* to, DType dtype, const float in[lane_elements]) {
#pragma unroll
  for (uint32_t n = 0; n < lane_elements / run; ++n) {
    if (dtype == DType::f32) {
      Bytes16 x;
#pragma unroll
      for (uint32_t e = 0; e < run; ++e) x.w[e] = bits_of(in[n * run + e]);
      reinterpret_cast<Bytes16*>(to)[n * warp_size + lane()] = x;
      continue;
    }
    Bytes8 x;
#pragma unroll
    for (uint32_t w = 0; w < run / 2; ++w) {
      const float* const two = in + n * run + 2 * w;
      x.w[w] = dtype == DType::bf16 ? to_bfloats(two[0], two[1]) : to_halves(two[0], two[1]);
    }
    reinterpret_cast<Bytes8*>(to)[n * warp_size + lane()] = x;
  }
}

// One row's numbers, as the arithmetic takes them.
struct RowNumbers {
  Step<float> step;
  double b;  // not rounded
  uint64_t key, transition;
};

__device__ __forceinline__ RowNumbers numbers_of(const Plan& p, const At& at) {
  RowNumbers n{};
  n.b = *p.table[1].at(at.k, at.i);
  n.step = {float(*p.table[0].at(at.k, at.i)), float(n.b), float(*p.table[2].at(at.k, at.i))};
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

__device__ __forceinline__ void normals(const RowNumbers& row, const At& at,
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
  if constexpr (F == Form::seeded) normals(row, at, in.noise);
  return in;
}

// Adds this lane's part of the tile's sums: in float32 within it, in float64 to `total`.
template <Form F>
__device__ __forceinline__ void add_sums_of(const Plan& p, const RowNumbers& row, const At& at,
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

// What the gradient of a row is made of, as the arithmetic takes it.
struct Direction {
  Factors<float> k;
  GradientKind kind;
  bool silent, nan, with_ref;  // silent: its coefficients but the reference's are 0
};

__device__ __forceinline__ Direction direction_of(const Plan& p, const RowNumbers& row,
                                                  const Coefficients& c) {
  const Factors<double> exact = factors_of(row.b, c);
  return {{float(exact.k1), float(exact.k2), float(exact.k3)},
          p.kind == GradientKind::general ? gradient_kind_of(c.c1, c.c2) : p.kind,
          c.c1 == 0 && c.c2 == 0,
          c.c1 != c.c1,
          p.operand[role_ref] && c.c3 != 0};
}

// The gradient of a tile in place of v, and of uncond, in the slot. Coefficients of 0 give 0, and
// NaN ones NaN, whatever the operands hold, as some may not have been read.
template <Form F>
__device__ __forceinline__ void gradient_of(const Plan& p, const RowNumbers& row,
                                            const Direction& to, const At& at, char* slot) {
  const Elements<F> in = read_tile<F>(p, row, at, slot);
  float g[lane_elements], ref[lane_elements];
  if (to.with_ref) read(slot + p.offset[role_ref], p.operand[role_ref].dtype, ref);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const Element<float> x = in.at(e);
    if (to.silent || to.nan) {
      g[e] = to.nan ? to.k.k1 : 0;
    } else if (to.kind == GradientKind::departure) {
      g[e] = to.k.k1 * departure<F>(row.step, x);
    } else if (to.kind == GradientKind::residual) {
      g[e] = to.k.k1 * residual<F>(row.step, x);
    } else {
      g[e] = velocity_gradient<F>(to.k, row.step, x);
    }
    if (to.with_ref) g[e] = fma(to.k.k3, in.v[e] - ref[e], g[e]);
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
                                                  const Direction& to, const At& at, char* slot) {
  by_form(p.form, [&](auto form) { gradient_of<decltype(form)::value>(p, row, to, at, slot); });
}

}  // namespace guard_ops::cuda
