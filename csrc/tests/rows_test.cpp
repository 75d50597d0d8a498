// The CUDA kernels that take a loss's sums, run on the host by emulate.h: the bits of guard_loss,
// and the CPU's statistics, in shared memory and, where that has no room, in the workspace.
#include "cuda_run.h"

namespace guard_ops::test {
namespace {

using cuda::emulation::become;

void check_given_sums(const Batch& t, const Problem& problem) {
  become({});
  const Result expected = run(t, problem, Path::two_launches, false, false);
  std::vector<double> sums(3 * rows);
  std::vector<char> of_sums = workspace_for(t);
  cuda::sums(t, problem.table, sums.data(), aligned(of_sums), nullptr);
  cuda::emulation::finish();
  // As a caller may have them: transposed.
  std::vector<double> transposed(3 * rows);
  std::vector<Sums> listed(rows);
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t at = n % batch * steps + n / batch;
    for (int c = 0; c < 3; ++c) transposed[c * rows + at] = sums[c * rows + n];
    listed[n] = {sums[n], sums[rows + n], sums[2 * rows + n]};
  }
  const Doubles given[3] = {{transposed.data(), 1, steps},
                            {transposed.data() + rows, 1, steps},
                            {transposed.data() + 2 * rows, 1, steps}};
  Problem unknown = problem;
  unknown.mean = nullptr;
  double statistics[statistic_count * steps];
  cpu::ratio_statistics(unknown, listed.data(), statistics);
  for (const int bytes : {1 << 16, 1000}) {
    become({.shared_bytes = bytes});
    std::vector<char> workspace(cuda::rows_workspace_bytes(problem) + 256, char(0xFF));
    CHECK((workspace.size() == 256) == (bytes == 1 << 16));
    Result got{NAN,
               std::vector<float>(4 * rows, NAN),
               std::vector<float>(metric_count * steps, NAN),
               std::vector<double>(3 * rows, NAN),
               Output({}, t, false),
               Output({}, t, false)};
    cuda::evaluate(
        problem, given,
        {&got.loss, got.per_row.data(), got.metrics.data(), got.sum_grads.data(), {}, {}},
        aligned(workspace), nullptr);
    cuda::emulation::finish();
    check_same(got, expected, t);
    std::vector<double> found(statistic_count * steps, NAN);
    cuda::ratio_statistics(unknown, given, found.data(), aligned(workspace), nullptr);
    cuda::emulation::finish();
    for (int64_t n = 0; n < statistic_count * steps; ++n) {
      CHECK_CLOSE(found[n], statistics[n], 1e-14 * std::fabs(statistics[n]));
    }
  }
}

void test_given_sums() {
  Operands in(dtypes[1], steps, batch, 37, true);
  for (const Form form : {Form::velocity, Form::log_prob}) {
    for_each_problem(form, 37, [&](Problem problem, bool) {
      CONTEXT("%s ratio_norm %d balance %d", form_names[int(form)], int(problem.config.ratio_norm),
              int(problem.config.balance));
      problem.config.rounding = 0.01;
      double advantages[rows];
      for (int64_t n = 0; n < rows; ++n) {  // a transition, and a step, that are not finite
        advantages[n] = n == 1 || n / batch == 2 ? NAN : *scalars.advantages;
      }
      check_given_sums(in.of(form, false, problem.config.kl_beta != 0), problem);
      problem.advantages = {advantages, batch, 1};
      check_given_sums(in.of(form, false, problem.config.kl_beta != 0), problem);
    });
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  guard_ops::test::test_given_sums();
  return guard_ops::test::finish();
}
