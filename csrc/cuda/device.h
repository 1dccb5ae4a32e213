// What the kernels need from the device. Other compilers than nvcc get host_emulation.h, which runs the kernels on
// threads.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "host_emulation.h"
#endif

#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define DELTAMEM_DEVICE __device__ __forceinline__
#define DELTAMEM_PRAGMA(x) _Pragma(#x)
#define DELTAMEM_UNROLL_BY(n) DELTAMEM_PRAGMA(unroll n)
#else
#define DELTAMEM_DEVICE inline
#define DELTAMEM_UNROLL_BY(n)
#endif

namespace deltamem {

// The operations that core/delta_rule.h needs; it is included below because it has to see them. Contraction is off
// (-fmad=false): only these calls are fused.
DELTAMEM_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DELTAMEM_DEVICE double fma(double a, double b, double c) { return ::fma(a, b, c); }
DELTAMEM_DEVICE float fnma(float a, float b, float c) { return ::fmaf(-a, b, c); }
DELTAMEM_DEVICE double fnma(double a, double b, double c) { return ::fma(-a, b, c); }

}  // namespace deltamem

#include "../core/operand.h"

namespace deltamem {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Conversions of 16-bit floats. Narrowing rounds to nearest, ties to even.
template <class To, class From>
DELTAMEM_DEVICE To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the types must have the same size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

DELTAMEM_DEVICE float widen(BFloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }
DELTAMEM_DEVICE float widen(Half x) {
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127. It also normalizes subnormal halves.
  const uint32_t rest = (x.bits & 0x7fffu) << 13;
  const uint32_t magnitude =
      (x.bits & 0x7c00) == 0x7c00 ? rest | 0x7f800000u : same_bits<uint32_t>(same_bits<float>(rest) * 0x1p112f);
  return same_bits<float>((x.bits & 0x8000u) << 16 | magnitude);
}
DELTAMEM_DEVICE void narrow(float x, BFloat16& out) {
  const uint32_t u = same_bits<uint32_t>(x), rounded = u + 0x7fff + (u >> 16 & 1);
  out.bits = uint16_t(((u & 0x7fffffff) > 0x7f800000 ? u | 0x400000 : rounded) >> 16);  // NaN stays NaN
}
DELTAMEM_DEVICE void narrow(float x, Half& out) {
  const uint32_t u = same_bits<uint32_t>(x), a = u & 0x7fffffff;
  uint32_t bits;
  if (a > 0x7f800000)
    bits = 0x7e00;
  else if (a >= 0x477ff000)  // 65520 and above round to infinity
    bits = 0x7c00;
  else if (a < 0x38800000)  // subnormal: adding 0.5 rounds at its last bit
    bits = same_bits<uint32_t>(same_bits<float>(a) + 0.5f) - 0x3f000000;
  else
    bits = (a + 0xc8000fffu + (a >> 13 & 1)) >> 13;
  out.bits = uint16_t(bits | (u >> 16 & 0x8000));
}

// A value of any dtype as T, and back.
template <class T>
DELTAMEM_DEVICE T convert(Half x) {
  return T(widen(x));
}
template <class T>
DELTAMEM_DEVICE T convert(BFloat16 x) {
  return T(widen(x));
}
template <class T>
DELTAMEM_DEVICE T convert(float x) {
  return T(x);
}
template <class T>
DELTAMEM_DEVICE T convert(double x) {
  return T(x);
}
template <class T>
DELTAMEM_DEVICE void convert_to(T x, float& out) {
  out = float(x);
}
template <class T>
DELTAMEM_DEVICE void convert_to(T x, double& out) {
  out = double(x);
}
template <class T, class X>
DELTAMEM_DEVICE void convert_to(T x, X& out) {
  narrow(float(x), out);
}

#ifdef __CUDACC__
extern __shared__ __align__(16) char deltamem_shared[];
template <class T>
DELTAMEM_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(deltamem_shared);
}

template <class... P, class... A>
int start(void (*kernel)(P...), unsigned blocks, int threads, size_t shared, void* stream, const A&... arguments) {
  kernel<<<blocks, unsigned(threads), shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return int(cudaGetLastError());
}
#endif

// Launches a kernel and returns the error code, 0 on success.
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void* stream, const A&... arguments) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX)
    throw std::length_error("the cuda backend needs " + std::to_string(blocks) +
                            " blocks for one launch, but a GPU takes at most 2147483647: split the call");
  return start(kernel, unsigned(blocks), threads, shared, stream, arguments...);
}

}  // namespace deltamem
