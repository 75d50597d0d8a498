// The device's normals against those of the specification in float64, and each of their functions
// where an argument is special.
#include "../cuda/normals.h"

#include <cmath>
#include <random>

#include "check.h"

namespace guard_ops::test {
namespace {

void check_pair(uint32_t radius, uint32_t angle) {
  CONTEXT("normals of %u and %u", radius, angle);
  float first = NAN, second = NAN;
  double x = NAN, y = NAN;
  cuda::box_muller(&radius, &angle, &first, &second);
  philox::box_muller(radius, angle, &x, &y);
  CHECK_CLOSE(first, x, 1e-6);
  CHECK_CLOSE(second, y, 1e-6);
}

void test_normals() {
  constexpr uint32_t edges[] = {0,          1,          2,          0x1FFFFFFF, 0x20000000,
                                0x20000001, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000,
                                0xBFFFFFFF, 0xC0000000, 0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFF};
  for (const uint32_t radius : edges) {
    for (const uint32_t angle : edges) check_pair(radius, angle);
  }
  std::mt19937 words(1);
  for (int n = 0; n < 200000; ++n) {
    const uint32_t radius = words();
    check_pair(radius, words());
  }
}

// Two at once have the bits of each alone.
void test_two_at_once() {
  CONTEXT("two at once");
  std::mt19937 words(2);
  for (int n = 0; n < 10000; ++n) {
    const uint32_t radius[2] = {uint32_t(words()), uint32_t(words())};
    const uint32_t angle[2] = {uint32_t(words()), uint32_t(words())};
    cuda::Pair first, second;
    cuda::box_muller(radius, angle, &first, &second);
    for (int m = 0; m < 2; ++m) {
      float x = NAN, y = NAN;
      cuda::box_muller(radius + m, angle + m, &x, &y);
      CHECK(cuda::bits_of(x) == cuda::bits_of(part(first, m)));
      CHECK(cuda::bits_of(y) == cuda::bits_of(part(second, m)));
    }
  }
}

// The logarithm of 2^-33, the least that box_muller takes, to 1, of which the root is 0.
void test_parts() {
  CONTEXT("parts");
  CHECK(cuda::log_of_normal(1.0f) == 0);
  CHECK(cuda::root_of_normal(0.0f) == 0);
  CHECK(cuda::root_of_normal(-0.0f) == 0);
  for (int n = 0; n <= 33 * 1000; ++n) {
    const float x = float(std::exp2(-n / 1000.0)), log = cuda::log_of_normal(x);
    CHECK_CLOSE(log, std::log(double(x)), 1.2e-7 * (0.1 - double(log)));
    const float root = cuda::root_of_normal(x);  // rounded once
    CHECK(root == std::sqrt(x));
  }
  for (int n = -1000; n <= 1000; ++n) {
    float sine = NAN, cosine = NAN;
    const float t = float(n) / 4000;
    cuda::sine_cosine(t, &sine, &cosine);
    CHECK_CLOSE(sine, std::sin(3.14159265358979323846 * t), 1.2e-7);
    CHECK_CLOSE(cosine, std::cos(3.14159265358979323846 * t), 1.2e-7);
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  guard_ops::test::test_normals();
  guard_ops::test::test_two_at_once();
  guard_ops::test::test_parts();
  return guard_ops::test::finish();
}
