// How kernels are launched: what the current device can run, which path of guard_loss that makes
// the best one, how many blocks with how much shared memory a launch has, and the memory that
// several launches share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "kernels.h"
#include "team.h"
#include "tiles.h"

namespace guard_ops::cuda {

#if defined(GUARD_OPS_EMULATE)
constexpr int stream_threads = 64, cooperative_threads = 96, cluster_threads = 64;
#else
constexpr int stream_threads = 256, cooperative_threads = 512, cluster_threads = 256;
#endif

constexpr int block_header = 256;  // bytes of shared memory before the slots

// ---- the device ---------------------------------------------------------------------------------

// Throws unless a call of the run time, which `what` names, succeeded.
void check(cudaError_t status, const char* what);

struct Device {
  int number, multiprocessors;
  int shared_bytes;            // the most that a block may have
  bool cooperative, clusters;  // whether it has not refused such a launch yet, see refused_launch
};

Device device();  // the current one

struct Launch {
  int blocks, threads, shared_bytes;
  bool cooperative = false;
  int cluster = 1;
  bool chained = false;  // may begin before the launch before it ends: see await_previous
};

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// How many blocks of this kernel, or clusters of blocks, the device runs at once; 0 where it cannot
// launch it so.
int at_once(const void* kernel, const Launch&);

// Whether both the device and the kernel's code know clusters and chained launches. Code from PTX
// for sm_80 does not, whatever the driver compiles it for: it would take each block for a cluster
// of its own, and await_previous would not wait.
bool runs_as_sm_90(const void* kernel);

// Whether an error says that the device cannot launch a kernel in the way that was tried.
bool refused(cudaError_t status);

// Launches a kernel. Returns false where the device refuses the way of the launch, although it said
// that it could: it may have no room for blocks that have to run at once, under MPS or when it is
// busy. A launch in no special way throws.
template <class Argument>
bool starts(void (*kernel)(Argument), const Launch& launch, void* stream, Argument argument) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.blocks);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (launch.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (launch.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = launch.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  const bool chained = launch.chained && runs_as_sm_90(address(kernel));
  if (chained) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = launch.cooperative || launch.cluster > 1 || chained ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, argument);
  if (config.numAttrs > 0 && refused(status)) {
    cudaGetLastError();
    return false;
  }
  check(status, "kernel launch");
  return true;
}

// Launches a kernel, not chained where that is refused.
template <class Argument>
void start(void (*kernel)(Argument), const Launch& launch, void* stream, Argument argument) {
  if (starts(kernel, launch, stream, argument)) return;
  Launch unchained = launch;
  unchained.chained = false;
  if (!starts(kernel, unchained, stream, argument))
    throw std::runtime_error("guard_ops: no launch");
}

// ---- blocks and shared memory -------------------------------------------------------------------

// How many bytes the sums of a block's chunks take, in a cluster.
GUARD_OPS_HD uint32_t partial_bytes(uint32_t chunks) {
  return uint32_t(chunks * sizeof(Sums) + 15) / 16 * 16;
}

inline int shared_bytes(const Plan& p, int threads, const Room& room) {
  return block_header + int(threads / warp_size * bytes_of(p, room));
}

// Whether the sums of the rows are too much work for the last block alone; then the block that
// completes a row adds up that row's.
constexpr uint32_t most_counted_rows = 4096;
inline bool adds_up_by_row(const Plan& p, int threads) {
  return p.rows <= most_counted_rows && p.rows * p.row_parts > 2 * uint32_t(threads) / warp_size;
}

inline void check_runs(int blocks) {
  if (blocks == 0) throw std::runtime_error("guard_ops: the device runs no block");
}

// The launch after one over chunks, in which a kernel's warps add up the parts of rows.
template <class Kernel>
Launch after_chunks(const Plan& p, Kernel* kernel) {
  const int warps = stream_threads / int(warp_size);
  Launch launch{std::min(int(p.rows * p.row_parts) / warps + 1, 1024), stream_threads, 0};
  launch.chained = true;
  check_runs(at_once(address(kernel), launch));
  return launch;
}

// How many blocks it takes to have a warp for every chunk.
inline int useful_blocks(uint32_t chunks) {
  constexpr uint32_t warps = stream_threads / warp_size;
  return int((chunks + warps - 1) / warps);
}

// How many bytes a warp of a block of `threads` can have of the block's `bytes` of shared memory.
inline int64_t bytes_a_warp(int64_t bytes, int threads) {
  return std::max<int64_t>(bytes - block_header, 0) / (threads / warp_size);
}

// A launch of blocks that walk through all chunks: as many blocks as run at once or are of use.
// They have slots to copy far ahead, but not so many that only one block fits a multiprocessor:
// while the warps of one block wait, those of another work.
template <class Kernel>
Launch streaming(const Plan& p, Kernel* kernel, Room* room) {
  Launch launch{0, stream_threads, 0};
  int most = 0;
  const Device d = device();
  for (uint32_t ring = ring_slots; ring > 0 && most < 2 * d.multiprocessors; ring /= 2) {
    const int64_t fit = bytes_a_warp(d.shared_bytes, stream_threads) / p.slot_bytes;
    const Room tried{uint32_t(std::min<int64_t>(ring, fit)), 0};
    const Launch candidate{0, stream_threads, shared_bytes(p, stream_threads, tried)};
    const int blocks = tried.slots == 0 ? 0 : at_once(address(kernel), candidate);
    if (blocks <= most) continue;
    most = blocks;
    launch = candidate;
    *room = tried;
  }
  check_runs(most);
  launch.blocks = std::min(most, useful_blocks(p.chunks));
  return launch;
}

// ---- which path ---------------------------------------------------------------------------------

// What the choice of a path depends on in a device.
struct Machine {
  int multiprocessors;  // those that a launch may fill all at once
  int shared_bytes;     // the most that a block may have
  bool cooperative, clusters;
  int cooperative_threads, cluster_threads;  // of a block
  // How many blocks of the path's kernel, or clusters of them, run at once on all its
  // multiprocessors.
  int (*at_once)(Path, const Launch&);
};

Machine machine();  // the current device

struct Wish {
  Path path;         // `automatic`, or the only one that will do
  bool gradient;     // whether a gradient is wanted
  bool independent;  // whether a row's gradient needs no other row
};

struct Choice {
  Path path = Path::two_launches;
  Launch launch{};              // that of the one launch; two_launches has what streaming() gives
  Room room{};                  // of a warp
  uint32_t scratch_offset = 0;  // where shared memory has room for evaluate()'s numbers; else 0
  bool sums_in_shared = false;  // whether the rows' sums are there too
  uint32_t block_chunks = 0;    // chunks of a block, in a cluster
};

// The path of a call: docs/cuda.md has the rules. Throws where the only one that will do cannot
// run.
Choice choose(const Machine&, const Plan&, const Wish&);

// Remembers that the current device has refused a launch of this path, although it said that it
// could: no later call tries it again. A launch that fails costs time, and ends a capture.
void refused_launch(Path);

const void* kernel_of(Path);  // its first kernel

// ---- what the kernels share ---------------------------------------------------------------------

struct Workspace {
  double* partials;       // [3, chunks]: the sums of chunks
  Sums* parts;            // [K, B, row_parts]: those of parts
  Sums* sums;             // [K, B]: those of rows
  Coefficients* assumed;  // [K, B]: what gradients were formed by before all rows were known
  EvaluationScratch scratch;
};

// Returns how many bytes a workspace has and, where `out` is given, lays one out at `base`.
int64_t workspace_layout(const Plan& p, char* base, Workspace* out);

}  // namespace guard_ops::cuda
