// How kernels see a tensor: a raw pointer, a dtype and strides. Nothing in core/, cpu/ and cuda/ includes torch.
#pragma once

#include <cstdint>

#include "delta_rule.h"

namespace deltamem {

enum class DType : int { f16, bf16, f32, f64 };

// Kernels convert 16-bit floats themselves, so that the same source runs on a CPU and a GPU.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The dtype of the arithmetic type T, which is float or double.
template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Strides are in elements. The comment at each use names the dimensions; data is null where the operand is absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {};
};

// An int32 or int64 array of one or two dimensions; data is null where it is absent.
struct Indices {
  const void* data = nullptr;
  bool wide = false;  // int64
  int64_t stride[2] = {};
  DELTAMEM_INLINE int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * stride[0] + j * stride[1];
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

inline namespace DELTAMEM_ISA {

// Calls f with a value of the type that the dtype names.
template <class F>
DELTAMEM_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
  }
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
