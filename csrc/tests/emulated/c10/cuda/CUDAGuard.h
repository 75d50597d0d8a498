// torch's choice of a device; there is only the emulated one. Tensors are the CPU's, whose memory
// may be gone when a binding returns, so every launch ends before its call does.
#pragma once

#include "../../../emulate_runtime.h"

namespace c10::cuda {

struct CUDAGuard {
  template <class Device>
  explicit CUDAGuard(Device) {
    namespace emulation = guard_ops::cuda::emulation;
    static const bool made = [] {
      emulation::become({.multiprocessors = 16, .threads = 192});
      return emulation::synchronous = true;
    }();
    (void)made;
  }
};

}  // namespace c10::cuda
