// Checks that print file, line and numbers when they fail, and go on. A test's main returns
// finish().
#pragma once

#include <cmath>
#include <cstdio>

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

// Says whether the next case is run: one in GUARD_OPS_TEST_STRIDE is. A prime gives every form,
// type and length its turn, where a divisor of a loop's length would meet the same of its values
// again.
inline long cases = 0, cases_run = 0;
inline bool is_run() {
  const bool run = cases++ % GUARD_OPS_TEST_STRIDE == 0;
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
