// The operands of a batch of transitions, as every backend's kernels take them.
#pragma once

#include "objective.h"

namespace guard_ops {

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

// Where [K, B] inputs lie: element (k, i) at data[k * stride_k + i * stride_b].
struct Rows {
  const double* data = nullptr;
  int64_t stride_k = 0, stride_b = 0;
  GUARD_OPS_HD const double* at(int64_t k, int64_t i) const {
    return data == nullptr ? nullptr : data + k * stride_k + i * stride_b;
  }
};

// The same of float64 or float32 numbers, read as the caller has them.
struct Numbers {
  const void* data = nullptr;
  int64_t stride_k = 0, stride_b = 0;
  bool wide = true;

  GUARD_OPS_HD double at(int64_t k, int64_t i) const {
    const int64_t n = k * stride_k + i * stride_b;
    return wide ? static_cast<const double*>(data)[n] : double(static_cast<const float*>(data)[n]);
  }
  GUARD_OPS_HD Maybe read(int64_t k, int64_t i) const {
    return data == nullptr ? Maybe{false, 0.0} : Maybe{true, at(k, i)};
  }
};

}  // namespace guard_ops
