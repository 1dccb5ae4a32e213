// Operations on a row of n values, with vectors along the row. `inline` makes the compiler inline more of them.
#pragma once

#include "vec.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// Calls f(width, i) for each whole vector, which begins at i and has W values, then with a width of 1 for each value
// that remains. width is a std::integral_constant.
template <int W, class F>
DELTAMEM_INLINE void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(std::integral_constant<int, W>{}, i);
  for (; i < n; ++i) f(std::integral_constant<int, 1>{}, i);
}

template <class T, int W>
inline T sum_of_lanes(Vec<T, W> x) {
  T lanes[W];
  x.store(lanes);
  T sum = lanes[0];
  for (int i = 1; i < W; ++i) sum += lanes[i];
  return sum;
}

template <int W, class T>
inline T sum_of_products(const T* a, const T* b, int64_t n) {
  typedef Vec<T, W> L;
  L sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = fma(L::load(a + i + k * W), L::load(b + i + k * W), sums[k]);
  for (; i + W <= n; i += W) sums[0] = fma(L::load(a + i), L::load(b + i), sums[0]);
  T sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <int W, class T>
inline void add(T* x, const T* y, int64_t n) {
  for_each_vector<W>(n, [&](auto w, int64_t i) {
    typedef Vec<T, w()> V;
    (V::load(x + i) + V::load(y + i)).store(x + i);
  });
}

template <int W, class T>
inline T inverse_rms(const T* x, int64_t n, T eps) {
  const T mean = sum_of_products<W>(x, x, n) / T(n) + eps;
  if constexpr (sizeof(T) == 4)
    return T(1) / __builtin_sqrtf(mean);
  else
    return T(1) / __builtin_sqrt(mean);
}

template <int W, class T>
inline void rms_norm(T* x, const T* weight, int64_t n, T eps) {
  const T inverse = inverse_rms<W>(x, n, eps);
  for_each_vector<W>(n, [&](auto w, int64_t i) {
    typedef Vec<T, w()> V;
    (V::load(x + i) * V::splat(inverse) * V::load(weight + i)).store(x + i);
  });
}

// g is the gradient of the norm's result and becomes that of its input x. The gradient of the weight is added to
// d_weight.
template <int W, class T>
inline void rms_norm_adjoint(T* g, const T* x, const T* weight, int64_t n, T eps, T* d_weight) {
  const T inverse = inverse_rms<W>(x, n, eps);
  for_each_vector<W>(n, [&](auto w, int64_t i) {
    typedef Vec<T, w()> V;
    const V gradient = V::load(g + i);
    fma(gradient, V::load(x + i) * V::splat(inverse), V::load(d_weight + i)).store(d_weight + i);
    (gradient * V::load(weight + i)).store(g + i);
  });
  const T along_x = sum_of_products<W>(g, x, n) / T(n) * inverse * inverse * inverse;
  for_each_vector<W>(n, [&](auto w, int64_t i) {
    typedef Vec<T, w()> V;
    fnma(V::splat(along_x), V::load(x + i), V::load(g + i) * V::splat(inverse)).store(g + i);
  });
}

// Rotates the two halves of a head by cos and sin, or applies the transpose of that rotation.
template <int W, bool Transposed, class T>
inline void rotate(T* x, const T* cos, const T* sin, int64_t half) {
  for_each_vector<W>(half, [&](auto w, int64_t i) {
    typedef Vec<T, w()> V;
    const V a = V::load(x + i), b = V::load(x + half + i);
    const V sin_b = V::load(sin + (Transposed ? half : 0) + i), sin_a = V::load(sin + (Transposed ? 0 : half) + i);
    const V cos_a = a * V::load(cos + i), cos_b = b * V::load(cos + half + i);
    (Transposed ? fma(b, sin_b, cos_a) : fnma(b, sin_b, cos_a)).store(x + i);
    (Transposed ? fnma(a, sin_a, cos_b) : fma(a, sin_a, cos_b)).store(x + half + i);
  });
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
