// tanh and sigmoid of W values at a time. Both use exp(u) with u <= 0, split into two parts that keep the relative
// error of exp(u) - 1 small. Their error is below 4 units in the last place for all inputs
// (tests/test_memory_projection.py).
#pragma once

#include "vec.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class T>
struct Exp;
template <>
struct Exp<float> {
  typedef int32_t Int;
  static constexpr int kTerms = 7, kFraction = 23, kBias = 127;
  static constexpr float kLowest = -87, kRound = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
};
template <>
struct Exp<double> {
  typedef int64_t Int;
  static constexpr int kTerms = 13, kFraction = 52, kBias = 1023;
  static constexpr double kLowest = -708, kRound = 0x1.8p52, kLn2High = 0x1.62e42fee00000p-1,
                          kLn2Low = 0x1.a39ef35793c76p-33;
};

// exp(u) = scale + rest, with scale a power of two and |rest| < 0.42 scale.
template <class T, int W>
struct ExpParts {
  Vec<T, W> scale, rest;
};

// For u <= 0.
template <class T, int W>
DELTAMEM_INLINE ExpParts<T, W> exp_parts(Vec<T, W> u) {
  typedef Exp<T> E;
  typedef typename Vec<T, W>::Native Native;
  typedef typename E::Int Ints __attribute__((vector_size(W * sizeof(T))));
  const auto splat = [](T value) { return Vec<T, W>::splat(value); };
  u.x = u.x < splat(E::kLowest).x ? splat(E::kLowest).x : u.x;  // NaN stays NaN
  const Vec<T, W> rounded = fma(u, splat(T(1.44269504088896340736)), splat(E::kRound));
  const Vec<T, W> n = rounded - splat(E::kRound);
  const Vec<T, W> r = fnma(n, splat(E::kLn2Low), fnma(n, splat(E::kLn2High), u));
  // r + r^2/2! + r^3/3! ...
  T factor[E::kTerms + 1] = {1, 1};
  for (int i = 2; i <= E::kTerms; ++i) factor[i] = factor[i - 1] / T(i);
  Vec<T, W> p = splat(factor[E::kTerms]);
#pragma GCC unroll 16
  for (int i = E::kTerms - 1; i >= 2; --i) p = fma(p, r, splat(factor[i]));
  p = fma(p * r, r, r);
  // The low bits of `rounded` hold n as an integer.
  const Ints exponent = (Ints(rounded.x) - Ints(splat(E::kRound).x) + E::kBias) << E::kFraction;
  const Vec<T, W> scale{Native(exponent)};
  return {scale, scale * p};
}

template <class T, int W>
DELTAMEM_INLINE Vec<T, W> negative_magnitude(Vec<T, W> x) {
  return {x.x > 0 ? -x.x : x.x};
}

// With m = exp(-2|x|) - 1: tanh|x| = -m / (2 + m).
template <class T, int W>
DELTAMEM_INLINE Vec<T, W> tanh(Vec<T, W> x) {
  const Vec<T, W> u = negative_magnitude(x);
  const ExpParts<T, W> e = exp_parts(u + u);
  const Vec<T, W> m = (e.scale - Vec<T, W>::splat(1)) + e.rest, y{m.x / (m.x + 2)};
  return {x.x > 0 ? -y.x : y.x};
}

// With e = exp(-|x|): 1 / (1 + e), or e / (1 + e) for negative x.
template <class T, int W>
DELTAMEM_INLINE Vec<T, W> sigmoid(Vec<T, W> x) {
  const ExpParts<T, W> parts = exp_parts(negative_magnitude(x));
  const Vec<T, W> e = parts.scale + parts.rest;
  return {(x.x > 0 ? Vec<T, W>::splat(1).x : e.x) / (e.x + 1)};
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
