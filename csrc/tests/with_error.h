// Numbers that know how far rounding may have moved what they stand for, so that a test's tolerance
// is computed from the operands of its case and is no constant that has to fit all cases.
#pragma once

#include <cmath>

#include "../cpu/kernels.h"

namespace guard_ops::test {

// A value, and a bound on the error of code that computes it and rounds after each operation.
struct WithError {
  // The relative size of half a unit in the last place, in the arithmetic under test.
  static inline long double unit = 0;

  long double value = 0, error = 0;

  WithError() = default;
  WithError(long double value) : value(value) {}  // exact
  WithError(long double value, long double error) : value(value), error(error) {}

  static WithError rounded(long double value, long double error) {
    return {value, error + unit * (std::fabs(value) + error)};
  }
};

inline WithError operator+(const WithError& p, const WithError& q) {
  return WithError::rounded(p.value + q.value, p.error + q.error);
}
inline WithError operator-(const WithError& p, const WithError& q) {
  return WithError::rounded(p.value - q.value, p.error + q.error);
}
inline WithError operator*(const WithError& p, const WithError& q) {
  return WithError::rounded(
      p.value * q.value,
      std::fabs(p.value) * q.error + std::fabs(q.value) * p.error + p.error * q.error);
}

// A float64 number as the compute type holds it.
inline WithError coefficient(double x) {
  return WithError::unit > 0x1p-50 ? WithError::rounded(x, 0) : WithError(x);
}

// A sum and its error, given that of its terms and size = sum(|terms|): a lane adds up at most 32
// terms of a tile in the compute type, and everything after that is float64.
inline WithError sum_of(long double value, long double error, long double size) {
  return {value, error + (33 * WithError::unit + 200 * 0x1p-53L) * size};
}

// A number after it is rounded to what a tensor stores; 16-bit results go through float32.
inline WithError stored(const WithError& x, cpu::DType dtype) {
  const long double unit = dtype == cpu::DType::f64    ? 0
                           : dtype == cpu::DType::bf16 ? 0x1p-8L + 0x1p-24L
                           : dtype == cpu::DType::f16  ? 0x1p-11L + 0x1p-24L
                                                       : 0x1p-24L;
  const long double least = dtype == cpu::DType::f16 ? 0x1p-25L : 0x1p-149L;
  return {x.value, x.error + unit * (std::fabs(x.value) + x.error) + least};
}

}  // namespace guard_ops::test

// 1 % more, for products of errors and for a fused multiply-add that is emulated.
#define CHECK_WITHIN_ERROR(actual, expected)                                     \
  do {                                                                           \
    const guard_ops::test::WithError with_error_ = (expected);                   \
    CHECK_CLOSE(actual, with_error_.value, 1.01L * with_error_.error + 1e-300L); \
  } while (false)
