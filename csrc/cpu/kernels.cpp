// The row kernels: sums, gradient, scaling and rollout step of a span of one row. This file is
// compiled once for each instruction set.
#include "kernels.h"

#include <initializer_list>
#include <type_traits>

#include "philox.h"
#include "simd.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {
namespace {

// Memory for one tile of each operand that cannot be read or written in place, because it is
// combined from two, generated or padded.
template <class R>
struct TileBuffers {
  alignas(64) R v[tile], uncond[tile], x[tile], y[tile], m[tile], v_old[tile], ref[tile];
  alignas(64) R noise[tile + 4 * width<float>];
  alignas(64) R out[2][tile];
  alignas(64) Bits<R> kept[tile];
};

// Where the operands of one stretch of a span are read.
template <class R>
struct Tile {
  Source<R> v, x, y, m, v_old, noise, ref;
  const Bits<R>* kept = nullptr;  // all ones where an element counts, else 0; null where all do
};

// A span is processed in stretches. A stretch is a whole number of groups of `lanes` elements: a
// tile, or the whole span where every operand is read in place. What is left at a row's end is
// shorter than a group. It is padded with zeros, which add nothing to a finite sum, and what is
// computed from them is not copied out.
template <class R>
constexpr int64_t padded(int64_t n) {
  return (n + lanes<R> - 1) / lanes<R> * lanes<R>;
}

template <class R>
int64_t stretch(const Span& at, int64_t from, bool in_place) {
  const int64_t left = at.end - from, most = in_place || left < tile ? left : tile;
  return most < lanes<R> ? most : most / lanes<R> * lanes<R>;
}

bool in_place(const Batch& t) { return !t.wide && !t.uncond && t.form != Form::seeded && !t.mask; }

template <class R>
void pad(R* buffer, DType dtype, int64_t n) {
  std::memset(reinterpret_cast<char*>(buffer) + n * size_of(dtype), 0,
              (padded<R>(n) - n) * size_of(dtype));
}

// Elements [j, j + n) of an operand's row, in place or padded in `buffer`. float32 arithmetic
// converts them when it loads them; for float64 arithmetic, which is for checking, they are
// converted here.
inline Source<float> stage(const Operand& from, const Span& at, int64_t j, int64_t n,
                           float* buffer) {
  const char* row = from.row(at.k, at.i) + j * size_of(from.dtype);
  if (padded<float>(n) == n) return {row, from.dtype};
  std::memcpy(buffer, row, n * size_of(from.dtype));
  pad(buffer, from.dtype, n);
  return {buffer, from.dtype};
}

inline Source<double> stage(const Operand& from, const Span& at, int64_t j, int64_t n,
                            double* buffer) {
  const char* row = from.row(at.k, at.i) + j * size_of(from.dtype);
  if (from.dtype == DType::f64 && padded<double>(n) == n) return {row, DType::f64};
  if (from.dtype == DType::f64) {
    std::memcpy(buffer, row, n * sizeof(double));
  } else {
    const Source<float> source{row, from.dtype};
    for (int64_t e = 0; e < n; ++e) buffer[e] = load_one(source, e);
  }
  pad(buffer, DType::f64, n);
  return {buffer};
}

template <class R>
Source<R> stage_velocity(const Batch& t, const Span& at, int64_t j, int64_t n,
                         TileBuffers<R>& buffers) {
  const Source<R> v = stage(t.v, at, j, n, buffers.v);
  if (!t.uncond) return v;
  const Source<R> uncond = stage(t.uncond, at, j, n, buffers.uncond);
  const Vector<R> scale = splat(R(t.guidance_scale));
  // backwards, as v's padded elements lie in the same buffer and may be narrower than the results
  for (int64_t e = padded<R>(n) - width<R>; e >= 0; e -= width<R>) {
    store(buffers.v + e, guided(load(uncond, e), load(v, e), scale));
  }
  return {buffers.v};
}

template <class R>
Source<R> stage_noise(const Batch& t, const Span& at, int64_t j, int64_t n,
                      TileBuffers<R>& buffers) {
  if (t.noise) return stage(t.noise, at, j, n, buffers.noise);
  const int64_t begin = t.seeds.offset(at.k, at.i) + j;
  normals(t.seeds.word(at.k, at.i, 0), t.seeds.word(at.k, at.i, 1), begin, n, buffers.noise);
  pad(buffers.noise, Source<R>{}.dtype, n);
  return {buffers.noise};
}

// What a mask leaves of elements [j, j + n), which are at most a tile: see Tile.
template <class R>
const Bits<R>* stage_mask(const Batch& t, const Span& at, int64_t j, int64_t n, Bits<R>* buffer) {
  if (!t.mask) return nullptr;
  const uint8_t* const from = t.mask.row(at.k, at.i) + j;
  for (int64_t e = 0; e < n; ++e) buffer[e] = from[e] ? ~Bits<R>(0) : 0;
  for (int64_t e = n; e < padded<R>(n); ++e) buffer[e] = 0;
  return buffer;
}

// Where the results of a stretch go: in place or, where they are padded, into `buffer`, from which
// finish() copies them.
template <class R>
struct Output {
  const Operand& to;
  const Span& at;
  int64_t j, n;
  Target<R> target;

  Output(const Operand& to, const Span& at, int64_t j, int64_t n, R* buffer)
      : to(to), at(at), j(j), n(n) {
    if (to) target = {padded<R>(n) == n ? row() : buffer, to.dtype};
  }
  void* row() const { return to.row(at.k, at.i) + j * size_of(to.dtype); }
  void finish() const {
    if (to && target.data != row()) std::memcpy(row(), target.data, n * size_of(to.dtype));
  }
};

// Which operands a pass reads, of those that not every pass needs.
struct Needs {
  bool v, x, old;  // old: the behaviour policy's mean or velocity
};

template <Form F>
constexpr Needs needs_of(GradientKind kind) {
  if (kind == GradientKind::residual) return {false, F == Form::velocity, !uses_noise(F)};
  return {true, true, kind == GradientKind::general || uses_noise(F)};
}

template <Form F, class R>
Tile<R> stage_tile(const Batch& t, const Span& at, int64_t j, int64_t n, TileBuffers<R>& buffers,
                   Needs needs) {
  Tile<R> in;
  if (needs.v) {
    in.v = stage_velocity(t, at, j, n, buffers);
    if (t.ref) in.ref = stage(t.ref, at, j, n, buffers.ref);
  }
  if constexpr (uses_sample(F)) {
    if (needs.x) in.x = stage(t.x, at, j, n, buffers.x);
    in.y = stage(t.y, at, j, n, buffers.y);
  }
  if (needs.old) {
    if constexpr (F == Form::mean) in.m = stage(t.m, at, j, n, buffers.m);
    if constexpr (uses_old_velocity(F)) in.v_old = stage(t.v_old, at, j, n, buffers.v_old);
  }
  if constexpr (uses_noise(F)) in.noise = stage_noise(t, at, j, n, buffers);
  in.kept = stage_mask<R>(t, at, j, n, buffers.kept);
  return in;
}

template <class R>
Step<Vector<R>> broadcast(const Step<double>& step) {
  return {splat(R(step.a)), splat(R(step.b)), splat(R(step.s))};
}

// The `lanes` partial sums of one tile, which total() adds up in float64 by a fixed tree.
template <class R>
struct Accumulator {
  static constexpr int registers = lanes<R> / width<R>;
  Vector<R> part[registers] = {};
  GUARD_OPS_HD double total() const {
    Vector<double> lane[lanes<R> / width<double>];
    for (int q = 0; q < registers; ++q) widen(part[q], lane + q * (width<R> / width<double>));
#pragma GCC unroll 8
    for (int half = lanes<R> / width<double> / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    return sum_of_lanes(lane[0]);
  }
};

// The dtypes of a call's operands, each a Known or Any: that of v, x, y and v_old, where they
// agree, and that of m or noise.
template <class Latents, class MeanOrNoise>
struct DTypes {
  using latents = Latents;
  using mean_or_noise = MeanOrNoise;
};

// One vector of a stretch, from element `at` on. The call itself loads what has the dtype of v, and
// put stores it; mean_or_noise and any load the rest.
template <class D>
struct VectorAt {
  int64_t at;
  template <class R>
  GUARD_OPS_HD Vector<R> operator()(const Source<R>& from) const {
    return load<typename D::latents>(from, at);
  }
  template <class R>
  GUARD_OPS_HD Vector<R> mean_or_noise(const Source<R>& from) const {
    return load<typename D::mean_or_noise>(from, at);
  }
  template <class R>
  GUARD_OPS_HD Vector<R> any(const Source<R>& from) const {
    return load(from, at);
  }
  // x, and 0 where an element does not count, whatever x is there.
  template <class R>
  GUARD_OPS_HD Vector<R> keep(const Bits<R>* kept, Vector<R> x) const {
    return masked(x, kept + at);
  }
  template <class R>
  GUARD_OPS_HD void put(const Target<R>& to, Vector<R> x) const {
    store<typename D::latents>(to, at, x);
  }
  // The same into memory of the compute type, whatever the operands are.
  template <class R>
  GUARD_OPS_HD void put_unrounded(const Target<R>& to, Vector<R> x) const {
    if constexpr (std::is_same_v<R, float>) {
      store<Known<DType::f32>>(to, at, x);
    } else {
      store(to, at, x);
    }
  }
};

// Calls body(q, VectorAt) for every vector of [begin, end), which is a whole number of groups of
// lanes; q is the accumulator's register for that vector.
template <class R, class D, class Body>
GUARD_OPS_HD void for_each_vector(int64_t begin, int64_t end, Body body) {
  for (int64_t j = begin; j < end; j += lanes<R>) {
#pragma GCC unroll 8
    for (int q = 0; q < Accumulator<R>::registers; ++q) body(q, VectorAt<D>{j + q * width<R>});
  }
}

template <Form F, class R, class D>
GUARD_OPS_HD Element<Vector<R>> element(const Tile<R>& in, Needs needs, VectorAt<D> load_at) {
  // what the form does not use stays uninitialized, as zeroing it costs a third of a pass
  Element<Vector<R>> e;
  if (needs.v) e.v = load_at(in.v);
  if constexpr (uses_sample(F)) {
    if (needs.x) e.x = load_at(in.x);
    e.y = load_at(in.y);
  }
  if (needs.old) {
    if constexpr (F == Form::mean) e.m = load_at.mean_or_noise(in.m);
    if constexpr (uses_old_velocity(F)) e.v_old = load_at(in.v_old);
  }
  if constexpr (uses_noise(F)) e.noise = load_at.mean_or_noise(in.noise);
  return e;
}

constexpr Needs everything{true, true, true};

// What the pass that forms sums also writes: nothing, or b times the departure or the residual.
// Or only some elements count; then it writes nothing.
enum class Written : int { nothing, departure, residual, nothing_masked };

template <Written W, Form F, class R, class D>
void add_sums(const Step<Vector<R>>& step, const Tile<R>& in, int64_t n, const Target<R>& to,
              Sums* out) {
  for (int64_t begin = 0; begin < n; begin += tile) {
    Accumulator<R> s1, s2;
    for_each_vector<R, D>(begin, n - begin < tile ? n : begin + tile, [&](int q, auto where) {
      const Element<Vector<R>> x = element<F, R>(in, everything, where);
      Vector<R> d = delta<F>(step, x), e = residual<F>(step, x);
      if constexpr (W == Written::nothing_masked) {
        d = where.template keep<R>(in.kept, d), e = where.template keep<R>(in.kept, e);
      }
      if constexpr (F != Form::log_prob) s1.part[q] = fma(d, e, s1.part[q]);
      s2.part[q] = fma(d, d, s2.part[q]);
      if constexpr (W == Written::departure) {
        where.put_unrounded(to, step.b * departure<F>(step, x));
      }
      if constexpr (W == Written::residual) where.put_unrounded(to, step.b * e);
    });
    out->s1 += s1.total();
    out->s2 += s2.total();
  }
}

template <class R, class D>
double reference_sum(const Step<Vector<R>>& step, const Tile<R>& in, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += tile) {
    Accumulator<R> ref;
    for_each_vector<R, D>(begin, n - begin < tile ? n : begin + tile, [&](int q, auto where) {
      Vector<R> d = step.b * (where(in.v) - where.any(in.ref));
      if (in.kept) d = where.template keep<R>(in.kept, d);
      ref.part[q] = fma(d, d, ref.part[q]);
    });
    total += ref.total();
  }
  return total;
}

template <Form F, class R, class D>
Sums sums_of(const Batch& t, const Step<double>& step, const Span& at, const EarlyGradient& early) {
  TileBuffers<R> buffers;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  Sums out{0, 0, 0};
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, in_place(t));
    const int64_t whole = padded<R>(n);
    const Tile<R> in = stage_tile<F>(t, at, j, n, buffers, everything);
    if (in.kept) {
      add_sums<Written::nothing_masked, F, R, D>(coefficients, in, whole, {}, &out);
    } else if (!early.to) {
      add_sums<Written::nothing, F, R, D>(coefficients, in, whole, {}, &out);
    } else {
      const Output<R> to(early.to, at, j, n, buffers.out[0]);
      if (early.kind == GradientKind::departure) {
        add_sums<Written::departure, F, R, D>(coefficients, in, whole, to.target, &out);
      } else {
        add_sums<Written::residual, F, R, D>(coefficients, in, whole, to.target, &out);
      }
      to.finish();
    }
    if (in.ref) out.ref += reference_sum<R, D>(coefficients, in, whole);
  }
  return out;
}

void write_zeros(const Operand& to, const Span& at) {
  if (!to) return;
  std::memset(to.row(at.k, at.i) + at.begin * size_of(to.dtype), 0,
              (at.end - at.begin) * size_of(to.dtype));
}

// `of`: a GradientKind, or the constant of one. `cond_only`: a constant that is true where cond is
// the only gradient to write, and neither reference model nor mask enters; then the loop has no
// branches for them.
template <Form F, class R, class D, class KindOf, class CondOnly>
void gradient_as(KindOf of, CondOnly cond_only, const Batch& t, const Step<double>& step,
                 const Coefficients& c, const Span& at, const Operand& cond,
                 const Operand& uncond) {
  TileBuffers<R> buffers;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  const Vector<R> b = coefficients.b, factor = splat(R(c.c1));
  const Factors<double> k = factors_of(step.b, c);
  const Factors<Vector<R>> factors{splat(R(k.k1)), splat(R(k.k2)), splat(R(k.k3))};
  const Vector<R> scale = splat(R(t.guidance_scale)), rest = splat(R(1 - t.guidance_scale));
  const GradientKind kind = of;
  const bool with_ref = !cond_only && c.c3 != 0 && t.ref;
  Needs needs = needs_of<F>(kind);
  needs.v = needs.v || with_ref;
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, in_place(t));
    const Tile<R> in = stage_tile<F>(t, at, j, n, buffers, needs);
    const Output<R> to(cond, at, j, n, buffers.out[0]), to_uncond(uncond, at, j, n, buffers.out[1]);
    for_each_vector<R, D>(0, padded<R>(n), [&](int, auto where) {
      const Element<Vector<R>> x = element<F, R>(in, needs, where);
      Vector<R> g;
      if (kind == GradientKind::general) {
        g = velocity_gradient<F>(factors, coefficients, x);
      } else {
        const bool with_v = kind == GradientKind::departure;
        g = factor * (b * (with_v ? departure<F>(coefficients, x) : residual<F>(coefficients, x)));
      }
      if (with_ref) g = fma(factors.k3, x.v - where.any(in.ref), g);
      if (!cond_only && in.kept) g = where.template keep<R>(in.kept, g);
      if (cond_only || cond) where.put(to.target, !cond_only && t.uncond ? scale * g : g);
      if (!cond_only && uncond) where.put(to_uncond.target, rest * g);
    });
    to.finish();
    to_uncond.finish();
  }
}

// Gives the bits that scaling an EarlyGradient by c1 gives, wherever sums could have written one.
template <Form F, class R, class D>
void gradient_of(const Batch& t, const Step<double>& step, const Coefficients& c, const Span& at,
                 const Operand& cond, const Operand& uncond) {
  if (c.c1 == 0 && c.c2 == 0 && c.c3 == 0) {
    write_zeros(cond, at);
    write_zeros(uncond, at);
    return;
  }
  const auto run = [&](auto kind, auto cond_only) {
    gradient_as<F, R, D>(kind, cond_only, t, step, c, at, cond, uncond);
  };
  const GradientKind kind = gradient_kind_of(c.c1, c.c2);
  const std::true_type cond_only;
  if (!cond || t.uncond || t.mask || (c.c3 != 0 && t.ref)) {
    run(kind, std::false_type{});
  } else if (kind == GradientKind::departure) {
    run(std::integral_constant<GradientKind, GradientKind::departure>{}, cond_only);
  } else if (kind == GradientKind::residual) {
    run(std::integral_constant<GradientKind, GradientKind::residual>{}, cond_only);
  } else {
    run(std::integral_constant<GradientKind, GradientKind::general>{}, cond_only);
  }
}

template <class R>
void scale_as(const Operand& from, const Operand& to, double factor, const Span& at) {
  TileBuffers<R> buffers;
  const Vector<R> f = splat(R(factor));
  using D = DTypes<Any, Any>;
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, true);
    const Source<R> in = stage(from, at, j, n, buffers.v);
    const Output<R> out(to, at, j, n, buffers.out[0]);
    for_each_vector<R, D>(0, padded<R>(n),
                          [&](int, auto where) { where.put(out.target, f * where(in)); });
    out.finish();
  }
}

void scale(const Operand& from, const Operand& to, double factor, const Span& at) {
  if (factor == 0) {
    write_zeros(to, at);
  } else if (from.dtype == DType::f64) {
    scale_as<double>(from, to, factor, at);
  } else {
    scale_as<float>(from, to, factor, at);
  }
}

template <class R>
double step_of(const Batch& t, const Step<double>& step, const Span& at, const Operand& prev_sample,
               const Operand& mean_out) {
  TileBuffers<R> buffers;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  double total = 0;
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, false);
    const Source<R> v = stage_velocity(t, at, j, n, buffers), x = stage(t.x, at, j, n, buffers.x);
    const Source<R> noise = stage_noise(t, at, j, n, buffers);
    const Output<R> y(prev_sample, at, j, n, buffers.out[0]), m(mean_out, at, j, n, buffers.out[1]);
    const Bits<R>* const kept = stage_mask<R>(t, at, j, n, buffers.kept);
    Accumulator<R> square;
    for_each_vector<R, DTypes<Any, Any>>(0, padded<R>(n), [&](int q, auto where) {
      const Vector<R> mu = mean(coefficients, where(x), where(v));
      const Vector<R> sampled = fma(coefficients.s, where(noise), mu);
      where.put(m.target, mu);
      where.put(y.target, sampled);
      // square enters log_prob, which is that of the sample as it is stored
      Vector<R> d = rounded<R>(sampled, prev_sample.dtype) - mu;
      if (kept) d = where.template keep<R>(kept, d);
      square.part[q] = fma(d, d, square.part[q]);
    });
    y.finish();
    m.finish();
    total += square.total();
  }
  return total;
}

// Calls call(real, dtypes): the type of the arithmetic, and the dtypes as constants where they are
// one of the usual combinations and v is not guided. Otherwise dtypes are Any.
template <Form F, class Call>
auto by_dtype(const Batch& t, Call call) {
  using any = DTypes<Any, Any>;
  if (t.wide) return call(double{}, any{});
  const Operand& operand = F == Form::mean ? t.m : t.noise;  // seeded noise is made in float32
  const DType v = t.v.dtype;
  const DType mean_or_noise = operand ? operand.dtype : DType::f32;
  bool same = !t.uncond;
  for (const Operand* x : {&t.x, &t.y, &t.v_old}) same = same && (!*x || x->dtype == v);
  using f32 = Known<DType::f32>;
  const auto of = [&](auto latents) {
    using Latents = decltype(latents);
    if (mean_or_noise == DType::f32) return call(float{}, DTypes<Latents, f32>{});
    if constexpr (F == Form::mean || F == Form::noise) {
      if (mean_or_noise == v) return call(float{}, DTypes<Latents, Latents>{});
    }
    return call(float{}, any{});
  };
  if (same && v == DType::f32) return of(f32{});
  if (same && v == DType::bf16) return of(Known<DType::bf16>{});
  if (same && v == DType::f16) return of(Known<DType::f16>{});
  return call(float{}, any{});
}

template <class Call>
auto dispatch(const Batch& t, Call call) {
  const auto as = [&](auto form) {
    return by_dtype<decltype(form)::value>(
        t, [&](auto real, auto dtypes) { return call(form, real, dtypes); });
  };
  switch (t.form) {
    case Form::mean:
      return as(std::integral_constant<Form, Form::mean>{});
    case Form::velocity:
      return as(std::integral_constant<Form, Form::velocity>{});
    case Form::noise:
    case Form::seeded:
      return as(std::integral_constant<Form, Form::noise>{});
    default:
      return as(std::integral_constant<Form, Form::log_prob>{});
  }
}

Sums sums(const Batch& t, const Step<double>& step, const Span& at, const EarlyGradient& early) {
  return dispatch(t, [&](auto form, auto real, auto dtypes) {
    return sums_of<decltype(form)::value, decltype(real), decltype(dtypes)>(t, step, at, early);
  });
}

void gradient(const Batch& t, const Step<double>& step, const Coefficients& c, const Span& at,
              const Operand& cond, const Operand& uncond) {
  dispatch(t, [&](auto form, auto real, auto dtypes) {
    gradient_of<decltype(form)::value, decltype(real), decltype(dtypes)>(t, step, c, at, cond,
                                                                         uncond);
  });
}

double sde_step(const Batch& t, const Step<double>& step, const Span& at,
                const Operand& prev_sample, const Operand& mean) {
  return t.wide ? step_of<double>(t, step, at, prev_sample, mean)
                : step_of<float>(t, step, at, prev_sample, mean);
}

#define GUARD_OPS_STRING_(x) #x
#define GUARD_OPS_STRING(x) GUARD_OPS_STRING_(x)

}  // namespace

extern const Kernels table;
const Kernels table{GUARD_OPS_STRING(GUARD_OPS_ISA), sums, gradient, scale, sde_step};

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
