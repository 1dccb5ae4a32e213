// SIMD vectors of W values, on the vector extensions of GCC and Clang. They are the lanes of core/delta_rule.h on a
// CPU.
#pragma once

#include "../core/delta_rule.h"
#include "system_headers.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class T, int W>
struct Vec {
  typedef T Native __attribute__((vector_size(W * sizeof(T))));
  Native x;

  DELTAMEM_INLINE static Vec load(const T* p) {
    Vec v;
    std::memcpy(&v.x, p, sizeof(v.x));
    return v;
  }
  DELTAMEM_INLINE static Vec splat(T value) { return {value - Native{}}; }
  DELTAMEM_INLINE void store(T* p) const { std::memcpy(p, &x, sizeof(x)); }
};

template <class T, int W>
DELTAMEM_INLINE Vec<T, W> operator+(Vec<T, W> a, Vec<T, W> b) {
  return {a.x + b.x};
}
template <class T, int W>
DELTAMEM_INLINE Vec<T, W> operator-(Vec<T, W> a, Vec<T, W> b) {
  return {a.x - b.x};
}
template <class T, int W>
DELTAMEM_INLINE Vec<T, W> operator*(Vec<T, W> a, Vec<T, W> b) {
  return {a.x * b.x};
}

// Contraction is off (-ffp-contract=off): only calls of fma are fused, so that a sequence gets the same bits in every
// batch and in every variant of the scan. Without hardware support fma is a product and a sum. DELTAMEM_VECTOR_BYTES
// selects the instructions because the compiler's own macros do not reflect `#pragma GCC target`.
template <class T, int W>
DELTAMEM_INLINE Vec<T, W> fma(Vec<T, W> a, Vec<T, W> b, Vec<T, W> c) {
  if constexpr (false) {
  }
#if defined(__x86_64__) && DELTAMEM_VECTOR_BYTES >= 64
  else if constexpr (W * sizeof(T) == 64 && sizeof(T) == 4)
    return {(typename Vec<T, W>::Native)_mm512_fmadd_ps((__m512)a.x, (__m512)b.x, (__m512)c.x)};
  else if constexpr (W * sizeof(T) == 64)
    return {(typename Vec<T, W>::Native)_mm512_fmadd_pd((__m512d)a.x, (__m512d)b.x, (__m512d)c.x)};
#endif
#if defined(__x86_64__) && DELTAMEM_VECTOR_BYTES >= 32
  else if constexpr (W * sizeof(T) == 32 && sizeof(T) == 4)
    return {(typename Vec<T, W>::Native)_mm256_fmadd_ps((__m256)a.x, (__m256)b.x, (__m256)c.x)};
  else if constexpr (W * sizeof(T) == 32)
    return {(typename Vec<T, W>::Native)_mm256_fmadd_pd((__m256d)a.x, (__m256d)b.x, (__m256d)c.x)};
  else if constexpr (W * sizeof(T) == 16 && sizeof(T) == 4)
    return {(typename Vec<T, W>::Native)_mm_fmadd_ps((__m128)a.x, (__m128)b.x, (__m128)c.x)};
  else if constexpr (W * sizeof(T) == 16)
    return {(typename Vec<T, W>::Native)_mm_fmadd_pd((__m128d)a.x, (__m128d)b.x, (__m128d)c.x)};
#elif defined(__aarch64__)
  else if constexpr (W * sizeof(T) == 16 && sizeof(T) == 4)
    return {(typename Vec<T, W>::Native)vfmaq_f32((float32x4_t)c.x, (float32x4_t)a.x, (float32x4_t)b.x)};
  else if constexpr (W * sizeof(T) == 16)
    return {(typename Vec<T, W>::Native)vfmaq_f64((float64x2_t)c.x, (float64x2_t)a.x, (float64x2_t)b.x)};
#endif
  else
    return {a.x * b.x + c.x};
}
template <class T, int W>
DELTAMEM_INLINE Vec<T, W> fnma(Vec<T, W> a, Vec<T, W> b, Vec<T, W> c) {
  return fma(Vec<T, W>{-a.x}, b, c);
}

// Joins two vectors, `low` first. Used only where a vector has room for several heads.
template <class T, int W>
DELTAMEM_INLINE Vec<T, 2 * W> join(Vec<T, W> low, Vec<T, W> high) {
  Vec<T, 2 * W> both{};
#if defined(__x86_64__) && DELTAMEM_VECTOR_BYTES >= 32
  if constexpr (W == 4) both.x = typename Vec<T, 2 * W>::Native(_mm256_set_m128(__m128(high.x), __m128(low.x)));
#endif
#if defined(__x86_64__) && DELTAMEM_VECTOR_BYTES >= 64
  if constexpr (W == 8)
    both.x = typename Vec<T, 2 * W>::Native(
        _mm512_insertf32x8(_mm512_castps256_ps512(__m256(low.x)), __m256(high.x), 1));
#endif
  return both;
}

// Loads W / P values from each of P pointers into one vector.
template <int W, int P, class T>
DELTAMEM_INLINE Vec<T, W> load_pieces(const T* const* from, ptrdiff_t offset) {
  if constexpr (P == 1)
    return Vec<T, W>::load(from[0] + offset);
  else
    return join(load_pieces<W / 2, P / 2>(from, offset), load_pieces<W / 2, P / 2>(from + P / 2, offset));
}

// A token's query or key: [j] is a vector with column j in every lane. If the vector holds P heads, `row` has the R = W
// / P columns of each, and [j] repeats column j of each head R times.
template <class T, int W, int P>
struct Broadcast {
  Vec<T, W> row;
  DELTAMEM_INLINE Vec<T, W> operator[](int j) const {
#if defined(__x86_64__) && DELTAMEM_VECTOR_BYTES >= 32
    if constexpr (W * sizeof(T) == 32) {
      const __m256i all = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i first = _mm256_andnot_si256(_mm256_set1_epi32(W / P - 1), all);
      return {typename Vec<T, W>::Native(
          _mm256_permutevar8x32_ps(__m256(row.x), _mm256_add_epi32(first, _mm256_set1_epi32(j))))};
    }
#endif
#if defined(__x86_64__) && DELTAMEM_VECTOR_BYTES >= 64
    if constexpr (W * sizeof(T) == 64) {
      const __m512i all = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i first = _mm512_andnot_si512(_mm512_set1_epi32(W / P - 1), all);
      return {typename Vec<T, W>::Native(
          _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(j)), __m512(row.x)))};
    }
#endif
    return row;
  }
};
template <class T, int W>
struct Broadcast<T, W, 1> {
  const T* p;
  DELTAMEM_INLINE Vec<T, W> operator[](int j) const { return Vec<T, W>::splat(p[j]); }
};

// Picks lanes by index: 0 to W - 1 are those of a, W to 2 W - 1 those of b.
template <int... Index, class T, int W>
DELTAMEM_INLINE Vec<T, W> shuffle(Vec<T, W> a, Vec<T, W> b) {
#ifdef __clang__
  return {__builtin_shufflevector(a.x, b.x, Index...)};
#else
  typedef std::conditional_t<sizeof(T) == 4, int, long long> Number;
  typedef Number Mask __attribute__((vector_size(W * sizeof(T))));
  return {__builtin_shuffle(a.x, b.x, Mask{Index...})};
#endif
}

// Within each Block of lanes, takes every other group of Unit values from a, then from b: the first, third, ... group
// if Odd is 0, otherwise the second, fourth, ...
template <int Unit, int Block, int Odd, class T, int W, int... I>
DELTAMEM_INLINE Vec<T, W> every_other(Vec<T, W> a, Vec<T, W> b, std::integer_sequence<int, I...>) {
  constexpr auto source = [](int i) {
    const int group = i % Block / Unit, half = Block / Unit / 2;
    return i / Block * Block + (group % half * 2 + Odd) * Unit + i % Unit + (group < half ? 0 : W);
  };
  return shuffle<source(I)...>(a, b);
}

template <int Unit, int Block, class T, int W>
DELTAMEM_INLINE Vec<T, W> add_neighbours(Vec<T, W> a, Vec<T, W> b) {
  const std::make_integer_sequence<int, W> all;
  return every_other<Unit, Block, 0>(a, b, all) + every_other<Unit, Block, 1>(a, b, all);
}

// Sums over the lanes of a head. v has Group vectors; in each group of Group lanes, lane j of the result is the sum of
// that group in v[j]. Neighbours are added in a tree, first within 128 bits, where shuffles are cheap. The order of the
// additions does not depend on the number of heads in the vector.
template <int Group, class T, int W>
DELTAMEM_INLINE Vec<T, W> sum_lanes(Vec<T, W>* v) {
  constexpr int near = 16 / sizeof(T) < Group ? 16 / sizeof(T) : Group;
#pragma GCC unroll 4
  for (int n = Group; n > Group / near; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) v[i] = add_neighbours<1, near>(v[2 * i], v[2 * i + 1]);
  if constexpr (Group > near)
#pragma GCC unroll 4
    for (int n = Group / near; n > 1; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n / 2; ++i) v[i] = add_neighbours<near, Group>(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Within each Block of lanes, alternates groups of Unit values of a and b, taken from the first or Second half of the
// block.
template <int Unit, int Block, bool Second, class T, int W, int... I>
DELTAMEM_INLINE Vec<T, W> interleave(Vec<T, W> a, Vec<T, W> b, std::integer_sequence<int, I...>) {
  constexpr auto source = [](int i) {
    const int group = i % Block / Unit, half = Block / Unit / 2;
    return i / Block * Block + (group / 2 + (Second ? half : 0)) * Unit + i % Unit + (group % 2) * W;
  };
  return shuffle<source(I)...>(a, b);
}

// Transposes the vectors v[i * Step], i < N, within each Block of lanes, as a matrix of groups of Unit values.
template <int N, int Step, int Unit, int Block, class T, int W>
DELTAMEM_INLINE void transpose_groups(Vec<T, W>* v) {
  const std::make_integer_sequence<int, W> all;
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
    Vec<T, W> mixed[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      mixed[2 * i] = interleave<Unit, Block, false>(v[i * Step], v[(i + N / 2) * Step], all);
      mixed[2 * i + 1] = interleave<Unit, Block, true>(v[i * Step], v[(i + N / 2) * Step], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i * Step] = mixed[i];
  }
}

// Transposes W vectors of W values: first within squares of 128 bits, where shuffles are cheap, then the squares.
template <class T, int W>
DELTAMEM_INLINE void transpose(Vec<T, W>* v) {
  constexpr int near = 16 / sizeof(T);
#pragma GCC unroll 8
  for (int i = 0; i < W; i += near) transpose_groups<near, 1, 1, near>(v + i);
#pragma GCC unroll 4
  for (int j = 0; W > near && j < near; ++j) transpose_groups<W / near, near, near, W>(v + j);
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
