// Loads operands of any dtype and stride into contiguous rows of the arithmetic's dtype, and stores results.
#pragma once

#include "convert.h"
#include "kernel_table.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// The row [i, j, k] of an operand; its values have the stride stride[3].
template <class X>
DELTAMEM_INLINE X* row_begin(const Operand& x, int64_t i, int64_t j, int64_t k) {
  return static_cast<X*>(x.data) + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
}
// Copies `count` values of a row.
template <class T>
inline void stage_row(const Operand& x, int64_t i, int64_t j, int64_t k, int64_t count, T* to) {
  with_dtype(x.dtype, [&](auto tag) {
    const auto* p = row_begin<decltype(tag)>(x, i, j, k);
    if (x.stride[3] == 1)
      convert_row(p, to, count);
    else
      for (int64_t d = 0; d < count; ++d) convert<1>(p + d * x.stride[3], to + d);
  });
}
template <class T>
inline void unstage_row(const T* from, int64_t count, const Operand& x, int64_t i, int64_t j) {
  with_dtype(x.dtype, [&](auto tag) {
    auto* p = row_begin<decltype(tag)>(x, i, j, 0);
    if (x.stride[3] == 1)
      convert_row(from, p, count);
    else
      for (int64_t d = 0; d < count; ++d) convert<1>(from + d, p + d * x.stride[3]);
  });
}

// The rows of P heads' tokens: row t of head i begins at data[i] + t * stride.
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

// n consecutive tokens of one head: tokens first, first + 1, ... of batch row b.
struct Span {
  int64_t b, first, h;
  int n;
  template <class X>
  DELTAMEM_INLINE X* begin(const Operand& x) const {
    return row_begin<X>(x, b, first, h);
  }
};

// Copies the tokens' rows of R values to `buffer`, one row every `stride` values, and pads each with zeros to `width`.
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

// Copies rows, one every `stride` values, to `out`; if out has one value per head, it gets the sum of the row.
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

// Loads W rows of W values and transposes them, so that columns[j] holds column j; store_square does the reverse.
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

// Loads the R x R state [n, h] into blocks of W rows: block i holds rows i W to i W + W - 1, and its column j is W
// consecutive values. If a block holds several heads, the rows of this one begin at `lane`.
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
