// Scalar conversions between float32 and the 16-bit storage types, to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {

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
