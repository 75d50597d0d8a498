// Which path guard_loss takes on which device, what becomes of launches that a device refuses, and
// captures: what stands before the kernels, which cuda_test.cpp compares.
#include <cuda_runtime.h>

#include "../cuda/launch.h"
#include "cuda_run.h"

namespace guard_ops::test {
namespace {

using cuda::Choice;
using cuda::Launch;
using cuda::emulation::become;
using cuda::emulation::Machine;

// ---- the choice, of devices that are not here ---------------------------------------------------

constexpr int threads_a_multiprocessor = 2048, registers_a_multiprocessor = 1 << 16;

template <int multiprocessors, int kibibytes>
int at_once(Path, const Launch& launch) {
  constexpr int registers = 128;  // of a thread, the most that two blocks of a cluster leave each
  const int a_multiprocessor = std::min(
      {(kibibytes << 10) / (launch.shared_bytes + 1024), threads_a_multiprocessor / launch.threads,
       registers_a_multiprocessor / (registers * launch.threads)});
  return a_multiprocessor * multiprocessors / launch.cluster;
}

template <int multiprocessors, int kibibytes>
constexpr cuda::Machine of_kind(bool clusters) {
  return {multiprocessors,
          (kibibytes - 1) << 10,
          true,
          clusters,
          512,
          256,
          at_once<multiprocessors, kibibytes>};
}
const cuda::Machine h100 = of_kind<132, 228>(true), b200 = of_kind<148, 228>(true),
                    a100 = of_kind<108, 164>(false), rtx4090 = of_kind<128, 100>(false),
                    rtx5090 = of_kind<170, 100>(true);

cuda::Plan plan_of(int64_t steps, int64_t batch, int64_t numel, DType dtype) {
  static char nowhere[256];
  Batch t{};
  t.form = Form::mean;
  t.steps = steps;
  t.batch = batch;
  t.numel = numel;
  t.guidance_scale = 1;
  char* const at = nowhere + (256 - reinterpret_cast<uintptr_t>(nowhere) % 256) % 256;
  t.v = t.x = t.y = {at, dtype, batch * numel, numel};
  t.m = {at, DType::f32, batch * numel, numel};
  const Doubles none[3] = {};
  cuda::Plan p = cuda::plan_of(t, none);
  cuda::expect(p, GradientKind::departure, t.v);
  return p;
}

Choice chosen(const cuda::Machine& on, const cuda::Plan& p, bool independent,
              Path wanted = Path::automatic) {
  return cuda::choose(on, p, {wanted, true, independent});
}

void test_devices() {
  CONTEXT("devices");
  // SD3.5-M at 1024 px: a row of 128 KB and more in each operand
  const cuda::Plan images = plan_of(10, 24, 16 * 128 * 128, DType::bf16);
  // and at 512 px
  const cuda::Plan small = plan_of(10, 24, 16 * 64 * 64, DType::bf16);
  const cuda::Plan few = plan_of(1, 4, 16 * 64 * 64, DType::bf16);
  const cuda::Plan videos = plan_of(16, 16, 16 * 21 * 60 * 104, DType::bf16);

  for (const auto* on : {&h100, &b200}) {
    const Choice c = chosen(*on, small, true);
    CHECK(c.path == Path::cluster);
    CHECK(c.launch.cluster == 8);  // the first of which two share a multiprocessor
    CHECK(on->at_once(c.path, c.launch) * c.launch.cluster >= 2 * on->multiprocessors);
    CHECK(c.launch.blocks == 240 * 8);
  }
  CHECK(chosen(h100, images, true).path == Path::cluster);
  CHECK(chosen(h100, few, true).launch.cluster == 16);  // 64 blocks of 4 rows: no more are possible
  CHECK(chosen(h100, few, false).path == Path::cooperative);
  const Choice joint = chosen(h100, small, false);
  CHECK(joint.path == Path::cooperative);
  CHECK(joint.room.slots == 2 && joint.room.directions == 9);  // of 30 tiles; 3 as operands
  CHECK(chosen(h100, videos, false).path == Path::two_launches);
  CHECK(chosen(h100, videos, true).path == Path::two_launches);  // no cluster holds a row
  CHECK(chosen(a100, small, true).path == Path::cooperative);    // no block holds a row
  CHECK(chosen(a100, few, true).path == Path::cooperative);
  CHECK(chosen(rtx4090, small, false).path == Path::two_launches);
  CHECK(chosen(rtx4090, few, false).path == Path::cooperative);
  CHECK(chosen(rtx5090, small, true).path == Path::cluster);
  for (const auto* on : {&h100, &b200, &a100, &rtx4090, &rtx5090}) {
    for (const auto* p : {&images, &small, &few, &videos}) {
      for (const bool independent : {false, true}) {
        const Choice c = chosen(*on, *p, independent), again = chosen(*on, *p, independent);
        CHECK(c.path == again.path && c.launch.blocks == again.launch.blocks);
        CHECK(c.launch.shared_bytes <= on->shared_bytes);
        CHECK(cuda::choose(*on, *p, {Path::automatic, false, independent}).path ==
              Path::two_launches);  // without a gradient nothing is read twice
        CHECK(chosen(*on, *p, independent, Path::two_launches).path == Path::two_launches);
        if (c.path == Path::two_launches) continue;
        CHECK(c.room.slots > 0);
        const int running = on->at_once(c.path, c.launch);
        CHECK(running > 0);
        if (c.path == Path::cooperative) CHECK(c.launch.blocks <= running);
        cuda::Machine without = *on;
        (c.path == Path::cluster ? without.clusters : without.cooperative) = false;
        const Choice other = chosen(without, *p, independent);
        CHECK(other.path != c.path || other.launch.cluster == 1);
      }
    }
  }
}

// A cooperative launch leaves as many multiprocessors free as it was told to, but one.
void test_left_free() {
  CONTEXT("left free");
  Operands in(dtypes[1], steps, batch, 601, true);
  const AlignedBatch a(in.of(Form::velocity, false, false));
  const Problem joint = scalars.problem(config_of(RatioNorm::standardize, Balance::inverse_ratio),
                                        Form::velocity, 601);
  become({.multiprocessors = 8});
  const Result expected = run(a.t, joint, Path::two_launches, true);
  const Doubles none[3] = {};
  const cuda::Plan p = cuda::plan_of(a.t, none);
  for (const int left : {0, 3, 20}) {
    cuda::leave_free(left);
    CHECK(chosen(cuda::machine(), p, false).launch.blocks == std::max(8 - left, 1));
    check_same(run(a.t, joint, Path::cooperative, true), expected, a.t);
  }
  cuda::leave_free(0);
}

// ---- the emulated device ------------------------------------------------------------------------

// Which path `automatic` takes depends on what the device says that it can do.
void test_choice() {
  Operands in(dtypes[1], steps, batch, 601, true);
  const Batch t = in.of(Form::velocity, false, false);
  const Config alone = config_of(RatioNorm::none, Balance::none);
  const Problem independent = scalars.problem(alone, Form::velocity, 601);
  const Problem joint = scalars.problem(config_of(RatioNorm::standardize, Balance::inverse_ratio),
                                        Form::velocity, 601);
  CONTEXT("choice");
  become({});
  CHECK(run(t, independent, Path::automatic, false).path == Path::cluster);
  CHECK(run(t, joint, Path::automatic, false).path == Path::cooperative);
  CHECK(run(t, joint, Path::automatic, false, false).path == Path::two_launches);
  const auto joined = [&](const Machine& machine) {
    become(machine);
    return run(t, joint, Path::automatic, false).path;
  };
  CHECK(joined({.cooperative = false}) == Path::two_launches);
  CHECK(joined({.shared_bytes = 10 << 10}) == Path::two_launches);  // too little for every warp
  CHECK(joined({.architecture = 80}) == Path::cooperative);
  become({});
  bool refused = false;
  try {
    run(t, joint, Path::cluster, false);  // its rows need each other
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused);
}

// The calls on a stream share counters, a captured call has its own, and where there are none left
// a call gets null.
void test_counters() {
  CONTEXT("counters");
  const auto stream = [](uintptr_t n) { return reinterpret_cast<cuda::Stream>(n); };
  const auto of = [&](int64_t count, uintptr_t n) { return cuda::counters_of(count, stream(n)); };
  const auto captured = [&](int64_t count, uintptr_t n) {
    cuda::emulation::being_captured = {stream(n)};
    uint32_t* const found = of(count, n);
    cuda::emulation::being_captured.clear();
    return found;
  };
  become({.has_memory = false});
  CHECK(of(100, 8) == nullptr);
  become({});
  CHECK(captured(100, 8) == nullptr);  // a capture cannot set any aside
  uint32_t* const first = of(100, 8);
  for (int n = 0; n < 100; ++n) CHECK(first[n] == 0);
  CHECK(of(1024, 8) == first);
  CHECK(of(100, 16) >= first + 1024);
  CHECK(of(100, uintptr_t(cudaStreamPerThread)) == nullptr);
  uint32_t *const one = captured(100, 8), *const another = captured(100, 8);
  CHECK(one >= of(100, 16) + 1024);
  CHECK(another >= one + 100);
  CHECK((another - one) % cuda::counter_line == 0);
  uint32_t* const larger = of(5000, 8);
  CHECK(larger >= another + 100);
  CHECK(of(100, 8) == larger);
  CHECK(of(int64_t(1) << 20, 8) == nullptr);  // more than there are
  CHECK(of(100, 8) == larger);
  int64_t count = 0;
  while (captured(4096, 8) != nullptr) CHECK(++count < 256);
  CHECK(of(2000, 16) == nullptr);
  CHECK(of(1000, 16) == first + 1024);
  CHECK(of(1000, 24) == nullptr);
  become({});  // another device has its own
  CHECK(of(100, 8) != larger);
  become({});
  cuda::emulation::being_captured = {stream(24)};  // another caller's capture is not disturbed
  CHECK(of(100, 8) != nullptr);
  cuda::emulation::being_captured.clear();
  CHECK(cudaGetLastError() == cudaSuccess);
}

// Checks what happens to launches and questions that a device refuses.
void test_refusals() {
  CONTEXT("refusals");
  become({.architecture = 0});
  CHECK(!cuda::unsupported().empty());
  become({});
  CHECK(cuda::unsupported().empty());
  Operands in(dtypes[1], steps, batch, 601, true);
  const Batch t = in.of(Form::velocity, false, false);
  const Problem problem =
      scalars.problem(config_of(RatioNorm::none, Balance::none), Form::velocity, 601);
  const auto says = [&](const Machine& machine, Path path) -> std::string {
    become(machine);
    try {
      run(t, problem, path, false);
    } catch (const std::runtime_error& error) {
      cuda::emulation::finish();
      std::fill(counters.begin(), counters.end(), 0);
      return error.what();
    }
    return "";
  };
  const auto has = [](const std::string& text, const char* words) {
    return text.find(words) != std::string::npos;
  };
  CHECK(says({.chains = false}, Path::two_launches).empty());  // then they are not chained
  const Machine pinched{.shared_bytes = 1 << 10};
  CHECK(has(says(pinched, Path::automatic), "the device runs no block"));
  CHECK(has(says({.cooperative = false}, Path::cooperative), "by the path cooperative"));
  Machine several{.multiprocessors = 8, .shared_bytes = 14 << 10};  // a row is two blocks
  CHECK(says(several, Path::cluster).empty());
  several.busy = true;
  CHECK(has(says(several, Path::cluster), "by the path cluster"));
  CHECK(has(says(pinched, Path::cluster), "by the path cluster"));
  CHECK(has(says({.registers = 1000}, Path::cooperative), "by the path cooperative"));
  CHECK(cudaGetLastError() ==
        cudaSuccess);  // we reported it, so whoever asks next must not find it
}

// A launch that a device has refused is made in another way, whatever error it gave, and no later
// call tries it again.
void test_refusals_are_remembered() {
  Operands in(dtypes[1], steps, batch, 601, true);
  const AlignedBatch a(in.of(Form::velocity, false, false));
  struct Case {
    int kibibytes;  // of shared memory
    RatioNorm norm;
    int refusals;
  };
  // A cooperative launch alone, or clusters before it.
  const Case cases[] = {{18, RatioNorm::standardize, 1}, {14, RatioNorm::none, 2}};
  for (const Case& c : cases) {
    const Problem problem = scalars.problem(config_of(c.norm, Balance::none), Form::velocity, 601);
    become({});
    const Result expected = run(a.t, problem, Path::two_launches, true);
    for (const bool vague : {false, true}) {
      CONTEXT("refused before, ratio_norm %d, %d KB, vague %d", int(c.norm), c.kibibytes, vague);
      const Machine busy{
          .multiprocessors = 16, .shared_bytes = c.kibibytes << 10, .busy = true, .vague = vague};
      become(busy);
      for (int call = 0; call < 2; ++call) {
        const Result got = run(a.t, problem, Path::automatic, true);
        CHECK(got.path == Path::two_launches);
        check_same(got, expected, a.t);
        CHECK(cuda::emulation::refusals == c.refusals);
        CHECK(cudaGetLastError() == cudaSuccess);
      }
    }
  }
}

// Calls that one capture makes in streams that fork and join again, by every path. Replayed, what
// the streams have runs beside each other, and chained launches as early as they may: the results
// have the bits of calls alone, in the first replay and in the next.
void test_forked_capture() {
  const auto stream = [](uintptr_t n) { return reinterpret_cast<cuda::Stream>(n); };
  Operands in(dtypes[1], steps, batch, 601, true);
  const AlignedBatch a(in.of(Form::velocity, false, false));
  struct Call {
    cuda::Stream stream;
    Path path;
    RatioNorm norm;
  };
  const RatioNorm alone = RatioNorm::none, joint = RatioNorm::standardize;
  const Call before{stream(8), Path::two_launches, joint}, after{stream(8), Path::cluster, alone};
  const Call forked[] = {{stream(8), Path::cooperative, joint},
                         {stream(16), Path::two_launches, joint},
                         {stream(8), Path::two_launches, alone},
                         {stream(24), Path::cluster, alone},
                         {stream(16), Path::cooperative, alone}};
  CONTEXT("forked capture");
  become({});
  cuda::counters_of(cuda::counters_needed(a.t), stream(8));  // sets the device's aside
  std::vector<Result> results, expected;
  std::vector<std::vector<char>> workspaces;
  results.reserve(8);
  const auto capture = [&](const Call& call, std::vector<cuda::emulation::Node>* nodes) {
    const Problem problem =
        scalars.problem(config_of(call.norm, Balance::none), Form::velocity, 601);
    expected.push_back(run(a.t, problem, call.path, true));
    results.push_back(room_for(a.t, true));
    Result& out = results.back();
    workspaces.push_back(workspace_for(a.t));
    cuda::emulation::recording = nodes;
    uint32_t* const own = cuda::counters_of(cuda::counters_needed(a.t), call.stream);
    CHECK(own != nullptr);
    out.path = cuda::guard_loss(a.t, problem, written_to(out), aligned(workspaces.back()), own,
                                call.path, call.stream);
    cuda::emulation::recording = nullptr;
    CHECK(out.path == call.path);
  };
  std::vector<cuda::emulation::Node> parts[3];
  cuda::emulation::being_captured = {stream(8), stream(16), stream(24)};
  capture(before, &parts[0]);
  for (const Call& call : forked) capture(call, &parts[1]);
  capture(after, &parts[2]);
  cuda::emulation::being_captured.clear();
  for (const Result& out : results) CHECK(std::isnan(out.loss));  // nothing has run
  for (int time = 0; time < 3; ++time) {
    for (Result& out : results) {
      out.loss = NAN;
      out.sum_grads.assign(3 * rows, NAN);
    }
    for (const auto& nodes : parts) {
      cuda::emulation::replay(nodes);
      cuda::emulation::finish();
    }
    for (size_t n = 0; n < results.size(); ++n) check_same(results[n], expected[n], a.t);
  }
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops::test;
  test_devices();
  test_choice();
  test_left_free();
  test_refusals();
  test_refusals_are_remembered();
  test_counters();
  test_forked_capture();
  return finish();
}
