// Vectors of one instruction set, in memory of any storage type: what kernels are written with.
//
// This header is compiled once for each instruction set, and whatever is not in the namespace of
// its name has to be inlined always: the linker keeps one copy of an inline function, for everyone.
// What is a processor's own is in simd_x86.h and simd_neon.h. A sum has `lanes` accumulators, 128
// bytes, whatever the register width, so that all of them but baseline, which rounds a fused
// multiply-add in its own way, give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

// ---- the instruction set, from the compiler's flags ---------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define GUARD_OPS_ISA avx512
#define GUARD_OPS_VECTOR 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GUARD_OPS_ISA avx2
#define GUARD_OPS_VECTOR 32
#elif defined(__x86_64__)
#define GUARD_OPS_ISA baseline
#define GUARD_OPS_VECTOR 16
#elif defined(__aarch64__)
#define GUARD_OPS_ISA neon
#define GUARD_OPS_VECTOR 16
#else
#error "guard_ops: the CPU kernels need x86-64 or 64-bit Arm"
#endif

namespace guard_ops::cpu::GUARD_OPS_ISA {

typedef float vf __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef double vd __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef uint64_t vq __attribute__((vector_size(GUARD_OPS_VECTOR)));

// ---- scalar conversions of 16-bit storage types, to nearest even --------------------------------

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

}  // namespace guard_ops::cpu::GUARD_OPS_ISA

// ---- vectors ------------------------------------------------------------------------------------

#if defined(__x86_64__)
#include "simd_x86.h"
#else
#include "simd_neon.h"
#endif

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

// Converts a vector's elements to float64, in their order; see the other `widen`.
GUARD_OPS_HD void widen(vd x, vd* to) { *to = x; }

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

// The bits of a number.
template <class R>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type;
};
template <class R>
using Bits = typename BitsOf<R>::type;

// x where the bits at `kept` are all ones, and 0 where they are 0.
template <class V, class B>
GUARD_OPS_HD V masked(V x, const B* kept) {
  typedef B bits __attribute__((vector_size(GUARD_OPS_VECTOR)));
  bits which;
  std::memcpy(&which, kept, sizeof which);
  return (V)((bits)x & which);
}

// ---- storage types ------------------------------------------------------------------------------

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
