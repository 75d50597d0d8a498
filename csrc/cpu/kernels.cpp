// The row kernels. This file is compiled once per instruction set.
#include "kernels.h"

#include <initializer_list>
#include <type_traits>

#include "philox.h"
#include "simd.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {
namespace {

template <class R>
struct Scratch {  // one tile of what is not read or written in place: combined, generated or padded
  alignas(64) R v[tile], uncond[tile], x[tile], y[tile], m[tile], v_old[tile], ref[tile];
  alignas(64) R noise[tile + 4 * width<float>];
  alignas(64) R out[2][tile];
};

// The operands of one stretch of a span.
template <class R>
struct Tile {
  Source<R> v, x, y, m, v_old, noise, ref;
};

// A span is worked off in stretches of whole groups of lanes: a tile, or, where every operand is
// read in place, all of them. What is left at a row's end is less than a group: it is padded with
// zeros, which add nothing to a finite sum, and what is made of them is not copied out.
template <class R>
constexpr int64_t padded(int64_t n) {
  return (n + lanes<R> - 1) / lanes<R> * lanes<R>;
}

template <class R>
int64_t stretch(const Span& at, int64_t from, bool in_place) {
  const int64_t left = at.end - from, most = in_place || left < tile ? left : tile;
  return most < lanes<R> ? most : most / lanes<R> * lanes<R>;
}

bool in_place(const Batch& t) { return !t.wide && !t.uncond && t.form != Form::seeded; }

template <class R>
void pad(R* scratch, DType dtype, int64_t n) {
  std::memset(reinterpret_cast<char*>(scratch) + n * size_of(dtype), 0,
              (padded<R>(n) - n) * size_of(dtype));
}

// float32 arithmetic converts as it loads; float64 arithmetic, which is for checking, beforehand.
inline Source<float> stage(const Operand& from, const Span& at, int64_t j, int64_t n,
                           float* scratch) {
  const char* row = from.row(at.k, at.i) + j * size_of(from.dtype);
  if (padded<float>(n) == n) return {row, from.dtype};
  std::memcpy(scratch, row, n * size_of(from.dtype));
  pad(scratch, from.dtype, n);
  return {scratch, from.dtype};
}

inline Source<double> stage(const Operand& from, const Span& at, int64_t j, int64_t n,
                            double* scratch) {
  const char* row = from.row(at.k, at.i) + j * size_of(from.dtype);
  if (from.dtype == DType::f64 && padded<double>(n) == n) return {row, DType::f64};
  if (from.dtype == DType::f64) {
    std::memcpy(scratch, row, n * sizeof(double));
  } else {
    const Source<float> source{row, from.dtype};
    for (int64_t e = 0; e < n; ++e) scratch[e] = load_one(source, e);
  }
  pad(scratch, DType::f64, n);
  return {scratch};
}

template <class R>
Source<R> stage_velocity(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s) {
  const Source<R> v = stage(t.v, at, j, n, s.v);
  if (!t.uncond) return v;
  const Source<R> uncond = stage(t.uncond, at, j, n, s.uncond);
  const Vector<R> scale = splat(R(t.guidance_scale));
  // backwards: v's padded elements lie in the same scratch, perhaps narrower than what is made
  for (int64_t e = padded<R>(n) - width<R>; e >= 0; e -= width<R>) {
    store(s.v + e, guided(load(uncond, e), load(v, e), scale));
  }
  return {s.v};
}

template <class R>
Source<R> stage_noise(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s) {
  if (t.noise) return stage(t.noise, at, j, n, s.noise);
  normals(t.seeds.word(at.k, at.i, 0), t.seeds.word(at.k, at.i, 1), j, n, s.noise);
  pad(s.noise, Source<R>{}.dtype, n);
  return {s.noise};
}

// Where the results of a stretch go: in place or, where they are padded, first into scratch.
template <class R>
struct Output {
  const Operand& to;
  const Span& at;
  int64_t j, n;
  Target<R> target;

  Output(const Operand& to, const Span& at, int64_t j, int64_t n, R* scratch)
      : to(to), at(at), j(j), n(n) {
    if (to) target = {padded<R>(n) == n ? row() : scratch, to.dtype};
  }
  void* row() const { return to.row(at.k, at.i) + j * size_of(to.dtype); }
  void finish() const {
    if (to && target.data != row()) std::memcpy(row(), target.data, n * size_of(to.dtype));
  }
};

// Which operands a pass reads that not every one does.
struct Needs {
  bool v, x, old;  // old: the behaviour policy's mean or velocity
};

template <Form F>
constexpr Needs needs_of(GradientKind kind) {
  if (kind == GradientKind::residual) return {false, F == Form::velocity, !uses_noise(F)};
  return {true, true, kind == GradientKind::general || uses_noise(F)};
}

template <Form F, class R>
Tile<R> stage_tile(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s,
                   Needs needs) {
  Tile<R> in;
  if (needs.v) {
    in.v = stage_velocity(t, at, j, n, s);
    if (t.ref) in.ref = stage(t.ref, at, j, n, s.ref);
  }
  if constexpr (uses_sample(F)) {
    if (needs.x) in.x = stage(t.x, at, j, n, s.x);
    in.y = stage(t.y, at, j, n, s.y);
  }
  if (needs.old) {
    if constexpr (F == Form::mean) in.m = stage(t.m, at, j, n, s.m);
    if constexpr (uses_old_velocity(F)) in.v_old = stage(t.v_old, at, j, n, s.v_old);
  }
  if constexpr (uses_noise(F)) in.noise = stage_noise(t, at, j, n, s);
  return in;
}

template <class R>
Step<Vector<R>> broadcast(const Step<double>& step) {
  return {splat(R(step.a)), splat(R(step.b)), splat(R(step.s))};
}

// `lanes` partial sums of one tile, added up in float64 in a fixed tree.
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

// Dtypes of a call's operands, each a constant or Any: of what has v's, and of the mean or noise.
template <class Latents, class Other>
struct DTypes {
  using latents = Latents;
  using other = Other;
};

// One vector of a stretch: loads and stores of what has v's dtype, and loads of others.
template <class D>
struct At {
  int64_t at;
  template <class R>
  GUARD_OPS_HD Vector<R> operator()(const Source<R>& from) const {
    return load<typename D::latents>(from, at);
  }
  template <class R>
  GUARD_OPS_HD Vector<R> other(const Source<R>& from) const {
    return load<typename D::other>(from, at);
  }
  template <class R>
  GUARD_OPS_HD Vector<R> any(const Source<R>& from) const {
    return load(from, at);
  }
  template <class R>
  GUARD_OPS_HD void put(const Target<R>& to, Vector<R> x) const {
    store<typename D::latents>(to, at, x);
  }
};

// Calls body(q, at) for every vector of [begin, end), whole groups; q is its accumulator.
template <class R, class D, class Body>
GUARD_OPS_HD void for_each_vector(int64_t begin, int64_t end, Body body) {
  for (int64_t j = begin; j < end; j += lanes<R>) {
#pragma GCC unroll 8
    for (int q = 0; q < Accumulator<R>::registers; ++q) body(q, At<D>{j + q * width<R>});
  }
}

template <Form F, class R, class D>
GUARD_OPS_HD Element<Vector<R>> element(const Tile<R>& in, Needs needs, At<D> load_at) {
  // what the form does not use stays as it is: zeroing it costs a third of a pass
  Element<Vector<R>> e;
  if (needs.v) e.v = load_at(in.v);
  if constexpr (uses_sample(F)) {
    if (needs.x) e.x = load_at(in.x);
    e.y = load_at(in.y);
  }
  if (needs.old) {
    if constexpr (F == Form::mean) e.m = load_at.other(in.m);
    if constexpr (uses_old_velocity(F)) e.v_old = load_at(in.v_old);
  }
  if constexpr (uses_noise(F)) e.noise = load_at.other(in.noise);
  return e;
}

constexpr Needs everything{true, true, true};

// What sums also writes: nothing, or b times the departure or the residual.
enum class Written : int { nothing, departure, residual };

template <Written W, Form F, class R, class D>
void add_sums(const Step<Vector<R>>& step, const Tile<R>& in, int64_t n, const Target<R>& to,
              Sums* out) {
  for (int64_t begin = 0; begin < n; begin += tile) {
    Accumulator<R> s1, s2;
    for_each_vector<R, D>(begin, n - begin < tile ? n : begin + tile, [&](int q, auto where) {
      const Element<Vector<R>> x = element<F, R>(in, everything, where);
      const Vector<R> d = delta<F>(step, x), e = residual<F>(step, x);
      if constexpr (F != Form::log_prob) s1.part[q] = fma(d, e, s1.part[q]);
      s2.part[q] = fma(d, d, s2.part[q]);
      if constexpr (W == Written::departure) where.put(to, step.b * departure<F>(step, x));
      if constexpr (W == Written::residual) where.put(to, step.b * e);
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
      const Vector<R> d = step.b * (where(in.v) - where.any(in.ref));
      ref.part[q] = fma(d, d, ref.part[q]);
    });
    total += ref.total();
  }
  return total;
}

template <Form F, class R, class D>
Sums sums_of(const Batch& t, const Step<double>& step, const Span& at, const Direction& direction) {
  Scratch<R> scratch;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  Sums out{0, 0, 0};
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, in_place(t));
    const int64_t whole = padded<R>(n);
    const Tile<R> in = stage_tile<F>(t, at, j, n, scratch, everything);
    if (!direction.to) {
      add_sums<Written::nothing, F, R, D>(coefficients, in, whole, {}, &out);
    } else {
      const Output<R> to(direction.to, at, j, n, scratch.out[0]);
      if (direction.kind == GradientKind::departure) {
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

// `kind`: a GradientKind, or a constant. `plain`: whether it is known that cond is all that there
// is to write, and that no reference model enters.
template <Form F, class R, class D, class KindOf, class Plain>
void gradient_as(KindOf of, Plain plain, const Batch& t, const Step<double>& step,
                 const Coefficients& c, const Span& at, const Operand& cond,
                 const Operand& uncond) {
  Scratch<R> scratch;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  const Vector<R> b = coefficients.b, factor = splat(R(c.c1));
  const Factors<double> k = factors_of(step.b, c);
  const Factors<Vector<R>> factors{splat(R(k.k1)), splat(R(k.k2)), splat(R(k.k3))};
  const Vector<R> scale = splat(R(t.guidance_scale)), rest = splat(R(1 - t.guidance_scale));
  const GradientKind kind = of;
  const bool with_ref = !plain && c.c3 != 0 && t.ref;
  Needs needs = needs_of<F>(kind);
  needs.v = needs.v || with_ref;
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, in_place(t));
    const Tile<R> in = stage_tile<F>(t, at, j, n, scratch, needs);
    const Output<R> to(cond, at, j, n, scratch.out[0]), to_uncond(uncond, at, j, n, scratch.out[1]);
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
      if (plain || cond) where.put(to.target, !plain && t.uncond ? scale * g : g);
      if (!plain && uncond) where.put(to_uncond.target, rest * g);
    });
    to.finish();
    to_uncond.finish();
  }
}

// Where a Direction could have been scaled, to its very bits.
template <Form F, class R, class D>
void gradient_of(const Batch& t, const Step<double>& step, const Coefficients& c, const Span& at,
                 const Operand& cond, const Operand& uncond) {
  if (c.c1 == 0 && c.c2 == 0 && c.c3 == 0) {
    write_zeros(cond, at);
    write_zeros(uncond, at);
    return;
  }
  const auto run = [&](auto kind, auto plain) {
    gradient_as<F, R, D>(kind, plain, t, step, c, at, cond, uncond);
  };
  const GradientKind kind = gradient_kind_of(c.c1, c.c2);
  const std::true_type plain;
  if (!cond || t.uncond || (c.c3 != 0 && t.ref)) {
    run(kind, std::false_type{});
  } else if (kind == GradientKind::departure) {
    run(std::integral_constant<GradientKind, GradientKind::departure>{}, plain);
  } else if (kind == GradientKind::residual) {
    run(std::integral_constant<GradientKind, GradientKind::residual>{}, plain);
  } else {
    run(std::integral_constant<GradientKind, GradientKind::general>{}, plain);
  }
}

template <class R>
void scale_of(const Operand& to, double factor, const Span& at) {
  Scratch<R> scratch;
  const Vector<R> f = splat(R(factor));
  using D = DTypes<Any, Any>;
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, true);
    const Source<R> in = stage(to, at, j, n, scratch.v);
    const Output<R> out(to, at, j, n, scratch.out[0]);
    for_each_vector<R, D>(0, padded<R>(n),
                          [&](int, auto where) { where.put(out.target, f * where(in)); });
    out.finish();
  }
}

void scale(const Operand& to, double factor, const Span& at) {
  if (factor == 0) {
    write_zeros(to, at);
  } else if (to.dtype == DType::f64) {
    scale_of<double>(to, factor, at);
  } else {
    scale_of<float>(to, factor, at);
  }
}

template <class R>
double step_of(const Batch& t, const Step<double>& step, const Span& at, const Operand& prev_sample,
               const Operand& mean_out) {
  Scratch<R> s;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  double total = 0;
  for (int64_t j = at.begin, n; j < at.end; j += n) {
    n = stretch<R>(at, j, false);
    const Source<R> v = stage(t.v, at, j, n, s.v), x = stage(t.x, at, j, n, s.x);
    const Source<R> noise = stage_noise(t, at, j, n, s);
    const Output<R> y(prev_sample, at, j, n, s.out[0]), m(mean_out, at, j, n, s.out[1]);
    Accumulator<R> square;
    for_each_vector<R, DTypes<Any, Any>>(0, padded<R>(n), [&](int q, auto where) {
      const Vector<R> mu = mean(coefficients, where(x), where(v));
      const Vector<R> sampled = fma(coefficients.s, where(noise), mu);
      where.put(m.target, mu);
      where.put(y.target, sampled);
      // log_prob is that of the sample as it is stored
      const Vector<R> d = rounded<R>(sampled, prev_sample.dtype) - mu;
      square.part[q] = fma(d, d, square.part[q]);
    });
    y.finish();
    m.finish();
    total += square.total();
  }
  return total;
}

// The dtypes, where they are one of the usual sets and nothing but conversion stands before v.
template <Form F, class Call>
auto by_dtype(const Batch& t, Call call) {
  using any = DTypes<Any, Any>;
  if (t.wide) return call(double{}, any{});
  const Operand& named = F == Form::mean ? t.m : t.noise;  // seeded noise is made in float32
  const DType v = t.v.dtype, other = named ? named.dtype : DType::f32;
  bool same = !t.uncond;
  for (const Operand* x : {&t.x, &t.y, &t.v_old}) same = same && (!*x || x->dtype == v);
  using f32 = Known<DType::f32>;
  const auto of = [&](auto own) {
    using Own = decltype(own);
    if (other == DType::f32) return call(float{}, DTypes<Own, f32>{});
    if constexpr (F == Form::mean || F == Form::noise) {
      if (other == v) return call(float{}, DTypes<Own, Own>{});
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

Sums sums(const Batch& t, const Step<double>& step, const Span& at, const Direction& direction) {
  return dispatch(t, [&](auto form, auto real, auto dtypes) {
    return sums_of<decltype(form)::value, decltype(real), decltype(dtypes)>(t, step, at, direction);
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
