// The CUDA kernels where the batch's layout was known when they were compiled, against those that
// look it up, bit for bit: every such layout, path and kind of gradient.
#include <cuda_runtime.h>

#include "../cuda/launch.h"
#include "cuda_run.h"

namespace guard_ops::test {
namespace {

using cuda::emulation::become;

constexpr DTypes uniform16{"uniform bfloat16", bf16, bf16, bf16, bf16, bf16, bf16, bf16, bf16};

uint32_t layout_of(const Batch& t, const Problem& problem) {
  return cuda::plan_of(t, problem.table).layout;
}

// The gradient of coefficients of every kind, some 0 and some NaN.
void check_gradients(const Batch& fixed, const Batch& any, const Problem& problem) {
  const int64_t rows = any.steps * any.batch;
  constexpr Coefficients kinds[] = {
      {0.3, -0.2, 0}, {0.3, -0.15, 0}, {0.3, 0, 0}, {0, 0, 0}, {NAN, NAN, NAN}};
  std::vector<double> flat(3 * rows);
  for (int first = 0; first < 5; ++first) {
    for (int64_t n = 0; n < rows; ++n) {
      const Coefficients& c = kinds[(first + n) % 5];
      flat[n] = c.c1, flat[rows + n] = c.c2, flat[2 * rows + n] = c.c3;
    }
    Doubles from[3];
    for (int n = 0; n < 3; ++n) from[n] = {flat.data() + n * rows, any.batch, 1};
    const Output got(fixed.v, fixed, true), expected(any.v, any, false);
    cuda::gradient(fixed, problem.table, from, got.operand(), {}, {}, false, nullptr);
    cuda::gradient(any, problem.table, from, expected.operand(), {}, {}, false, nullptr);
    cuda::emulation::finish();
    CHECK(same_rows(got.operand(), expected.operand(), any));
    // into memory that is not aligned no gradient can be stored from registers
    const Output loose(any.v, any, false);
    cuda::gradient(fixed, problem.table, from, loose.operand(), {}, {}, false, nullptr);
    cuda::emulation::finish();
    CHECK(same_rows(loose.operand(), expected.operand(), any));
    CHECK(loose.loose.guards_intact());
  }
}

// Shared memory for a block that holds a row's directions, but not its operands; 0 where these are
// not more.
int bytes_for_directions(const Batch& t, const Problem& problem) {
  cuda::Plan p = cuda::plan_of(t, problem.table);
  cuda::expect(p, problem.config.gradient_kind(), {});
  const uint32_t warps = cuda::cluster_threads / cuda::warp_size;
  const uint32_t tiles = (p.row_chunks + warps - 1) / warps * p.chunk_tiles;
  const cuda::Room room{cuda::ring_slots, tiles};
  if (bytes_of(p, room) >= tiles * p.slot_bytes) return 0;
  const int bytes =
      cuda::shared_bytes(p, cuda::cluster_threads, room) + int(cuda::partial_bytes(p.row_chunks));
  become({.multiprocessors = 8, .shared_bytes = bytes, .clusters = false});
  CHECK(cuda::choose(cuda::machine(), p, {Path::cluster, true, true}).room.directions == tiles);
  return bytes;
}

void check_layout(const DTypes& d, Form form, int64_t numel, uint32_t* seen) {
  CONTEXT("layout of %s %s D=%ld", d.name, form_names[int(form)], long(numel));
  Operands in(d, 1, 2, numel, true);
  const Batch any = in.of(form, false, false);
  const AlignedBatch aligned(any);
  for (const RatioNorm norm : {RatioNorm::none, RatioNorm::closed_form}) {
    if (form == Form::log_prob && norm == RatioNorm::closed_form) continue;
    Problem problem = scalars.problem(config_of(norm, Balance::none), form, numel);
    problem.steps = 1;
    problem.batch = 2;
    const uint32_t layout = layout_of(aligned.t, problem);
    CHECK(layout != 0 && (layout & (layout - 1)) == 0);
    CHECK(layout_of(any, problem) == 0);
    *seen |= layout;
    become({});
    const Result expected = run(any, problem, Path::two_launches, false);
    for (const bool at_once : {false, true}) {
      cuda::emulation::copies_land_at_once = at_once;
      become({});
      check_same(run(aligned.t, problem, Path::two_launches, true), expected, any);
      become({.shared_bytes = 16 << 10});  // a ring of two slots
      check_same(run(aligned.t, problem, Path::two_launches, true), expected, any);
    }
    for (const int kibibytes : {20, 40, 400}) {  // from one slot a warp to all tiles
      become({.multiprocessors = 2, .shared_bytes = kibibytes << 10});
      check_same(run(aligned.t, problem, Path::cooperative, true), expected, any);
    }
    become({.multiprocessors = 8, .shared_bytes = 1 << 20});
    check_same(run(aligned.t, problem, Path::cluster, true), expected, any);
    if (const int bytes = bytes_for_directions(aligned.t, problem)) {
      become({.multiprocessors = 8, .shared_bytes = bytes, .clusters = false});
      check_same(run(aligned.t, problem, Path::cluster, true), expected, any);
    }
    if (norm == RatioNorm::none) check_gradients(aligned.t, any, problem);
  }
}

void test_layouts() {
  uint32_t seen = 0, all = 0, n = 0;
  for (const DTypes* d : {&dtypes[1], &dtypes[2], &uniform16}) {
    for (const Form form : forms) {
      if (d == &uniform16 && form != Form::mean) continue;  // dtypes[2] is the same in the others
      check_layout(*d, form, 5 * cuda::tile, &seen);
    }
  }
#define GUARD_OPS_COUNT(form, dtype, old) all |= uint32_t(1) << n++;
  GUARD_OPS_LAYOUTS(GUARD_OPS_COUNT)
#undef GUARD_OPS_COUNT
  CHECK(seen == all);
}

// Chunks of two tiles, of which a row's last has one, and of four.
void test_chunks() {
  uint32_t seen = 0;
  check_layout(dtypes[2], Form::mean, 301 * cuda::tile, &seen);
  check_layout(dtypes[2], Form::seeded, 40 * cuda::tile, &seen);
  check_layout(dtypes[1], Form::velocity, 770 * cuda::tile, &seen);
}

// Whatever makes a batch one of no layout.
void test_others() {
  CONTEXT("no layout");
  const auto layout = [&](const DTypes& d, int64_t numel, bool guided, bool with_ref) {
    Operands in(d, 1, 2, numel, true);
    const AlignedBatch aligned(in.of(Form::mean, guided, with_ref));
    Problem problem = scalars.problem(config_of(RatioNorm::none, Balance::none), Form::mean, numel);
    return layout_of(aligned.t, problem);
  };
  CHECK(layout(dtypes[2], 512, false, false) != 0);
  CHECK(layout(dtypes[2], 512 + 8, false, false) == 0);
  CHECK(layout(dtypes[2], 512, true, false) == 0);
  CHECK(layout(dtypes[2], 512, false, true) == 0);
  CHECK(layout(dtypes[3], 512, false, false) == 0);
  CHECK(layout(dtypes[4], 512, false, false) == 0);
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops::test;
  test_others();
  test_layouts();
  test_chunks();
  return guard_ops::test::finish();
}
