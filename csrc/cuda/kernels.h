// What the CUDA kernels offer to callers that have pointers and a stream; ../cpu/driver.h is the
// same on the CPU. Every call enqueues its work on a stream of the current device and returns. Only
// counters_of allocates memory and waits for the device, once a device. Errors are
// std::runtime_error.
#pragma once

#include <string>

#include "../objective.h"

namespace guard_ops::cuda {

using Stream = void*;  // a cudaStream_t

// How guard_loss reads the batch: docs/cuda.md has a table. `automatic` chooses by what the device
// can run at once.
enum class Path : int { automatic, cooperative, cluster, two_launches };
inline constexpr Path paths[] = {Path::automatic, Path::cooperative, Path::cluster,
                                 Path::two_launches};
inline const char* name_of(Path path) {
  constexpr const char* names[] = {"automatic", "cooperative", "cluster", "two_launches"};
  return names[static_cast<int>(path)];
}

struct LossResult {
  float* loss;        // []
  float* per_row;     // [4, K, B]: log_ratio, excess, weights, kl
  float* metrics;     // [metric_count, K]
  double* sum_grads;  // [3, K, B]: d loss / d sums
  Operand cond, uncond;
};

// A number on the device that multiplies a gradient, float32 or float64 (`wide`). Without data it
// is 1.
struct Factor {
  const void* data = nullptr;
  bool wide = false;
};

// How many bytes of device memory, aligned to 256, a call needs as its workspace.
int64_t workspace_bytes(const Batch&);

// How many counters guard_loss needs: integers on the device that are 0 before its first launch and
// that it leaves as the next one needs them. Only one launch at a time may use them.
int64_t counters_needed(const Batch&);
constexpr int64_t counter_line = 32;  // how many of them a cache line holds

// Returns `count` counters on the current device. Calls on one stream get the same ones, as they
// run one after another; a call that is captured gets counters of its own, as its graph may be
// replayed beside anything. Null where there are none left: in a capture before the device's first
// call, after too many streams or captured calls, on a device without memory left, or on the
// per-thread stream, which is a different one in each thread.
uint32_t* counters_of(int64_t count, Stream);

// Writes the sums of every transition to `out`, float64 [3, K, B].
void sums(const Batch&, const Doubles table[5], double* out, void* workspace, Stream);

// Writes the gradients of `factor` times the loss whose coefficients these are. `unless_one`: cond
// and uncond already hold the gradients for a factor of 1, and where the factor is 1 the device
// writes nothing. `kind`: the kind of all finite rows' coefficients, if it is known.
void gradient(const Batch&, const Doubles table[5], const Doubles coefficients[3],
              const Operand& cond, const Operand& uncond, const Factor&, bool unless_one, Stream,
              GradientKind kind = GradientKind::general);

// Computes loss and gradient, and returns the path that was taken. It is an error to ask for a path
// that cannot run.
Path guard_loss(const Batch&, const Problem&, const LossResult&, void* workspace,
                uint32_t* counters, Path, Stream);

// How many bytes of device memory, aligned to 16, the next two need as their workspace.
int64_t rows_workspace_bytes(const Problem&);

// What guard_loss makes of the sums [3, K, B] of its transitions, which are given: writes all of
// the result but the gradients.
void evaluate(const Problem&, const Doubles sums[3], const LossResult&, void* workspace, Stream);

// Writes what guard_ops::ratio_statistics does, float64 [statistic_count, K].
void ratio_statistics(const Problem&, const Doubles sums[3], double* out, void* workspace, Stream);

// Writes prev_sample, mean (float32) and square [K, B] = sum((prev_sample - mean)^2).
void sde_step(const Batch&, const Doubles table[5], const Operand& prev_sample, const Operand& mean,
              double* square, void* workspace, Stream);

// How many multiprocessors of every device a cooperative launch leaves to other streams' kernels: 0
// until this is called.
void leave_free(int multiprocessors);

// Why the current device cannot run what was compiled; empty where it can.
std::string unsupported();

}  // namespace guard_ops::cuda
