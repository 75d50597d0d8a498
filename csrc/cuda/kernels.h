// What the CUDA kernels offer to whoever has pointers and a stream: see ../cpu/driver.h for the
// same on the CPU. Every call enqueues on the stream of the current device and returns: nothing
// waits for the device and nothing is allocated, but by counters_of, once a device. Errors are
// std::runtime_error.
#pragma once

#include <string>

#include "../evaluate.h"

namespace guard_ops::cuda {

using Stream = void*;  // a cudaStream_t

// How guard_loss reads the batch. `automatic` asks the device what it can run at once.
enum class Path : int { automatic, cooperative, cluster, in_turn, two_launches };
inline constexpr Path paths[] = {Path::automatic, Path::cooperative, Path::cluster, Path::in_turn,
                                 Path::two_launches};
inline const char* name_of(Path path) {
  constexpr const char* names[] = {"automatic", "cooperative", "cluster", "in_turn",
                                   "two_launches"};
  return names[static_cast<int>(path)];
}

struct LossResult {
  float* loss;        // []
  float* per_row;     // [4, K, B]: log_ratio, excess, weights, kl
  float* metrics;     // [metric_count, K]
  double* sum_grads;  // [3, K, B]: d loss / d sums
  Operand cond, uncond;
};

// A number on the device that multiplies a gradient; float32 or float64. Without data it is 1.
struct Factor {
  const void* data = nullptr;
  bool wide = false;
};

// Bytes of device memory that a call needs, aligned to 256.
int64_t workspace_bytes(const Batch&);

// Integers on the device that guard_loss needs: 0 before its first launch, as it leaves them for
// the next one. One launch at a time may have them.
int64_t counters_needed(const Batch&);
constexpr int64_t counter_line = 32;  // of them in a line of the cache

// So many of them on the current device: the stream's, whose calls follow each other; while it is
// captured ones that nobody else gets, as a graph may be replayed beside anything. Null where there
// are none: in a capture before the device's first call, after too many streams or captured calls,
// on a device without memory left, or on the per-thread stream, which is several.
uint32_t* counters_of(int64_t count, Stream);

// out: [3, K, B] float64.
void sums(const Batch&, const Rows table[5], double* out, void* workspace, Stream);

// The gradients of `factor` times the loss whose coefficients these are. `unless_one`: the
// gradients are there already, for a factor of 1; where the device finds that, it writes nothing.
// `kind`: that of every finite row's coefficients, where it is known.
void gradient(const Batch&, const Rows table[5], const Rows coefficients[3], const Operand& cond,
              const Operand& uncond, const Factor&, bool unless_one, Stream,
              GradientKind kind = GradientKind::general);

// Loss and gradient; returns the path it took. A path that is forced and cannot run is an error.
Path guard_loss(const Batch&, const Problem&, const LossResult&, void* workspace,
                uint32_t* counters, Path, Stream);

// square: [K, B] = sum((prev_sample - mean)^2); mean: float32.
void sde_step(const Batch&, const Rows table[5], const Operand& prev_sample, const Operand& mean,
              double* square, void* workspace, Stream);

// Whether the current device can run what was compiled; if not, why.
std::string unsupported();

}  // namespace guard_ops::cuda
