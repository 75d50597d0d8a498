// The emulated device: what it has, which a test may change, and when its launches run.
#pragma once

namespace guard_ops::cuda::emulation {

struct Machine {
  int multiprocessors = 3, shared_bytes = 1 << 16;  // the most that a block may have
  int cache_bytes = 1 << 15;                        // of the second level
  int registers = 1 << 16, threads = 96;            // of a multiprocessor
  bool cooperative = true, clusters = true;
  bool busy = false;       // says that it launches blocks together, and does not
  bool chains = true;      // takes chained launches, where clusters and architecture say so too
  int architecture = 90;   // that the kernels were compiled for; 0: for none that it runs
  bool has_memory = true;  // to allocate
};

void become(const Machine&);  // another device from now on, as nobody asks about one twice

void finish();                      // everything that was launched
extern bool synchronous;            // a launch ends before the call of it does
extern bool copies_land_at_once;    // and not only when they are waited for
extern const void* being_captured;  // a stream, or none

}  // namespace guard_ops::cuda::emulation
