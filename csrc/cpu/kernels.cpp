// The row kernels. This file is compiled once per instruction set.
#include "kernels.h"

#include <initializer_list>
#include <type_traits>

#include "philox.h"
#include "simd.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {
namespace {

template <class R>
struct Scratch {  // one tile of what is not read in place: converted, combined or generated
  alignas(64) R v[tile], uncond[tile], x[tile], y[tile], m[tile], v_old[tile], ref[tile];
  alignas(64) R noise[tile + 4 * width<float>];
  alignas(64) R out[tile];
};

// The operands of one tile.
template <class R>
struct Tile {
  Source<R> v, x, y, m, v_old, noise, ref;
};

// float32 arithmetic converts as it loads; float64 arithmetic, which is for checking, beforehand.
inline Source<float> stage(const Operand& from, const Span& at, int64_t j, int64_t, float*) {
  return {from.row(at.k, at.i) + j * size_of(from.dtype), from.dtype};
}

inline Source<double> stage(const Operand& from, const Span& at, int64_t j, int64_t n,
                            double* scratch) {
  const char* row = from.row(at.k, at.i) + j * size_of(from.dtype);
  if (from.dtype == DType::f64) return {row, DType::f64};
  const Source<float> source{row, from.dtype};
  for (int64_t e = 0; e < n; ++e) scratch[e] = load_one(source, e);
  return {scratch};
}

template <class R>
Source<R> stage_velocity(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s) {
  const Source<R> v = stage(t.v, at, j, n, s.v);
  if (!t.uncond) return v;
  const Source<R> uncond = stage(t.uncond, at, j, n, s.uncond);
  const Vector<R> scale = splat(R(t.guidance_scale));
  constexpr int w = width<R>;
  for (int64_t e = 0; e < n; e += w) {
    const int64_t count = n - e < w ? n - e : w;
    store_some(s.v + e, guided(load_some(uncond, e, count), load_some(v, e, count), scale), count);
  }
  return {s.v};
}

template <class R>
Source<R> stage_noise(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s) {
  if (t.noise) return stage(t.noise, at, j, n, s.noise);
  normals(t.seeds.word(at.k, at.i, 0), t.seeds.word(at.k, at.i, 1), j, n, s.noise);
  return {s.noise};
}

// Which operands a pass reads that not every one does.
struct Needs {
  bool v, x, old;  // old: the behaviour policy's mean or velocity
};

template <Form F>
constexpr Needs needs_of(Shape shape) {
  if (shape == Shape::residual) return {false, F == Form::velocity, !uses_noise(F)};
  return {true, true, shape == Shape::general || uses_noise(F)};
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

template <Form F, class R, class Load>
GUARD_OPS_HD Element<Vector<R>> element(const Tile<R>& in, Needs needs, Load load_at) {
  // what the form does not use stays as it is: zeroing it costs a third of a pass
  Element<Vector<R>> e;
  if (needs.v) e.v = load_at(in.v);
  if constexpr (uses_sample(F)) {
    if (needs.x) e.x = load_at(in.x);
    e.y = load_at(in.y);
  }
  if (needs.old) {
    if constexpr (F == Form::mean) e.m = load_at.any(in.m);
    if constexpr (uses_old_velocity(F)) e.v_old = load_at(in.v_old);
  }
  if constexpr (uses_noise(F)) e.noise = load_at.any(in.noise);
  return e;
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
  double total() const {
    double lane[lanes<R>];
    for (int q = 0; q < registers; ++q) {
      for (int l = 0; l < width<R>; ++l) lane[q * width<R> + l] = part[q][l];
    }
    for (int half = lanes<R> / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    return lane[0];
  }
};

// One vector of a tile: whole, or its last one, shorter. `call` loads an operand of dtype D, `any`
// one of whichever, `put` stores one of dtype D.
template <class D>
struct Whole {
  int64_t at;
  template <class R>
  GUARD_OPS_HD Vector<R> operator()(const Source<R>& from) const {
    return load<D>(from, at);
  }
  template <class R>
  GUARD_OPS_HD Vector<R> any(const Source<R>& from) const {
    return load(from, at);
  }
  template <class R>
  GUARD_OPS_HD void put(const Target<R>& to, Vector<R> x) const {
    store<D>(to, at, x);
  }
};

template <class D>
struct Part {
  int64_t at, count;
  template <class R>
  GUARD_OPS_HD Vector<R> operator()(const Source<R>& from) const {
    return any(from);
  }
  template <class R>
  GUARD_OPS_HD Vector<R> any(const Source<R>& from) const {
    return load_some(from, at, count);
  }
  template <class R>
  GUARD_OPS_HD void put(const Target<R>& to, Vector<R> x) const {
    store_some(to, at, x, count);
  }
};

// Calls body(q, where) for every vector of a tile; q is its accumulator.
template <class R, class D, class Body>
GUARD_OPS_HD void for_each_vector(int64_t n, Body body) {
  constexpr int w = width<R>, registers = Accumulator<R>::registers;
  int64_t j = 0;
  for (; j + lanes<R> <= n; j += lanes<R>) {
#pragma GCC unroll 8
    for (int q = 0; q < registers; ++q) body(q, Whole<D>{j + q * w});
  }
  for (int q = 0; j < n; j += w, ++q) body(q, Part<D>{j, n - j < w ? n - j : w});
}

template <class R>
Target<R> target(const Operand& to, const Span& at, int64_t j) {
  return {to.row(at.k, at.i) + j * size_of(to.dtype), to.dtype};
}

constexpr Needs everything{true, true, true};

template <Form F, class R, class D>
Sums sums_of(const Batch& t, const Step<double>& step, const Span& at, const Direction& direction) {
  Scratch<R> scratch;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  Sums out{0, 0, 0};
  for (int64_t j = at.begin; j < at.end; j += tile) {
    const int64_t n = at.end - j < tile ? at.end - j : tile;
    const Tile<R> in = stage_tile<F>(t, at, j, n, scratch, everything);
    Accumulator<R> s1, s2;
    Target<R> to{};
    if (direction.to) to = target<R>(direction.to, at, j);
    for_each_vector<R, D>(n, [&](int q, auto where) {
      const Element<Vector<R>> x = element<F, R>(in, everything, where);
      const Vector<R> d = delta<F>(coefficients, x), e = residual<F>(coefficients, x);
      if constexpr (F != Form::log_prob) s1.part[q] = fma(d, e, s1.part[q]);
      s2.part[q] = fma(d, d, s2.part[q]);
      if (!to) return;
      const bool with_v = direction.shape == Shape::departure;
      where.put(to, coefficients.b * (with_v ? departure<F>(coefficients, x) : e));
    });
    out.s1 += s1.total();
    out.s2 += s2.total();
    if (!in.ref) continue;
    Accumulator<R> ref;
    for_each_vector<R, D>(n, [&](int q, auto where) {
      const Vector<R> d = coefficients.b * (where(in.v) - where.any(in.ref));
      ref.part[q] = fma(d, d, ref.part[q]);
    });
    out.ref += ref.total();
  }
  return out;
}

void write_zeros(const Operand& to, const Span& at) {
  if (!to) return;
  std::memset(to.row(at.k, at.i) + at.begin * size_of(to.dtype), 0,
              (at.end - at.begin) * size_of(to.dtype));
}

// `shape`: a Shape, or a constant. `plain`: whether it is known that cond is all that there is to
// write, and that no reference model enters.
template <Form F, class R, class D, class ShapeOf, class Plain>
void gradient_as(ShapeOf of, Plain plain, const Batch& t, const Step<double>& step,
                 const Coefficients& c, const Span& at, const Operand& cond,
                 const Operand& uncond) {
  Scratch<R> scratch;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  const Vector<R> b = coefficients.b, factor = splat(R(c.c1));
  const Factors<double> k = factors_of(step.b, c);
  const Factors<Vector<R>> factors{splat(R(k.k1)), splat(R(k.k2)), splat(R(k.k3))};
  const Vector<R> scale = splat(R(t.guidance_scale)), rest = splat(R(1 - t.guidance_scale));
  const Shape shape = of;
  const bool with_ref = !plain && c.c3 != 0 && t.ref;
  Needs needs = needs_of<F>(shape);
  needs.v = needs.v || with_ref;
  for (int64_t j = at.begin; j < at.end; j += tile) {
    const int64_t n = at.end - j < tile ? at.end - j : tile;
    const Tile<R> in = stage_tile<F>(t, at, j, n, scratch, needs);
    Target<R> to{}, to_uncond{};
    if (plain || cond) to = target<R>(cond, at, j);
    if (!plain && uncond) to_uncond = target<R>(uncond, at, j);
    for_each_vector<R, D>(n, [&](int, auto where) {
      const Element<Vector<R>> x = element<F, R>(in, needs, where);
      Vector<R> g;
      if (shape == Shape::general) {
        g = velocity_gradient<F>(factors, coefficients, x);
      } else {
        const bool with_v = shape == Shape::departure;
        g = factor * (b * (with_v ? departure<F>(coefficients, x) : residual<F>(coefficients, x)));
      }
      if (with_ref) g = fma(factors.k3, x.v - where.any(in.ref), g);
      if (plain || to) where.put(to, !plain && t.uncond ? scale * g : g);
      if (!plain && to_uncond) where.put(to_uncond, rest * g);
    });
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
  const auto run = [&](auto shape, auto plain) {
    gradient_as<F, R, D>(shape, plain, t, step, c, at, cond, uncond);
  };
  const Shape shape = shape_of(c.c1, c.c2);
  const std::true_type plain;
  if (!cond || t.uncond || (c.c3 != 0 && t.ref)) {
    run(shape, std::false_type{});
  } else if (shape == Shape::departure) {
    run(std::integral_constant<Shape, Shape::departure>{}, plain);
  } else if (shape == Shape::residual) {
    run(std::integral_constant<Shape, Shape::residual>{}, plain);
  } else {
    run(std::integral_constant<Shape, Shape::general>{}, plain);
  }
}

template <class R>
void scale_of(const Operand& to, double factor, const Span& at) {
  const Vector<R> f = splat(R(factor));
  const Target<R> out = target<R>(to, at, at.begin);
  const Source<R> in{out.data, out.dtype};
  for_each_vector<R, Any>(at.end - at.begin,
                          [&](int, auto where) { where.put(out, f * where(in)); });
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
  for (int64_t j = at.begin; j < at.end; j += tile) {
    const int64_t n = at.end - j < tile ? at.end - j : tile;
    const Source<R> v = stage(t.v, at, j, n, s.v), x = stage(t.x, at, j, n, s.x);
    const Source<R> noise = stage_noise(t, at, j, n, s);
    const Target<R> y = target<R>(prev_sample, at, j), m = target<R>(mean_out, at, j);
    Accumulator<R> square;
    for_each_vector<R, Any>(n, [&](int q, auto where) {
      const Vector<R> mu = mean(coefficients, where(x), where(v));
      const Vector<R> sampled = fma(coefficients.s, where(noise), mu);
      where.put(m, mu);
      where.put(y, sampled);
      // log_prob is that of the sample as it is stored
      const Vector<R> d = rounded<R>(sampled, y.dtype) - mu;
      square.part[q] = fma(d, d, square.part[q]);
    });
    total += square.total();
  }
  return total;
}

// The dtype of v, x, y and v_old, if it is one and nothing but conversion stands before them.
template <class Call>
auto by_dtype(const Batch& t, Call call) {
  if (t.wide) return call(double{}, Any{});
  bool same = !t.uncond;
  for (const Operand* x : {&t.x, &t.y, &t.v_old}) same = same && (!*x || x->dtype == t.v.dtype);
  if (same && t.v.dtype == DType::f32) return call(float{}, Known<DType::f32>{});
  if (same && t.v.dtype == DType::bf16) return call(float{}, Known<DType::bf16>{});
  if (same && t.v.dtype == DType::f16) return call(float{}, Known<DType::f16>{});
  return call(float{}, Any{});
}

template <class Call>
auto dispatch(const Batch& t, Call call) {
  return by_dtype(t, [&](auto real, auto dtype) {
    switch (t.form) {
      case Form::mean:
        return call(std::integral_constant<Form, Form::mean>{}, real, dtype);
      case Form::velocity:
        return call(std::integral_constant<Form, Form::velocity>{}, real, dtype);
      case Form::noise:
      case Form::seeded:
        return call(std::integral_constant<Form, Form::noise>{}, real, dtype);
      default:
        return call(std::integral_constant<Form, Form::log_prob>{}, real, dtype);
    }
  });
}

Sums sums(const Batch& t, const Step<double>& step, const Span& at, const Direction& direction) {
  return dispatch(t, [&](auto form, auto real, auto dtype) {
    return sums_of<decltype(form)::value, decltype(real), decltype(dtype)>(t, step, at, direction);
  });
}

void gradient(const Batch& t, const Step<double>& step, const Coefficients& c, const Span& at,
              const Operand& cond, const Operand& uncond) {
  dispatch(t, [&](auto form, auto real, auto dtype) {
    gradient_of<decltype(form)::value, decltype(real), decltype(dtype)>(t, step, c, at, cond,
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
