// A device on the host: every CUDA thread is a fiber, and all fibers of a grid take turns on one
// thread of the host. The primitives at the top of ../cuda/team.h are here in plain C++, and
// stricter than the device's where that finds mistakes. Asynchronous copies land either only when
// they are waited for or all at once, as a test likes. Shared memory holds NaNs when its block
// begins and after it has ended. Threads take turns from the first on, then from the last on. A
// chained launch runs as early as it may, before the one that it is chained to. This cannot find
// races between two synchronizations.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace guard_ops::cuda {

namespace emulation {

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

// What a running thread knows of itself; `shared` is its block's shared memory.
struct Position {
  uint32_t thread, threads, block, blocks, rank, cluster;
  char* shared;
};

const Position& position();
void arrive_and_wait(Barrier& barrier);
void pause();  // lets the others run

Barrier& block_barrier();
bool any_of_block(bool mine);
Barrier& warp_barrier();
Barrier& cluster_barrier();
char* shared_of(uint32_t rank);  // the shared memory of a block of this cluster
// Gives the 8 bytes that a lane of the warp passed; all lanes call it at once.
uint64_t exchange(uint64_t bits, uint32_t from_lane);
void enqueue_copy(void* to, const void* from);
void commit();
void complete(size_t pending);
void let_next_start();
void await_previous();

}  // namespace emulation

inline uint32_t thread() { return emulation::position().thread; }
inline uint32_t threads() { return emulation::position().threads; }
inline uint32_t block() { return emulation::position().block; }
inline uint32_t blocks() { return emulation::position().blocks; }
inline char* shared_memory() { return emulation::position().shared; }

inline uint32_t computed_anew(uint32_t x) { return x; }
inline void sync_block() { emulation::arrive_and_wait(emulation::block_barrier()); }
inline bool any_of_block(bool mine) { return emulation::any_of_block(mine); }
inline void sync_warp() { emulation::arrive_and_wait(emulation::warp_barrier()); }
template <class T>
T shuffle_xor(T x, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  bits = emulation::exchange(bits, (thread() % 32) ^ uint32_t(mask));
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct alignas(16) Bytes16 {
  uint32_t w[4];
};
struct alignas(8) Bytes8 {
  uint32_t w[2];
};
template <class Bytes>
void store_global(void* global, const Bytes& x) {
  if (reinterpret_cast<uintptr_t>(global) % sizeof x != 0)
    std::abort();  // the device would fail too
  std::memcpy(global, &x, sizeof x);
}
inline char* broadcast(char* pointer, uint32_t lane) {
  return reinterpret_cast<char*>(emulation::exchange(reinterpret_cast<uintptr_t>(pointer), lane));
}

using SharedAddress = char*;
inline SharedAddress address_of(char* shared) { return shared; }
inline char* pointer_of(SharedAddress shared) { return shared; }
inline SharedAddress same_for_warp(SharedAddress shared) { return shared; }
inline void copy_async(SharedAddress shared, const void* global) {
  emulation::enqueue_copy(shared, global);
}
inline void commit_copies() { emulation::commit(); }
template <int pending>
void wait_copies() {
  emulation::complete(pending);
}

inline float from_bits(uint32_t x) {
  float out;
  std::memcpy(&out, &x, sizeof x);
  return out;
}
inline uint32_t bits_of(float x) {
  uint32_t out;
  std::memcpy(&out, &x, sizeof x);
  return out;
}
#if defined(__aarch64__)
using Half = __fp16;  // in C++, GCC has no other name for it before version 13
#else
using Half = _Float16;
#endif
inline void from_halves(uint32_t x, float* low, float* high) {
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  *low = float(halves[0]), *high = float(halves[1]);
}
inline uint32_t to_halves(float low, float high) {
  const Half halves[2] = {Half(low), Half(high)};
  uint32_t out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}
inline void from_bfloats(uint32_t x, float* low, float* high) {
  *low = from_bits(x << 16), *high = from_bits(x & 0xFFFF0000u);
}
inline uint32_t to_bfloats(float low, float high) {
  const auto one = [](float x) {
    const uint32_t bits = bits_of(x);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  return one(low) | one(high) << 16;
}

inline float reciprocal_root(float x) { return float(1 / std::sqrt(double(x))); }

inline uint32_t count_up(uint32_t* counter, uint32_t by) {
  const uint32_t before = *counter;
  *counter += by;
  return before;
}
inline uint32_t flag_now(const uint32_t* flag) {
  return *static_cast<const volatile uint32_t*>(flag);
}
inline void set_flag(uint32_t* flag, uint32_t value) {
  *static_cast<volatile uint32_t*>(flag) = value;
}
inline void await_change(const uint32_t* flag, uint32_t before) {
  while (flag_now(flag) == before) emulation::pause();
}

inline void let_next_start() { emulation::let_next_start(); }
inline void await_previous() { emulation::await_previous(); }

inline double load_fresh(const double* x) { return *x; }

inline void sync_cluster() { emulation::arrive_and_wait(emulation::cluster_barrier()); }
inline uint32_t cluster_rank() { return emulation::position().rank; }
inline uint32_t cluster_size() { return emulation::position().cluster; }
template <class T>
const T* of_cluster(const T* shared, uint32_t rank) {
  const char* const here = reinterpret_cast<const char*>(shared);
  return reinterpret_cast<const T*>(emulation::shared_of(rank) + (here - shared_memory()));
}

}  // namespace guard_ops::cuda
