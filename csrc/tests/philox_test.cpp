// The generator of the seeded form against Random123's published answers, and an instruction set's
// vector code against the scalar one. This file is compiled once for each instruction set.
#include "../cpu/philox.h"

#include <random>
#include <vector>

#include "check.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {
namespace {

constexpr double tolerance = 1e-6;  // what the design promises between backends

// The counter's words are (counter low, counter high, transition low, transition high).
void test_known_answers() {
  struct Answer {
    uint64_t key, counter, transition;
    uint32_t words[4];
  };
  const Answer answers[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~0ull, ~0ull, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822,
       0x85a308d3243f6a88,
       0x0370734413198a2e,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Answer& a : answers) {
    const philox::Words got = philox::generate(a.key, a.counter, a.transition);
    for (int q = 0; q < 4; ++q) CHECK(got.w[q] == a.words[q]);
  }
  for (const Answer& a : answers) {
    vu words[4];
    Generator(a.key, a.transition).words(a.counter, words);
    for (int q = 0; q < 4; ++q) CHECK(words[q][0] == a.words[q]);
  }
}

void test_words() {
  std::mt19937_64 random(1);
  for (int n = 0; n < 20000; ++n) {
    const uint64_t key = random(), transition = random() >> n % 64;
    const uint64_t first = n % 4 == 0 ? (random() << 32) - 5 : random();  // a carry
    vu words[4];
    Generator(key, transition).words(first, words);
    for (int l = 0; l < width<float>; ++l) {
      const int number = l % 4 * (width<float> / 4) + l / 4;
      const philox::Words expected = philox::generate(key, first + number, transition);
      for (int q = 0; q < 4; ++q) CHECK(words[q][l] == expected.w[q]);
    }
  }
}

void check_box_muller(const uint32_t* radius, const uint32_t* angle) {
  vu r, a;
  for (int l = 0; l < width<float>; ++l) {
    r[l] = radius[l];
    a[l] = angle[l];
  }
  vf first, second;
  box_muller(r, a, &first, &second);
  for (int l = 0; l < width<float>; ++l) {
    double x, y;
    philox::box_muller(r[l], a[l], &x, &y);
    CONTEXT("radius word %08x, angle word %08x", r[l], a[l]);
    CHECK_CLOSE(first[l], x, tolerance);
    CHECK_CLOSE(second[l], y, tolerance);
  }
}

// Every pair of words near a place where something changes: powers of two (the exponent, and
// rounding to float32), halves and quarters of the range (quadrants), sqrt(1/2) (the logarithm).
void test_extreme_words() {
  std::vector<uint32_t> words;
  for (int bit = 0; bit <= 32; ++bit) {
    const uint64_t power = uint64_t(1) << bit;
    for (const uint64_t at : {power, power + power / 2, power / 2 + power / 5}) {
      for (int d = -3; d <= 3; ++d) words.push_back(uint32_t(at + uint64_t(d)));
    }
    for (const uint64_t d : {64, 127, 128, 129, 255, 256, 257, 384}) {
      words.push_back(uint32_t(power - d));
      words.push_back(uint32_t(power + d));
    }
  }
  for (int d = -300; d <= 300; d += 25) words.push_back(0xB504F333u + d);
  const size_t count = words.size(), w = width<float>;
  for (size_t n = 0; n < count; ++n) {
    for (size_t m = 0; m < count; m += w) {
      uint32_t radius[w], angle[w];
      for (size_t l = 0; l < w; ++l) {
        radius[l] = words[n];
        angle[l] = words[(m + l) % count];
      }
      check_box_muller(radius, angle);
    }
  }
}

struct Moments {
  double count = 0, sum[5] = {}, neighbours = 0;
};

// Runs of counters at a place that reaches every bit of key, counter and transition; the last ones
// cross the border of the counter's low word.
void test_normals(Moments* moments) {
  struct Run {
    uint64_t key, transition;
    int64_t begin, n;
  };
  std::vector<Run> runs = {
      {0, 0, 0, 1 << 20},
      {~0ull, ~0ull, 0, 4096},
      {0x299f31d0a4093822, 0x0370734413198a2e, 4 * int64_t(0x05a308d3243f6a88), 4096},
      {1, 1ull << 63, (int64_t(1) << 34) - 2048, 4096},
      {1ull << 63, 1, (int64_t(1) << 34) - 36, 72},
  };
  std::mt19937_64 random(2);
  for (int n = 0; n < 64; ++n) {
    runs.push_back({random(), random(), int64_t(random() >> 3) / 4 * 4, 1 << 14});
  }
  for (int64_t n = 1; n < 260; ++n) runs.push_back({7, uint64_t(n), 4 * n, n});

  std::vector<float> got;
  std::vector<double> wide;
  for (const Run& run : runs) {
    CONTEXT("key %016lx transition %016lx begin %ld n %ld", run.key, run.transition, run.begin,
            run.n);
    const int64_t room = run.n + 4 * width<float>;
    got.assign(room + 1, 12345.0f);
    wide.assign(room, 0.0);
    normals(run.key, run.transition, run.begin, run.n, got.data());
    normals(run.key, run.transition, run.begin, run.n, wide.data());
    CHECK(got[room] == 12345.0f);
    for (int64_t j = 0; j < run.n; j += 4) {
      const philox::Words words =
          philox::generate(run.key, uint64_t(run.begin + j) / 4, run.transition);
      double z[4];
      philox::box_muller(words.w[0], words.w[2], z, z + 1);
      philox::box_muller(words.w[1], words.w[3], z + 2, z + 3);
      for (int64_t q = 0; q < 4 && j + q < run.n; ++q) {
        CHECK_CLOSE(got[j + q], z[q], tolerance);
        CHECK_CLOSE(wide[j + q], z[q], 1e-14);
      }
    }
    for (int64_t j = 0; j < run.n; ++j) {
      double power = 1;
      for (double& sum : moments->sum) {
        sum += power;
        power *= got[j];
      }
      if (j > 0) moments->neighbours += double(got[j]) * got[j - 1];
      moments->count += 1;
    }
  }
}

// The moments have to be within five standard errors of a normal's.
void test_moments(const Moments& m) {
  CONTEXT("moments of %.0f normals", m.count);
  CHECK(m.count > 2e6);
  const double expected[] = {1, 0, 1, 0, 3}, variance[] = {0, 1, 2, 15, 96};
  for (int p = 1; p < 5; ++p) {
    CHECK_CLOSE(m.sum[p] / m.count, expected[p], 5 * std::sqrt(variance[p] / m.count));
  }
  CHECK_CLOSE(m.neighbours / m.count, 0, 5 / std::sqrt(m.count));
}

}  // namespace

void run_tests() {
  test_known_answers();
  test_words();
  test_extreme_words();
  Moments moments;
  test_normals(&moments);
  test_moments(moments);
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA

void run_isa_test(const guard_ops::cpu::Kernels&) { guard_ops::cpu::GUARD_OPS_ISA::run_tests(); }
