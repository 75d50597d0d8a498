// The threads that run a kernel: what one of them finds around it, how it works with two numbers at
// once, how a warp, a block and a cluster work together, and the objective on [K, B], which is one
// block's work.
#pragma once

#include "../objective.h"

// The tests replace what follows, up to the #endif, by ../tests/emulate.h, which runs the same
// kernels on the host.
#if defined(GUARD_OPS_EMULATE)
#include "../tests/emulate.h"
#else

#include <cooperative_groups.h>

#include <cstdint>

namespace guard_ops::cuda {

__device__ __forceinline__ uint32_t thread() { return threadIdx.x; }
__device__ __forceinline__ uint32_t threads() { return blockDim.x; }
__device__ __forceinline__ uint32_t block() { return blockIdx.x; }
__device__ __forceinline__ uint32_t blocks() { return gridDim.x; }

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Gives x back, of which the compiler no longer knows what it is: what is computed from it is
// computed here, instead of being kept in a register from before a loop.
__device__ __forceinline__ uint32_t computed_anew(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ bool any_of_block(bool mine) { return __syncthreads_or(mine) != 0; }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
struct alignas(16) Bytes16 {
  uint32_t w[4];
};
struct alignas(8) Bytes8 {
  uint32_t w[2];
};

// Gives every lane the pointer that `lane` has. The compiler no longer sees that it points into
// global memory, so what it points to is stored to by store_global.
__device__ __forceinline__ char* broadcast(char* pointer, uint32_t lane) {
  const auto bits = reinterpret_cast<unsigned long long>(pointer);
  return reinterpret_cast<char*>(__shfl_sync(0xFFFFFFFFu, bits, lane));
}
__device__ __forceinline__ void store_global(void* global, const Bytes16& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}
__device__ __forceinline__ void store_global(void* global, const Bytes8& x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(global)),
               "r"(x.w[0]), "r"(x.w[1])
               : "memory");
}

// copy_async starts to copy 16 bytes from global to shared memory, past the registers;
// commit_copies makes the copies since the last one a group, and wait_copies waits until all but
// the latest `pending` groups have landed.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ char* pointer_of(SharedAddress shared) {
  return static_cast<char*>(__cvta_shared_to_generic(shared));
}
// Gives the address back, which is the same in every lane. The compiler would rather compute it
// again, from the block's place in its cluster, wherever it is needed.
__device__ __forceinline__ SharedAddress same_for_warp(SharedAddress shared) {
  return __shfl_sync(0xFFFFFFFFu, shared, 0);
}
__device__ __forceinline__ void copy_async(SharedAddress shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Conversions of the storage types, two 16-bit numbers a word; each rounds once, to nearest even.
__device__ __forceinline__ float from_bits(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ void from_halves(uint32_t x, float* low, float* high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(*low), "=f"(*high)
      : "r"(x));
}
__device__ __forceinline__ uint32_t to_halves(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ void from_bfloats(uint32_t x, float* low, float* high) {
  *low = __uint_as_float(x << 16);
  *high = __uint_as_float(x & 0xFFFF0000u);
}
__device__ __forceinline__ uint32_t to_bfloats(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// 1 / sqrt(x), to about a float32's last place.
__device__ __forceinline__ float reciprocal_root(float x) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Blocks tell each other by such integers how far they are. Changing one releases what its block
// has written, and reading one acquires what the others have, which is then read like any memory.
__device__ __forceinline__ uint32_t count_up(uint32_t* counter, uint32_t by) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(by)
               : "memory");
  return before;
}
__device__ __forceinline__ uint32_t flag_now(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ void set_flag(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void await_change(const uint32_t* flag, uint32_t before) {
  while (flag_now(flag) == before) {
  }
}

// Launches that overlap: the next launch of a stream may begin once every block of this one has
// called let_next_start; what this launch and those before it wrote is there once the next one's
// await_previous returns, which it does at once in a launch that is not chained. Every chained
// launch has to call it, or the launch after it could run beside the one before it.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void await_previous() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
#else
__device__ __forceinline__ void let_next_start() {}
__device__ __forceinline__ void await_previous() {}
#endif

// Reads past this multiprocessor's cache, which may hold an older value that a launch running
// beside this one has read.
__device__ __forceinline__ double load_fresh(const double* x) { return __ldcg(x); }

// The blocks of one cluster; before sm_90, where there are none, a block counts as one.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void sync_cluster() { cooperative_groups::this_cluster().sync(); }
__device__ __forceinline__ uint32_t cluster_rank() {
  return cooperative_groups::this_cluster().block_rank();
}
__device__ __forceinline__ uint32_t cluster_size() {
  return cooperative_groups::this_cluster().num_blocks();
}
template <class T>
__device__ __forceinline__ const T* of_cluster(const T* shared, uint32_t rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
__device__ __forceinline__ void sync_cluster() { __syncthreads(); }
__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
template <class T>
__device__ __forceinline__ const T* of_cluster(const T* shared, uint32_t) {
  return shared;
}
#endif

}  // namespace guard_ops::cuda
#endif

namespace guard_ops::cuda {

// ---- two numbers as one -------------------------------------------------------------------------
//
// sm_100 adds and multiplies two float32 numbers by one instruction, each rounded as it is alone.
// What is written for `Number` uses that there, and has one number elsewhere.

struct Pair {
  float low, high;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
#define GUARD_OPS_PAIRED(instruction, ...)                                   \
  unsigned long long out;                                                    \
  asm(instruction : "=l"(out) : __VA_ARGS__);                                \
  Pair pair;                                                                 \
  asm("mov.b64 {%0, %1}, %2;" : "=f"(pair.low), "=f"(pair.high) : "l"(out)); \
  return pair
__device__ __forceinline__ unsigned long long packed(Pair x) {
  unsigned long long out;
  asm("mov.b64 %0, {%1, %2};" : "=l"(out) : "f"(x.low), "f"(x.high));
  return out;
}
__device__ __forceinline__ Pair operator+(Pair p, Pair q) {
  GUARD_OPS_PAIRED("add.rn.f32x2 %0, %1, %2;", "l"(packed(p)), "l"(packed(q)));
}
__device__ __forceinline__ Pair operator*(Pair p, Pair q) {
  GUARD_OPS_PAIRED("mul.rn.f32x2 %0, %1, %2;", "l"(packed(p)), "l"(packed(q)));
}
__device__ __forceinline__ Pair fma_of_pairs(Pair p, Pair q, Pair r) {
  GUARD_OPS_PAIRED("fma.rn.f32x2 %0, %1, %2, %3;", "l"(packed(p)), "l"(packed(q)), "l"(packed(r)));
}
#undef GUARD_OPS_PAIRED
using Number = Pair;
#else
GUARD_OPS_HD Pair operator+(Pair p, Pair q) { return {p.low + q.low, p.high + q.high}; }
GUARD_OPS_HD Pair operator*(Pair p, Pair q) { return {p.low * q.low, p.high * q.high}; }
GUARD_OPS_HD Pair fma_of_pairs(Pair p, Pair q, Pair r) {
  return {guard_ops::fma(p.low, q.low, r.low), guard_ops::fma(p.high, q.high, r.high)};
}
#if defined(GUARD_OPS_EMULATE)
using Number = Pair;  // so that tests see it
#else
using Number = float;
#endif
#endif
GUARD_OPS_HD Pair operator-(Pair x) { return {-x.low, -x.high}; }
// As -q would be two instructions; this rounds the same difference.
GUARD_OPS_HD Pair operator-(Pair p, Pair q) { return fma_of_pairs(q, {-1, -1}, p); }

// How many numbers it is, the n-th of them, and that of which f(n) is the n-th.
template <class T>
constexpr int parts = sizeof(T) / sizeof(float);
GUARD_OPS_HD float part(float x, int) { return x; }
GUARD_OPS_HD float part(Pair x, int n) { return n == 0 ? x.low : x.high; }
template <class T, class F>
GUARD_OPS_HD T make(F f) {
  if constexpr (parts<T> == 1) {
    return f(0);
  } else {
    return {f(0), f(1)};
  }
}
template <class T>
GUARD_OPS_HD T all(float x) {
  return make<T>([=](int) { return x; });
}
template <class T, class F>
GUARD_OPS_HD T each(T x, F f) {
  return make<T>([&](int n) { return f(part(x, n)); });
}
template <class T, class F>
GUARD_OPS_HD T each(T x, T y, F f) {
  return make<T>([&](int n) { return f(part(x, n), part(y, n)); });
}

}  // namespace guard_ops::cuda

template <>
struct guard_ops::Fma<guard_ops::cuda::Pair> {
  using Pair = guard_ops::cuda::Pair;
  static GUARD_OPS_HD Pair call(Pair a, Pair b, Pair c) {
    return guard_ops::cuda::fma_of_pairs(a, b, c);
  }
};

namespace guard_ops::cuda {

// ---- threads together ---------------------------------------------------------------------------

constexpr uint32_t warp_size = 32;

__device__ __forceinline__ uint32_t lane() { return thread() % warp_size; }
__device__ __forceinline__ uint32_t warp() { return thread() / warp_size; }
__device__ __forceinline__ uint32_t warps() { return threads() / warp_size; }

// Adds up a number that each lane has, by a tree, and gives every lane the total.
__device__ __forceinline__ double warp_total(double x) {
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The same of two numbers, in fewer steps: the lower half of the warp gets the total of x, and the
// upper half that of y.
__device__ __forceinline__ double warp_totals(double x, double y) {
  constexpr int half = warp_size / 2;
  const bool upper = lane() >= half;
  const double theirs = shuffle_xor(upper ? x : y, half);
  double total = (upper ? y : x) + theirs;
#pragma unroll
  for (int mask = half / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  return total;
}

// A warp as evaluate()'s Group.
struct Warp {
  __device__ __forceinline__ bool leader() const { return lane() == 0; }
  template <class F>
  __device__ __forceinline__ void each(int64_t n, F body) const {
#pragma unroll 1
    for (int64_t i = lane(); i < n; i += warp_size) body(i);
    sync_warp();
  }
  template <class F>
  __device__ __forceinline__ double sum(int64_t n, F value) const {
    double total = 0;
#pragma unroll 1
    for (int64_t i = lane(); i < n; i += warp_size) total += value(i);
    return warp_total(total);
  }
};

// A block as evaluate()'s Team. Each of its warps forms every sum for itself, all the same one.
struct Block {
  template <class F>
  __device__ __forceinline__ void each(int64_t n, F body) const {
#pragma unroll 1
    for (int64_t i = thread(); i < n; i += threads()) body(i);
    sync_block();
  }
  template <class F>
  __device__ __forceinline__ void groups(int64_t n, F body) const {
#pragma unroll 1
    for (int64_t i = warp(); i < n; i += warps()) body(Warp{}, i);
    sync_block();
  }
  template <class F>
  __device__ __forceinline__ double sum(int64_t n, F value) const {
    return Warp{}.sum(n, value);
  }
};

// Where the results of a loss go; the gradient's launches read sum_grads again.
struct LossOut {
  float *loss, *per_row, *metrics;  // [], [4, K, B], [10, K]
  double* sum_grads;                // [3, K, B]
};

inline int64_t scratch_bytes(int64_t rows, int64_t batch) {
  return rows * sizeof(RowState) + batch * sizeof(int64_t);
}
GUARD_OPS_HD EvaluationScratch scratch_at(char* base, int64_t rows) {
  return {reinterpret_cast<RowState*>(base),
          reinterpret_cast<int64_t*>(base + rows * sizeof(RowState))};
}

// The coefficients of a row, which lie in sum_grads [3, K, B].
__device__ __forceinline__ Coefficients coefficients_at(const double* sum_grads, uint32_t rows,
                                                        uint32_t row) {
  return {sum_grads[row], sum_grads[rows + row], sum_grads[2 * rows + row]};
}

__device__ __forceinline__ void put_coefficients(double* sum_grads, uint32_t rows, uint32_t row,
                                                 const Coefficients& c) {
  sum_grads[row] = c.c1;
  sum_grads[rows + row] = c.c2;
  sum_grads[2 * rows + row] = c.c3;
}

// evaluate()'s Out.
struct LossWriter {
  LossOut to;
  int64_t steps, rows;

  __device__ __forceinline__ void loss(double value) const { *to.loss = float(value); }
  __device__ __forceinline__ void metric(int m, int64_t k, double value) const {
    to.metrics[m * steps + k] = float(value);
  }
  __device__ __forceinline__ void row(int64_t n, const RowState& r, const Coefficients& c) const {
    to.per_row[n] = float(r.ratio.log_ratio);
    to.per_row[rows + n] = float(r.norm.excess);
    to.per_row[2 * rows + n] = float(r.weight);
    to.per_row[3 * rows + n] = float(r.ratio.kl);
    put_coefficients(to.sum_grads, uint32_t(rows), uint32_t(n), c);
  }
};

// Evaluates the objective from the rows' sums; the whole block calls it.
__device__ __forceinline__ void evaluate_by_block(const Problem& problem, const Sums* sums,
                                                  const EvaluationScratch& scratch,
                                                  const LossOut& out) {
  evaluate(
      Block{}, problem, [=](int64_t n) { return sums[n]; }, scratch,
      LossWriter{out, problem.steps, problem.steps * problem.batch});
}

// Adds `by` to the counter and returns whether that completes `all`. If it does, the counter is 0
// again and this block sees what the others wrote before they counted. The whole block calls it;
// `shared` is a word of its shared memory. One thread counts for the block: what the barriers order
// before its count is ordered before the count of any block after it.
__device__ __forceinline__ bool completes(uint32_t* counter, uint32_t by, uint32_t all,
                                          uint32_t* shared) {
  sync_block();
  if (thread() == 0) {
    *shared = count_up(counter, by) + by;
    if (*shared == all) *counter = 0;
  }
  sync_block();
  return *shared == all;
}

// Where the share of a block begins if n things are shared out evenly.
__device__ __forceinline__ uint32_t share(uint32_t n, uint32_t block) {
  return uint32_t(uint64_t(n) * block / blocks());
}

}  // namespace guard_ops::cuda
