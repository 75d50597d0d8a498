// Conversions of bfloat16 and float16, against the formats' definition: the scalar ones of simd.h,
// and the vector ones as kernels use them. This file is compiled once for each instruction set.
#include "../cpu/simd.h"
#include "check.h"
#include "storage.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {
namespace {

using test::decode;
using test::encode;
using test::Format;
using test::format_of;

float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

bool same_bits(float p, float q) { return std::memcmp(&p, &q, sizeof p) == 0; }

// NaN has to give NaN, whatever its payload, and everything else the same bits, signed zeros too.
void check_word(const Format& f, uint16_t got, float from) {
  CONTEXT("precision %d, from %a", f.precision, from);
  if (std::isnan(from)) {
    CHECK(std::isnan(decode(f, got)));
  } else {
    CHECK(got == encode(f, from));
  }
}

void check_widened(const Format& f, float got, uint16_t from) {
  CONTEXT("precision %d, from word %04x", f.precision, from);
  const double expected = decode(f, from);
  CHECK(std::isnan(expected) ? std::isnan(got) : same_bits(got, float(expected)));
}

// Every number of the format, the midpoint to its successor and the midpoint's neighbours: all
// places where rounding changes. Then what lies outside the format, and numbers in between.
std::vector<float> numbers_that_matter(const Format& f) {
  std::vector<float> out;
  for (int body = 0; body < test::infinity_bits(f); ++body) {
    const double x = decode(f, uint16_t(body)), below = body == 0 ? 0 : decode(f, body - 1);
    const double next = body + 1 < test::infinity_bits(f) ? decode(f, body + 1) : 2 * x - below;
    for (const double middle : {x, x + (next - x) / 2}) {
      const float m = float(middle);
      CHECK(double(m) == middle);
      for (const float at : {m, std::nextafter(m, INFINITY), std::nextafter(m, -INFINITY)}) {
        out.push_back(at);
        out.push_back(-at);
      }
    }
  }
  for (uint32_t exponent = 0; exponent <= 255; ++exponent) {
    for (const uint32_t mantissa : {0u, 1u, 0x1000u, 0x1001u, 0x3FFFFFu, 0x400000u, 0x7FFFFFu}) {
      out.push_back(float_of(exponent << 23 | mantissa));
      out.push_back(float_of(1u << 31 | exponent << 23 | mantissa));
    }
  }
  std::mt19937 random(3);
  for (int n = 0; n < 200000; ++n) out.push_back(float_of(uint32_t(random())));
  return out;
}

void test_oracle() {
  const Format half = format_of(DType::f16), brain = format_of(DType::bf16);
  CHECK(encode(half, 65504) == 0x7BFF && encode(half, 65519.99) == 0x7BFF);
  CHECK(encode(half, 65520) == 0x7C00 && encode(half, std::ldexp(1, -24)) == 1);
  CHECK(encode(half, 1) == 0x3C00 && encode(half, -2) == 0xC000 && encode(half, -0.0) == 0x8000);
  CHECK(encode(half, 1 + std::ldexp(1, -11)) == 0x3C00);
  CHECK(encode(half, 1 + 3 * std::ldexp(1, -11)) == 0x3C02);
  CHECK(encode(brain, 1) == 0x3F80 && encode(brain, 1 + std::ldexp(3, -8)) == 0x3F82);
  CHECK(encode(brain, std::ldexp(1, -126)) == 0x0080 && encode(brain, 3.4e38) == 0x7F80);
  for (const Format& f : {half, brain}) {
    for (int word = 0; word < 1 << 16; ++word) {
      const double x = decode(f, uint16_t(word));
      CHECK(std::isnan(x) || encode(f, x) == word);
    }
  }
}

void test_scalars() {
  const Format half = format_of(DType::f16), brain = format_of(DType::bf16);
  for (int n = 0; n < 1 << 16; ++n) {
    const uint16_t word = uint16_t(n);
    check_widened(half, half_to_float(word), word);
    check_widened(brain, bfloat_to_float(word), word);
    if (!std::isnan(decode(half, word))) CHECK(float_to_half(half_to_float(word)) == word);
    if (!std::isnan(decode(brain, word))) CHECK(float_to_bfloat(bfloat_to_float(word)) == word);
  }
  for (const float x : numbers_that_matter(half)) check_word(half, float_to_half(x), x);
  for (const float x : numbers_that_matter(brain)) check_word(brain, float_to_bfloat(x), x);
}

// Converts by means of sde_step: with a = b = s = 1 and -0 for the other operands (which, unlike
// +0, changes no sum) mean = v and prev_sample = noise.
void convert(const Kernels& kernels, bool wide, int64_t n, const Operand& v, const Operand& x,
             const Operand& noise, const Operand& prev_sample, const Operand& mean) {
  Batch t{};
  t.form = Form::noise;
  t.wide = wide;
  t.steps = t.batch = 1;
  t.numel = n;
  t.v = v;
  t.x = x;
  t.noise = noise;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    kernels.sde_step(t, {1, 1, 1}, {0, 0, begin, std::min(n, begin + chunk)}, prev_sample, mean);
  }
}

template <class R>
void test_vectors_of(const Kernels& kernels, DType dtype) {
  const Format f = format_of(dtype);
  const bool wide = sizeof(R) == 8;
  const DType compute_type = wide ? DType::f64 : DType::f32;
  const std::vector<float> numbers = numbers_that_matter(f);
  std::vector<R> from(numbers.begin(), numbers.end()), zeros(from.size(), R(-0.0));
  std::vector<R> mean(from.size() + 1), sample(from.size() + 1);
  std::vector<uint16_t> words(1 << 16), narrowed(from.size() + 1);
  for (size_t n = 0; n < words.size(); ++n) words[n] = uint16_t(n);
  const Operand none{zeros.data(), compute_type};

  // All of them at once; then short rows at odd places, where no whole vector fits.
  std::vector<std::pair<int64_t, int64_t>> spans = {{0, 0}};
  for (int64_t n = 1; n < 70; ++n) spans.push_back({37 * n, n});
  for (const auto& [begin, some] : spans) {
    int64_t count = some > 0 ? some : int64_t(words.size());
    mean[count] = R(12345);
    convert(kernels, wide, count, {&words[begin], dtype}, none, none, {sample.data(), compute_type},
            {mean.data(), compute_type});
    for (int64_t n = 0; n < count; ++n) check_widened(f, float(mean[n]), words[begin + n]);
    CHECK(mean[count] == R(12345));  // nothing is written past the end

    count = some > 0 ? some : int64_t(from.size());
    narrowed[count] = 0xDEAD;
    convert(kernels, wide, count, none, none, {&from[begin], compute_type},
            {narrowed.data(), dtype}, {mean.data(), compute_type});
    for (int64_t n = 0; n < count; ++n) check_word(f, narrowed[n], float(from[begin + n]));
    CHECK(narrowed[count] == 0xDEAD);
  }
}

}  // namespace

void run_tests(const Kernels& kernels) {
  test_oracle();
  test_scalars();
  for (const DType dtype : {DType::bf16, DType::f16}) {
    test_vectors_of<float>(kernels, dtype);
    test_vectors_of<double>(kernels, dtype);
  }
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA

void run_isa_test(const guard_ops::cpu::Kernels& kernels) {
  guard_ops::cpu::GUARD_OPS_ISA::run_tests(kernels);
}
