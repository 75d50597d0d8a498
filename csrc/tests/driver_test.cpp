// Checks that whole batches give the same bits for any number of threads and whether rows are read
// once or twice, what is read and written how often, and transitions that are not finite.
#include "../cpu/driver.h"

#include <thread>

#include "driver_cases.h"

namespace guard_ops::test {
namespace {

using cpu::Evaluation;
using cpu::Machine;

constexpr int64_t always = int64_t(1) << 40, never = 0;  // cache_bytes: one pass, two passes

// Runs as many threads as asked for, however little there is to do.
cpu::Parallel threads_of(int threads) {
  return [threads](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t useful = std::min<int64_t>(threads, n);
    std::vector<std::thread> pool;
    for (int64_t t = 1; t < useful; ++t) {
      pool.emplace_back(body, n * t / useful, n * (t + 1) / useful);
    }
    body(0, n / std::max<int64_t>(useful, 1));
    for (std::thread& thread : pool) thread.join();
  };
}

// The kernels of this processor, which also write down the row they are called for: in capitals if
// they read operands, so "Aa" means a row's sums and then the scaling of its gradient.
std::string trace;
void note(char first, const cpu::Span& at) { trace += char(first + at.k * batch + at.i); }
const cpu::Kernels traced = {
    "traced",
    [](const cpu::Batch& t, const Step<double>& step, const cpu::Span& at,
       const cpu::EarlyGradient& early) {
      note('A', at);
      return cpu::kernels().sums(t, step, at, early);
    },
    [](const cpu::Batch& t, const Step<double>& step, const Coefficients& c, const cpu::Span& at,
       const Operand& cond, const Operand& uncond) {
      note('A', at);
      cpu::kernels().gradient(t, step, c, at, cond, uncond);
    },
    [](const Operand& from, const Operand& to, double factor, const cpu::Span& at) {
      note('a', at);
      cpu::kernels().scale(from, to, factor, at);
    },
    nullptr};

// Loss, diagnostics and gradients of one call.
struct Result {
  Evaluation evaluation;
  Tensor cond, uncond;

  friend bool operator==(const Result& a, const Result& b) {
    const Evaluation &p = a.evaluation, &q = b.evaluation;
    return std::memcmp(&p.loss, &q.loss, sizeof p.loss) == 0 && same(p.log_ratio, q.log_ratio) &&
           same(p.excess, q.excess) && same(p.weights, q.weights) && same(p.kl, q.kl) &&
           same(p.metrics, q.metrics) && same(p.coefficients, q.coefficients) &&
           a.cond.bytes() == b.cond.bytes() && a.uncond.bytes() == b.uncond.bytes();
  }
  template <class T>
  static bool same(const std::vector<T>& p, const std::vector<T>& q) {
    return p.size() == q.size() && std::memcmp(p.data(), q.data(), p.size() * sizeof(T)) == 0;
  }
};

Result run(const Machine& machine, const cpu::Batch& t, const Problem& problem) {
  Result out;
  out.cond = Tensor(t.v.dtype, steps, batch, t.numel);
  if (t.uncond) out.uncond = Tensor(t.uncond.dtype, steps, batch, t.numel);
  out.evaluation = cpu::guard_loss(machine, t, problem, out.cond.operand(), out.uncond.operand());
  CHECK(out.cond.guards_intact() && (!t.uncond || out.uncond.guards_intact()));
  return out;
}

// Checks that the gradient is that of the coefficients, except for the rounding of another order of
// operations.
void check_gradient(const Result& got, const cpu::Batch& t, const Problem& problem) {
  const Machine serial{cpu::kernels(), threads_of(1), 1, never};
  Tensor expected(t.v.dtype, steps, batch, t.numel);
  cpu::gradient(serial, t, problem.table, got.evaluation.coefficients.data(), expected.operand(),
                {});
  for (int64_t k = 0; k < steps; ++k) {
    for (int64_t i = 0; i < batch; ++i) {
      double largest = 0;
      for (int64_t j = 0; j < t.numel; ++j) {
        largest = std::max(largest, std::fabs(expected.get(k, i, j)));
      }
      for (int64_t j = 0; j < t.numel; ++j) {
        const double g = got.cond.get(k, i, j), e = expected.get(k, i, j);
        if (std::isnan(got.evaluation.coefficients[k * batch + i].c1)) {
          CHECK(std::isnan(g) && std::isnan(e));
        } else {
          CHECK_CLOSE(g, e, 4e-7 * largest);
        }
      }
    }
  }
}

// One thread with two passes sets the bits, and everything else has to give the same.
Result check_same_bits(const cpu::Batch& t, const Problem& problem) {
  const Result expected = run({cpu::kernels(), threads_of(1), 1, never}, t, problem);
  check_gradient(expected, t, problem);
  for (const int threads : {1, 2, 3, 7}) {
    const Machine once{cpu::kernels(), threads_of(threads), threads, always};
    CHECK(run(once, t, problem) == expected);
    if (threads < 3) continue;
    const Machine twice{cpu::kernels(), threads_of(threads), threads, never};
    CHECK(run(twice, t, problem) == expected);
  }
  return expected;
}

void test_same_bits() {
  for_each_case(601, [](Operands&, const cpu::Batch& t, const Problem& problem, bool) {
    const Result got = check_same_bits(t, problem);
    CHECK(std::isfinite(got.evaluation.loss));
  });
  // The sums of rows longer than a chunk combine in the order of their chunks.
  const Operands in(dtypes[1], steps, batch, 70000, true);
  for (const Form form : {Form::mean, Form::seeded}) {
    for_each_problem(form, in.numel, [&](const Problem& problem, bool) {
      if (!is_run()) return;
      CONTEXT("%s D=70000 ratio_norm %d", form_names[int(form)], int(problem.config.ratio_norm));
      check_same_bits(in.of(form, false, problem.config.kl_beta != 0), problem);
    });
  }
}

// Checks which rows are touched in which order, in one thread.
void test_passes() {
  for_each_case(40, [](Operands&, const cpu::Batch& t, const Problem& problem, bool independent) {
    for (const int64_t cache : {always, never}) {
      // 16 bits do not hold an unscaled gradient; that of the seeded form is kept beside them
      const bool unrounded =
          t.v.dtype == (t.wide ? f64 : f32) || (t.seeds.data && !t.wide && cache == always);
      const bool scaled = !t.uncond && problem.config.kl_beta == 0 && unrounded;
      std::string once, twice;
      for (int row = 0; row < rows; ++row) {
        once += {char('A' + row), char((scaled ? 'a' : 'A') + row)};
        twice += char('A' + row);
      }
      for (int row = rows - 1; row >= 0; --row) twice += char((scaled ? 'a' : 'A') + row);
      trace.clear();
      run({traced, threads_of(1), 1, cache}, t, problem);
      CHECK(trace == (independent && cache == always ? once : twice));
    }
  });
  // One pass needs a cache that a row fits into, and rows for all threads.
  const Operands in(dtypes[1], steps, batch, 40, true);
  const cpu::Batch t = in.of(Form::velocity, true, true);
  const Problem problem =
      scalars.problem(config_of(RatioNorm::none, Balance::none), t.form, in.numel);
  const auto is_one_pass = [&](int threads, int64_t cache) {
    trace.clear();
    run({traced, threads_of(1), threads, cache}, t, problem);
    return trace.substr(0, 2) == "AA";
  };
  const int64_t row_bytes = 6 * 4 * in.numel;  // v, uncond, ref, x, y, v_old
  CONTEXT("one pass or two");
  CHECK(is_one_pass(1, row_bytes) && !is_one_pass(1, row_bytes - 1));
  CHECK(is_one_pass(rows, row_bytes) && !is_one_pass(rows + 1, row_bytes));
}

// Row 1 ends in NaN, row 6 begins with Inf, and no step of sample 3 is finite.
bool spoiled(int64_t row) { return row == 1 || row == 6 || row % batch == 3; }

void test_nonfinite_rows() {
  for_each_case(601, [](Operands& in, const cpu::Batch& t, Problem problem, bool) {
    const Tensor before = in.v;
    in.v.set(0, 1, in.numel - 1, NAN);
    in.v.set(1, 2, 0, INFINITY);
    for (int64_t k = 0; k < steps; ++k) in.v.set(k, 3, in.numel / 2, NAN);
    for (const bool drop : {true, false}) {
      problem.config.nonfinite = drop ? NonFinite::drop : NonFinite::propagate;
      const Result got = check_same_bits(t, problem);
      CHECK(std::isfinite(got.evaluation.loss) == drop);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = 0; j < in.numel; ++j) {
          const double g = got.cond.get(row / batch, row % batch, j);
          CHECK(!spoiled(row) ? std::isfinite(g) : drop ? g == 0 : std::isnan(g));
        }
      }
    }
    // The batch points into the tensor, so its numbers are put back, not the tensor.
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < in.numel; ++j) {
        in.v.set(row / batch, row % batch, j, before.get(row / batch, row % batch, j));
      }
    }
  });
}

// A call without some of the gradients gives the same bits as one with all of them.
void test_absent_outputs() {
  const Operands in(dtypes[1], steps, batch, 601, true);
  for (const bool independent : {true, false}) {
    const Config config =
        config_of(independent ? RatioNorm::none : RatioNorm::standardize, Balance::none);
    for (const bool guided : {false, true}) {
      CONTEXT("absent outputs, independent %d guided %d", independent, guided);
      const cpu::Batch t = in.of(Form::velocity, guided, false);
      const Problem problem = scalars.problem(config, t.form, in.numel);
      const Machine machine{cpu::kernels(), threads_of(2), 2, always};
      const Result all = run(machine, t, problem);
      CHECK(cpu::guard_loss(machine, t, problem, {}, {}).loss == all.evaluation.loss);
      if (!guided) continue;
      Tensor uncond(f32, steps, batch, in.numel);
      const double loss = cpu::guard_loss(machine, t, problem, {}, uncond.operand()).loss;
      CHECK(loss == all.evaluation.loss && uncond.bytes() == all.uncond.bytes());
    }
  }
}

// sums and sde_step of long rows give the same bits for any number of threads.
void test_sums_and_sde_step() {
  const Operands in(dtypes[1], steps, batch, 2 * cpu::chunk + 77, false);
  cpu::Batch t = in.of(Form::velocity, false, true);
  t.noise = in.noise.operand();
  const Problem problem = scalars.problem(Config{}, t.form, in.numel);
  std::vector<Sums> expected(rows);
  Tensor prev_sample, mean;
  std::vector<double> square(rows);
  for (const int threads : {1, 2, 3, 7, 50}) {
    CONTEXT("%d threads", threads);
    const Machine machine{cpu::kernels(), threads_of(threads), threads, never};
    std::vector<Sums> sums(rows);
    cpu::sums(machine, t, problem.table, sums.data());
    Tensor y(f32, steps, batch, in.numel), m(f32, steps, batch, in.numel);
    std::vector<double> squares(rows);
    cpu::sde_step(machine, t, problem.table, y.operand(), m.operand(), squares.data());
    if (threads == 1) {
      expected = sums;
      prev_sample = y;
      mean = m;
      square = squares;
    }
    CHECK(Result::same(sums, expected) && squares == square);
    CHECK(y.bytes() == prev_sample.bytes() && m.bytes() == mean.bytes());
    CHECK(y.guards_intact() && m.guards_intact());
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops;
  test::test_same_bits();
  test::test_passes();
  test::test_nonfinite_rows();
  test::test_absent_outputs();
  test::test_sums_and_sde_step();
  return test::finish();
}
