// What the kernels ask of a thread's surroundings. The tests replace it by ../tests/emulate.h,
// which runs the same kernels on the host.
#pragma once

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

// For every lane the pointer that `lane` has, into global memory: to be stored to by store_global,
// as the compiler does not see any more what it points to.
__device__ __forceinline__ char* broadcast(char* pointer, uint32_t lane) {
  const auto bits = reinterpret_cast<unsigned long long>(pointer);
  return reinterpret_cast<char*>(__shfl_sync(0xFFFFFFFFu, bits, lane));
}
__device__ __forceinline__ void store_global(void* global, const Bytes16& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

// 16 bytes from global to shared memory, past the registers; a group of copies is waited for.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
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

// The storage types' conversions, two numbers a word; each rounds once, to nearest even.
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

// Integers that blocks tell each other how far they are with: release what was written, acquire
// what others have, which is then read as any memory is.
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

// Launches that overlap: the next one of a stream may begin once every block of this one has called
// let_next_start, and has what this one wrote, and all before it, once its await_previous returns.
// A launch that is not chained to the one before it finds that over. Whoever is chained has to wait
// at some time, or what comes after it would run beside what came before it.
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

// Past this multiprocessor's cache, into which a launch that runs beside this one may have read
// what was there before.
__device__ __forceinline__ double load_fresh(const double* x) { return __ldcg(x); }

// The blocks of one cluster; before sm_90 a block is a cluster of its own.
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
