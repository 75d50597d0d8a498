// torch's choice of a device, of which there is one. Its tensors are the CPU's, whose memory is
// gone when a binding returns, so every launch ends before its call does.
#pragma once

#include "../../../emulate_runtime.h"

namespace c10::cuda {

struct CUDAGuard {
  template <class Device>
  explicit CUDAGuard(Device) {
    namespace emulation = guard_ops::cuda::emulation;
    if (emulation::synchronous) return;
    emulation::synchronous = true;
    emulation::become({.multiprocessors = 16, .threads = 192});
  }
};

}  // namespace c10::cuda
