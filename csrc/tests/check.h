// Checks that print file, line and numbers when they fail, and go on. A test's main returns
// finish().
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace guard_ops::test {

// These are plain data, so that a test compiled for an instruction set runs nothing before its
// main.
inline long failures = 0;
inline char context[256] = "";  // the case at hand, printed with a failure

inline bool fail(const char* file, int line) {
  if (++failures > 20) return false;
  std::printf("%s:%d: [%s] ", file, line, context);
  return true;
}

// Asked for by `make test-slow` and by the sanitizers; `make test` has some of what takes seconds.
inline bool every_case() {
  static const bool asked = std::getenv("GUARD_OPS_EVERY_CASE") != nullptr;
  return asked;
}

// Says whether the next case is run: one in GUARD_OPS_TEST_STRIDE is, and one in three of `make
// test`. A prime gives every form, type and length its turn, where a divisor of a loop's length
// would meet the same of its values again.
inline long cases = 0, cases_run = 0;
inline bool is_run() {
  constexpr long asked = GUARD_OPS_TEST_STRIDE;
  const bool run = cases++ % (every_case() || asked > 3 ? asked : 3) == 0;
  cases_run += run;
  return run;
}

inline int finish() {
  if (cases > 0) std::printf("%ld of %ld cases\n", cases_run, cases);
  if (failures > 0) std::printf("%ld checks failed\n", failures);
  return failures > 0 ? 1 : 0;
}

}  // namespace guard_ops::test

#define CONTEXT(...) \
  std::snprintf(guard_ops::test::context, sizeof guard_ops::test::context, __VA_ARGS__)

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition) && guard_ops::test::fail(__FILE__, __LINE__)) { \
      std::printf("%s\n", #condition);                               \
    }                                                                \
  } while (false)

// Checks |actual - expected| <= tolerance. An infinity equals itself, and NaN nothing.
#define CHECK_CLOSE(actual, expected, tolerance)                                                \
  do {                                                                                          \
    const double actual_ = double(actual), expected_ = double(expected);                        \
    const double tolerance_ = double(tolerance);                                                \
    const bool close_ = actual_ == expected_ || std::fabs(actual_ - expected_) <= tolerance_;   \
    if (!close_ && guard_ops::test::fail(__FILE__, __LINE__)) {                                 \
      std::printf("%s is %.17g, not %.17g +- %.2g\n", #actual, actual_, expected_, tolerance_); \
    }                                                                                           \
  } while (false)
