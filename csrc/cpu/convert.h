// Conversions between dtypes, N values at a time. Narrowing rounds to nearest, ties to even.
#pragma once

#include "../core/operand.h"
#include "vec.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// Vectors of N bit patterns.
template <int N>
struct Bits {
  typedef uint16_t U16 __attribute__((vector_size(2 * N)));
  typedef uint32_t U32 __attribute__((vector_size(4 * N)));
  typedef int32_t I32 __attribute__((vector_size(4 * N)));
  typedef float F32 __attribute__((vector_size(4 * N)));

  template <class V, class P>
  DELTAMEM_INLINE static V read(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  DELTAMEM_INLINE static U32 choose(I32 condition, U32 yes, U32 no) {
    return (U32(condition) & yes) | (~U32(condition) & no);
  }
};

template <int N>
DELTAMEM_INLINE void widen(const BFloat16* p, float* out) {
  typedef Bits<N> B;
  const auto u = __builtin_convertvector(B::template read<typename B::U16>(p), typename B::U32) << 16;
  std::memcpy(out, &u, sizeof(u));
}

template <int N>
DELTAMEM_INLINE void narrow(const float* p, BFloat16* out) {
  typedef Bits<N> B;
  typedef typename B::U32 U32;
  const U32 u = B::template read<U32>(p), rounded = u + 0x7fff + ((u >> 16) & 1);
  const U32 bits = B::choose((u & 0x7fffffff) > 0x7f800000, u | 0x400000, rounded) >> 16;  // NaN stays NaN
  const auto h = __builtin_convertvector(bits, typename B::U16);
  std::memcpy(out, &h, sizeof(h));
}

template <int N>
DELTAMEM_INLINE void widen(const Half* p, float* out) {
  typedef Bits<N> B;
  typedef typename B::U32 U32;
  typedef typename B::F32 F32;
  const U32 u = __builtin_convertvector(B::template read<typename B::U16>(p), U32);
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127. It also normalizes subnormal halves.
  const U32 rest = (u & 0x7fff) << 13, scaled = U32(F32(rest) * 0x1p112f);
  const U32 magnitude = B::choose((u & 0x7c00) == 0x7c00, rest | 0x7f800000, scaled);
  const U32 bits = ((u & 0x8000) << 16) | magnitude;
  std::memcpy(out, &bits, sizeof(bits));
}

template <int N>
DELTAMEM_INLINE void narrow(const float* p, Half* out) {
  typedef Bits<N> B;
  typedef typename B::U32 U32;
  typedef typename B::F32 F32;
  const U32 u = B::template read<U32>(p), a = u & 0x7fffffff;
  U32 bits = (a + 0xc8000fff + ((a >> 13) & 1)) >> 13;
  // Below 2^-14 the half is subnormal. Adding 0.5 makes the hardware round at its last bit.
  bits = B::choose(a < 0x38800000, U32(F32(a) + 0.5f) - 0x3f000000, bits);
  bits = B::choose(a >= 0x477ff000, U32{} + 0x7c00, bits);  // 65520 and above round to infinity
  bits = B::choose(a > 0x7f800000, U32{} + 0x7e00, bits);
  const auto h = __builtin_convertvector(bits | ((u >> 16) & 0x8000), typename B::U16);
  std::memcpy(out, &h, sizeof(h));
}

// N values.
template <int N, class From, class To>
DELTAMEM_INLINE void convert(const From* p, To* out) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(out, p, N * sizeof(To));
  } else if constexpr (std::is_arithmetic_v<From> && std::is_arithmetic_v<To>) {
    for (int i = 0; i < N; ++i) out[i] = To(p[i]);
  } else if constexpr (std::is_same_v<To, float>) {
    widen<N>(p, out);
  } else if constexpr (std::is_same_v<From, float>) {
    narrow<N>(p, out);
  } else {  // between double and a 16-bit float, through float
    float middle[N];
    convert<N>(p, middle);
    convert<N>(middle, out);
  }
}

// R values, where R is an integer or a std::integral_constant.
template <class From, class To, class Rank>
DELTAMEM_INLINE void convert_row(const From* p, To* out, Rank R) {
  int i = 0;
  for (; i + 8 <= R; i += 8) convert<8>(p + i, out + i);
  for (; i + 4 <= R; i += 4) convert<4>(p + i, out + i);
  for (; i < R; ++i) convert<1>(p + i, out + i);
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
