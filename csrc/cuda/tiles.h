// How a warp brings a tile into shared memory and out again, and reads its elements there.
//
// Only copies touch global memory: 16 bytes a lane where a row is so aligned, element by element
// where it is not. What reads a slot tells dtypes apart, once for 8 elements, unless the compiler
// knows the dtype.
#pragma once

#include "plan.h"

namespace guard_ops::cuda {

// Where in the batch a tile lies.
struct TileAt {
  int64_t begin;              // its first element, counted from the row's
  uint32_t k, i, row, chunk;  // row = k B + i
  uint32_t count;             // how many elements it has; 0 behind the row's end
};

// The place in a tile of this lane's element `e`. A lane has two runs, so that a warp reads 512
// consecutive bytes of float32, or 256 of a 16-bit type. If its eight elements were all adjacent,
// lanes would want the same banks of shared memory.
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
