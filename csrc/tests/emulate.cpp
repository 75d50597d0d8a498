#include "emulate.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "emulate_grids.h"
#include "emulate_runtime.h"

namespace guard_ops::cuda::emulation {

bool copies_land_at_once = false;

namespace {

constexpr uint32_t lanes = 32;
constexpr size_t stack_bytes = size_t(1) << 16;

struct Warp {
  Barrier barrier;
  uint64_t box[2][lanes];  // for even and odd exchanges, as no lane is two ahead of another
};

struct Block {
  Barrier barrier;
  std::vector<char> shared;
  std::vector<Warp> warps;
  uint32_t left = 0;  // threads that still run
  bool vote = false;
};

using Copies = std::vector<std::pair<void*, const void*>>;
struct Grid;

// Where a jump leads: the compiler's jump buffer. The C library's longjmp also looks for cleanups,
// which costs a tenth of a test, and swapcontext asks the kernel for the signal mask every time.
using Place = void* [5];

struct Fiber {
  ucontext_t context;  // where it begins; afterwards it goes on at `resume`
  Place resume;
  bool begun = false;
  Position position;
  Grid* grid;
  Block* block;
  Barrier* cluster;
  const Barrier* waits_for = nullptr;
  uint64_t until = 0;  // it waits while the barrier's generation is this
  bool waits_for_previous = false, lets_next_start = false;
  uint32_t exchanges = 0;
  Copies open;
  std::deque<Copies> committed;
  bool done = false;
};

// A launch that has not ended.
struct Grid {
  std::function<void()> thread;
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Grid* previous = nullptr;  // the one that it is chained to, until that has ended
  size_t left = 0;           // threads that still run
  size_t holding = 0;        // threads that have neither ended nor called let_next_start
  size_t first_stack = 0;    // of its threads' stacks
};
using Chain = std::deque<std::unique_ptr<Grid>>;

std::vector<std::unique_ptr<char[]>> stacks;  // kept, as fresh memory costs a page fault a page
ucontext_t scheduler;
Place back;
Fiber* current;
std::map<const void*, Chain> streams;  // what each of them has to run

void let_go(Fiber& fiber) {
  if (!std::exchange(fiber.lets_next_start, true)) --fiber.grid->holding;
}

void begin() {
  current->grid->thread();
  Block& block = *current->block;
  // No other block may read this one's shared memory from now on.
  if (--block.left == 0) std::fill(block.shared.begin(), block.shared.end(), char(0xFF));
  let_go(*current);
  current->done = true;
  __builtin_longjmp(back, 1);
}

// A jump must not be in the function that it leads to.
[[noreturn, gnu::noinline]] void jump(Place& to) { __builtin_longjmp(to, 1); }

[[gnu::noinline]] void yield() {
  if (__builtin_setjmp(current->resume) == 0) jump(back);
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  current = &fiber;
  if (__builtin_setjmp(back) != 0) return;
  if (fiber.begun) jump(fiber.resume);
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
bool any_of_block(bool mine) {
  Block& block = *current->block;
  if (mine) block.vote = true;
  arrive_and_wait(block.barrier);
  const bool any = block.vote;
  arrive_and_wait(block.barrier);
  block.vote = false;
  arrive_and_wait(block.barrier);
  return any;
}
Barrier& warp_barrier() { return current->block->warps[current->position.thread / lanes].barrier; }
Barrier& cluster_barrier() { return *current->cluster; }

char* shared_of(uint32_t rank) {
  const Position& p = current->position;
  return current->grid->blocks[p.block - p.rank + rank].shared.data();
}

void let_next_start() { let_go(*current); }

void await_previous() {
  if (current->grid->previous == nullptr) return;
  current->waits_for_previous = true;
  yield();
}

uint64_t exchange(uint64_t bits, uint32_t from_lane) {
  Warp& warp = current->block->warps[current->position.thread / lanes];
  uint64_t* const box = warp.box[current->exchanges++ % 2];
  box[current->position.thread % lanes] = bits;
  arrive_and_wait(warp.barrier);
  return box[from_lane];
}

void enqueue_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    std::abort();  // the device would fail too
  }
  if (copies_land_at_once) {
    std::memcpy(to, from, 16);
  } else {
    current->open.emplace_back(to, from);
  }
}

void commit() { current->committed.push_back(std::exchange(current->open, {})); }

void complete(size_t pending) {
  while (current->committed.size() > pending) {
    for (const auto& [to, from] : current->committed.front()) std::memcpy(to, from, 16);
    current->committed.pop_front();
  }
}

namespace {
void finish(const std::vector<Chain*>& together);
}

void enqueue(const GridShape& launch, std::function<void()> thread) {
  Chain& chain = streams[launch.stream];
  if (!launch.chained) finish({&chain});
  auto grid = std::make_unique<Grid>();
  grid->thread = std::move(thread);
  grid->blocks.resize(launch.blocks);
  grid->clusters.resize(launch.blocks / launch.cluster);
  grid->left = grid->holding = size_t(launch.blocks) * launch.threads;
  if (!chain.empty()) grid->previous = chain.back().get();
  for (Barrier& c : grid->clusters) c.expected = launch.cluster * launch.threads;
  for (int b = 0; b < launch.blocks; ++b) {
    Block& block = grid->blocks[b];
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
      fiber->grid = grid.get();
      fiber->block = &block;
      fiber->cluster = &grid->clusters[b / launch.cluster];
      grid->fibers.push_back(std::move(fiber));
    }
  }
  chain.push_back(std::move(grid));
}

namespace {

__attribute__((noinline)) bool turn(Fiber& fiber, char* stack) {
  if (fiber.done || (fiber.waits_for_previous && fiber.grid->previous != nullptr)) return false;
  if (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.until) return false;
  fiber.waits_for = nullptr;
  fiber.waits_for_previous = false;
  if (!fiber.begun) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, begin, 0);
  }
  resume(fiber);
  fiber.grid->left -= fiber.done;
  return true;
}

// Gives every thread of a grid that can go on one turn, beginning with the first thread and the
// next time with the last. Returns whether any could.
bool step(Grid& grid) {
  bool moved = false;
  static bool backwards = false;
  backwards = !backwards;
  for (size_t m = 0; m < grid.fibers.size(); ++m) {
    const size_t n = backwards ? grid.fibers.size() - 1 - m : m;
    while (stacks.size() <= grid.first_stack + n) stacks.emplace_back(new char[stack_bytes]);
    moved |= turn(*grid.fibers[n], stacks[grid.first_stack + n].get());
  }
  return moved;
}

// Gives the newest grid of a chain that can go on a turn; false where all of them have ended.
bool advance(Chain& chain) {
  size_t ended = 0;  // how many grids at the chain's beginning have ended
  while (ended < chain.size() && chain[ended]->left == 0) ++ended;
  if (ended == chain.size()) return false;
  size_t started = ended + 1;
  while (started < chain.size() && chain[started - 1]->holding == 0) ++started;
  bool moved = false;
  for (size_t n = started; n-- > ended && !moved;) moved = step(*chain[n]);
  if (!moved) std::abort();  // it is a deadlock
  for (size_t n = ended; n + 1 < chain.size(); ++n) {
    if (chain[n]->left == 0) chain[n + 1]->previous = nullptr;
  }
  return true;
}

void finish(const std::vector<Chain*>& together) {
  size_t stack = 0;
  for (Chain* const chain : together) {
    for (const auto& grid : *chain) {
      grid->first_stack = stack;
      stack += grid->fibers.size();
    }
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (Chain* const chain : together) moved |= advance(*chain);
  }
  for (Chain* const chain : together) chain->clear();
}

}  // namespace

void finish() {
  std::vector<Chain*> all;
  for (auto& [stream, chain] : streams) all.push_back(&chain);
  finish(all);
}

}  // namespace guard_ops::cuda::emulation
