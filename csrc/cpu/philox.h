// A tile of the seeded form's noise. Compiled once per instruction set.
#pragma once

#include "simd.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {

typedef uint32_t vu __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef int32_t vi __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef uint64_t vq __attribute__((vector_size(GUARD_OPS_VECTOR)));

// Low and high words of m * x per lane.
GUARD_OPS_HD void multiply(uint32_t m, vu x, vu* low, vu* high) {
  const vq even_mask = vq{} + 0xFFFFFFFFull;
  const vq x64 = (vq)x;
#if GUARD_OPS_VECTOR == 64
  const __m512i factor = _mm512_set1_epi64(m);
  const vq even = (vq)_mm512_mul_epu32((__m512i)x64, factor);
  const vq odd = (vq)_mm512_mul_epu32((__m512i)(x64 >> 32), factor);
#elif GUARD_OPS_VECTOR == 32
  const __m256i factor = _mm256_set1_epi64x(m);
  const vq even = (vq)_mm256_mul_epu32((__m256i)x64, factor);
  const vq odd = (vq)_mm256_mul_epu32((__m256i)(x64 >> 32), factor);
#else
  const __m128i factor = _mm_set1_epi64x(m);
  const vq even = (vq)_mm_mul_epu32((__m128i)x64, factor);
  const vq odd = (vq)_mm_mul_epu32((__m128i)(x64 >> 32), factor);
#endif
  *low = (vu)((even & even_mask) | (odd << 32));
  *high = (vu)((even >> 32) | (odd & ~even_mask));
}

// Natural logarithm of x in (0, 1]: exponent and a polynomial on [sqrt(1/2), sqrt(2)) (Cephes).
GUARD_OPS_HD vf log_unit(vf x) {
  const vi bits = (vi)x;
  vi exponent = ((bits >> 23) & 0xFF) - 126;
  vf m = (vf)((bits & 0x007FFFFF) | 0x3F000000);  // [0.5, 1)
  const vi small = (vi)(m < 0.70710678118654752440f);
  exponent += small;                   // -1 where small
  m = m + (vf)((vi)m & small) - 1.0f;  // x or 2 x, minus 1
  const vf e = __builtin_convertvector(exponent, vf);
  const vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  vf y = p * m * z;
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fma(splat(-0.5f), z, y);
  return fma(e, splat(0.693359375f), m + y);
}

GUARD_OPS_HD vf square_root(vf x) {
#if GUARD_OPS_VECTOR == 64
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif GUARD_OPS_VECTOR == 32
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  return (vf)_mm_sqrt_ps((__m128)x);
#endif
}

// philox::box_muller on vectors; sine and cosine by their Taylor-minimax polynomials (Cephes).
GUARD_OPS_HD void box_muller(vu radius_word, vu angle_word, vf* first, vf* second) {
  vf uniform = __builtin_convertvector(radius_word, vf);
  uniform = (uniform < 0.5f ? splat(0.5f) : uniform) * 2.3283064365386963e-10f;
  const vf radius = square_root(-2.0f * log_unit(uniform));
  const vi quadrant = (vi)(angle_word >> 30);
  const vi rest = (vi)(angle_word & 0x3FFFFFFFu) - 0x20000000;
  const vf angle =
      __builtin_convertvector(rest, vf) * 9.313225746154785e-10f * 1.57079632679489662f;
  const vf z = angle * angle;
  vf sine = fma(splat(-1.9515295891e-4f), z, splat(8.3321608736e-3f));
  sine = fma(fma(sine, z, splat(-1.6666654611e-1f)), z * angle, angle);
  vf cosine = fma(splat(2.443315711809948e-5f), z, splat(-1.388731625493765e-3f));
  cosine =
      fma(fma(cosine, z, splat(4.166664568298827e-2f)), z * z, fma(splat(-0.5f), z, splat(1.0f)));
  const vi swap = -(quadrant & 1);
  const vf x = (vf)(((vi)-sine & swap) | ((vi)cosine & ~swap));
  const vf y = (vf)(((vi)cosine & swap) | ((vi)sine & ~swap));
  const vf signed_radius = (vf)((vi)radius ^ ((quadrant >> 1) << 31));
  *first = signed_radius * x;
  *second = signed_radius * y;
}

// Elements [begin, begin + n) of a transition's noise; begin is a multiple of 4, `out` has room
// for a whole vector of counters past n.
inline void normals(uint64_t key, uint64_t transition, int64_t begin, int64_t n, float* out) {
  constexpr int w = width<float>;
  for (int64_t j = 0; j < n; j += 4 * w) {
    const uint64_t first = uint64_t(begin + j) / 4;
    vu c0, c1;
    for (int l = 0; l < w; ++l) {
      c0[l] = uint32_t(first + l);
      c1[l] = uint32_t((first + l) >> 32);
    }
    vu c2 = vu{} + uint32_t(transition), c3 = vu{} + uint32_t(transition >> 32);
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int r = 0; r < philox::rounds; ++r) {
      vu low0, high0, low1, high1;
      multiply(philox::multiplier0, c0, &low0, &high0);
      multiply(philox::multiplier1, c2, &low1, &high1);
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = low1;
      c3 = low0;
      k0 += philox::weyl0;
      k1 += philox::weyl1;
    }
    vf z[4];
    box_muller(c0, c2, &z[0], &z[1]);
    box_muller(c1, c3, &z[2], &z[3]);
    for (int l = 0; l < w; ++l) {
      for (int q = 0; q < 4; ++q) out[j + 4 * l + q] = z[q][l];
    }
  }
}

inline void normals(uint64_t key, uint64_t transition, int64_t begin, int64_t n, double* out) {
  for (int64_t j = 0; j < n; j += 4) {
    const philox::Words words = philox::generate(key, uint64_t(begin + j) / 4, transition);
    philox::box_muller(words.w[0], words.w[2], out + j, out + j + 1);
    philox::box_muller(words.w[1], words.w[3], out + j + 2, out + j + 3);
  }
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
