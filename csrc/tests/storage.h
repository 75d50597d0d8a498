// Tensors for the tests, and what their bits mean; nothing here uses the code under test.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu/kernels.h"

namespace guard_ops::test {

using cpu::DType;
using cpu::Operand;
using cpu::size_of;

// ---- 16-bit formats, by their definition --------------------------------------------------------

struct Format {
  int precision, least;  // a normal number's binary digits, and the exponent of the smallest one
};

constexpr Format format_of(DType t) { return t == DType::bf16 ? Format{8, -126} : Format{11, -14}; }

// The bits of +Inf, which has every exponent bit set.
inline int infinity_bits(const Format& f) { return 0x8000 - (1 << (f.precision - 1)); }

inline double decode(const Format& f, uint16_t word) {
  const int body = word & 0x7FFF, one = 1 << (f.precision - 1);
  const int exponent = body / one, fraction = body % one;
  double value;
  if (body >= infinity_bits(f)) {
    value = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, f.least - (f.precision - 1));
  } else {
    value = std::ldexp(one + fraction, f.least + (exponent - 1) - (f.precision - 1));
  }
  return (word & 0x8000) ? -value : value;
}

// Rounds to nearest, ties to even, as nearbyint does by default.
inline uint16_t encode(const Format& f, double x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return uint16_t(sign | (infinity_bits(f) + 1));
  if (std::isinf(x)) return uint16_t(sign | infinity_bits(f));
  const int exponent = x == 0 ? f.least : std::max(std::ilogb(x), f.least);
  const double units = std::nearbyint(std::ldexp(std::fabs(x), f.precision - 1 - exponent));
  // A fraction that rounds up to the next power of two carries into the exponent field.
  const int body = (exponent - f.least) * (1 << (f.precision - 1)) + int(units);
  return uint16_t(sign | std::min(body, infinity_bits(f)));
}

// ---- tensors ------------------------------------------------------------------------------------

// [K, B, D] whose rows are strided, misaligned and surrounded by guard elements. All bytes start as
// 0xFF, which is NaN in every type: reading a guard makes a sum NaN, and an element that is not
// written stays NaN.
class Tensor {
 public:
  Tensor() = default;
  // `transposed`: stored as [B, K, D], as trainers hold a trajectory. Without `fenced` the last row
  // ends with the allocation, so that an address sanitizer sees a read past it.
  Tensor(DType dtype, int64_t steps, int64_t batch, int64_t numel, bool transposed = false,
         bool fenced = true)
      : dtype_(dtype), steps_(steps), batch_(batch), numel_(numel) {
    const int64_t row = numel + guard;
    stride_k_ = transposed ? row : batch * row;
    stride_b_ = transposed ? steps * row : row;
    const int64_t elements = guard + steps * batch * row - (fenced ? 0 : guard);
    bytes_.assign(elements * size_of(dtype), char(0xFF));
  }

  Operand operand() const {
    if (bytes_.empty()) return {};
    return {const_cast<char*>(bytes_.data()) + guard * size_of(dtype_), dtype_, stride_k_,
            stride_b_};
  }

  DType dtype() const { return dtype_; }
  const std::vector<char>& bytes() const { return bytes_; }

  double get(int64_t k, int64_t i, int64_t j) const {
    const char* at = operand().row(k, i) + j * size_of(dtype_);
    if (dtype_ == DType::f64) return read<double>(at);
    if (dtype_ == DType::f32) return read<float>(at);
    return decode(format_of(dtype_), read<uint16_t>(at));
  }

  void set(int64_t k, int64_t i, int64_t j, double x) {
    char* at = operand().row(k, i) + j * size_of(dtype_);
    if (dtype_ == DType::f64) {
      write(at, x);
    } else if (dtype_ == DType::f32) {
      write(at, float(x));
    } else {
      write(at, encode(format_of(dtype_), x));
    }
  }

  template <class F>
  void fill(F value) {
    for (int64_t k = 0; k < steps_; ++k) {
      for (int64_t i = 0; i < batch_; ++i) {
        for (int64_t j = 0; j < numel_; ++j) set(k, i, j, value());
      }
    }
  }

  bool guards_intact() const {
    std::vector<char> rest = bytes_;
    for (int64_t k = 0; k < steps_; ++k) {
      for (int64_t i = 0; i < batch_; ++i) {
        const int64_t at = operand().row(k, i) - bytes_.data();
        std::fill_n(rest.begin() + at, numel_ * size_of(dtype_), char(0xFF));
      }
    }
    return std::all_of(rest.begin(), rest.end(), [](char c) { return c == char(0xFF); });
  }

 private:
  static constexpr int64_t guard = 5;

  template <class T>
  static T read(const char* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  template <class T>
  static void write(char* to, T x) {
    std::memcpy(to, &x, sizeof x);
  }

  DType dtype_ = DType::f32;
  int64_t steps_ = 0, batch_ = 0, numel_ = 0, stride_k_ = 0, stride_b_ = 0;
  std::vector<char> bytes_;
};

// Uniform numbers in [-bound, bound), the same in every run and with every library.
class Uniform {
 public:
  explicit Uniform(uint64_t seed, double bound = 2) : engine_(seed), bound_(bound) {}
  double operator()() { return bound_ * (std::ldexp(double(engine_() >> 11), -52) - 1); }

 private:
  std::mt19937_64 engine_;
  double bound_;
};

}  // namespace guard_ops::test
