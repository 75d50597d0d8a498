#include "emulate.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "emulate_runtime.h"

namespace guard_ops::cuda::emulation {
namespace {

constexpr uint32_t lanes = 32;
constexpr size_t stack_bytes = size_t(1) << 16;

struct Warp {
  Barrier barrier;
  uint64_t box[2][lanes];  // of even and odd exchanges: nobody is two ahead
};

struct Block {
  Barrier barrier;
  std::vector<char> shared;
  std::vector<Warp> warps;
  uint32_t left = 0;  // threads that still run
};

using Copies = std::vector<std::pair<void*, const void*>>;

struct Fiber {
  ucontext_t context;  // of its beginning; from then on it is `resume`
  jmp_buf resume;
  bool begun = false;
  Position position;
  Block* block;
  Barrier* cluster;
  const Barrier* waits_for = nullptr;
  uint64_t until = 0;  // waits while the barrier's generation is this
  uint32_t exchanges = 0;
  Copies open;
  std::deque<Copies> committed;
  bool done = false;
};

std::vector<std::unique_ptr<char[]>> stacks;  // kept: fresh memory costs a page fault a page
ucontext_t scheduler;
jmp_buf back;
Fiber* current;
const std::function<void()>* body;
std::vector<Block>* grid;

void begin() {
  (*body)();
  Block& block = *current->block;
  // Nobody may read a block's shared memory once it has left.
  if (--block.left == 0) std::memset(block.shared.data(), 0xFF, block.shared.size());
  current->done = true;
  _longjmp(back, 1);
}

// _setjmp and _longjmp, as swapcontext asks the kernel for the signal mask every time.
void yield() {
  if (_setjmp(current->resume) == 0) _longjmp(back, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(back) != 0) return;
  if (fiber.begun) _longjmp(fiber.resume, 1);
  fiber.begun = true;
  swapcontext(&scheduler, &fiber.context);
}

}  // namespace

const Position& position() { return current->position; }

void arrive_and_wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier;
  current->until = barrier.generation;
  yield();
}

void pause() { yield(); }

Barrier& block_barrier() { return current->block->barrier; }
Barrier& warp_barrier() { return current->block->warps[current->position.thread / lanes].barrier; }
Barrier& cluster_barrier() { return *current->cluster; }

char* shared_of(uint32_t rank) {
  const Position& p = current->position;
  return (*grid)[p.block - p.rank + rank].shared.data();
}

uint64_t exchange(uint64_t own, uint32_t from_lane) {
  Warp& warp = current->block->warps[current->position.thread / lanes];
  uint64_t* const box = warp.box[current->exchanges++ % 2];
  box[current->position.thread % lanes] = own;
  arrive_and_wait(warp.barrier);
  return box[from_lane];
}

void enqueue_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    std::abort();  // the device would
  }
  current->open.emplace_back(to, from);
}

void commit() { current->committed.push_back(std::exchange(current->open, {})); }

void complete(size_t pending) {
  while (current->committed.size() > pending) {
    for (const auto& [to, from] : current->committed.front()) std::memcpy(to, from, 16);
    current->committed.pop_front();
  }
}

void run(const Launch& launch, const std::function<void()>& thread) {
  std::vector<Block> blocks(launch.blocks);
  std::vector<Barrier> clusters(launch.blocks / launch.cluster);
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (Barrier& c : clusters) c.expected = launch.cluster * launch.threads;
  body = &thread;
  grid = &blocks;
  for (int b = 0; b < launch.blocks; ++b) {
    Block& block = blocks[b];
    block.barrier.expected = launch.threads;
    block.left = launch.threads;
    block.shared.assign(launch.shared_bytes, char(0xFF));
    block.warps.resize(launch.threads / lanes);
    for (Warp& w : block.warps) w.barrier.expected = lanes;
    for (int t = 0; t < launch.threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->position = {uint32_t(t),
                         uint32_t(launch.threads),
                         uint32_t(b),
                         uint32_t(launch.blocks),
                         uint32_t(b % launch.cluster),
                         uint32_t(launch.cluster),
                         block.shared.data()};
      fiber->block = &block;
      fiber->cluster = &clusters[b / launch.cluster];
      if (stacks.size() == fibers.size()) stacks.emplace_back(new char[stack_bytes]);
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = stacks[fibers.size()].get();
      fiber->context.uc_stack.ss_size = stack_bytes;
      fiber->context.uc_link = &scheduler;
      makecontext(&fiber->context, begin, 0);
      fibers.push_back(std::move(fiber));
    }
  }
  for (size_t left = fibers.size(); left > 0;) {
    bool moved = false;
    for (const auto& fiber : fibers) {
      if (fiber->done) continue;
      if (fiber->waits_for != nullptr && fiber->waits_for->generation == fiber->until) continue;
      fiber->waits_for = nullptr;
      resume(*fiber);
      moved = true;
      left -= fiber->done;
    }
    if (!moved) std::abort();  // a deadlock
  }
}

}  // namespace guard_ops::cuda::emulation
