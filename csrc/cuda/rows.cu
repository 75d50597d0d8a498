// What a loss does with its transitions' sums, where the caller has them: ranks exchange theirs in
// between. Each kernel is one block, which reads and writes no more than [K, B] numbers.
#include "launch.h"

namespace guard_ops::cuda {
namespace {

struct RowsCall {
  Problem problem;
  Doubles sums[3];
  LossOut out;         // of loss_of_rows
  double* statistics;  // of statistics_of_rows, [statistic_count, K]
  char* scratch;       // null where shared memory has room for it

  __device__ __forceinline__ int64_t rows() const { return problem.steps * problem.batch; }
  __device__ __forceinline__ Sums of(int64_t n) const {
    const int64_t k = quotient(n, problem.batch), i = n - k * problem.batch;
    return {*sums[0].at(k, i), *sums[1].at(k, i), *sums[2].at(k, i)};
  }
  __device__ __forceinline__ EvaluationScratch scratch_of_rows() const {
    return scratch_at(scratch == nullptr ? shared_memory() : scratch, rows());
  }
};

__global__ void __launch_bounds__(cooperative_threads, 1)
    loss_of_rows(const __grid_constant__ RowsCall call) {
  evaluate(
      Block{}, call.problem, [&](int64_t n) { return call.of(n); }, call.scratch_of_rows(),
      LossWriter{call.out, call.problem.steps, call.rows()});
}

__global__ void __launch_bounds__(cooperative_threads, 1)
    statistics_of_rows(const __grid_constant__ RowsCall call) {
  ratio_statistics(
      Block{}, call.problem, [&](int64_t n) { return call.of(n); }, call.scratch_of_rows().rows,
      call.statistics);
}

void start_on_rows(void (*kernel)(RowsCall), const Problem& problem, const Doubles sums[3],
                   RowsCall call, void* workspace, Stream stream) {
  call.problem = problem;
  for (int n = 0; n < 3; ++n) call.sums[n] = sums[n];
  Launch launch{1, cooperative_threads, 0};
  if (rows_workspace_bytes(problem) == 0) {
    launch.shared_bytes = int(scratch_bytes(problem.steps * problem.batch, problem.batch));
  } else {
    call.scratch = static_cast<char*>(workspace);
  }
  check_runs(at_once(address(kernel), launch));
  start(kernel, launch, stream, call);
}

}  // namespace

int64_t rows_workspace_bytes(const Problem& problem) {
  const int64_t bytes = scratch_bytes(problem.steps * problem.batch, problem.batch);
  return bytes <= device().shared_bytes ? 0 : bytes;
}

void evaluate(const Problem& problem, const Doubles sums[3], const LossResult& result,
              void* workspace, Stream stream) {
  RowsCall call{};
  call.out = {result.loss, result.per_row, result.metrics, result.sum_grads};
  start_on_rows(loss_of_rows, problem, sums, call, workspace, stream);
}

void ratio_statistics(const Problem& problem, const Doubles sums[3], double* out, void* workspace,
                      Stream stream) {
  RowsCall call{};
  call.statistics = out;
  start_on_rows(statistics_of_rows, problem, sums, call, workspace, stream);
}

}  // namespace guard_ops::cuda
