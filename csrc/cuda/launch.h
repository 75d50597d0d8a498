// How kernels are launched: what the current device can run, how many blocks with how much shared
// memory a launch has, and the memory that several launches share.
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
  int shared_bytes;  // the most that a block may have
  bool cooperative, clusters;
  int cache_bytes;  // of the second-level cache
  int registers;    // of a multiprocessor
};

const Device& device();  // the current one

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

// Whether blocks of the second kernel can begin while blocks of the first run: whether a
// multiprocessor has registers for `blocks` of the first kernel's and one of the second's.
bool overlap(const void* first, int blocks, const void* second, int threads);

// Whether both the device and the kernel's code know clusters and chained launches. Code from PTX
// for sm_80 does not, whatever the driver compiles it for: it would take each block for a cluster
// of its own, and await_previous would not wait.
bool runs_as_sm_90(const void* kernel);

// Whether an error says that the device cannot launch a kernel in the way that was tried.
bool refused(cudaError_t status);

// Launches a kernel. Returns false where the device refuses the way of the launch, although it said
// that it could: it may have no room for blocks that have to run at once, under MPS or when it is
// busy.
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
  if (config.numAttrs > 0 && status != cudaErrorInvalidValue && refused(status)) {
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

inline int shared_bytes(const Plan& p, int threads, uint32_t slots_a_warp) {
  return block_header + int(threads / warp_size * slots_a_warp * p.slot_bytes);
}

// Whether the sums of the rows are too much work for the last block alone; then the block that
// completes a row adds up that row's.
constexpr uint32_t most_counted_rows = 4096;
inline bool adds_up_by_row(uint32_t rows, const Plan& p, int threads) {
  return rows <= most_counted_rows && rows * p.row_parts > 2 * uint32_t(threads) / warp_size;
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

// How many slots a warp of a block of `threads` can have, up to `most`.
inline uint32_t slots_a_warp(const Plan& p, int threads, uint32_t most) {
  const uint32_t room = (device().shared_bytes - block_header) / (threads / warp_size);
  return std::min(most, room / p.slot_bytes);
}

// A launch of blocks that walk through so many chunks: as many blocks as run at once or are of use.
// They have slots to copy far ahead, but not so many that only one block fits a multiprocessor:
// while the warps of one block wait, those of another work.
template <class Kernel>
Launch streaming(const Plan& p, Kernel* kernel, uint32_t chunks, uint32_t* slots) {
  Launch launch{0, stream_threads, 0};
  int most = 0;
  for (uint32_t ring = ring_slots; ring > 0 && most < 2 * device().multiprocessors; ring /= 2) {
    const uint32_t count = slots_a_warp(p, stream_threads, ring);
    const Launch candidate{0, stream_threads, shared_bytes(p, stream_threads, count)};
    const int blocks = count == 0 ? 0 : at_once(address(kernel), candidate);
    if (blocks <= most) continue;
    most = blocks;
    launch = candidate;
    *slots = count;
  }
  check_runs(most);
  launch.blocks = std::min(most, useful_blocks(chunks));
  return launch;
}

// The same for a launch beside which another kernel's blocks are to run: `blocks` of this one a
// multiprocessor, each with at most `bytes` of shared memory, unless a slot a warp needs more.
template <class Kernel>
Launch beside_another(const Plan& p, Kernel* kernel, uint32_t chunks, int blocks, int bytes,
                      uint32_t* slots) {
  const uint32_t room =
      uint32_t(bytes - block_header) / (stream_threads / warp_size * p.slot_bytes);
  *slots = room >= ring_slots ? ring_slots : room >= 2 ? 2 : 1;
  Launch launch{0, stream_threads, shared_bytes(p, stream_threads, *slots)};
  const int most = std::min(at_once(address(kernel), launch), blocks * device().multiprocessors);
  check_runs(most);
  launch.blocks = std::min(most, useful_blocks(chunks));
  return launch;
}

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

const void* gradient_kernel();  // of gradient.cu, like the next

// Launches the gradient of some chunks. The launch may begin while the one before it in the stream,
// which forms the coefficients, still runs. `alone`: whether it has the whole device to itself.
// `assumed` [K, B]: coefficients by which the gradient is there already; it is formed again only if
// those of any row have changed.
void gradient_after(const Plan&, const Doubles coefficients[3], const Operand& cond,
                    const Operand& uncond, Range chunks, bool alone, const Coefficients* assumed,
                    Stream);

}  // namespace guard_ops::cuda
