// The emulated device for a test: what the device has, which the test may change, and when launches
// run.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "emulate_grids.h"

namespace guard_ops::cuda::emulation {

struct Machine {
  int multiprocessors = 3, shared_bytes = 1 << 16;  // the most that a block may have
  int registers = 1 << 16, threads = 96;            // of a multiprocessor
  bool cooperative = true, clusters = true;
  bool busy = false;       // refuses to run blocks together although it says that it can
  bool vague = false;      // and calls the launch's arguments invalid then
  bool chains = true;      // accepts chained launches, if clusters and architecture allow them too
  int architecture = 90;   // what the kernels are compiled for; 0: nothing that this device runs
  bool has_memory = true;  // has memory left to allocate
};

void become(const Machine&);  // makes it another device, as nobody asks the same one twice

// Runs everything that was launched to its end; what streams have to run, beside each other.
void finish();
extern int refusals;              // how many launches this device has refused
extern bool synchronous;          // whether a launch ends before the call that launches it
extern bool copies_land_at_once;  // or only when they are waited for
extern std::vector<const void*> being_captured;  // the streams that are

// A launch of a graph. While `recording` is set, launches become its nodes and do not run.
struct Node {
  GridShape shape;
  std::function<void()> thread;
};
extern std::vector<Node>* recording;
void replay(const std::vector<Node>&);  // launches the nodes in the streams that recorded them

// If it is set, it gets the argument of each launch that the device accepts, and nothing runs.
extern void (*recorder)(const void* argument, size_t bytes);

}  // namespace guard_ops::cuda::emulation
