// The instruction set that a file is compiled for, from the compiler's flags: the name of the
// namespace that its kernels are in, and the bytes of a vector.
//
// What includes this is compiled once for each instruction set. Whatever is not in that namespace
// has to be inlined always: the linker keeps one copy of an inline function, for everyone.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define GUARD_OPS_ISA avx512
#define GUARD_OPS_VECTOR 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GUARD_OPS_ISA avx2
#define GUARD_OPS_VECTOR 32
#elif defined(__x86_64__)
#define GUARD_OPS_ISA baseline
#define GUARD_OPS_VECTOR 16
#elif defined(__aarch64__)
#define GUARD_OPS_ISA neon
#define GUARD_OPS_VECTOR 16
#else
#error "guard_ops: the CPU kernels need x86-64 or 64-bit Arm"
#endif

namespace guard_ops::cpu::GUARD_OPS_ISA {

typedef float vf __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef double vd __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef uint64_t vq __attribute__((vector_size(GUARD_OPS_VECTOR)));

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
