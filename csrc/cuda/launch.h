// What the launches of all kernels share: the workspace's layout, slots a warp.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "plan.h"
#include "runtime.h"
#include "team.h"

namespace guard_ops::cuda {

constexpr int block_header = 128;  // bytes of shared memory before the slots
constexpr uint32_t ring_slots = 4;

inline int64_t workspace_layout(const Plan& p, int64_t steps, char* base, Workspace* out) {
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* const data = base + at;
    at += (bytes + 255) / 256 * 256;
    return data;
  };
  Workspace w{};
  const int64_t rows = p.rows;
  w.arrived = reinterpret_cast<uint32_t*>(take(256));
  w.evaluated = w.arrived + 32;  // not on the line that blocks count on
  w.partials = reinterpret_cast<double*>(take(3 * int64_t(p.chunks) * sizeof(double)));
  w.sums = reinterpret_cast<Sums*>(take(rows * sizeof(Sums)));
  w.assumed = reinterpret_cast<Coefficients*>(take(rows * sizeof(Coefficients)));
  w.scratch.rows = reinterpret_cast<RowState*>(take(rows * sizeof(RowState)));
  w.scratch.stats = reinterpret_cast<Statistics*>(take(steps * sizeof(Statistics)));
  w.scratch.finite = reinterpret_cast<int64_t*>(take(p.batch * sizeof(int64_t)));
  if (out != nullptr) *out = w;
  return at;
}

inline int shared_bytes(const Plan& p, int threads, uint32_t slots_a_warp) {
  return block_header + int(threads / warp_size * slots_a_warp * p.slot_bytes);
}

// The slots that a warp of such a block can have, `most` of them if there is room.
inline uint32_t slots_a_warp(const Plan& p, int threads, uint32_t most) {
  const uint32_t room = (device().shared_bytes - block_header) / (threads / warp_size);
  return std::min(most, room / p.slot_bytes);
}

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// A launch of blocks that walk through the chunks, as many as run at once or are of use. Slots for
// copies far ahead, but not so many that a multiprocessor has room for one block alone: it is the
// other's warps that work while one's wait for each other's instructions.
template <class Kernel>
Launch streaming(const Plan& p, Kernel* kernel, uint32_t* slots) {
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
  if (most == 0) throw std::runtime_error("guard_ops: the device runs no block");
  const int useful =
      int((p.chunks + stream_threads / warp_size - 1) / (stream_threads / warp_size));
  launch.blocks = std::min(most, useful);
  return launch;
}

}  // namespace guard_ops::cuda
