// The CUDA kernels, run on the host by emulate.h: every form, dtype and objective against the CPU's
// kernels, and every path of guard_loss against every other, bit for bit.
#include <cstring>

#include "../cuda/kernels.h"
#include "../cuda/plan.h"
#include "driver_cases.h"
#include "emulate_runtime.h"

namespace guard_ops::test {
namespace {

using cpu::Machine;
using cuda::Path;

const Machine serial{
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

// A gradient as wide rows, to be compared: aligned or not, as the batch is.
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

bool same(const void* p, const void* q, size_t bytes) { return std::memcmp(p, q, bytes) == 0; }

bool same_rows(const Operand& p, const Operand& q, const Batch& t) {
  if (!p || !q) return !p && !q;
  for (int64_t n = 0; n < t.steps * t.batch; ++n) {
    const int64_t k = n / t.batch, i = n % t.batch;
    if (!same(p.row(k, i), q.row(k, i), t.numel * size_of(p.dtype))) return false;
  }
  return true;
}

std::vector<char> workspace_for(const Batch& t) {
  return std::vector<char>(cuda::workspace_bytes(t) + 256, char(0xFF));
}

char* aligned(std::vector<char>& x) {
  return x.data() + (256 - reinterpret_cast<uintptr_t>(x.data()) % 256);
}

// The counters of all calls, which each leaves as the next one needs them.
std::vector<uint32_t> counters(1024, 0);

void check_counters(const Batch& t) {
  const int64_t needed = cuda::counters_needed(t);
  CHECK(needed <= int64_t(counters.size()));
  for (int64_t n = 0; n < int64_t(counters.size()); ++n) {
    if (n != 32) CHECK(counters[n] == 0);  // that one only changes
  }
}

Result run(const Batch& t, const Problem& problem, Path path, bool is_aligned, bool wanted = true) {
  const int64_t rows = t.steps * t.batch;
  Result out{NAN,
             std::vector<float>(4 * rows, NAN),
             std::vector<float>(metric_count * t.steps, NAN),
             std::vector<double>(3 * rows, NAN),
             Output(wanted ? t.v : Operand{}, t, is_aligned),
             Output(wanted ? t.uncond : Operand{}, t, is_aligned)};
  std::vector<char> workspace = workspace_for(t);
  out.path = cuda::guard_loss(t, problem,
                              {&out.loss, out.per_row.data(), out.metrics.data(),
                               out.sum_grads.data(), out.cond.operand(), out.uncond.operand()},
                              aligned(workspace), counters.data(), path, nullptr);
  cuda::emulation::finish();
  check_counters(t);
  CHECK(path == Path::automatic || out.path == path);
  if (wanted && !is_aligned) CHECK(out.cond.loose.guards_intact());
  return out;
}

void check_same(const Result& p, const Result& q, const Batch& t) {
  CHECK(same(&p.loss, &q.loss, sizeof p.loss));
  CHECK(same(p.per_row.data(), q.per_row.data(), p.per_row.size() * 4));
  CHECK(same(p.metrics.data(), q.metrics.data(), p.metrics.size() * 4));
  CHECK(same(p.sum_grads.data(), q.sum_grads.data(), p.sum_grads.size() * 8));
  CHECK(same_rows(p.cond.operand(), q.cond.operand(), t));
  CHECK(same_rows(p.uncond.operand(), q.uncond.operand(), t));
}

// One stored number of `dtype`, at the given element of a row.
double at(const Operand& x, int64_t k, int64_t i, int64_t j) {
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

// Equal up to the order of a few float32 operations, and one rounding to the stored type.
void check_rows(const Operand& got, const Operand& expected, const Batch& t, double bound = 1e-6) {
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

void check_close(const float* got, const std::vector<double>& expected, double bound) {
  for (size_t n = 0; n < expected.size(); ++n) {
    if (std::isnan(expected[n])) {
      CHECK(std::isnan(got[n]));
    } else {
      CHECK_CLOSE(got[n], expected[n], bound * (1 + std::fabs(expected[n])));
    }
  }
}

// Against the CPU: its numbers, then the gradient of the coefficients that were found here.
void check_against_cpu(const Result& got, const Batch& t, const Problem& problem) {
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

// Every path and amount of shared memory gives the bits of two launches.
void check_paths(const Batch& t, const Problem& problem, bool independent, bool is_aligned) {
  cuda::emulated.shared_bytes = 1 << 16;
  const Result expected = run(t, problem, Path::two_launches, is_aligned);
  check_against_cpu(expected, t, problem);
  for (const int kibibytes : {10, 20, 40, 400}) {  // of which the rows' tiles take up to 6 a warp
    cuda::emulated.shared_bytes = kibibytes << 10;
    const uint32_t slots = (cuda::emulated.shared_bytes - 256) / 3 / (6 * 1024);
    if (slots > 0) check_same(run(t, problem, Path::cooperative, is_aligned), expected, t);
  }
  if (!independent) return;
  check_same(run(t, problem, Path::cluster, is_aligned), expected, t);
  for (const int kibibytes : {1, 60}) {  // a row a turn; some rows; the last turn has fewer
    cuda::emulated.cache_bytes = kibibytes << 10;
    check_same(run(t, problem, Path::in_turn, is_aligned), expected, t);
  }
}

void test_guard_loss() {
  for (const int64_t numel : {37, 601}) {
    int turn = 0;
    for_each_case(numel, [&](Operands&, const Batch& t, const Problem& problem, bool independent) {
      if (t.wide || (numel == 37 && turn++ % 3 != 0)) return;
      const bool is_aligned = numel == 601 && turn++ % 2 == 0;
      if (is_aligned) {
        check_paths(AlignedBatch(t).t, problem, independent, true);
      } else {
        check_paths(t, problem, independent, false);
      }
    });
  }
}

// Rows of more chunks than a cluster has blocks, and of several tiles a chunk.
void test_long_rows() {
  constexpr int64_t numel = 256 * 128 * 2 - 1000;
  for (const int d : {1, 2}) {
    Operands in(dtypes[d], steps, batch, numel, true);
    for (const Form form : {Form::velocity, Form::seeded}) {
      for_each_problem(form, numel, [&](const Problem& problem, bool independent) {
        if (problem.config.kl_beta != 0 || problem.mean != nullptr) return;
        CONTEXT("long rows %s ratio_norm %d", dtypes[d].name, int(problem.config.ratio_norm));
        const AlignedBatch a(in.of(form, false, false));
        cuda::emulated.shared_bytes = 1 << 16;
        const Result expected = run(a.t, problem, Path::two_launches, true);
        check_against_cpu(expected, a.t, problem);
        check_same(run(a.t, problem, Path::cooperative, true), expected, a.t);
        cuda::emulated = {0, 8, 1 << 18, true, true};
        if (independent) {
          check_same(run(a.t, problem, Path::cluster, true), expected, a.t);
          CHECK(run(a.t, problem, Path::automatic, true).path == Path::cluster);
        }
        cuda::emulated = {0, 3, 1 << 16, true, true};
      });
    }
  }
}

// Rows that several warps add up the chunks of.
void test_rows_of_parts() {
  constexpr int64_t numel = 256 * 4 * (2 * 256 + 9) - 11;
  Operands in(dtypes[1], 1, 2, numel, true);
  const AlignedBatch a(in.of(Form::noise, false, false));
  for_each_problem(Form::noise, numel, [&](Problem problem, bool independent) {
    if (problem.config.kl_beta != 0 || problem.mean != nullptr) return;
    CONTEXT("rows of parts, ratio_norm %d", int(problem.config.ratio_norm));
    problem.steps = 1;
    problem.batch = 2;
    cuda::emulated = {0, 8, 1 << 20, true, true};
    const Result expected = run(a.t, problem, Path::two_launches, true);
    check_against_cpu(expected, a.t, problem);
    check_same(run(a.t, problem, Path::cooperative, true), expected, a.t);
    if (independent) {
      check_same(run(a.t, problem, Path::cluster, true), expected, a.t);
      check_same(run(a.t, problem, Path::in_turn, true), expected, a.t);
    }
    cuda::emulated = {0, 3, 1 << 16, true, true};
  });
}

// A transition that is not finite: alone in its gradient, and the others' corrected in every path.
void test_not_finite() {
  for (const bool drop : {false, true}) {
    Operands in(dtypes[1], steps, batch, 601, false);
    in.v.set(1, 2, 300, NAN);
    in.v.set(2, 0, 5, INFINITY);
    const Batch t = in.of(Form::velocity, false, false);
    for_each_problem(Form::velocity, 601, [&](Problem problem, bool independent) {
      CONTEXT("not finite, drop %d ratio_norm %d", drop, int(problem.config.ratio_norm));
      if (problem.config.kl_beta != 0) return;
      problem.config.drop = drop;
      check_paths(t, problem, independent, false);
      const Result got = run(t, problem, Path::two_launches, false);
      CHECK(std::isnan(got.loss) == !drop);
      for (int64_t n = 0; n < rows; ++n) {
        const bool bad = n == batch + 2 || n == 2 * batch;
        const double g = got.cond.loose.get(n / batch, n % batch, 7);
        CHECK(bad ? (drop ? g == 0 : std::isnan(g)) : std::isfinite(g));
      }
    });
  }
}

// Which path `automatic` is, by what the device says that it can do.
void test_choice() {
  Operands in(dtypes[1], steps, batch, 601, true);
  const Batch t = in.of(Form::velocity, false, false);
  const Config alone = config_of(RatioNorm::none, Balance::none);
  const Problem independent = scalars.problem(alone, Form::velocity, 601);
  const Problem joint = scalars.problem(config_of(RatioNorm::standardize, Balance::inverse_ratio),
                                        Form::velocity, 601);
  CONTEXT("choice");
  cuda::emulated = {0, 3, 1 << 16, true, true};
  CHECK(run(t, independent, Path::automatic, false).path == Path::cluster);
  CHECK(run(t, joint, Path::automatic, false).path == Path::cooperative);
  cuda::emulated.clusters = false;  // then a block has to hold a row, and cannot
  cuda::emulated.shared_bytes = 14 << 10;
  cuda::emulated.cache_bytes = 40 << 10;  // two rows or three of 13 KB
  CHECK(run(t, independent, Path::automatic, false).path == Path::in_turn);
  CHECK(run(t, independent, Path::automatic, false, false).path == Path::two_launches);
  cuda::emulated.cache_bytes = 20 << 10;  // less than twice a row: it would be gone again
  CHECK(run(t, independent, Path::automatic, false).path != Path::in_turn);
  cuda::emulated = {0, 3, 1 << 16, true, true};
  CHECK(run(t, joint, Path::automatic, false, false).path == Path::two_launches);
  cuda::emulated.cooperative = false;
  CHECK(run(t, joint, Path::automatic, false).path == Path::two_launches);
  cuda::emulated = {0, 3, 10 << 10, true, true};  // too little for a warp
  CHECK(run(t, joint, Path::automatic, false).path == Path::two_launches);
  cuda::emulated = {0, 3, 1 << 16, true, true};
  cuda::emulated.busy = true;
  CHECK(run(t, joint, Path::automatic, false).path == Path::two_launches);
  cuda::emulated.busy = false;
  for (const Path path : {Path::cluster, Path::in_turn}) {  // rows of `joint` need each other
    bool refused = false;
    try {
      run(t, joint, path, false);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    CHECK(refused);
  }
}

void test_sums_and_gradient() {
  for (const int d : {1, 2, 3, 4, 5}) {
    for (const int64_t numel : {1, 8, 255, 601, 20000}) {
      if (numel == 20000 && d != 1) continue;
      Operands in(dtypes[d], steps, batch, numel, false);
      for (const Form form : forms) {
        for (const bool guided : {false, true}) {
          CONTEXT("sums %s D=%ld %s guided %d", form_names[int(form)], long(numel), dtypes[d].name,
                  guided);
          const Batch loose = in.of(form, guided, guided);
          const AlignedBatch a(loose);
          const Problem problem =
              scalars.problem(config_of(RatioNorm::none, Balance::none), form, numel);
          std::vector<Sums> expected(rows);
          cpu::sums(serial, loose, problem.table, expected.data());
          std::vector<double> got(3 * rows, NAN), again = got;
          std::vector<char> workspace = workspace_for(loose);
          cuda::sums(loose, problem.table, got.data(), aligned(workspace), nullptr);
          cuda::sums(a.t, problem.table, again.data(), aligned(workspace), nullptr);
          cuda::emulation::finish();
          CHECK(same(got.data(), again.data(), got.size() * 8));
          for (int64_t n = 0; n < rows; ++n) {
            const double size = std::sqrt(double(numel)) + expected[n].s2;
            CHECK_CLOSE(got[n], expected[n].s1, 2e-6 * size);
            CHECK_CLOSE(got[rows + n], expected[n].s2, 2e-6 * size);
            CHECK_CLOSE(got[2 * rows + n], expected[n].ref, 2e-6 * (size + expected[n].ref));
          }
          std::vector<Coefficients> c(rows);
          std::vector<double> flat(3 * rows);
          for (int64_t n = 0; n < rows; ++n) {
            c[n] = n == 3 ? Coefficients{0, 0, 0}
                          : Coefficients{0.3 + 0.01 * n, -0.2, guided ? 0.05 : 0};
            flat[n] = c[n].c1;
            flat[rows + n] = c[n].c2;
            flat[2 * rows + n] = c[n].c3;
          }
          const Rows from[3] = {{flat.data(), batch, 1},
                                {flat.data() + rows, batch, 1},
                                {flat.data() + 2 * rows, batch, 1}};
          const Output cond(loose.v, loose, false), uncond(loose.uncond, loose, false);
          const Output want(loose.v, loose, false), want_uncond(loose.uncond, loose, false);
          cpu::gradient(serial, loose, problem.table, c.data(), want.operand(),
                        want_uncond.operand());
          cuda::gradient(loose, problem.table, from, cond.operand(), uncond.operand(), {}, false,
                         nullptr);
          cuda::emulation::finish();
          check_rows(cond.operand(), want.operand(), loose);
          if (guided) check_rows(uncond.operand(), want_uncond.operand(), loose);
          CHECK(cond.loose.guards_intact());
          // A factor of 1 leaves what is there; another is applied before the only rounding.
          const float one = 1, half = 0.5;
          const Output kept(loose.v, loose, false);
          cuda::gradient(loose, problem.table, from, kept.operand(), {}, {&one, false}, true,
                         nullptr);
          cuda::emulation::finish();
          CHECK(std::isnan(kept.loose.get(0, 0, 0)));
          cuda::gradient(loose, problem.table, from, kept.operand(), {}, {&half, false}, true,
                         nullptr);
          cuda::emulation::finish();
          for (int64_t n = 0; n < rows; ++n) {
            const double g = cond.loose.get(n / batch, n % batch, 0);
            CHECK_CLOSE(kept.loose.get(n / batch, n % batch, 0), g / 2, 0x1p-24);
          }
        }
      }
    }
  }
}

// What a gradient of known shape does not need is not read: here it cannot be.
void test_unread_operands() {
  char* const nowhere = reinterpret_cast<char*>(16);
  for (const Form form : forms) {
    for (const Shape shape : {Shape::departure, Shape::residual}) {
      CONTEXT("unread %s shape %d", form_names[int(form)], int(shape));
      Operands in(dtypes[1], steps, batch, 601, true);
      const Batch t = in.of(form, false, false);
      const Problem problem = scalars.problem(config_of(RatioNorm::none, Balance::none), form, 601);
      std::vector<double> flat(3 * rows, 0.0);
      std::vector<Coefficients> c(rows);
      for (int64_t n = 0; n < rows; ++n) {
        flat[n] = 0.3 + 0.01 * n;
        flat[rows + n] = shape == Shape::departure ? -flat[n] / 2 : 0;
        c[n] = {flat[n], flat[rows + n], 0};
      }
      const Rows from[3] = {{flat.data(), batch, 1},
                            {flat.data() + rows, batch, 1},
                            {flat.data() + 2 * rows, batch, 1}};
      const Output cond(t.v, t, false), want(t.v, t, false);
      cpu::gradient(serial, t, problem.table, c.data(), want.operand(), {});
      const cuda::Roles needed = cuda::roles_of(form, shape, false);
      Batch less = t;
      const auto hide = [&](Operand& x, cuda::Role role) {
        if (x && !(needed & cuda::bit(role))) x.data = nowhere;
      };
      hide(less.v, cuda::role_v), hide(less.x, cuda::role_x), hide(less.y, cuda::role_y);
      hide(less.m, cuda::role_old), hide(less.v_old, cuda::role_old);
      hide(less.noise, cuda::role_noise);
      cuda::gradient(less, problem.table, from, cond.operand(), {}, {}, false, nullptr, shape);
      cuda::emulation::finish();
      check_rows(cond.operand(), want.operand(), t);
    }
  }
}

void test_sde_step() {
  for (const int d : {1, 2, 3, 4}) {
    for (const int64_t numel : {5, 601}) {
      Operands in(dtypes[d], steps, batch, numel, true);
      for (const bool seeded : {false, true}) {
        CONTEXT("sde_step D=%ld %s seeded %d", long(numel), dtypes[d].name, seeded);
        Batch t = in.of(seeded ? Form::seeded : Form::noise, false, false);
        t.v_old = {};
        t.x = in.x.operand();
        const Problem problem =
            scalars.problem(config_of(RatioNorm::none, Balance::none), Form::noise, numel);
        const Output y(t.x, t, false), want(t.x, t, false);
        const Operand f32_like{t.x.data, DType::f32, 0, 0};
        const Output mean(f32_like, t, false), want_mean(f32_like, t, false);
        double square[rows], expected[rows];
        std::vector<char> workspace = workspace_for(t);
        cuda::sde_step(t, problem.table, y.operand(), mean.operand(), square, aligned(workspace),
                       nullptr);
        cuda::emulation::finish();
        cpu::sde_step(serial, t, problem.table, want.operand(), want_mean.operand(), expected);
        CHECK(same_rows(mean.operand(), want_mean.operand(), t));  // on policy is exactly 0
        if (seeded) {
          check_rows(y.operand(), want.operand(), t);
        } else {
          CHECK(same_rows(y.operand(), want.operand(), t));
        }
        for (int64_t n = 0; n < rows; ++n) CHECK_CLOSE(square[n], expected[n], 1e-5 * numel);
      }
    }
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops::test;
  test_sums_and_gradient();
  test_unread_operands();
  test_sde_step();
  test_choice();
  test_not_finite();
  test_long_rows();
  test_rows_of_parts();
  test_guard_loss();
  return finish();
}
