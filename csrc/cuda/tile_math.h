// What a warp computes from one tile: its part of a row's sums, and its part of the gradient.
//
// `layout` says what is where in a slot, and in which dtype: a FixedLayout, of which the compiler
// knows all that, or AnyLayout, which looks it up in the plan.
#pragma once

#include "normals.h"
#include "tiles.h"

namespace guard_ops::cuda {

// What the arithmetic needs to know of a row.
struct RowNumbers {
  Step<float> step;
  double b;  // not rounded
  uint64_t key, transition;
};

__device__ __forceinline__ RowNumbers numbers_of(const Plan& p, const TileAt& at) {
  RowNumbers n{};
  n.b = *p.table[1].at(at.k, at.i);
  n.step = {float(*p.table[0].at(at.k, at.i)), float(n.b), float(*p.table[2].at(at.k, at.i))};
  if (p.seeds.data != nullptr) {
    n.key = p.seeds.word(at.k, at.i, 0);
    n.transition = p.seeds.word(at.k, at.i, 1);
  }
  return n;
}

// A lane's eight elements of every operand that the form reads.
template <Form F>
struct Elements {
  float v[lane_elements], x[lane_elements], y[lane_elements], old[lane_elements],
      noise[lane_elements];

  // Element e, or a pair of elements from e on.
  template <class T = float>
  __device__ __forceinline__ Element<T> at(uint32_t e) const {
    const auto of = [=](const float from[lane_elements]) {
      return make<T>([=](int n) { return from[e + n]; });
    };
    Element<T> out{};
    out.v = of(v);
    if constexpr (uses_sample(F)) out.x = of(x), out.y = of(y);
    if constexpr (F == Form::mean) out.m = of(old);
    if constexpr (uses_old_velocity(F)) out.v_old = of(old);
    if constexpr (uses_noise(F)) out.noise = of(noise);
    return out;
  }
};

// T: float or Number, whichever is to be worked with.
template <class T>
__device__ __forceinline__ void normals(const RowNumbers& row, const TileAt& at,
                                        float out[lane_elements]) {
  static_assert(run == 4, "the numbers of one counter");
#pragma unroll
  for (uint32_t q = 0; q < lane_elements / run; ++q) {
    const uint64_t counter = uint64_t(at.begin + place_of(q * run)) / run;
    const philox::Words words = philox::generate(row.key, counter, row.transition);
#pragma unroll
    for (int p = 0; p < 2; p += parts<T>) {
      T first, second;
      box_muller(words.w + p, words.w + 2 + p, &first, &second);
#pragma unroll
      for (int n = 0; n < parts<T>; ++n) {
        out[4 * q + 2 * (p + n)] = part(first, n);
        out[4 * q + 2 * (p + n) + 1] = part(second, n);
      }
    }
  }
}

// Which of a lane's elements the mask counts, a bit each. The mask is read where it lies: one byte
// an element is little beside the operands.
__device__ __forceinline__ uint32_t mask_bits(const Plan& p, const TileAt& at) {
  if (!p.mask) return (1u << lane_elements) - 1;
  const uint8_t* const row = p.mask.row(at.k, at.i) + at.begin;
  const uint32_t first = computed_anew(lane()) * run;  // place_of(0)
  uint32_t bits = 0;
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    const uint32_t place = first + place_in_lane(e);
    if (place < at.count && row[place] != 0) bits |= 1u << e;
  }
  return bits;
}

// The same where a layout may have a mask, else nothing.
template <class Layout>
__device__ __forceinline__ uint32_t counted_of(const Layout&, const Plan& p, const TileAt& at) {
  if constexpr (!Layout::fixed) return mask_bits(p, at);
  return 0;
}

// The same place in the whole latent, of which the rows may be a part.
__device__ __forceinline__ TileAt in_whole_latent(const Plan& p, TileAt at) {
  at.begin += p.seeds.offset(at.k, at.i);
  return at;
}

// The layout of a slot of any plan whose form is F.
template <Form F>
struct AnyLayout {
  static constexpr Form form = F;
  static constexpr bool fixed = false;
  const Plan& p;

  __device__ __forceinline__ bool has(Role r) const { return bool(p.operand[r]); }
  __device__ __forceinline__ DType dtype(Role r) const { return p.operand[r].dtype; }
  __device__ __forceinline__ uint32_t offset(Role r) const { return p.offset[r]; }
};

// What is computed with. A layout that is looked up has no registers to spare for pairs.
template <class Layout>
using NumberOf = std::conditional_t<Layout::fixed, Number, float>;

template <class Layout>
__device__ __forceinline__ void read_role(const Layout& layout, Role r, const char* slot,
                                          float out[lane_elements]) {
  read(slot + layout.offset(r), layout.dtype(r), out);
}

template <class Layout>
__device__ __forceinline__ void read_velocity(const Layout& layout, const Plan& p, const char* slot,
                                              float out[lane_elements]) {
  read_role(layout, role_v, slot, out);
  if (!layout.has(role_uncond)) return;
  float uncond[lane_elements];
  read_role(layout, role_uncond, slot, uncond);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) out[e] = guided(uncond[e], out[e], p.guidance_scale);
}
__device__ __forceinline__ void read_velocity(const Plan& p, const char* slot,
                                              float out[lane_elements]) {
  read_velocity(AnyLayout<Form::mean>{p}, p, slot, out);
}

template <class Layout>
__device__ __forceinline__ Elements<Layout::form> read_tile(const Layout& layout, const Plan& p,
                                                            const RowNumbers& row, const TileAt& at,
                                                            const char* slot) {
  constexpr Form F = Layout::form;
  Elements<F> in;
  read_velocity(layout, p, slot, in.v);
  if constexpr (uses_sample(F)) {
    read_role(layout, role_x, slot, in.x);
    read_role(layout, role_y, slot, in.y);
  }
  if constexpr (F != Form::log_prob) read_role(layout, role_old, slot, in.old);
  if constexpr (F == Form::noise) read_role(layout, role_noise, slot, in.noise);
  if constexpr (F == Form::seeded) {
    using T = NumberOf<Layout>;
    normals<T>(row, Layout::fixed ? at : in_whole_latent(p, at), in.noise);
  }
  return in;
}

// Calls call(std::integral_constant<Form, form>). This is done once a tile: a kernel for each form
// would take five times as long to compile, as most of a kernel does not depend on the form.
template <class Call>
GUARD_OPS_HD void by_form(Form form, Call call) {
  if (form == Form::mean) {
    call(std::integral_constant<Form, Form::mean>{});
  } else if (form == Form::velocity) {
    call(std::integral_constant<Form, Form::velocity>{});
  } else if (form == Form::noise) {
    call(std::integral_constant<Form, Form::noise>{});
  } else if (form == Form::seeded) {
    call(std::integral_constant<Form, Form::seeded>{});
  } else {
    call(std::integral_constant<Form, Form::log_prob>{});
  }
}

// The direction of a tile's gradient: what the coefficients of this kind multiply.
template <Form F>
__device__ __forceinline__ void direction_of(GradientKind kind, const RowNumbers& row,
                                             const Elements<F>& in, float out[lane_elements]) {
  const auto each = [&](auto value) {
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) out[e] = value(in.at(e));
  };
  if (kind == GradientKind::departure) {
    each([&](const Element<float>& x) { return departure<F>(row.step, x); });
  } else {
    each([&](const Element<float>& x) { return residual<F>(row.step, x); });
  }
}

// Adds this lane's part of the tile's sums to `total`. It is summed in float32, and added in
// float64. Then calls keep(elements).
template <class Layout, class Keep>
__device__ __forceinline__ void add_sums_of(const Layout& layout, const Plan& p,
                                            const RowNumbers& row, const TileAt& at,
                                            const char* slot, Sums& total, Keep keep) {
  constexpr Form F = Layout::form;
  const uint32_t counted = counted_of(layout, p, at);  // first: it needs registers of its own
  const Elements<F> in = read_tile(layout, p, row, at, slot);
  float s1 = 0, s2 = 0;
  using T = NumberOf<Layout>;
  const Step<T> step{all<T>(row.step.a), all<T>(row.step.b), all<T>(row.step.s)};
#pragma unroll
  for (uint32_t first = 0; first < lane_elements; first += parts<T>) {
    const auto x = in.template at<T>(first);
    const T ds = delta<F>(step, x), es = residual<F>(step, x);
#pragma unroll
    for (int n = 0; n < parts<T>; ++n) {
      if (!Layout::fixed && !(counted >> (first + n) & 1)) continue;
      const float d = part(ds, n);
      if constexpr (F != Form::log_prob) s1 = fma(d, part(es, n), s1);
      s2 = fma(d, d, s2);
    }
  }
  total.s1 += double(s1);
  total.s2 += double(s2);
  keep(in);
  if (!layout.has(role_ref)) return;
  float ref[lane_elements], drift = 0;
  read_role(layout, role_ref, slot, ref);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) {
    if (!Layout::fixed && !(counted >> e & 1)) continue;
    const float d = row.step.b * (in.v[e] - ref[e]);
    drift = fma(d, d, drift);
  }
  total.ref += double(drift);
}

__device__ __forceinline__ void add_sums(const Plan& p, const RowNumbers& row, const TileAt& at,
                                         const char* slot, Sums& total) {
  by_form(p.form, [&](auto form) {
    add_sums_of(AnyLayout<decltype(form)::value>{p}, p, row, at, slot, total, [](const auto&) {});
  });
}

// What the gradient of a row is made of: its factors, and which of its terms there are.
struct RowGradient {
  Factors<float> k;
  GradientKind kind;
  bool silent, nan, with_ref;  // silent: c1 and c2 are 0
};

__device__ __forceinline__ RowGradient row_gradient_of(const Plan& p, const RowNumbers& row,
                                                       const Coefficients& c) {
  const Factors<double> exact = factors_of(row.b, c);
  return {{float(exact.k1), float(exact.k2), float(exact.k3)},
          p.kind == GradientKind::general ? gradient_kind_of(c.c1, c.c2) : p.kind,
          c.c1 == 0 && c.c2 == 0,
          c.c1 != c.c1,
          p.operand[role_ref] && c.c3 != 0};
}

// Coefficients that are 0 give 0, and NaN ones NaN, whatever the operands hold, as some may not
// have been read. Returns whether this row's are.
__device__ __forceinline__ bool same_everywhere(const RowGradient& gradient,
                                                float g[lane_elements]) {
  if (!gradient.silent && !gradient.nan) return false;
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) g[e] = gradient.nan ? gradient.k.k1 : 0;
  return true;
}

// Forms this lane's part of a tile's gradient from the direction that was kept of it.
__device__ __forceinline__ void gradient_of_direction(const RowGradient& gradient, const char* kept,
                                                      float g[lane_elements]) {
  if (same_everywhere(gradient, g)) return;
  read(kept, DType::f32, g);
#pragma unroll
  for (uint32_t e = 0; e < lane_elements; ++e) g[e] = gradient.k.k1 * g[e];
}

// Forms this lane's part of a tile's gradient, before guidance. What the gradient is made of is
// asked once for 8 elements.
template <class Layout>
__device__ __forceinline__ void gradient_of_tile(const Layout& layout, const Plan& p,
                                                 const RowNumbers& row, const RowGradient& gradient,
                                                 const TileAt& at, const char* slot,
                                                 float g[lane_elements]) {
  constexpr Form F = Layout::form;
  const auto each = [&](auto value) {
    const Elements<F> in = read_tile(layout, p, row, at, slot);
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) g[e] = value(in.at(e));
  };
  const float k1 = gradient.k.k1;
  if (same_everywhere(gradient, g)) {
  } else if (gradient.kind == GradientKind::departure) {
    each([&](const Element<float>& x) { return k1 * departure<F>(row.step, x); });
  } else if (gradient.kind == GradientKind::residual) {
    each([&](const Element<float>& x) { return k1 * residual<F>(row.step, x); });
  } else {
    each([&](const Element<float>& x) { return velocity_gradient<F>(gradient.k, row.step, x); });
  }
  if (layout.has(role_ref) && gradient.with_ref) {
    float v[lane_elements], ref[lane_elements];
    read_velocity(layout, p, slot, v);
    read_role(layout, role_ref, slot, ref);
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) g[e] = fma(gradient.k.k3, v[e] - ref[e], g[e]);
  }
  if constexpr (!Layout::fixed) {
    const uint32_t counted = counted_of(layout, p, at);
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) g[e] = counted >> e & 1 ? g[e] : 0;
  }
}

// Writes the gradient of a tile into its slot, in place of v, and of uncond.
template <class Layout>
__device__ __forceinline__ void gradient_into_slot(const Layout& layout, const Plan& p,
                                                   const RowNumbers& row,
                                                   const RowGradient& gradient, const TileAt& at,
                                                   char* slot) {
  float g[lane_elements];
  gradient_of_tile(layout, p, row, gradient, at, slot, g);
  if (layout.has(role_uncond)) {
    float rest[lane_elements];
#pragma unroll
    for (uint32_t e = 0; e < lane_elements; ++e) {
      rest[e] = p.uncond_scale * g[e];
      g[e] = p.guidance_scale * g[e];
    }
    write(slot + layout.offset(role_uncond), layout.dtype(role_uncond), rest);
  }
  write(slot + layout.offset(role_v), layout.dtype(role_v), g);
}

__device__ __forceinline__ void gradient_in_place(const Plan& p, const RowNumbers& row,
                                                  const RowGradient& gradient, const TileAt& at,
                                                  char* slot) {
  by_form(p.form, [&](auto form) {
    gradient_into_slot(AnyLayout<decltype(form)::value>{p}, p, row, gradient, at, slot);
  });
}

// The slots of a warp.
struct Slots {
  char* memory;       // where this warp's slots begin
  uint32_t ring;      // how many of them are the ring: 1, 2 or 4
  uint32_t resident;  // how many tiles stay
  bool directions;    // as directions, behind the ring

  __device__ __forceinline__ uint32_t ahead() const { return ring - 1; }

  // The same for a warp that has not yet started the copies of the tile `ahead()` tiles ahead. When
  // this returns, every lane has read the slot that those go to.
  __device__ __forceinline__ void wait_before_next() const {
    if (ring == 4) {
      wait_copies<2>();
    } else {
      wait_copies<0>();
    }
    sync_warp();
  }

  // Waits until the oldest tile's copies have landed, those of all lanes.
  __device__ __forceinline__ void wait() const {
    if (ring == 4) {
      wait_copies<3>();
    } else if (ring == 2) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    sync_warp();
  }
};

// The slots that one tile after another takes: those from `begin` to `end`, again and again.
struct SharedRing {
  SharedAddress begin, end, slot;

  __device__ __forceinline__ void move(uint32_t slot_bytes) {
    slot += slot_bytes;
    if (slot == end) slot = begin;
  }
};

}  // namespace guard_ops::cuda
