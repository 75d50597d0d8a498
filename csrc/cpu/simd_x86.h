// What simd.h and philox.h need of the instructions of x86-64: AVX-512, AVX2 or, as baseline, what
// every such processor has.
#pragma once

#include <immintrin.h>

#include "../transition.h"
#include "halves.h"

namespace guard_ops {
template <>
struct Fma<cpu::GUARD_OPS_ISA::vf> {
  using vf = cpu::GUARD_OPS_ISA::vf;
  static GUARD_OPS_HD vf call(vf a, vf b, vf c) {
#if GUARD_OPS_VECTOR == 64
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif GUARD_OPS_VECTOR == 32
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    // There is no instruction for it. The product is exact in float64, so this rounds like an fma
    // except where rounding twice hits a tie. All that is promised is that the kernels of this
    // instruction set agree with each other.
    const auto half = [](__m128 a, __m128 b, __m128 c) {
      return _mm_cvtpd_ps(_mm_cvtps_pd(a) * _mm_cvtps_pd(b) + _mm_cvtps_pd(c));
    };
    const auto upper = [](vf x) { return _mm_movehl_ps((__m128)x, (__m128)x); };
    return (vf)_mm_movelh_ps(half((__m128)a, (__m128)b, (__m128)c),
                             half(upper(a), upper(b), upper(c)));
#endif
  }
};

template <>
struct Fma<cpu::GUARD_OPS_ISA::vd> {
  using vd = cpu::GUARD_OPS_ISA::vd;
  static GUARD_OPS_HD vd call(vd a, vd b, vd c) {
#if GUARD_OPS_VECTOR == 64
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif GUARD_OPS_VECTOR == 32
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    vd r;
    for (int l = 0; l < 2; ++l) r[l] = ::fma(a[l], b[l], c[l]);
    return r;
#endif
  }
};
}  // namespace guard_ops

namespace guard_ops::cpu::GUARD_OPS_ISA {

// ---- float64 of float32 -------------------------------------------------------------------------

// Converts a vector's elements to float64, in their order.
GUARD_OPS_HD void widen(vf x, vd* to) {
#if GUARD_OPS_VECTOR == 64
  to[0] = (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  to[1] = (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif GUARD_OPS_VECTOR == 32
  to[0] = (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  to[1] = (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#else
  to[0] = (vd)_mm_cvtps_pd((__m128)x);
  to[1] = (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#endif
}

// Adds the upper half to the lower one until one element is left.
GUARD_OPS_HD double sum_of_lanes(vd x) {
#if GUARD_OPS_VECTOR == 64
  const __m256d four = _mm512_castpd512_pd256((__m512d)x) + _mm512_extractf64x4_pd((__m512d)x, 1);
#elif GUARD_OPS_VECTOR == 32
  const __m256d four = (__m256d)x;
#endif
#if GUARD_OPS_VECTOR >= 32
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
#else
  const __m128d two = (__m128d)x;
#endif
  return two[0] + two[1];
}

// ---- storage types ------------------------------------------------------------------------------

// vh: as many elements of a 16-bit type as a vf has; conversions of them to float32, and back with
// rounding to nearest even.
#if GUARD_OPS_VECTOR == 64
typedef __m256i vh;
GUARD_OPS_HD vf from_bfloat(vh h) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16); }
GUARD_OPS_HD vf from_half(vh h) { return (vf)_mm512_cvtph_ps(h); }
GUARD_OPS_HD vh to_half(vf x) { return _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
GUARD_OPS_HD vh to_bfloat(vf x) {
  const __m512i bits = (__m512i)x, odd = _mm512_srli_epi32(_mm512_slli_epi32(bits, 15), 31);
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0)));
}
#elif GUARD_OPS_VECTOR == 32
typedef __m128i vh;
GUARD_OPS_HD vf from_bfloat(vh h) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16); }
GUARD_OPS_HD vf from_half(vh h) { return (vf)_mm256_cvtph_ps(h); }
GUARD_OPS_HD vh to_half(vf x) { return _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
GUARD_OPS_HD vh to_bfloat(vf x) {
  const __m256i bits = (__m256i)x, odd = _mm256_srli_epi32(_mm256_slli_epi32(bits, 15), 31);
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);
  const __m256i words =
      _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
#else
typedef struct {
  uint16_t h[4];
} vh;
GUARD_OPS_HD vf from_bfloat(vh h) {
  return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)h.h));
}
GUARD_OPS_HD vh to_bfloat(vf x) {
  const __m128i bits = (__m128i)x, odd = _mm_srli_epi32(_mm_slli_epi32(bits, 15), 31);
  const __m128i sum = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7FFF)), odd);
  const __m128i nan = (__m128i)_mm_cmpunord_ps((__m128)x, (__m128)x);
  const __m128i words =
      _mm_or_si128(_mm_andnot_si128(nan, sum), _mm_and_si128(nan, _mm_set1_epi32(0x7FC00000)));
  const __m128i high = _mm_srai_epi32(words, 16);  // signed, as the pack saturates
  vh r;
  _mm_storel_epi64((__m128i*)r.h, _mm_packs_epi32(high, high));
  return r;
}
__attribute__((noinline)) inline vf from_half(vh h) {
  vf r;
  for (int l = 0; l < 4; ++l) r[l] = half_to_float(h.h[l]);
  return r;
}
__attribute__((noinline)) inline vh to_half(vf x) {
  vh r;
  for (int l = 0; l < 4; ++l) r.h[l] = float_to_half(x[l]);
  return r;
}
#endif

// ---- for the noise ------------------------------------------------------------------------------

#if GUARD_OPS_VECTOR == 64
#define GUARD_OPS_MM(op) _mm512_##op
typedef __m512 mm_ps;
typedef __m512d mm_pd;
typedef __m512i mm_si;
#elif GUARD_OPS_VECTOR == 32
#define GUARD_OPS_MM(op) _mm256_##op
typedef __m256 mm_ps;
typedef __m256d mm_pd;
typedef __m256i mm_si;
#else
#define GUARD_OPS_MM(op) _mm_##op
typedef __m128 mm_ps;
typedef __m128d mm_pd;
typedef __m128i mm_si;
#endif

// NaN may give either.
GUARD_OPS_HD vf larger(vf x, vf y) { return (vf)GUARD_OPS_MM(max_ps)((mm_ps)x, (mm_ps)y); }

GUARD_OPS_HD vf square_root(vf x) { return (vf)GUARD_OPS_MM(sqrt_ps)((mm_ps)x); }

// The 64-bit products of the lower halves of 64-bit lanes.
GUARD_OPS_HD vq product_of_low_halves(vq x, vq y) {
  return (vq)GUARD_OPS_MM(mul_epu32)((mm_si)x, (mm_si)y);
}

// Transposes every four lanes: lane 4 b + i of z[q] becomes lane 4 b + q of to[i].
GUARD_OPS_HD void transpose_fours(const vf z[4], vf to[4]) {
  const mm_ps z0 = (mm_ps)z[0], z1 = (mm_ps)z[1], z2 = (mm_ps)z[2], z3 = (mm_ps)z[3];
  const mm_pd low01 = (mm_pd)GUARD_OPS_MM(unpacklo_ps)(z0, z1);
  const mm_pd low23 = (mm_pd)GUARD_OPS_MM(unpacklo_ps)(z2, z3);
  const mm_pd high01 = (mm_pd)GUARD_OPS_MM(unpackhi_ps)(z0, z1);
  const mm_pd high23 = (mm_pd)GUARD_OPS_MM(unpackhi_ps)(z2, z3);
  to[0] = (vf)GUARD_OPS_MM(unpacklo_pd)(low01, low23);
  to[1] = (vf)GUARD_OPS_MM(unpackhi_pd)(low01, low23);
  to[2] = (vf)GUARD_OPS_MM(unpacklo_pd)(high01, high23);
  to[3] = (vf)GUARD_OPS_MM(unpackhi_pd)(high01, high23);
}

#undef GUARD_OPS_MM

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
