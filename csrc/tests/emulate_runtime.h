// The launches on the emulated device, whose properties a test may set.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

namespace guard_ops::cuda {

constexpr int stream_threads = 64, cooperative_threads = 96, cluster_threads = 64;

struct Device {
  int number, multiprocessors, shared_bytes;
  bool cooperative, clusters;
  bool busy = false;  // says that it launches blocks together, and does not
};

inline Device emulated{0, 3, 1 << 16, true, true};

inline const Device& device() { return emulated; }

struct Launch {
  int blocks, threads, shared_bytes;
  bool cooperative = false;
  int cluster = 1;
};

inline std::string why_not(const void*) { return ""; }

inline int at_once(const void*, const Launch& launch) {
  if (launch.shared_bytes > emulated.shared_bytes) return 0;
  return emulated.multiprocessors / launch.cluster;
}

namespace emulation {
void run(const Launch& launch, const std::function<void()>& thread);
}  // namespace emulation

template <class Argument>
bool starts(void (*kernel)(Argument), const Launch& launch, void*, Argument argument) {
  if (emulated.busy && (launch.cooperative || launch.cluster > 1)) return false;
  emulation::run(launch, [&] { kernel(argument); });
  return true;
}

template <class Argument>
void start(void (*kernel)(Argument), const Launch& launch, void* stream, Argument argument) {
  if (!starts(kernel, launch, stream, argument)) throw std::runtime_error("no launch");
}

inline void zero(void* data, size_t bytes, void*) { std::memset(data, 0, bytes); }

}  // namespace guard_ops::cuda
