// The noise of the seeded form, in vectors. This header is compiled once for each instruction set.
#pragma once

#include "simd.h"

namespace guard_ops::cpu::GUARD_OPS_ISA {

typedef uint32_t vu __attribute__((vector_size(GUARD_OPS_VECTOR)));
typedef int32_t vi __attribute__((vector_size(GUARD_OPS_VECTOR)));

// Gives each lane one of the `width<float>` counters from `first` on: lane 4 b + i gets number
// i (w / 4) + b.
GUARD_OPS_HD void counters(uint64_t first, vu* low, vu* high) {
  constexpr int w = width<float>;
  vu number;
  for (int l = 0; l < w; ++l) number[l] = l % 4 * (w / 4) + l / 4;
  *low = number + uint32_t(first);
  *high = uint32_t(first >> 32) - (vu)(*low < number);  // the comparison is -1 where it carried
}

// The natural logarithm of x / 2^32 for x in [1/2, 2^32], from the exponent and Cephes' polynomial
// on [sqrt(1/2), sqrt(2)).
GUARD_OPS_HD vf log_of_word(vf x) {
  const vi bits = (vi)x;
  vi exponent = (bits >> 23) - (126 + 32);
  vf m = (vf)((bits & 0x007FFFFF) | 0x3F000000);  // [0.5, 1)
  const vi small = (vi)(m < 0.70710678118654752440f);
  exponent += small;                   // -1 where small
  m = m + (vf)((vi)m & small) - 1.0f;  // x or 2 x, minus 1
  const vf e = __builtin_convertvector(exponent, vf);
  const vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  vf y = p * m * z;
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fma(splat(-0.5f), z, y);
  return fma(e, splat(0.693359375f), m + y);
}

// philox::box_muller on vectors. Sine and cosine are Cephes' polynomials.
GUARD_OPS_HD void box_muller(vu radius_word, vu angle_word, vf* first, vf* second) {
  const vf word = __builtin_convertvector(radius_word, vf);
  const vf positive = larger(word, splat(0.5f));
  const vf radius = square_root(-2.0f * log_of_word(positive));
  const vi quadrant = (vi)(angle_word >> 30);
  const vi rest = (vi)(angle_word & 0x3FFFFFFFu) - 0x20000000;
  constexpr float scale = 9.313225746154785e-10f * 1.57079632679489662f;  // 2^-30 pi / 2
  const vf angle = __builtin_convertvector(rest, vf) * scale;
  const vf z = angle * angle;
  vf sine = fma(splat(-1.9515295891e-4f), z, splat(8.3321608736e-3f));
  sine = fma(fma(sine, z, splat(-1.6666654611e-1f)), z * angle, angle);
  vf cosine = fma(splat(2.443315711809948e-5f), z, splat(-1.388731625493765e-3f));
  cosine =
      fma(fma(cosine, z, splat(4.166664568298827e-2f)), z * z, fma(splat(-0.5f), z, splat(1.0f)));
  const vi swap = -(quadrant & 1);
  const vf x = (vf)(((vi)-sine & swap) | ((vi)cosine & ~swap));
  const vf y = (vf)(((vi)cosine & swap) | ((vi)sine & ~swap));
  const vf signed_radius = (vf)((vi)radius ^ ((quadrant >> 1) << 31));
  *first = signed_radius * x;
  *second = signed_radius * y;
}

// The words of every other counter of a vector, each in the lower half of a 64-bit lane. A product
// reads only the lower halves, so the upper ones may hold anything.
struct Half {
  vq c0, c1, c2, c3;

  GUARD_OPS_HD static vq product(uint32_t m, vq x) {
    return product_of_low_halves((vq)(vu{} + m), x);
  }
  GUARD_OPS_HD void round(uint32_t k0, uint32_t k1) {
    const vq p0 = product(philox::multiplier0, c0), p1 = product(philox::multiplier1, c2);
    c0 = (p1 >> 32) ^ c1 ^ (vq)(vu{} + k0);
    c2 = (p0 >> 32) ^ c3 ^ (vq)(vu{} + k1);
    c1 = p1;
    c3 = p0;
  }
};

GUARD_OPS_HD vu interleaved(vq even, vq odd) { return (vu)((even & 0xFFFFFFFFull) | odd << 32); }

// philox::generate on vectors: the counters of one transition.
class Generator {
 public:
  Generator(uint64_t key, uint64_t transition)
      : low_(vq{} + uint32_t(transition)), high_(vq{} + (transition >> 32)) {
    for (int r = 0; r < philox::rounds; ++r) {
      keys_[r][0] = uint32_t(key) + r * philox::weyl0;
      keys_[r][1] = uint32_t(key >> 32) + r * philox::weyl1;
    }
  }

  // The four words of `width<float>` counters from `first` on, in the order of `counters`.
  GUARD_OPS_HD void words(uint64_t first, vu to[4]) const {
    vu c0, c1;
    counters(first, &c0, &c1);
    Half even{(vq)c0, (vq)c1, low_, high_}, odd{(vq)c0 >> 32, (vq)c1 >> 32, low_, high_};
#pragma GCC unroll 10
    for (int r = 0; r < philox::rounds; ++r) {
      even.round(keys_[r][0], keys_[r][1]);
      odd.round(keys_[r][0], keys_[r][1]);
    }
    to[0] = interleaved(even.c0, odd.c0);
    to[1] = interleaved(even.c1, odd.c1);
    to[2] = interleaved(even.c2, odd.c2);
    to[3] = interleaved(even.c3, odd.c3);
  }

 private:
  uint32_t keys_[philox::rounds][2];
  vq low_, high_;
};

// Elements [begin, begin + n) of a transition's noise; begin is a multiple of 4, `out` has room
// for a whole vector of counters past n. All words are generated first and made into normals then:
// the processor overlaps the steps of two short loops, but not those of a long one.
inline void normals(uint64_t key, uint64_t transition, int64_t begin, int64_t n, float* out) {
  constexpr int w = width<float>;
  const Generator generator(key, transition);
  for (int64_t j = 0; j < n; j += 4 * w) {
    vu word[4];
    generator.words(uint64_t(begin + j) / 4, word);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) store(out + j + q * w, (vf)word[q]);
  }
  for (int64_t j = 0; j < n; j += 4 * w) {
    vu word[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) word[q] = (vu)load(out + j + q * w);
    vf z[4], elements[4];
    box_muller(word[0], word[2], &z[0], &z[1]);
    box_muller(word[1], word[3], &z[2], &z[3]);
    transpose_fours(z, elements);  // into their order, because of how `counters` numbers the lanes
    for (int q = 0; q < 4; ++q) store(out + j + q * w, elements[q]);
  }
}

inline void normals(uint64_t key, uint64_t transition, int64_t begin, int64_t n, double* out) {
  for (int64_t j = 0; j < n; j += 4) {
    const philox::Words words = philox::generate(key, uint64_t(begin + j) / 4, transition);
    philox::box_muller(words.w[0], words.w[2], out + j, out + j + 1);
    philox::box_muller(words.w[1], words.w[3], out + j + 2, out + j + 3);
  }
}

}  // namespace guard_ops::cpu::GUARD_OPS_ISA
