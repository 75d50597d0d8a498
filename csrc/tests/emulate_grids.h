// Launches of the emulated device, once the run time has accepted them.
#pragma once

#include <functional>

namespace guard_ops::cuda::emulation {

struct GridShape {
  int blocks, threads, shared_bytes;
  int cluster = 1;
  bool chained = false;
};

void enqueue(const GridShape&, std::function<void()> thread);

}  // namespace guard_ops::cuda::emulation
