// Loads and stores of single values of an operand, converted from and to its dtype.
#pragma once

#include "device.h"

namespace deltamem {

// The offset in elements of [b, t, h, r].
DELTAMEM_DEVICE int64_t offset(const Operand& x, int64_t b, int64_t t, int64_t h, int64_t r) {
  return b * x.stride[0] + t * x.stride[1] + h * x.stride[2] + r * x.stride[3];
}

// The third argument of load is a value of the operand's dtype, or AnyDtype, which branches on it. With a known dtype
// there is no branch between loads, so that many of them are in flight.
struct AnyDtype {};
template <class T, class X>
DELTAMEM_DEVICE T load(const Operand& x, int64_t at, X) {
  return convert<T>(static_cast<const X*>(x.data)[at]);
}
template <class T>
DELTAMEM_DEVICE T load(const Operand& x, int64_t at, AnyDtype) {
  T loaded{};
  with_dtype(x.dtype, [&](auto dtype) { loaded = load<T>(x, at, dtype); });
  return loaded;
}
// Calls f with a value of the operand's dtype, or with AnyDtype in double precision, where more instantiations would
// not be worth the compile time.
template <class T, class F>
DELTAMEM_DEVICE void with_operand_dtype(const Operand& x, F&& f) {
  if constexpr (sizeof(T) == 8)
    f(AnyDtype{});
  else
    with_dtype(x.dtype, [&](auto dtype) {
      if constexpr (sizeof(dtype) < 8) f(dtype);
    });
}
template <class T>
DELTAMEM_DEVICE void store(T x, const Operand& out, int64_t at) {
  with_dtype(out.dtype, [&](auto dtype) { convert_to(x, static_cast<decltype(dtype)*>(out.data)[at]); });
}

}  // namespace deltamem
