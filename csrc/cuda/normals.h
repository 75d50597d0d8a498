// philox::box_muller for the device: the bits of CUDA's logf, sqrtf and sincospif, whose operations
// these are, without what those do about arguments that do not occur: subnormal and infinite ones,
// and angles of more than an eighth of a turn.
#pragma once

#include "team.h"

namespace guard_ops::cuda {

// log x of a normal number.
__device__ __forceinline__ float log_of_normal(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t exponent = (bits - 0x3F2AAAABu) & 0xFF800000u;  // x = 2^n m with m in [2/3, 4/3)
  const float m = from_bits(bits - exponent) - 1.0f;
  float p = fma(m, from_bits(0xBE055027u), from_bits(0x3E1039F6u));
  p = fma(p, m, from_bits(0xBDF8CDCCu));
  p = fma(p, m, from_bits(0x3E0F2955u));
  p = fma(p, m, from_bits(0xBE2AD8B9u));
  p = fma(p, m, from_bits(0x3E4CED0Bu));
  p = fma(p, m, from_bits(0xBE7FFF22u));
  p = fma(p, m, from_bits(0x3EAAAA78u));
  p = fma(p, m, -0.5f);
  p = fma(m * p, m, m);
  return fma(float(int32_t(exponent)) * 0x1p-23f, from_bits(0x3F317218u), p);
}

// The square root of a normal number or of 0.
__device__ __forceinline__ float root_of_normal(float x) {
  const float reciprocal = reciprocal_root(x), near = x * reciprocal;
  const float root = fma(fma(-near, near, x), 0.5f * reciprocal, near);
  return x == 0 ? x : root;
}

// sin(pi t) and cos(pi t) for |t| <= 1/4.
__device__ __forceinline__ void sine_cosine(float t, float* sine, float* cosine) {
  const float square = t * t;
  float s = fma(from_bits(0xBF17ACC9u), square, from_bits(0x40233590u));
  s = fma(s, square, from_bits(0xC0A55DF6u));
  *sine = fma(from_bits(0x40490FDBu), t, s * (square * t));
  float c = fma(from_bits(0x3E684E12u), square, from_bits(0xBFAAD2E0u));
  c = fma(c, square, from_bits(0x4081E0CFu));
  c = fma(c, square, from_bits(0xC09DE9E6u));
  *cosine = fma(c, square, 1.0f);
}

// Two normals from a radius word and an angle word: see philox::box_muller.
__device__ __forceinline__ void box_muller(uint32_t radius_word, uint32_t angle_word, float* first,
                                           float* second) {
  const float uniform = fmaxf(float(radius_word), 0.5f) * 0x1p-32f;
  const float radius = root_of_normal(-2.0f * log_of_normal(uniform));
  // two bits are the quadrant: the upper one turns both signs, the lower one swaps the two
  const float signed_radius = from_bits(bits_of(radius) ^ (angle_word & 0x80000000u));
  const float rest = float(int32_t(angle_word & 0x3FFFFFFFu) - 0x20000000);
  float sine, cosine;
  sine_cosine(rest * 0x1p-31f, &sine, &cosine);
  const bool swapped = (angle_word & 0x40000000u) != 0;
  *first = signed_radius * (swapped ? -sine : cosine);
  *second = signed_radius * (swapped ? cosine : sine);
}

}  // namespace guard_ops::cuda
