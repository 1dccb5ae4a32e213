// Operands of any dtype and stride to rows of numbers in the arithmetic's dtype, and results back.
#pragma once

#include "convert.h"
#include "isa.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class F>
DELTAMEM_INLINE void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
  }
}

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Tokens of P heads: row t of each begins at its data + t * stride.
template <class T, int W, int P>
struct Rows {
  const T* data[P];
  ptrdiff_t stride;

  DELTAMEM_INLINE Vec<T, W> load(int t, int i) const { return load_pieces<W, P>(data, t * stride + i); }
  DELTAMEM_INLINE Broadcast<T, W, P> columns(int t) const {
    if constexpr (P == 1)
      return {data[0] + t * stride};
    else
      return {load(t, 0)};
  }
};

// n tokens of one head, from `first` on, counted from the start of row b of the batch.
struct Span {
  int64_t b, first, h;
  int n;
  template <class X>
  DELTAMEM_INLINE X* begin(const Operand& x) const {
    return static_cast<X*>(x.data) + b * x.stride[0] + first * x.stride[1] + h * x.stride[2];
  }
};

// The rows of an operand to `buffer`, one every `stride` numbers, zeros behind the R that count up to `width`. Rank is
// a constant or an int.
template <class T, class Rank>
void stage(const Operand& x, Span span, Rank R, T* buffer, int stride, int width) {
  with_dtype(x.dtype, [&](auto tag) {
    const auto* p = span.begin<decltype(tag)>(x);
    for (int t = 0; t < span.n; ++t, p += x.stride[1], buffer += stride) {
      if (x.stride[3] == 1)
        convert_row(p, buffer, R);
      else
        for (int i = 0; i < R; ++i) convert<1>(p + i * x.stride[3], buffer + i);
      for (int i = R; i < width; ++i) buffer[i] = T(0);
    }
  });
}

// Rows, one every `stride` numbers, to out, or the sum of each where out holds one number per head.
template <class T, class Rank>
void unstage(const Operand& out, Span span, Rank R, const T* rows, int stride, bool per_head = false) {
  with_dtype(out.dtype, [&](auto tag) {
    auto* p = span.begin<decltype(tag)>(out);
    for (int t = 0; t < span.n; ++t, p += out.stride[1], rows += stride) {
      if (per_head) {
        T sum = rows[0];
        for (int i = 1; i < R; ++i) sum += rows[i];
        convert<1>(&sum, p);
      } else if (out.stride[3] == 1) {
        convert_row(rows, p, R);
      } else {
        for (int i = 0; i < R; ++i) convert<1>(rows + i, p + i * out.stride[3]);
      }
    }
  });
}

// A state, [R rows, R columns] of any strides, to and from blocks of W rows: column j of a block is W numbers. With
// several heads in a block, this one's rows begin at `lane`.
// W rows of W numbers as W columns, and back.
template <int W, class T>
DELTAMEM_INLINE void load_square(const T* p, int64_t row_stride, Vec<T, W>* columns) {
  for (int i = 0; i < W; ++i) columns[i] = Vec<T, W>::load(p + i * row_stride);
  transpose(columns);
}
template <int W, class T>
DELTAMEM_INLINE void store_square(const Vec<T, W>* columns, T* p, int64_t row_stride) {
  Vec<T, W> rows[W];
  for (int j = 0; j < W; ++j) rows[j] = columns[j];
  transpose(rows);
  for (int i = 0; i < W; ++i) rows[i].store(p + i * row_stride);
}

template <int W, class T, class Rank>
__attribute__((noinline)) void load_state(const Operand& x, int64_t n, int64_t h, Rank R, T* S, int lane) {
  const int64_t offset = n * x.stride[0] + h * x.stride[1];
  if (W == R && x.dtype == kDType<T> && x.stride[3] == 1) {
    return load_square<W>(static_cast<const T*>(x.data) + offset, x.stride[2], reinterpret_cast<Vec<T, W>*>(S));
  }
  with_dtype(x.dtype, [&](auto tag) {
    const auto* p = static_cast<const decltype(tag)*>(x.data) + offset;
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < R; ++j)
        convert<1>(p + i * x.stride[2] + j * x.stride[3], S + (i / W * R + j) * W + lane + i % W);
  });
}

template <int W, class T, class Rank>
__attribute__((noinline)) void store_state(const T* S, int lane, Rank R, const Operand& x, int64_t n, int64_t h) {
  const int64_t offset = n * x.stride[0] + h * x.stride[1];
  if (W == R && x.dtype == kDType<T> && x.stride[3] == 1) {
    return store_square<W>(reinterpret_cast<const Vec<T, W>*>(S), static_cast<T*>(x.data) + offset, x.stride[2]);
  }
  with_dtype(x.dtype, [&](auto tag) {
    auto* p = static_cast<decltype(tag)*>(x.data) + offset;
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < R; ++j)
        convert<1>(S + (i / W * R + j) * W + lane + i % W, p + i * x.stride[2] + j * x.stride[3]);
  });
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
