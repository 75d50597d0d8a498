// The row kernels of one instruction set, and the operands they take.
#pragma once

#include <cstdint>

#include "../objective.h"

namespace guard_ops::cpu {

enum class DType : int { f64, f32, bf16, f16 };

GUARD_OPS_HD int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// A [K, B, D] tensor with dense latents; strides in elements. Null when absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_k = 0, stride_b = 0;

  GUARD_OPS_HD explicit operator bool() const { return data != nullptr; }
  GUARD_OPS_HD char* row(int64_t k, int64_t i) const {
    return static_cast<char*>(data) + (k * stride_k + i * stride_b) * size_of(dtype);
  }
};

// [K, B, 2] int64: Philox key and transition.
struct Seeds {
  const int64_t* data = nullptr;
  int64_t stride_k = 0, stride_b = 0, stride_word = 0;
  GUARD_OPS_HD uint64_t word(int64_t k, int64_t i, int w) const {
    return static_cast<uint64_t>(data[k * stride_k + i * stride_b + w * stride_word]);
  }
};

struct Batch {
  Form form;
  bool wide;  // arithmetic in float64 instead of float32
  int64_t steps, batch, numel;
  Operand v, uncond, ref, x, y, m, v_old, noise;
  Seeds seeds;
  double guidance_scale;
};

// Elements [begin, end) of row (k, i); begin is a multiple of `tile`.
struct Span {
  int64_t k, i, begin, end;
};

// Where sums may also write h = b (e - delta), or h = b e: the gradient up to the factor c1 of
// every loss whose c2 is -c1 / 2, or 0 (all of them, but for the KL to a reference model).
struct Direction {
  Operand to;  // of v's dtype, which has to be the compute type; or absent
  bool with_delta = false;
};

constexpr int64_t tile = 1024;        // staged in L1, summed in the compute type
constexpr int64_t chunk = 64 * tile;  // unit of parallel work; partial sums are float64

struct Kernels {
  const char* name;
  Sums (*sums)(const Batch&, const Step<double>&, const Span&, const Direction&);
  // Either may be absent; they have the dtypes of v and uncond.
  void (*gradient)(const Batch&, const Step<double>&, const Coefficients&, const Span&,
                   const Operand& cond, const Operand& uncond);
  void (*scale)(const Operand&, double factor, const Span&);  // in place; 0 gives zeros always
  // prev_sample, mean; returns sum((prev_sample - mean)^2).
  double (*sde_step)(const Batch&, const Step<double>&, const Span&, const Operand& prev_sample,
                     const Operand& mean);
};

// The best instruction set of this processor; GUARD_OPS_CPU_ISA=baseline|avx2|avx512 overrides.
const Kernels& kernels();
// One by name, or null when this processor lacks it.
const Kernels* kernels(const char* name);

}  // namespace guard_ops::cpu
