// Vectors of one instruction set, and conversion of the storage types to the compute type.
//
// This header is compiled once for each instruction set. A sum has `lanes` accumulators, 128 bytes,
// whatever the register width, so that AVX2 and AVX-512 give the same bits.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define GUARD_OPS_ISA avx512
#define GUARD_OPS_VECTOR 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GUARD_OPS_ISA avx2
#define GUARD_OPS_VECTOR 32
#else
#define GUARD_OPS_ISA baseline
#define GUARD_OPS_VECTOR 16
#endif

namespace guard_ops::cpu::GUARD_OPS_ISA {
typedef float vf __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef double vd __attribute__((vector_size(GUARD_OPS_VECTOR)));

}  // namespace guard_ops::cpu::GUARD_OPS_ISA

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
    typedef double wide __attribute__((vector_size(32)));
    const wide r = __builtin_convertvector(a, wide) * __builtin_convertvector(b, wide) +
                   __builtin_convertvector(c, wide);
    return __builtin_convertvector(r, vf);
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

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef vf type;
};
template <>
struct VectorOf<double> {
  typedef vd type;
};
template <class R>
using Vector = typename VectorOf<R>::type;
template <class R>
constexpr int width = GUARD_OPS_VECTOR / sizeof(R);
template <class R>
constexpr int lanes = 128 / sizeof(R);  // accumulators of a sum

// Converts a vector's elements to float64, in their order.
GUARD_OPS_HD void widen(vd x, vd* to) { *to = x; }
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

template <class R>
GUARD_OPS_HD Vector<R> splat(R x) {
  return Vector<R>{} + x;
}

// Load and store a vector where memory has its type.
template <class R>
GUARD_OPS_HD Vector<R> load(const R* p) {
  Vector<R> r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

template <class R>
GUARD_OPS_HD void store(R* p, Vector<R> x) {
  std::memcpy(p, &x, sizeof x);
}

// ---- storage types ------------------------------------------------------------------------------

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, body = h & 0x7FFFu;
  uint32_t bits;
  if (body >= 0x7C00u) {  // Inf, NaN
    bits = 0x7F800000u | (body & 0x3FFu) << 13 | (body > 0x7C00u ? 0x400000u : 0u);
  } else if (body >= 0x400u) {
    bits = (body << 13) + (112u << 23);
  } else {                                                     // subnormal: exact in float
    const float value = float(body) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, body = bits & 0x7FFFFFFFu;
  if (body > 0x7F800000u) return uint16_t(sign | 0x7E00u | (body >> 13 & 0x3FFu));
  if (body >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // rounds past 65504
  if (body < 0x38800000u) {                                  // subnormal result: one rounding
    float magnitude;
    std::memcpy(&magnitude, &body, 4);
    magnitude += 0.5f;  // its last bits are now units of 2^-24
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    return uint16_t(sign | (rounded - 0x3F000000u));
  }
  return uint16_t(sign | ((body + 0xFFFu + (body >> 13 & 1u) - (112u << 23)) >> 13));
}

inline float bfloat_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_bfloat(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? uint16_t(0x7FC0u) : uint16_t(rounded);
}

// `width<float>` elements of a 16-bit type, conversions of them to float32, and back with rounding
// to nearest even.
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

// What arithmetic in R reads from and writes to: memory of type R; float32 arithmetic also reads
// and writes 16-bit types, and float64 arithmetic writes any type.
template <class R>
struct Source {
  const void* data = nullptr;
  DType dtype = sizeof(R) == 8 ? DType::f64 : DType::f32;
  GUARD_OPS_HD explicit operator bool() const { return data != nullptr; }
};

template <class R>
struct Target {
  void* data = nullptr;
  DType dtype = sizeof(R) == 8 ? DType::f64 : DType::f32;
};

// Any: the dtype is known only when running, and every access branches on it. Known: it is a
// constant.
struct Any {
  GUARD_OPS_HD static DType of(DType dtype) { return dtype; }
};
template <DType D>
struct Known {
  GUARD_OPS_HD static constexpr DType of(DType) { return D; }
};

template <class T>
GUARD_OPS_HD T load_bytes(const void* from, int64_t at, int64_t count) {
  T r{};
  std::memcpy(&r, static_cast<const char*>(from) + at, count);
  return r;
}

// Loads the elements [at, at + count) of a source; the rest of the vector is 0.
template <class D = Any>
GUARD_OPS_HD vf load_some(const Source<float>& s, int64_t at, int64_t count) {
  const DType dtype = D::of(s.dtype);
  if (dtype == DType::f32) return load_bytes<vf>(s.data, 4 * at, 4 * count);
  const vh h = load_bytes<vh>(s.data, 2 * at, 2 * count);
  return dtype == DType::bf16 ? from_bfloat(h) : from_half(h);
}

template <class D = Any>
GUARD_OPS_HD vd load_some(const Source<double>& s, int64_t at, int64_t count) {
  return load_bytes<vd>(s.data, 8 * at, 8 * count);
}

template <class D = Any, class R>
GUARD_OPS_HD Vector<R> load(const Source<R>& s, int64_t at) {
  return load_some<D>(s, at, width<R>);
}

GUARD_OPS_HD float load_one(const Source<float>& s, int64_t at) { return load_some(s, at, 1)[0]; }

template <class T>
GUARD_OPS_HD void store_bytes(void* to, int64_t at, const T& x, int64_t count) {
  std::memcpy(static_cast<char*>(to) + at, &x, count);
}

// Stores the first `count` elements of x, converted to the target's type, from element `at` on.
template <class D = Any>
GUARD_OPS_HD void store_some(const Target<float>& to, int64_t at, vf x, int64_t count) {
  const DType dtype = D::of(to.dtype);
  if (dtype == DType::f32) {
    store_bytes(to.data, 4 * at, x, 4 * count);
  } else {
    store_bytes(to.data, 2 * at, dtype == DType::bf16 ? to_bfloat(x) : to_half(x), 2 * count);
  }
}

template <class D = Any>
inline void store_some(const Target<double>& to, int64_t at, vd x, int64_t count) {
  if (to.dtype == DType::f64) return store_bytes(to.data, 8 * at, x, 8 * count);
  float* f = static_cast<float*>(to.data) + at;
  auto* h = static_cast<uint16_t*>(to.data) + at;
  for (int64_t l = 0; l < count; ++l) {
    if (to.dtype == DType::f32) {
      f[l] = float(x[l]);
    } else {
      h[l] = to.dtype == DType::bf16 ? float_to_bfloat(float(x[l])) : float_to_half(float(x[l]));
    }
  }
}

template <class D = Any, class R>
GUARD_OPS_HD void store(const Target<R>& to, int64_t at, Vector<R> x) {
  store_some<D>(to, at, x, width<R>);
}

// Rounds x to what memory of `dtype` can hold.
template <class R>
GUARD_OPS_HD Vector<R> rounded(Vector<R> x, DType dtype) {
  char bytes[sizeof x];
  store(Target<R>{bytes, dtype}, 0, x);
  if (dtype == DType::f64 || sizeof(R) == 4) return load(Source<R>{bytes, dtype}, 0);
  Vector<R> r{};
  for (int l = 0; l < width<R>; ++l) r[l] = load_one(Source<float>{bytes, dtype}, l);
  return r;
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
