// How the emulated run time hands a launch that it has accepted to the emulated device.
#pragma once

#include <functional>

namespace guard_ops::cuda::emulation {

struct GridShape {
  int blocks, threads, shared_bytes;
  int cluster = 1;
  bool chained = false;
  const void* stream = nullptr;
};

void enqueue(const GridShape&, std::function<void()> thread);

}  // namespace guard_ops::cuda::emulation
