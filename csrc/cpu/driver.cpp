#include "driver.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <vector>

namespace guard_ops::cpu {

// ---- the instruction set: chosen once, from what the processor has ------------------------------

#if defined(__x86_64__)
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#else
namespace neon {
extern const Kernels table;
}
#endif

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "baseline") == 0) return &baseline::table;
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &avx2::table;
  }
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &avx512::table;
  }
#else
  if (std::strcmp(name, "neon") == 0) return &neon::table;
#endif
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    if (const char* asked = std::getenv("GUARD_OPS_CPU_ISA")) {
      if (const Kernels* found = kernels(asked)) return *found;
    }
    for (size_t n = std::size(isa_names); n-- > 1;) {
      if (const Kernels* found = kernels(isa_names[n])) return *found;
    }
    return *kernels(isa_names[0]);
  }();
  return chosen;
}

// ---- the objective on [K, B] --------------------------------------------------------------------

namespace {

// evaluate()'s Team, and the only Group of it: one thread, which adds terms in their order.
struct Alone {
  bool leader() const { return true; }
  template <class F>
  void each(int64_t n, F body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <class F>
  void groups(int64_t n, F body) const {
    for (int64_t i = 0; i < n; ++i) body(*this, i);
  }
  template <class F>
  double sum(int64_t n, F value) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += value(i);
    return total;
  }
};

struct IntoEvaluation {  // evaluate()'s Out
  Evaluation& to;
  int64_t steps;
  void loss(double value) const { to.loss = value; }
  void metric(int m, int64_t k, double value) const { to.metrics[m * steps + k] = value; }
  void row(int64_t n, const RowState& r, const Coefficients& coefficients) const {
    to.log_ratio[n] = r.ratio.log_ratio;
    to.excess[n] = r.norm.excess;
    to.weights[n] = r.weight;
    to.kl[n] = r.ratio.kl;
    to.coefficients[n] = coefficients;
  }
};

}  // namespace

Evaluation evaluate(const Problem& problem, const Sums* sums) {
  const int64_t steps = problem.steps, rows = steps * problem.batch;
  Evaluation out;
  for (auto* x : {&out.log_ratio, &out.excess, &out.weights, &out.kl}) x->resize(rows);
  out.metrics.resize(metric_count * steps);
  out.coefficients.resize(rows);
  std::vector<RowState> state(rows);
  std::vector<int64_t> finite(problem.batch);
  guard_ops::evaluate(
      Alone{}, problem, [=](int64_t n) { return sums[n]; },
      EvaluationScratch{state.data(), finite.data()}, IntoEvaluation{out, steps});
  return out;
}

void ratio_statistics(const Problem& problem, const Sums* sums, double* out) {
  std::vector<RowState> state(problem.steps * problem.batch);
  guard_ops::ratio_statistics(
      Alone{}, problem, [=](int64_t n) { return sums[n]; }, state.data(), out);
}

// ---- whole batches ------------------------------------------------------------------------------

namespace {

constexpr int64_t grain_elements = 16384;  // fewer elements are not worth a thread

int64_t chunks_of(const Batch& t) { return (t.numel + chunk - 1) / chunk; }

Step<double> step_at(const Doubles table[5], int64_t k, int64_t i) {
  return {*table[0].at(k, i), *table[1].at(k, i), *table[2].at(k, i)};
}

// Calls body(unit, span) for every chunk of every row, in parallel.
template <class Body>
void for_each_chunk(const Machine& machine, const Batch& t, bool backwards, Body body) {
  const int64_t chunks = chunks_of(t), units = t.steps * t.batch * chunks;
  const int64_t grain = std::max<int64_t>(1, grain_elements / std::min(t.numel, chunk));
  machine.parallel(units, grain, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      const int64_t unit = backwards ? last - 1 - (u - first) : u;
      const int64_t row = unit / chunks, begin = unit % chunks * chunk;
      body(unit, Span{row / t.batch, row % t.batch, begin, std::min(begin + chunk, t.numel)});
    }
  });
}

void add(Sums& total, const Sums& part) {
  total.s1 += part.s1;
  total.s2 += part.s2;
  total.ref += part.ref;
}

int64_t row_bytes(const Batch& t) {
  int64_t bytes = 0;
  for (const Operand* x : {&t.v, &t.uncond, &t.ref, &t.x, &t.y, &t.m, &t.v_old, &t.noise}) {
    if (*x) bytes += t.numel * size_of(x->dtype);
  }
  return bytes;
}

}  // namespace

int64_t cache_share(int threads) {
  const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE), l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::max<int64_t>(l2 > 0 ? l2 : 1 << 19, l3 > 0 ? l3 / threads : 0);
}

void sums(const Machine& machine, const Batch& t, const Doubles table[5], Sums* out,
          const EarlyGradient& early) {
  const int64_t chunks = chunks_of(t), rows = t.steps * t.batch;
  std::vector<Sums> partial(chunks == 1 ? 0 : rows * chunks);
  Sums* parts = chunks == 1 ? out : partial.data();
  for_each_chunk(machine, t, false, [&](int64_t unit, const Span& at) {
    parts[unit] = machine.kernels.sums(t, step_at(table, at.k, at.i), at, early);
  });
  for (int64_t row = 0; row < rows && chunks > 1; ++row) {
    out[row] = partial[row * chunks];
    for (int64_t n = 1; n < chunks; ++n) add(out[row], partial[row * chunks + n]);
  }
}

void gradient(const Machine& machine, const Batch& t, const Doubles table[5],
              const Coefficients* coefficients, const Operand& cond, const Operand& uncond) {
  for_each_chunk(machine, t, true, [&](int64_t, const Span& at) {
    machine.kernels.gradient(t, step_at(table, at.k, at.i), coefficients[at.k * t.batch + at.i], at,
                             cond, uncond);
  });
}

namespace {

// What the steps of one call of guard_loss share.
struct Call {
  const Machine& machine;
  const Batch& t;
  const Problem& problem;
  const Operand &cond, &uncond;
  EarlyGradient early;  // absent where the sums' pass cannot write the gradient
  bool may_keep;        // whether it could, into memory that is kept beside the gradient's
  std::vector<Sums> sums;

  Call(const Machine& machine, const Batch& t, const Problem& problem, const Operand& cond,
       const Operand& uncond)
      : machine(machine), t(t), problem(problem), cond(cond), uncond(uncond) {
    sums.resize(t.steps * t.batch);
    const bool compute_type = cond.dtype == (t.wide ? DType::f64 : DType::f32);
    const bool factor_alone = cond && !t.uncond && !t.mask && problem.config.kl_beta == 0;
    may_keep = factor_alone && !compute_type && !t.wide && t.form == Form::seeded;
    if (factor_alone && compute_type) early = {cond, problem.config.gradient_kind()};
  }

  // Float32 memory for the gradient up to a factor, of rows that are `stride_b` elements apart.
  EarlyGradient kept(float* memory, int64_t stride_b) const {
    return {{reinterpret_cast<char*>(memory), DType::f32, t.batch * stride_b, stride_b},
            problem.config.gradient_kind()};
  }

  Span span(int64_t row, int64_t begin) const {
    return {row / t.batch, row % t.batch, begin, std::min(begin + chunk, t.numel)};
  }

  Step<double> step(int64_t row) const {
    return step_at(problem.table, row / t.batch, row % t.batch);
  }

  // Forms one row's sums, and writes its early gradient if there is one.
  Sums read(int64_t row, const EarlyGradient& early) const {
    Sums total = machine.kernels.sums(t, step(row), span(row, 0), early);
    for (int64_t begin = chunk; begin < t.numel; begin += chunk) {
      add(total, machine.kernels.sums(t, step(row), span(row, begin), early));
    }
    return total;
  }

  // Finishes one row's gradient right after the row was read: backwards, as its end is still
  // cached.
  void write(int64_t row, const Coefficients& c, const EarlyGradient& early) const {
    for (int64_t begin = (t.numel - 1) / chunk * chunk; begin >= 0; begin -= chunk) {
      if (early.to) {
        machine.kernels.scale(early.to, cond, c.c1, span(row, begin));
      } else {
        machine.kernels.gradient(t, step(row), c, span(row, begin), cond, uncond);
      }
    }
  }

  Evaluation one_pass() {
    std::vector<Coefficients> assumed(sums.size());
    const bool keeps = may_keep && row_bytes(t) + 4 * t.numel <= machine.cache_bytes;
    const int64_t grain = std::max<int64_t>(1, grain_elements / t.numel);
    machine.parallel(int64_t(sums.size()), grain, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> memory(keeps ? new float[t.numel] : nullptr);
      const EarlyGradient written = keeps ? kept(memory.get(), 0) : early;
      for (int64_t row = first; row < last; ++row) {
        sums[row] = read(row, written);
        assumed[row] = problem.assume(row / t.batch, row % t.batch, sums[row]);
        write(row, assumed[row], written);
      }
    });
    Evaluation out = evaluate(problem, sums.data());
    for (size_t row = 0; row < sums.size(); ++row) {  // rare: another transition was not finite
      const Coefficients& c = out.coefficients[row];
      if (assumed[row] == c || std::isnan(c.c1)) continue;
      if (early.to) read(row, early);
      write(row, c, early);
    }
    return out;
  }

  Evaluation two_passes() {
    const int64_t elements = t.steps * t.batch * t.numel;
    const bool keeps = may_keep && 4 * elements <= machine.cache_bytes * machine.threads;
    const std::unique_ptr<float[]> memory(keeps ? new float[elements] : nullptr);
    const EarlyGradient written = keeps ? kept(memory.get(), t.numel) : early;
    cpu::sums(machine, t, problem.table, sums.data(), written);
    Evaluation out = evaluate(problem, sums.data());
    if (written.to) {
      for_each_chunk(machine, t, true, [&](int64_t, const Span& at) {
        machine.kernels.scale(written.to, cond, out.coefficients[at.k * t.batch + at.i].c1, at);
      });
    } else if (cond || uncond) {
      gradient(machine, t, problem.table, out.coefficients.data(), cond, uncond);
    }
    return out;
  }
};

}  // namespace

Evaluation guard_loss(const Machine& machine, const Batch& t, const Problem& problem,
                      const Operand& cond, const Operand& uncond) {
  Call call(machine, t, problem, cond, uncond);
  const bool fits = row_bytes(t) <= machine.cache_bytes;
  const bool busy = t.steps * t.batch >= machine.threads;
  if ((cond || uncond) && problem.rows_are_independent() && fits && busy) return call.one_pass();
  return call.two_passes();
}

void sde_step(const Machine& machine, const Batch& t, const Doubles table[5],
              const Operand& prev_sample, const Operand& mean, double* square) {
  const int64_t chunks = chunks_of(t);
  std::vector<double> partial(t.steps * t.batch * chunks);
  for_each_chunk(machine, t, false, [&](int64_t unit, const Span& at) {
    partial[unit] = machine.kernels.sde_step(t, step_at(table, at.k, at.i), at, prev_sample, mean);
  });
  for (int64_t row = 0; row < t.steps * t.batch; ++row) {
    square[row] = 0;
    for (int64_t n = 0; n < chunks; ++n) square[row] += partial[row * chunks + n];
  }
}

}  // namespace guard_ops::cpu
