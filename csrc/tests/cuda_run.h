// Calls of the emulated CUDA kernels, and what their results are compared with.
#pragma once

#include <cstring>

#include "../cuda/kernels.h"
#include "../cuda/tiles.h"
#include "driver_cases.h"
#include "emulate_runtime.h"

namespace guard_ops::test {

using cpu::Machine;
using cuda::Path;

inline const Machine serial{
    cpu::kernels(),
    [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }, 1,
    0};

struct alignas(256) Line {
  char bytes[256];
};

// A copy whose rows begin on 256 bytes, with NaNs between them.
class Aligned {
 public:
  Aligned() = default;
  Aligned(const Operand& from, int64_t steps, int64_t batch, int64_t numel) {
    if (!from) return;
    const int64_t size = size_of(from.dtype), row = (numel * size + 511) / 256 * 256 / size;
    lines_.resize(steps * batch * row * size / 256);
    std::memset(static_cast<void*>(lines_.data()), 0xFF, lines_.size() * sizeof(Line));
    operand = {lines_.data(), from.dtype, batch * row, row};
    for (int64_t n = 0; n < steps * batch; ++n) {
      std::memcpy(operand.row(n / batch, n % batch), from.row(n / batch, n % batch), numel * size);
    }
  }
  Operand operand;

 private:
  std::vector<Line> lines_;
};

struct AlignedBatch {
  Batch t;
  Aligned copies[8];

  explicit AlignedBatch(const Batch& from) : t(from) {
    Operand* const all[] = {&t.v, &t.uncond, &t.ref, &t.x, &t.y, &t.m, &t.v_old, &t.noise};
    for (int n = 0; n < 8; ++n) {
      copies[n] = Aligned(*all[n], t.steps, t.batch, t.numel);
      *all[n] = copies[n].operand;
    }
  }
};

// Memory for a gradient, which is aligned if the batch is.
struct Output {
  Tensor loose;
  Aligned aligned;
  bool is_aligned;

  Output(const Operand& like, const Batch& t, bool is_aligned) : is_aligned(is_aligned) {
    if (!like) return;
    loose = Tensor(like.dtype, t.steps, t.batch, t.numel);
    aligned = Aligned(loose.operand(), t.steps, t.batch, t.numel);
  }
  Operand operand() const { return is_aligned ? aligned.operand : loose.operand(); }
};

struct Result {
  float loss = NAN;
  std::vector<float> per_row, metrics;
  std::vector<double> sum_grads;
  Output cond, uncond;
  Path path = Path::automatic;
};

inline bool same(const void* p, const void* q, size_t bytes) {
  return std::memcmp(p, q, bytes) == 0;
}

inline bool same_rows(const Operand& p, const Operand& q, const Batch& t) {
  if (!p || !q) return !p && !q;
  for (int64_t n = 0; n < t.steps * t.batch; ++n) {
    const int64_t k = n / t.batch, i = n % t.batch;
    if (!same(p.row(k, i), q.row(k, i), t.numel * size_of(p.dtype))) return false;
  }
  return true;
}

inline std::vector<char> workspace_for(const Batch& t) {
  return std::vector<char>(cuda::workspace_bytes(t) + 256, char(0xFF));
}

inline char* aligned(std::vector<char>& x) {
  return x.data() + (256 - reinterpret_cast<uintptr_t>(x.data()) % 256);
}

// The counters of all calls; each call has to leave them as the next one needs them.
inline std::vector<uint32_t> counters(1024, 0);

inline void check_counters(const Batch& t) {
  const int64_t needed = cuda::counters_needed(t);
  CHECK(needed <= int64_t(counters.size()));
  for (int64_t n = 0; n < int64_t(counters.size()); ++n) {
    if (n != cuda::counter_line) CHECK(counters[n] == 0);  // that one is not reset
  }
}

// A result that nothing has been written into.
inline Result room_for(const Batch& t, bool is_aligned, bool wanted = true) {
  const int64_t rows = t.steps * t.batch;
  return {NAN,
          std::vector<float>(4 * rows, NAN),
          std::vector<float>(metric_count * t.steps, NAN),
          std::vector<double>(3 * rows, NAN),
          Output(wanted ? t.v : Operand{}, t, is_aligned),
          Output(wanted ? t.uncond : Operand{}, t, is_aligned)};
}

inline cuda::LossResult written_to(Result& out) {
  return {&out.loss,          out.per_row.data(),  out.metrics.data(), out.sum_grads.data(),
          out.cond.operand(), out.uncond.operand()};
}

inline Result run(const Batch& t, const Problem& problem, Path path, bool is_aligned,
                  bool wanted = true) {
  Result out = room_for(t, is_aligned, wanted);
  std::vector<char> workspace = workspace_for(t);
  out.path = cuda::guard_loss(t, problem, written_to(out), aligned(workspace), counters.data(),
                              path, nullptr);
  cuda::emulation::finish();
  check_counters(t);
  CHECK(path == Path::automatic || out.path == path);
  if (wanted && !is_aligned) CHECK(out.cond.loose.guards_intact());
  return out;
}

inline void check_same(const Result& p, const Result& q, const Batch& t) {
  CHECK(same(&p.loss, &q.loss, sizeof p.loss));
  CHECK(same(p.per_row.data(), q.per_row.data(), p.per_row.size() * 4));
  CHECK(same(p.metrics.data(), q.metrics.data(), p.metrics.size() * 4));
  CHECK(same(p.sum_grads.data(), q.sum_grads.data(), p.sum_grads.size() * 8));
  CHECK(same_rows(p.cond.operand(), q.cond.operand(), t));
  CHECK(same_rows(p.uncond.operand(), q.uncond.operand(), t));
}

// Element j of a row.
inline double at(const Operand& x, int64_t k, int64_t i, int64_t j) {
  const char* const from = x.row(k, i) + j * size_of(x.dtype);
  if (x.dtype == DType::f32) {
    float out;
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return decode(format_of(x.dtype), bits);
}

// Checks that rows are equal, except for the order of a few float32 operations and one rounding to
// the stored type.
inline void check_rows(const Operand& got, const Operand& expected, const Batch& t,
                       double bound = 1e-6) {
  const double unit = got.dtype == DType::bf16 ? 0x1p-7 : got.dtype == DType::f16 ? 0x1p-10 : 0;
  for (int64_t n = 0; n < t.steps * t.batch; ++n) {
    const int64_t k = n / t.batch, i = n % t.batch;
    double largest = 0;
    for (int64_t j = 0; j < t.numel; ++j) {
      largest = std::fmax(largest, std::fabs(at(expected, k, i, j)));
    }
    for (int64_t j = 0; j < t.numel; ++j) {
      const double e = at(expected, k, i, j), g = at(got, k, i, j);
      if (std::isnan(e)) {
        CHECK(std::isnan(g));
      } else {
        CHECK_CLOSE(g, e, bound * largest + unit * std::fabs(e) + 0x1p-24);
      }
    }
  }
}

inline void check_close(const float* got, const std::vector<double>& expected, double bound) {
  for (size_t n = 0; n < expected.size(); ++n) {
    if (std::isnan(expected[n])) {
      CHECK(std::isnan(got[n]));
    } else {
      CHECK_CLOSE(got[n], expected[n], bound * (1 + std::fabs(expected[n])));
    }
  }
}

// Compares with the CPU: first the numbers, then the gradient of the coefficients that were found.
inline void check_against_cpu(const Result& got, const Batch& t, const Problem& problem) {
  const int64_t rows = t.steps * t.batch;
  const auto expected = cpu::guard_loss(serial, t, problem, {}, {});
  check_close(&got.loss, {expected.loss}, 2e-5);
  check_close(got.per_row.data(), expected.log_ratio, 2e-5);
  check_close(got.per_row.data() + rows, expected.excess, 1e-4);
  check_close(got.per_row.data() + 2 * rows, expected.weights, 1e-4);
  check_close(got.per_row.data() + 3 * rows, expected.kl, 2e-5);
  check_close(got.metrics.data(), expected.metrics, 1e-4);
  std::vector<Coefficients> c(rows);
  for (int64_t n = 0; n < rows; ++n) {
    c[n] = {got.sum_grads[n], got.sum_grads[rows + n], got.sum_grads[2 * rows + n]};
  }
  const Output cond(t.v, t, false), uncond(t.uncond, t, false);
  cpu::gradient(serial, t, problem.table, c.data(), cond.operand(), uncond.operand());
  check_rows(got.cond.operand(), cond.operand(), t);
  if (t.uncond) check_rows(got.uncond.operand(), uncond.operand(), t);
}

}  // namespace guard_ops::test
