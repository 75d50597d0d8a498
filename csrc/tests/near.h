// Numbers that know how far rounding may have moved what they stand for: the tests' tolerances are
// sums over the very operands of a case, not constants that fit all of them.
#pragma once

#include <cmath>

#include "../cpu/kernels.h"

namespace guard_ops::test {

// A value, and a bound on the error of code that computes it with one rounding per operation.
struct Near {
  // Half a unit in the last place, relative, of the arithmetic under test.
  static inline long double unit = 0;

  long double value = 0, error = 0;

  Near() = default;
  Near(long double value) : value(value) {}  // exact
  Near(long double value, long double error) : value(value), error(error) {}

  static Near rounded(long double value, long double error) {
    return {value, error + unit * (std::fabs(value) + error)};
  }
};

inline Near operator+(const Near& p, const Near& q) {
  return Near::rounded(p.value + q.value, p.error + q.error);
}
inline Near operator-(const Near& p, const Near& q) {
  return Near::rounded(p.value - q.value, p.error + q.error);
}
inline Near operator*(const Near& p, const Near& q) {
  return Near::rounded(p.value * q.value, std::fabs(p.value) * q.error +
                                              std::fabs(q.value) * p.error + p.error * q.error);
}

// A float64 number as the compute type holds it.
inline Near coefficient(double x) { return Near::unit > 0x1p-50 ? Near::rounded(x, 0) : Near(x); }

// The error of adding up `size` = sum(|terms|): at most 32 terms of a tile meet in one lane, and
// everything after that is float64.
inline Near sum_of(long double value, long double error, long double size) {
  return {value, error + (33 * Near::unit + 200 * 0x1p-53L) * size};
}

// After rounding to what a tensor stores. 16-bit results go through float32.
inline Near stored(const Near& x, cpu::DType dtype) {
  const long double unit = dtype == cpu::DType::f64    ? 0
                           : dtype == cpu::DType::bf16 ? 0x1p-8L + 0x1p-24L
                           : dtype == cpu::DType::f16  ? 0x1p-11L + 0x1p-24L
                                                       : 0x1p-24L;
  const long double least = dtype == cpu::DType::f16 ? 0x1p-25L : 0x1p-149L;
  return {x.value, x.error + unit * (std::fabs(x.value) + x.error) + least};
}

}  // namespace guard_ops::test

// 1 %: for products of errors, and a fused multiply-add that is emulated.
#define CHECK_NEAR(actual, expected)                                 \
  do {                                                               \
    const guard_ops::test::Near near_ = (expected);                  \
    CHECK_CLOSE(actual, near_.value, 1.01L * near_.error + 1e-300L); \
  } while (false)
