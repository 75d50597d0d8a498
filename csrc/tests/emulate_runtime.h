// The launches on the emulated device, whose properties a test may set.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

namespace guard_ops::cuda {

constexpr int stream_threads = 64, cooperative_threads = 96, cluster_threads = 64;

struct Device {
  int number, multiprocessors, shared_bytes;
  bool cooperative, clusters;
  int cache_bytes = 1 << 15;
  bool busy = false;  // says that it launches blocks together, and does not
  bool overlaps = true;
  bool synchronous = false;  // a launch ends before the call of it does
};

inline Device emulated{0, 3, 1 << 16, true, true};

inline const Device& device() { return emulated; }

struct Launch {
  int blocks, threads, shared_bytes;
  bool cooperative = false;
  int cluster = 1;
  bool chained = false;
};

inline std::string why_not(const void*) { return ""; }

inline bool overlap(const void*, int, const void*, int) { return emulated.overlaps; }

inline int at_once(const void*, const Launch& launch) {
  if (launch.shared_bytes > emulated.shared_bytes) return 0;
  return emulated.multiprocessors / launch.cluster;
}

namespace emulation {
void launch(const Launch& launch, std::function<void()> thread);
void finish();                    // everything that was launched
extern bool copies_land_at_once;  // and not only when they are waited for
}  // namespace emulation

template <class Argument>
bool starts(void (*kernel)(Argument), const Launch& launch, void*, Argument argument) {
  if (emulated.busy && (launch.cooperative || launch.cluster > 1)) return false;
  emulation::launch(launch, [=] { kernel(argument); });
  if (emulated.synchronous) emulation::finish();
  return true;
}

template <class Argument>
void start(void (*kernel)(Argument), const Launch& launch, void* stream, Argument argument) {
  if (!starts(kernel, launch, stream, argument)) throw std::runtime_error("no launch");
}

}  // namespace guard_ops::cuda
