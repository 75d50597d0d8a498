// The row kernels. This file is compiled once per instruction set.
#include "kernels.h"

#include <type_traits>

#include "philox.h"
#include "simd.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {
namespace {

template <class R>
struct Scratch {  // one tile of each operand, in L1
  alignas(64) R v[tile], uncond[tile], x[tile], y[tile], m[tile], v_old[tile], ref[tile];
  alignas(64) R noise[tile + 4 * width<float>];
  alignas(64) R out[tile];
};

// The operands of one tile, in the compute type.
template <class R>
struct Tile {
  const R *v = nullptr, *x = nullptr, *y = nullptr, *m = nullptr, *v_old = nullptr;
  const R *noise = nullptr, *ref = nullptr;
};

template <class R>
const R* stage(const Operand& from, const Span& at, int64_t j, int64_t n, R* scratch) {
  return widen(from.dtype, from.row(at.k, at.i) + j * size_of(from.dtype), scratch, n);
}

template <class R>
const R* stage_velocity(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s) {
  const R* v = stage(t.v, at, j, n, s.v);
  if (!t.uncond) return v;
  const R* uncond = stage(t.uncond, at, j, n, s.uncond);
  const R scale = R(t.guidance_scale);
  for (int64_t e = 0; e < n; ++e) s.v[e] = guided(uncond[e], v[e], scale);
  return s.v;
}

template <class R>
const R* stage_noise(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s) {
  if (t.noise) return stage(t.noise, at, j, n, s.noise);
  normals(t.seeds.word(at.k, at.i, 0), t.seeds.word(at.k, at.i, 1), j, n, s.noise);
  return s.noise;
}

template <Form F, class R>
Tile<R> stage_tile(const Batch& t, const Span& at, int64_t j, int64_t n, Scratch<R>& s,
                   bool with_delta) {
  Tile<R> in;
  if (with_delta) {
    in.v = stage_velocity(t, at, j, n, s);
    if (t.ref) in.ref = stage(t.ref, at, j, n, s.ref);
  }
  if constexpr (uses_sample(F)) {
    in.x = stage(t.x, at, j, n, s.x);
    in.y = stage(t.y, at, j, n, s.y);
  }
  if constexpr (F == Form::mean) in.m = stage(t.m, at, j, n, s.m);
  if constexpr (uses_old_velocity(F)) {
    if (with_delta || F == Form::velocity) in.v_old = stage(t.v_old, at, j, n, s.v_old);
  }
  if constexpr (uses_noise(F)) in.noise = stage_noise(t, at, j, n, s);
  return in;
}

template <Form F, class R, class Load>
GUARD_OPS_HD Element<Vector<R>> element(const Tile<R>& in, bool with_delta, Load load_at) {
  Element<Vector<R>> e{};
  if (with_delta) e.v = load_at(in.v);
  if constexpr (uses_sample(F)) {
    e.x = load_at(in.x);
    e.y = load_at(in.y);
  }
  if constexpr (F == Form::mean) e.m = load_at(in.m);
  if constexpr (uses_old_velocity(F)) {
    if (with_delta || F == Form::velocity) e.v_old = load_at(in.v_old);
  }
  if constexpr (uses_noise(F)) e.noise = load_at(in.noise);
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

// Calls body(q, load) for every vector of a tile: q its accumulator, load(p) its elements of p.
template <class R, class Body>
GUARD_OPS_HD void for_each_vector(int64_t n, Body body) {
  constexpr int w = width<R>, registers = Accumulator<R>::registers;
  int64_t j = 0;
  for (; j + lanes<R> <= n; j += lanes<R>) {
#pragma GCC unroll 8
    for (int q = 0; q < registers; ++q) {
      const int64_t at = j + q * w;
      body(q, [at](const R* p) { return load(p + at); });
    }
  }
  for (int q = 0; j < n; j += w, ++q) {
    const int64_t at = j, count = n - j < w ? n - j : w;
    body(q, [at, count](const R* p) { return load_some(p + at, count); });
  }
}

template <Form F, class R>
Sums sums_of(const Batch& t, const Step<double>& step, const Span& at) {
  Scratch<R> scratch;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  Sums out{0, 0, 0};
  for (int64_t j = at.begin; j < at.end; j += tile) {
    const int64_t n = at.end - j < tile ? at.end - j : tile;
    const Tile<R> in = stage_tile<F>(t, at, j, n, scratch, true);
    Accumulator<R> s1, s2;
    for_each_vector<R>(n, [&](int q, auto load_at) {
      const Element<Vector<R>> e = element<F, R>(in, true, load_at);
      const Vector<R> d = delta<F>(coefficients, e);
      if constexpr (F != Form::log_prob) {
        s1.part[q] = fma(d, residual<F>(coefficients, e), s1.part[q]);
      }
      s2.part[q] = fma(d, d, s2.part[q]);
    });
    out.s1 += s1.total();
    out.s2 += s2.total();
    if (in.ref == nullptr) continue;
    Accumulator<R> ref;
    for_each_vector<R>(n, [&](int q, auto load_at) {
      const Vector<R> d = coefficients.b * (load_at(in.v) - load_at(in.ref));
      ref.part[q] = fma(d, d, ref.part[q]);
    });
    out.ref += ref.total();
  }
  return out;
}

template <Form F, class R>
void gradient_of(const Batch& t, const Step<double>& step, const Coefficients& c, const Span& at,
                 const Operand& cond, const Operand& uncond) {
  const auto write_zeros = [&](const Operand& to) {
    if (!to) return;
    std::memset(to.row(at.k, at.i) + at.begin * size_of(to.dtype), 0,
                (at.end - at.begin) * size_of(to.dtype));
  };
  if (c.c1 == 0 && c.c2 == 0 && c.c3 == 0) {
    write_zeros(cond);
    write_zeros(uncond);
    return;
  }
  Scratch<R> scratch;
  const Step<Vector<R>> coefficients = broadcast<R>(step);
  const Vector<R> k1 = splat(R(step.b * c.c1)), k2 = splat(R(2 * step.b * c.c2));
  const Vector<R> k3 = splat(R(2 * step.b * step.b * c.c3));
  // Without c2 and c3 the gradient is c1 e alone, and delta's operands need not be read.
  const bool with_delta = c.c2 != 0 || c.c3 != 0;
  for (int64_t j = at.begin; j < at.end; j += tile) {
    const int64_t n = at.end - j < tile ? at.end - j : tile;
    const Tile<R> in = stage_tile<F>(t, at, j, n, scratch, with_delta);
    const bool direct = cond && !t.uncond;
    R* out = direct
                 ? target(cond.dtype, cond.row(at.k, at.i) + j * size_of(cond.dtype), scratch.out)
                 : scratch.out;
    constexpr int w = width<R>;
    const auto body = [&](bool delta_too, auto load_at) {
      const Element<Vector<R>> e = element<F, R>(in, delta_too, load_at);
      Vector<R> g{};
      if (delta_too) g = k2 * delta<F>(coefficients, e);
      if constexpr (F != Form::log_prob) g = fma(k1, residual<F>(coefficients, e), g);
      if (delta_too && in.ref != nullptr) g = fma(k3, load_at(in.v) - load_at(in.ref), g);
      return g;
    };
    const auto sweep = [&](auto delta_too) {
      int64_t e = 0;
      for (; e + w <= n; e += w) {
        store(out + e, body(delta_too, [e](const R* p) { return load(p + e); }));
      }
      if (e < n) {
        const int64_t count = n - e;
        store_some(out + e,
                   body(delta_too, [e, count](const R* p) { return load_some(p + e, count); }),
                   count);
      }
    };
    if (with_delta) {
      sweep(std::true_type{});
    } else {
      sweep(std::false_type{});
    }
    const auto deliver = [&](const Operand& to, R scale, bool scaled) {
      if (!to) return;
      char* row = to.row(at.k, at.i) + j * size_of(to.dtype);
      R* own = target(to.dtype, row, scratch.ref);
      if (scaled) {
        for (int64_t e = 0; e < n; ++e) own[e] = scale * out[e];
      }
      if (reinterpret_cast<char*>(own) != row) narrow(to.dtype, scaled ? own : out, row, n);
    };
    if (direct) {
      deliver(cond, R(1), false);
    } else {
      deliver(cond, R(t.guidance_scale), true);
      deliver(uncond, R(1 - t.guidance_scale), true);
    }
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
    const R* v = stage(t.v, at, j, n, s.v);
    const R* x = stage(t.x, at, j, n, s.x);
    const R* noise = stage_noise(t, at, j, n, s);
    char* y_row = prev_sample.row(at.k, at.i) + j * size_of(prev_sample.dtype);
    R* y = target(prev_sample.dtype, y_row, s.y);
    R* m = reinterpret_cast<R*>(mean_out.row(at.k, at.i)) + j;
    constexpr int w = width<R>;
    for (int64_t e = 0; e < n; e += w) {
      const int64_t count = n - e < w ? n - e : w;
      const Vector<R> mu = mean(coefficients, load_some(x + e, count), load_some(v + e, count));
      store_some(m + e, mu, count);
      store_some(y + e, fma(coefficients.s, load_some(noise + e, count), mu), count);
    }
    if (reinterpret_cast<char*>(y) != y_row) {  // log_prob is that of the rounded sample
      narrow(prev_sample.dtype, y, y_row, n);
      const R* rounded = widen(prev_sample.dtype, y_row, s.out, n);
      std::memmove(y, rounded, n * sizeof(R));
    }
    Accumulator<R> square;
    for_each_vector<R>(n, [&](int q, auto load_at) {
      const Vector<R> d = load_at(y) - load_at(m);
      square.part[q] = fma(d, d, square.part[q]);
    });
    total += square.total();
  }
  return total;
}

template <class R, class Call>
auto by_form(Form form, Call call) {
  switch (form) {
    case Form::mean:
      return call(std::integral_constant<Form, Form::mean>{}, R{});
    case Form::velocity:
      return call(std::integral_constant<Form, Form::velocity>{}, R{});
    case Form::noise:
    case Form::seeded:
      return call(std::integral_constant<Form, Form::noise>{}, R{});
    default:
      return call(std::integral_constant<Form, Form::log_prob>{}, R{});
  }
}

template <class Call>
auto dispatch(const Batch& t, Call call) {
  return t.wide ? by_form<double>(t.form, call) : by_form<float>(t.form, call);
}

Sums sums(const Batch& t, const Step<double>& step, const Span& at) {
  return dispatch(t, [&](auto form, auto real) {
    return sums_of<decltype(form)::value, decltype(real)>(t, step, at);
  });
}

void gradient(const Batch& t, const Step<double>& step, const Coefficients& c, const Span& at,
              const Operand& cond, const Operand& uncond) {
  dispatch(t, [&](auto form, auto real) {
    gradient_of<decltype(form)::value, decltype(real)>(t, step, c, at, cond, uncond);
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
const Kernels table{GUARD_OPS_STRING(GUARD_OPS_ISA), sums, gradient, sde_step};

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
