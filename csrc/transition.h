// Transitions: the operands that every C++ and CUDA kernel takes, and the formulas of one element.
//
// Symbols are those of docs/math.md: mean = a x + b v, delta = mean - m, e = y - m. T is a scalar
// or a SIMD vector. No function here rounds twice where the specification rounds once: build
// without floating-point contraction.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GUARD_OPS_HD __host__ __device__ __forceinline__
#else
#define GUARD_OPS_HD inline __attribute__((always_inline))
#endif

namespace guard_ops {

// How the behaviour policy is given.
enum class Form : int { mean, velocity, noise, seeded, log_prob };

GUARD_OPS_HD constexpr bool uses_sample(Form f) {
  return f == Form::mean || f == Form::velocity || f == Form::log_prob;
}
GUARD_OPS_HD constexpr bool uses_old_velocity(Form f) {
  return f == Form::velocity || f == Form::noise || f == Form::seeded;
}
GUARD_OPS_HD constexpr bool uses_noise(Form f) { return f == Form::noise || f == Form::seeded; }

// ---- operands -----------------------------------------------------------------------------------

// The operands over latents, [K, B, D] each: (their field in Batch, their name), in the order of
// guard_ops.transitions.Latents, which has `mask` after them. An extension whose list is another
// one is not loaded.
#define GUARD_OPS_LATENTS(X)     \
  X(v, model_output)             \
  X(uncond, model_output_uncond) \
  X(ref, ref_model_output)       \
  X(x, sample)                   \
  X(y, prev_sample)              \
  X(m, old_mean)                 \
  X(v_old, old_model_output)     \
  X(noise, noise)

enum class DType : int { f64, f32, bf16, f16 };

GUARD_OPS_HD constexpr int64_t size_of(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2;
}

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

// [K, B, D] bool with dense latents: which elements count. Null when all do.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t stride_k = 0, stride_b = 0;

  GUARD_OPS_HD explicit operator bool() const { return data != nullptr; }
  GUARD_OPS_HD const uint8_t* row(int64_t k, int64_t i) const {
    return data + k * stride_k + i * stride_b;
  }
};

// [K, B, 2] int64: Philox key and transition; or [K, B, 3], where the latents are a shard: the
// third is the counter of its first four elements.
struct Seeds {
  const int64_t* data = nullptr;
  int64_t stride_k = 0, stride_b = 0, stride_word = 0;
  bool of_shard = false;

  // The number in the whole latent of a row's first element.
  GUARD_OPS_HD int64_t offset(int64_t k, int64_t i) const {
    return of_shard ? 4 * int64_t(word(k, i, 2)) : 0;
  }
  GUARD_OPS_HD uint64_t word(int64_t k, int64_t i, int w) const {
    return static_cast<uint64_t>(data[k * stride_k + i * stride_b + w * stride_word]);
  }
};

struct Batch {
  Form form;
  bool wide;  // arithmetic in float64 instead of float32
  int64_t steps, batch, numel;
#define GUARD_OPS_FIELD(field, name) Operand field;
  GUARD_OPS_LATENTS(GUARD_OPS_FIELD)
#undef GUARD_OPS_FIELD
  Mask mask;
  Seeds seeds;
  double guidance_scale;

  // Calls body(operand) for each of them, absent ones too.
  template <class Body>
  void each(Body body) const {
#define GUARD_OPS_CALL(field, name) body(field);
    GUARD_OPS_LATENTS(GUARD_OPS_CALL)
#undef GUARD_OPS_CALL
  }
};

// A number that a call may do without.
struct Maybe {
  bool given;
  double value;
};

// Where [K, B] inputs lie: element (k, i) at data[k * stride_k + i * stride_b].
struct Doubles {
  const double* data = nullptr;
  int64_t stride_k = 0, stride_b = 0;
  GUARD_OPS_HD const double* at(int64_t k, int64_t i) const {
    return data == nullptr ? nullptr : data + k * stride_k + i * stride_b;
  }
};

// The same of float64 or float32 numbers, read as the caller has them.
struct Reals {
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

struct Sums {  // S1 = sum(delta e), S2 = sum(delta^2), ref = sum((b (v - v_ref))^2)
  double s1, s2, ref;
};

GUARD_OPS_HD Sums operator+(const Sums& p, const Sums& q) {
  return {p.s1 + q.s1, p.s2 + q.s2, p.ref + q.ref};
}

struct Coefficients {  // d loss / d Sums
  double c1, c2, c3;
};

GUARD_OPS_HD bool operator==(const Coefficients& p, const Coefficients& q) {
  return p.c1 == q.c1 && p.c2 == q.c2 && p.c3 == q.c3;
}

// ---- formulas -----------------------------------------------------------------------------------

// a * b + c in one rounding; a SIMD vector's header specializes it.
template <class T>
struct Fma;
template <>
struct Fma<float> {
  static GUARD_OPS_HD float call(float a, float b, float c) { return ::fmaf(a, b, c); }
};
template <>
struct Fma<double> {
  static GUARD_OPS_HD double call(double a, double b, double c) { return ::fma(a, b, c); }
};
template <class T>
GUARD_OPS_HD T fma(T a, T b, T c) {
  return Fma<T>::call(a, b, c);
}

// One step's coefficients, broadcast to T.
template <class T>
struct Step {
  T a, b, s;
};

// One element's operands; a form reads some of them.
template <class T>
struct Element {
  T v, x, y, m, v_old, noise;
};

// The one expression for the mean: one multiplication, one fused multiply-add.
template <class T>
GUARD_OPS_HD T mean(const Step<T>& step, T x, T v) {
  return fma(step.b, v, step.a * x);
}

// Classifier-free guidance, rounded like the three PyTorch operators.
template <class T>
GUARD_OPS_HD T guided(T uncond, T cond, T scale) {
  return uncond + scale * (cond - uncond);
}

template <Form F, class T>
GUARD_OPS_HD T delta(const Step<T>& step, const Element<T>& in) {
  if constexpr (uses_old_velocity(F)) {
    return step.b * (in.v - in.v_old);
  } else if constexpr (F == Form::mean) {
    return mean(step, in.x, in.v) - in.m;
  } else {
    return mean(step, in.x, in.v) - in.y;
  }
}

template <Form F, class T>
GUARD_OPS_HD T residual(const Step<T>& step, const Element<T>& in) {  // e
  if constexpr (uses_noise(F)) {
    return step.s * in.noise;
  } else if constexpr (F == Form::velocity) {
    // not y - mean: that would round twice at the size of the latent, and e is of the size of s
    return fma(-step.b, in.v_old, fma(-step.a, in.x, in.y));
  } else if constexpr (F == Form::mean) {
    return in.y - in.m;
  } else {
    return T{};
  }
}

// What a gradient needs of a transition: e and delta; or, where c2 = -c1 / 2 as for every function
// of the log-ratio alone, only y - mean = e - delta, whatever the behaviour policy's mean was; or,
// where c2 = 0, only e, whatever the policy's is.
enum class GradientKind : int { general, departure, residual };

GUARD_OPS_HD GradientKind gradient_kind_of(double c1, double c2) {
  if (c2 == 0) return GradientKind::residual;
  return c2 == -0.5 * c1 ? GradientKind::departure : GradientKind::general;
}

template <Form F, class T>
GUARD_OPS_HD T departure(const Step<T>& step, const Element<T>& in) {  // y - mean
  if constexpr (uses_noise(F)) {
    return residual<F>(step, in) - delta<F>(step, in);
  } else {
    return fma(-step.b, in.v, fma(-step.a, in.x, in.y));
  }
}

// What multiplies e, delta and v - v_ref in the gradient of one transition.
template <class T>
struct Factors {
  T k1, k2, k3;
};

// The gradient's factors of a transition whose velocity enters the mean by b.
GUARD_OPS_HD Factors<double> factors_of(double b, const Coefficients& c) {
  return {b * c.c1, 2 * b * c.c2, 2 * b * b * c.c3};
}

// b (c1 e + 2 c2 delta), without the reference's part.
template <Form F, class T>
GUARD_OPS_HD T velocity_gradient(const Factors<T>& k, const Step<T>& step, const Element<T>& in) {
  return fma(k.k1, residual<F>(step, in), k.k2 * delta<F>(step, in));
}

// ---- Philox4x32-10 (Salmon et al., 2011) and its normals ----------------------------------------

namespace philox {

constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
constexpr uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
constexpr int rounds = 10;

struct Words {
  uint32_t w[4];
};

GUARD_OPS_HD Words generate(uint64_t key, uint64_t counter, uint64_t transition) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(transition), c3 = static_cast<uint32_t>(transition >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int r = 0; r < rounds; ++r) {
    const uint64_t p0 = static_cast<uint64_t>(multiplier0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(multiplier1) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += weyl0;
    k1 += weyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Sine and cosine of a quarter turn's fraction in [-1/2, 1/2). The device has them without the
// reduction of large arguments, which would need local memory.
template <class R>
GUARD_OPS_HD void sine_cosine(R fraction, R* sine, R* cosine) {
#if defined(__CUDA_ARCH__)
  ::sincospif(fraction * R(0.5), sine, cosine);
#else
  const R angle = fraction * R(1.5707963267948966);
  *cosine = std::cos(angle);
  *sine = std::sin(angle);
#endif
}

// Two normals from a radius word and an angle word. Both go through exact float32 numbers, the
// angle as a quadrant and a rest in [-pi/4, pi/4), so backends differ by libm's rounding only.
template <class R>
GUARD_OPS_HD void box_muller(uint32_t radius_word, uint32_t angle_word, R* first, R* second) {
  float uniform = static_cast<float>(radius_word);
  uniform = (uniform < 0.5f ? 0.5f : uniform) * 2.3283064365386963e-10f;  // 2^-32, in (0, 1]
  const R radius = std::sqrt(R(-2) * std::log(static_cast<R>(uniform)));
  const uint32_t quadrant = angle_word >> 30;
  const int32_t rest = static_cast<int32_t>(angle_word & 0x3FFFFFFFu) - 0x20000000;
  const R fraction = static_cast<R>(static_cast<float>(rest) * 9.313225746154785e-10f);  // 2^-30
  R sine, cosine;
  sine_cosine(fraction, &sine, &cosine);
  const R x = (quadrant & 1) ? -sine : cosine, y = (quadrant & 1) ? cosine : sine;
  const R signed_radius = quadrant >= 2 ? -radius : radius;
  *first = signed_radius * x;
  *second = signed_radius * y;
}

}  // namespace philox
}  // namespace guard_ops
