// What simd.h and philox.h need of the instructions of 64-bit Arm, NEON. Its fused multiply-add and
// its conversions round like those of AVX2, so that both give the same bits.
#pragma once

#include <arm_neon.h>

#include "../transition.h"
#include "isa.h"

namespace guard_ops {
template <>
struct Fma<cpu::GUARD_OPS_ISA::vf> {
  using vf = cpu::GUARD_OPS_ISA::vf;
  static GUARD_OPS_HD vf call(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
};

template <>
struct Fma<cpu::GUARD_OPS_ISA::vd> {
  using vd = cpu::GUARD_OPS_ISA::vd;
  static GUARD_OPS_HD vd call(vd a, vd b, vd c) {
    return (vd)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
};
}  // namespace guard_ops

namespace guard_ops::cpu::GUARD_OPS_ISA {

// ---- float64 of float32 -------------------------------------------------------------------------

GUARD_OPS_HD void widen(vf x, vd* to) {
  to[0] = (vd)vcvt_f64_f32(vget_low_f32((float32x4_t)x));
  to[1] = (vd)vcvt_high_f64_f32((float32x4_t)x);
}

GUARD_OPS_HD double sum_of_lanes(vd x) { return x[0] + x[1]; }

// ---- storage types ------------------------------------------------------------------------------

typedef uint16x4_t vh;
GUARD_OPS_HD vf from_bfloat(vh h) { return (vf)vshll_n_u16(h, 16); }
GUARD_OPS_HD vf from_half(vh h) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(h)); }
GUARD_OPS_HD vh to_half(vf x) { return vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)); }
GUARD_OPS_HD vh to_bfloat(vf x) {
  const uint32x4_t bits = (uint32x4_t)x, odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
  const uint32x4_t number = vceqq_f32((float32x4_t)x, (float32x4_t)x);
  return vshrn_n_u32(vbslq_u32(number, sum, vdupq_n_u32(0x7FC00000)), 16);
}

// ---- for the noise ------------------------------------------------------------------------------

GUARD_OPS_HD vf square_root(vf x) { return (vf)vsqrtq_f32((float32x4_t)x); }

GUARD_OPS_HD vf larger(vf x, vf y) { return (vf)vmaxq_f32((float32x4_t)x, (float32x4_t)y); }

GUARD_OPS_HD vq product_of_low_halves(vq x, vq y) {
  return (vq)vmull_u32(vmovn_u64((uint64x2_t)x), vmovn_u64((uint64x2_t)y));
}

GUARD_OPS_HD void transpose_fours(const vf z[4], vf to[4]) {
  const float64x2_t low01 = (float64x2_t)vzip1q_f32((float32x4_t)z[0], (float32x4_t)z[1]);
  const float64x2_t low23 = (float64x2_t)vzip1q_f32((float32x4_t)z[2], (float32x4_t)z[3]);
  const float64x2_t high01 = (float64x2_t)vzip2q_f32((float32x4_t)z[0], (float32x4_t)z[1]);
  const float64x2_t high23 = (float64x2_t)vzip2q_f32((float32x4_t)z[2], (float32x4_t)z[3]);
  to[0] = (vf)vzip1q_f64(low01, low23);
  to[1] = (vf)vzip2q_f64(low01, low23);
  to[2] = (vf)vzip1q_f64(high01, high23);
  to[3] = (vf)vzip2q_f64(high01, high23);
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
