// The emulated device as the one of an extension: its tensors are the CPU's, whose memory is gone
// when a binding returns, so every launch ends before its call does.
#include "../../cuda/kernels.h"
#include "../emulate_runtime.h"

namespace guard_ops::cuda {

static const bool made = [] {
  emulated.multiprocessors = 16;  // a cluster's blocks
  return emulated.synchronous = true;
}();

// More than a few are the caller's to make, as on a device that has no memory left.
uint32_t* counters_of(int64_t count, Stream) {
  static uint32_t counters[256];
  return count <= int64_t(sizeof counters / sizeof *counters) ? counters : nullptr;
}

}  // namespace guard_ops::cuda
