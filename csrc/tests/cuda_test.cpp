// The CUDA kernels, run on the host by emulate.h: every form, dtype and objective against the CPU's
// kernels, and every path of guard_loss against every other bit for bit.
#include <cuda_runtime.h>

#include "cuda_run.h"

namespace guard_ops::test {
namespace {

using cuda::emulation::become;

// Every path and amount of shared memory gives the bits of two launches.
void check_paths(const Batch& t, const Problem& problem, bool independent, bool is_aligned) {
  become({});
  const Result expected = run(t, problem, Path::two_launches, is_aligned);
  check_against_cpu(expected, t, problem);
  for (const int kibibytes : {20, 40, 400}) {  // a slot takes up to 6
    become({.shared_bytes = kibibytes << 10});
    const uint32_t slots = ((kibibytes << 10) - 256) / 3 / (6 * 1024);
    if (slots > 0) check_same(run(t, problem, Path::cooperative, is_aligned), expected, t);
  }
  if (independent) check_same(run(t, problem, Path::cluster, is_aligned), expected, t);
}

void test_guard_loss() {
  for (const int64_t numel : {37, 601}) {
    int turn = 0, drawn = 0;
    for_each_case(numel, [&](Operands&, const Batch& t, const Problem& problem, bool independent) {
      if (t.wide || (numel == 37 && turn++ % 3 != 0)) return;
      // every problem, form and dtype: their numbers have no factor 5
      if (!every_case() && numel == 601 && drawn++ % 5 != 0) return;
      cuda::emulation::copies_land_at_once = turn / 2 % 2 == 0;
      const bool is_aligned = numel == 601 && turn++ % 2 == 0;
      if (is_aligned) {
        check_paths(AlignedBatch(t).t, problem, independent, true);
      } else {
        check_paths(t, problem, independent, false);
      }
    });
  }
}

// Tests rows that have more chunks than the largest cluster has blocks.
void test_long_rows() {
  constexpr int64_t numel = 40 * cuda::tile - 100;
  for (const int d : {1, 2}) {
    Operands in(dtypes[d], steps, batch, numel, true);
    for (const Form form : {Form::velocity, Form::seeded}) {
      if (!every_case() && (d == 1) != (form == Form::velocity)) continue;
      for_each_problem(form, numel, [&](const Problem& problem, bool independent) {
        if (problem.config.kl_beta != 0 || problem.mean != nullptr) return;
        CONTEXT("long rows %s ratio_norm %d", dtypes[d].name, int(problem.config.ratio_norm));
        const AlignedBatch a(in.of(form, false, false));
        become({});
        const Result expected = run(a.t, problem, Path::two_launches, true);
        check_against_cpu(expected, a.t, problem);
        check_same(run(a.t, problem, Path::cooperative, true), expected, a.t);
        become({.multiprocessors = 8, .shared_bytes = 1 << 15});  // holds a few of the 40 tiles
        if (independent) {
          check_same(run(a.t, problem, Path::cluster, true), expected, a.t);
          CHECK(run(a.t, problem, Path::automatic, true).path == Path::cluster);
        }
      });
    }
  }
}

// Checks two samples of one step by every path.
void check_one_step(int64_t numel, int shared_bytes) {
  Operands in(dtypes[1], 1, 2, numel, true);
  const AlignedBatch a(in.of(Form::noise, false, false));
  int drawn = 0;
  for_each_problem(Form::noise, numel, [&](Problem problem, bool independent) {
    if (problem.config.kl_beta != 0 || problem.mean != nullptr) return;
    // standardize, and a closed form whose rows are independent
    if (!every_case() && numel > 601 && drawn++ % 2 == 0) return;
    CONTEXT("one step, D=%ld ratio_norm %d", long(numel), int(problem.config.ratio_norm));
    problem.steps = 1;
    problem.batch = 2;
    become({.multiprocessors = 8, .shared_bytes = shared_bytes});
    const Result expected = run(a.t, problem, Path::two_launches, true);
    check_against_cpu(expected, a.t, problem);
    check_same(run(a.t, problem, Path::cooperative, true), expected, a.t);
    if (independent) check_same(run(a.t, problem, Path::cluster, true), expected, a.t);
    // a launch that is refused leaves nothing behind for the two that take its place
    become({.multiprocessors = 8, .shared_bytes = shared_bytes, .busy = true});
    check_same(run(a.t, problem, Path::automatic, true), expected, a.t);
  });
}

// Tests rows whose chunks have two tiles, and rows of chunks of four that several warps add up.
void test_chunks_of_tiles() { check_one_step(300 * cuda::tile - 11, 1 << 18); }
void test_rows_of_parts() {
  check_one_step(cuda::tile * cuda::most_chunk_tiles * (2 * cuda::part_chunks + 9) - 11, 1 << 20);
}

// Tests so few rows that one block adds all of them up, in its shared memory.
void test_few_rows() { check_one_step(601, 1 << 16); }

// A transition that is not finite has to keep that to its gradient, and the other rows' gradients
// have to be corrected in every path.
void test_not_finite() {
  for (const bool drop : {false, true}) {
    Operands in(dtypes[1], steps, batch, 601, false);
    in.v.set(1, 2, 300, NAN);
    in.v.set(2, 0, 5, INFINITY);
    const Batch t = in.of(Form::velocity, false, false);
    for_each_problem(Form::velocity, 601, [&](Problem problem, bool independent) {
      CONTEXT("not finite, drop %d ratio_norm %d", drop, int(problem.config.ratio_norm));
      if (problem.config.kl_beta != 0) return;
      problem.config.nonfinite = drop ? NonFinite::drop : NonFinite::propagate;
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

void test_sums_and_gradient() {
  for (const int d : {1, 2, 3, 4, 5}) {
    for (const int64_t numel : {1, 8, 255, 601, 20000}) {
      if (numel == 20000 && d != 1) continue;
      Operands in(dtypes[d], steps, batch, numel, false);
      for (const Form form : forms) {
        for (const bool guided : {false, true}) {
          // rows of many chunks, which take most of the time: once guided and once not
          const bool drawn = guided ? form == Form::velocity : form == Form::seeded;
          if (!every_case() && numel == 20000 && !drawn) continue;
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
          const Doubles from[3] = {{flat.data(), batch, 1},
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
          // A factor of 1 leaves what is there; any other is applied before the only rounding.
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

// A gradient of a known kind does not read the operands that it does not need: here they cannot be
// read.
void test_unread_operands() {
  char* const nowhere = reinterpret_cast<char*>(16);
  for (const Form form : forms) {
    for (const GradientKind kind : {GradientKind::departure, GradientKind::residual}) {
      CONTEXT("unread %s kind %d", form_names[int(form)], int(kind));
      Operands in(dtypes[1], steps, batch, 601, true);
      const Batch t = in.of(form, false, false);
      const Problem problem = scalars.problem(config_of(RatioNorm::none, Balance::none), form, 601);
      std::vector<double> flat(3 * rows, 0.0);
      std::vector<Coefficients> c(rows);
      for (int64_t n = 0; n < rows; ++n) {
        flat[n] = 0.3 + 0.01 * n;
        flat[rows + n] = kind == GradientKind::departure ? -flat[n] / 2 : 0;
        c[n] = {flat[n], flat[rows + n], 0};
      }
      const Doubles from[3] = {{flat.data(), batch, 1},
                               {flat.data() + rows, batch, 1},
                               {flat.data() + 2 * rows, batch, 1}};
      const Output cond(t.v, t, false), want(t.v, t, false);
      cpu::gradient(serial, t, problem.table, c.data(), want.operand(), {});
      const cuda::Roles needed = cuda::roles_of(form, kind, false);
      Batch less = t;
      const auto hide = [&](Operand& x, cuda::Role role) {
        if (x && !(needed & cuda::bit(role))) x.data = nowhere;
      };
      hide(less.v, cuda::role_v), hide(less.x, cuda::role_x), hide(less.y, cuda::role_y);
      hide(less.m, cuda::role_old), hide(less.v_old, cuda::role_old);
      hide(less.noise, cuda::role_noise);
      cuda::gradient(less, problem.table, from, cond.operand(), {}, {}, false, nullptr, kind);
      cuda::emulation::finish();
      check_rows(cond.operand(), want.operand(), t);
    }
  }
}

void test_sde_step() {
  for (const int d : {1, 2, 3, 4}) {
    for (const int64_t numel : {5, 601}) {
      Operands in(dtypes[d], steps, batch, numel, true);
      for (const auto& [seeded, guided] : {std::pair{false, false}, {true, false}, {false, true}}) {
        CONTEXT("sde_step D=%ld %s seeded %d guided %d", long(numel), dtypes[d].name, seeded,
                guided);
        Batch t = in.of(seeded ? Form::seeded : Form::noise, guided, false);
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
        CHECK(same_rows(mean.operand(), want_mean.operand(),
                        t));  // so that delta is exactly 0 on policy
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

// Runs everything once, with copies that land as late as they may in one half of the tests and at
// once in the other; with every case, both in all.
int main() {
  using namespace guard_ops::test;
  const auto test = [&](void (*run)(), bool at_once) {
    for (const bool chosen : {at_once, !at_once}) {
      guard_ops::cuda::emulation::copies_land_at_once = chosen;
      if (chosen == at_once || every_case()) run();
    }
  };
  test(test_sums_and_gradient, false);
  test(test_unread_operands, true);
  test(test_sde_step, false);
  test(test_not_finite, true);
  test(test_long_rows, false);
  test(test_chunks_of_tiles, true);
  test(test_rows_of_parts, false);
  test(test_few_rows, true);
  test(test_guard_loss, false);  // has both
  return finish();
}
