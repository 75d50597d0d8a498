// Vectors of one instruction set, and conversion of the storage types to the compute type.
//
// Compiled once per instruction set. Sums run in 64 logical bytes per accumulator pair (`lanes`
// elements), whatever the register width, so that AVX2 and AVX-512 give the same bits.
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
    // Without the instruction: the product is exact in float64, so this rounds like an fma but for
    // double-rounding ties. All that is promised is that every kernel of this ISA agrees.
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
constexpr int lanes = 128 / sizeof(R);  // logical accumulators of a sum

template <class R>
GUARD_OPS_HD Vector<R> splat(R x) {
  return Vector<R>{} + x;
}

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

// The first `count` elements, zeros after them.
template <class R>
GUARD_OPS_HD Vector<R> load_some(const R* p, int64_t count) {
  Vector<R> r{};
  std::memcpy(&r, p, count * sizeof(R));
  return r;
}

template <class R>
GUARD_OPS_HD void store_some(R* p, Vector<R> x, int64_t count) {
  std::memcpy(p, &x, count * sizeof(R));
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

inline void widen_half(const uint16_t* from, float* to, int64_t n) {
  int64_t j = 0;
#if GUARD_OPS_VECTOR == 64
  for (; j + 16 <= n; j += 16) {
    _mm512_storeu_ps(to + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + j))));
  }
#elif GUARD_OPS_VECTOR == 32
  for (; j + 8 <= n; j += 8) {
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + j))));
  }
#endif
  for (; j < n; ++j) to[j] = half_to_float(from[j]);
}

inline void narrow_half(const float* from, uint16_t* to, int64_t n) {
  int64_t j = 0;
#if GUARD_OPS_VECTOR == 64
  for (; j + 16 <= n; j += 16) {
    _mm256_storeu_si256((__m256i*)(to + j), _mm512_cvtps_ph(_mm512_loadu_ps(from + j), 0));
  }
#elif GUARD_OPS_VECTOR == 32
  for (; j + 8 <= n; j += 8) {
    _mm_storeu_si128((__m128i*)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
  }
#endif
  for (; j < n; ++j) to[j] = float_to_half(from[j]);
}

// A pointer to `n` elements of compute type: the tensor's own memory, or `scratch`.
inline const float* widen(DType dtype, const char* from, float* scratch, int64_t n) {
  const auto* h = reinterpret_cast<const uint16_t*>(from);
  switch (dtype) {
    case DType::f32:
      return reinterpret_cast<const float*>(from);
    case DType::bf16:
      for (int64_t j = 0; j < n; ++j) scratch[j] = bfloat_to_float(h[j]);
      return scratch;
    case DType::f16:
      widen_half(h, scratch, n);
      return scratch;
    case DType::f64:
      break;  // float64 operands make the arithmetic wide
  }
  return nullptr;
}

inline const double* widen(DType dtype, const char* from, double* scratch, int64_t n) {
  if (dtype == DType::f64) return reinterpret_cast<const double*>(from);
  float narrow[tile];
  const float* f = widen(dtype, from, narrow, n);
  for (int64_t j = 0; j < n; ++j) scratch[j] = f[j];
  return scratch;
}

// Where to write `n` elements of compute type: the tensor's own memory, or `scratch`.
template <class R>
inline R* target(DType dtype, char* to, R* scratch) {
  const DType own = sizeof(R) == 8 ? DType::f64 : DType::f32;
  return dtype == own ? reinterpret_cast<R*>(to) : scratch;
}

inline void narrow(DType dtype, const float* from, char* to, int64_t n) {
  auto* h = reinterpret_cast<uint16_t*>(to);
  if (dtype == DType::bf16) {
    for (int64_t j = 0; j < n; ++j) h[j] = float_to_bfloat(from[j]);
  } else if (dtype == DType::f16) {
    narrow_half(from, h, n);
  } else if (dtype == DType::f64) {
    for (int64_t j = 0; j < n; ++j) reinterpret_cast<double*>(to)[j] = from[j];
  }
}

inline void narrow(DType dtype, const double* from, char* to, int64_t n) {
  if (dtype == DType::f64) return;
  float f[tile];
  for (int64_t j = 0; j < n; ++j) f[j] = float(from[j]);
  if (dtype == DType::f32) {
    std::memcpy(to, f, n * sizeof(float));
  } else {
    narrow(dtype, f, to, n);
  }
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
