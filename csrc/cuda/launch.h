// What the launches of all kernels share: the workspace's layout, slots a warp.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "plan.h"
#include "runtime.h"
#include "team.h"

namespace guard_ops::cuda {

constexpr int block_header = 256;  // bytes of shared memory before the slots

inline int64_t workspace_layout(const Plan& p, int64_t steps, char* base, Workspace* out) {
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* const data = base + at;
    at += (bytes + 255) / 256 * 256;
    return data;
  };
  Workspace w{};
  const int64_t rows = p.rows;
  w.partials = reinterpret_cast<double*>(take(3 * int64_t(p.chunks) * sizeof(double)));
  w.parts = reinterpret_cast<Sums*>(take(rows * p.row_parts * sizeof(Sums)));
  w.sums = reinterpret_cast<Sums*>(take(rows * sizeof(Sums)));
  w.assumed = reinterpret_cast<Coefficients*>(take(rows * sizeof(Coefficients)));
  w.scratch = scratch_at(take(scratch_bytes(rows, steps, p.batch)), rows, steps);
  if (out != nullptr) *out = w;
  return at;
}

inline int shared_bytes(const Plan& p, int threads, uint32_t slots_a_warp) {
  return block_header + int(threads / warp_size * slots_a_warp * p.slot_bytes);
}

// Whether rows' sums are too much for one block after the others: then each row has its own.
constexpr uint32_t most_counted_rows = 4096;
inline bool adds_up_by_row(uint32_t rows, const Plan& p, int threads) {
  return rows <= most_counted_rows && rows * p.row_parts > 2 * uint32_t(threads) / warp_size;
}

const void* gradient_kernel();

// The gradient of some chunks' rows, in a launch that may begin while the one before it in the
// stream, which forms the coefficients, still runs. `alone`: with the whole device for itself.
// `assumed` [K, B]: only if other coefficients than these hold for any row.
void gradient_after(const Plan&, const Rows coefficients[3], const Operand& cond,
                    const Operand& uncond, Range chunks, bool alone, const Coefficients* assumed,
                    Stream);

inline void check_runs(int blocks) {
  if (blocks == 0) throw std::runtime_error("guard_ops: the device runs no block");
}

template <class Kernel>
const void* address(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// The launch, after that over chunks, in which the kernel's warps add up the parts of rows.
template <class Kernel>
Launch after_chunks(const Plan& p, Kernel* kernel) {
  const int warps = stream_threads / int(warp_size);
  Launch launch{std::min(int(p.rows * p.row_parts) / warps + 1, 1024), stream_threads, 0};
  launch.chained = true;
  check_runs(at_once(address(kernel), launch));
  return launch;
}

// Blocks with a chunk for each of their warps.
inline int useful_blocks(uint32_t chunks) {
  constexpr uint32_t warps = stream_threads / warp_size;
  return int((chunks + warps - 1) / warps);
}

// The slots that a warp of a block of `threads` can have, `most` of them if there is room.
inline uint32_t slots_a_warp(const Plan& p, int threads, uint32_t most) {
  const uint32_t room = (device().shared_bytes - block_header) / (threads / warp_size);
  return std::min(most, room / p.slot_bytes);
}

// A launch of blocks that walk through so many chunks, as many as run at once or are of use. Slots
// for copies far ahead, but not so many that a multiprocessor has room for one block alone: it is
// the other's warps that work while one's wait for each other's instructions.
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

// The same of launches of which two kinds are to run side by side: `blocks` a multiprocessor, each
// with so many bytes of shared memory where a slot a warp does not need more.
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

}  // namespace guard_ops::cuda
