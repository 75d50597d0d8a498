// philox::box_muller for the device: the bits of CUDA's logf, sqrtf and sincospif, whose operations
// these are, without what those do about arguments that do not occur: subnormal and infinite ones,
// and angles of more than an eighth of a turn.
#pragma once

#include "team.h"

namespace guard_ops::cuda {

template <class T>
__device__ __forceinline__ T from_bits_of_all(uint32_t x) {
  return all<T>(from_bits(x));
}

// log x of a normal number. T here and below: float, or Pair.
template <class T>
__device__ __forceinline__ T log_of_normal(T x) {
  // x = 2^n m with m in [2/3, 4/3)
  const auto exponent = [](float x) { return (bits_of(x) - 0x3F2AAAABu) & 0xFF800000u; };
  const auto c = from_bits_of_all<T>;
  const T m = each(x, [&](float x) { return from_bits(bits_of(x) - exponent(x)); }) - all<T>(1.0f);
  const T n = each(x, [&](float x) { return float(int32_t(exponent(x))); });
  T p = fma(m, c(0xBE055027u), c(0x3E1039F6u));
  p = fma(p, m, c(0xBDF8CDCCu));
  p = fma(p, m, c(0x3E0F2955u));
  p = fma(p, m, c(0xBE2AD8B9u));
  p = fma(p, m, c(0x3E4CED0Bu));
  p = fma(p, m, c(0xBE7FFF22u));
  p = fma(p, m, c(0x3EAAAA78u));
  p = fma(p, m, all<T>(-0.5f));
  p = fma(m * p, m, m);
  return fma(n * all<T>(0x1p-23f), c(0x3F317218u), p);
}

// The square root of a normal number or of 0.
template <class T>
__device__ __forceinline__ T root_of_normal(T x) {
  const T reciprocal = each(x, [](float x) { return reciprocal_root(x); }), about = x * reciprocal;
  const T root = fma(fma(-about, about, x), all<T>(0.5f) * reciprocal, about);
  return each(x, root, [](float x, float root) { return x == 0 ? x : root; });
}

// sin(pi t) and cos(pi t) for |t| <= 1/4.
template <class T>
__device__ __forceinline__ void sine_cosine(T t, T* sine, T* cosine) {
  const auto c = from_bits_of_all<T>;
  const T square = t * t;
  T s = fma(c(0xBF17ACC9u), square, c(0x40233590u));
  s = fma(s, square, c(0xC0A55DF6u));
  *sine = fma(c(0x40490FDBu), t, s * (square * t));
  T q = fma(c(0x3E684E12u), square, c(0xBFAAD2E0u));
  q = fma(q, square, c(0x4081E0CFu));
  q = fma(q, square, c(0xC09DE9E6u));
  *cosine = fma(q, square, all<T>(1.0f));
}

// Two normals from each radius word and angle word, of which T has one or two: see
// philox::box_muller.
template <class T>
__device__ __forceinline__ void box_muller(const uint32_t* radius_words,
                                           const uint32_t* angle_words, T* first, T* second) {
  const auto of = [](const uint32_t* words, auto f) {
    return make<T>([&](int n) { return f(words[n]); });
  };
  const T uniform =
      of(radius_words, [](uint32_t w) { return fmaxf(float(w), 0.5f); }) * all<T>(0x1p-32f);
  const T radius = root_of_normal(all<T>(-2.0f) * log_of_normal(uniform));
  // two bits are the quadrant: the upper one turns both signs, the lower one swaps the two
  const T turned = of(angle_words, [](uint32_t w) { return from_bits(w & 0x80000000u); });
  const T signed_radius = each(
      radius, turned, [](float r, float sign) { return from_bits(bits_of(r) ^ bits_of(sign)); });
  const T rest =
      of(angle_words, [](uint32_t w) { return float(int32_t(w & 0x3FFFFFFFu) - 0x20000000); });
  T sine, cosine;
  sine_cosine(rest * all<T>(0x1p-31f), &sine, &cosine);
  const T x = make<T>(
      [&](int n) { return angle_words[n] & 0x40000000u ? -part(sine, n) : part(cosine, n); });
  const T y = make<T>(
      [&](int n) { return angle_words[n] & 0x40000000u ? part(cosine, n) : part(sine, n); });
  *first = signed_radius * x;
  *second = signed_radius * y;
}

}  // namespace guard_ops::cuda
