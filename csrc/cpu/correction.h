// The correction of a projection's output on a CPU, and what an attention layer does to a query or key next; the
// formulas are at the top of backends/reference_correction.py. Rows one after another, vectors along a row: a row has
// the same bits wherever it stands. A few rows go through the weights together, to load them once.
#pragma once

#include "chunk.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class T, int W>
struct Correct {
  typedef Vec<T, W> L;
  static constexpr int kVectors = 4, kBlock = kVectors * W;                // of columns that are computed at once
  static constexpr int kRows = DELTAMEM_VECTOR_BYTES >= 64 ? 4 : 2;  // as many as there are registers for

  const Correction& c;
  const int64_t width = (c.D + kBlock - 1) / kBlock * kBlock;
  const T factor = T(c.scale) * (c.gain.data ? number(c.gain) : T(1));

  // Operands

  static T number(const Operand& x) {
    T value;
    stage_row(x, 0, 0, 0, 1, &value);
    return value;
  }

  // Numbers of the row [i, j, k], as T.
  static void stage_row(const Operand& x, int64_t i, int64_t j, int64_t k, int64_t count, T* to) {
    with_dtype(x.dtype, [&](auto tag) {
      const auto* p = place<decltype(tag)>(x, i, j, k);
      if (x.stride[3] == 1)
        convert_row(p, to, count);
      else
        for (int64_t d = 0; d < count; ++d) convert<1>(p + d * x.stride[3], to + d);
    });
  }
  static void unstage_row(const T* from, int64_t count, const Operand& x, int64_t i, int64_t j) {
    with_dtype(x.dtype, [&](auto tag) {
      auto* p = place<decltype(tag)>(x, i, j, 0);
      if (x.stride[3] == 1)
        convert_row(from, p, count);
      else
        for (int64_t d = 0; d < count; ++d) convert<1>(from + d, p + d * x.stride[3]);
    });
  }
  template <class X>
  static X* place(const Operand& x, int64_t i, int64_t j, int64_t k) {
    return static_cast<X*>(x.data) + i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
  }
  int64_t batch(int64_t row) const { return row / c.T; }
  int64_t token(int64_t row) const { return row % c.T; }

  void stage_reads(int64_t row, T* to) const {
    for (int64_t h = 0; h < c.H; ++h) stage_row(c.reads, batch(row), token(row), h, c.R, to + h * c.R);
  }

  // The weights as [blocks][K][kBlock], zeros behind the last column: in squares, rows to columns.
  size_t packed_size() const { return width * c.K; }
  void pack(T* packed) const {
    constexpr int S = W < 8 ? W : 8;
    for (int64_t d = 0; d < width; d += S)
      for (int64_t j = 0; j < c.K; j += S) {
        const int64_t rows = c.D - d < 0 ? 0 : c.D - d < S ? c.D - d : S, columns = c.K - j < S ? c.K - j : S;
        Vec<T, S> square[S];
        if (rows == S && columns == S && c.weight.dtype == kDType<T> && c.weight.stride[3] == 1) {
          load_square<S>(place<const T>(c.weight, 0, 0, d) + j, c.weight.stride[2], square);
        } else {
          T staged[S * S] = {};
          for (int64_t i = 0; i < rows; ++i)
            stage_row(c.weight, 0, j, d + i, columns, staged + i * S);
          load_square<S>(staged, S, square);
        }
        T* to = packed + d / kBlock * kBlock * c.K + d % kBlock;
        for (int64_t k = 0; k < columns; ++k) square[k].store(to + (j + k) * kBlock);
      }
  }

  // Numbers along a row

  template <class F>
  static DELTAMEM_INLINE void along(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(std::integral_constant<int, W>{}, i);
    for (; i < n; ++i) f(std::integral_constant<int, 1>{}, i);
  }
  static T sum_of_products(const T* a, const T* b, int64_t n) {
    L sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] = fma(L::load(a + i + k * W), L::load(b + i + k * W), sums[k]);
    for (; i + W <= n; i += W) sums[0] = fma(L::load(a + i), L::load(b + i), sums[0]);
    T sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
  }
  static T sum_of(L x) {
    T lanes[W];
    x.store(lanes);
    T sum = lanes[0];
    for (int i = 1; i < W; ++i) sum += lanes[i];
    return sum;
  }
  T inverse_rms(const T* x, int64_t n) const {
    const T mean = sum_of_products(x, x, n) / T(n) + T(c.norm_eps);
    if constexpr (sizeof(T) == 4)
      return T(1) / __builtin_sqrtf(mean);
    else
      return T(1) / __builtin_sqrt(mean);
  }
  static void add(T* x, const T* y, int64_t n) {
    along(n, [&](auto w, int64_t i) { (Vec<T, w()>::load(x + i) + Vec<T, w()>::load(y + i)).store(x + i); });
  }
  void norm(T* x, const T* weight, int64_t n) const {
    const T inverse = inverse_rms(x, n);
    along(n, [&](auto w, int64_t i) {
      typedef Vec<T, w()> V;
      (V::load(x + i) * V::splat(inverse) * V::load(weight + i)).store(x + i);
    });
  }
  // The gradient g of the normed x to that of x itself, and to that of the weight, which is added up.
  void norm_adjoint(T* g, const T* x, const T* weight, int64_t n, T* d_weight) const {
    const T inverse = inverse_rms(x, n);
    along(n, [&](auto w, int64_t i) {
      typedef Vec<T, w()> V;
      const V gradient = V::load(g + i);
      fma(gradient, V::load(x + i) * V::splat(inverse), V::load(d_weight + i)).store(d_weight + i);
      (gradient * V::load(weight + i)).store(g + i);
    });
    const T along_x = sum_of_products(g, x, n) / T(n) * inverse * inverse * inverse;
    along(n, [&](auto w, int64_t i) {
      typedef Vec<T, w()> V;
      fnma(V::splat(along_x), V::load(x + i), V::load(g + i) * V::splat(inverse)).store(g + i);
    });
  }
  // The halves of a head, turned by cos and sin; backward by their transpose.
  template <bool Backward>
  static void rotate(T* x, const T* cos, const T* sin, int64_t half) {
    along(half, [&](auto w, int64_t i) {
      typedef Vec<T, w()> V;
      const V a = V::load(x + i), b = V::load(x + half + i);
      const V from_b = V::load(sin + (Backward ? half : 0) + i), from_a = V::load(sin + (Backward ? 0 : half) + i);
      const V of_a = a * V::load(cos + i), of_b = b * V::load(cos + half + i);
      (Backward ? fma(b, from_b, of_a) : fnma(b, from_b, of_a)).store(x + i);
      (Backward ? fnma(a, from_a, of_b) : fma(a, from_a, of_b)).store(x + half + i);
    });
  }

  // f(row m, column d, the block's vectors) with the correction of M rows, of reads [M][K] that the factor is in.
  template <int M, class F>
  DELTAMEM_INLINE void corrections(const T* packed, const T* reads, F&& f) const {
    for (int64_t d = 0; d < width; d += kBlock, packed += c.K * kBlock) {
      L u[M][kVectors] = {};
      for (int64_t j = 0; j < c.K; ++j) {
        L w[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) w[i] = L::load(packed + j * kBlock + i * W);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) u[m][i] = fma(L::splat(reads[m * c.K + j]), w[i], u[m][i]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) f(m, d, u[m]);
    }
  }
  template <int M>
  void store_corrections(const T* packed, const T* reads, T* rows) const {
    corrections<M>(packed, reads, [&](int m, int64_t d, const L(&u)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) u[i].store(rows + m * width + d + i * W);
    });
  }

  // What a thread works on: reads [kRows][K], once as they are and once with the factor; rows [kRows][width] twice,
  // the first also for the gradients of the reads; the norm's weights and a token's rotary.
  struct Work {
    T *raw, *reads, *x, *y, *norm_weight, *cos, *sin;
    Work(const Correct& of, Arena& arena) {
      const int64_t all = kRows * of.c.K, rows = kRows * of.width > all ? kRows * of.width : all;
      arena.reset(2 * (Arena::piece<T>(all) + Arena::piece<T>(rows)) + Arena::piece<T>(of.c.D) +
                  2 * Arena::piece<T>(of.c.head_dim));
      raw = arena.take<T>(all), reads = arena.take<T>(all), x = arena.take<T>(rows), y = arena.take<T>(rows);
      norm_weight = arena.take<T>(of.c.D), cos = arena.take<T>(of.c.head_dim), sin = arena.take<T>(of.c.head_dim);
      if (of.c.norm_weight.data) stage_row(of.c.norm_weight, 0, 0, 0, of.norm_size(), norm_weight);
    }
  };
  int64_t norm_size() const { return !c.norm_weight.data ? 0 : c.head_dim ? c.head_dim : c.D; }

  void load_reads(const Work& work, int64_t row, int m) const {
    T *raw = work.raw + m * c.K, *reads = work.reads + m * c.K;
    stage_reads(row, raw);
    along(c.K, [&](auto w, int64_t j) { (Vec<T, w()>::load(raw + j) * Vec<T, w()>::splat(factor)).store(reads + j); });
  }
  void load_rotary(const Work& work, int64_t row) const {
    if (!c.cos.data) return;
    stage_row(c.cos, batch(row), token(row), 0, c.head_dim, work.cos);
    stage_row(c.sin, batch(row), token(row), 0, c.head_dim, work.sin);
  }

  // Calls f with the rows from begin to end, kRows at a time, then one at a time.
  template <class F>
  static void in_groups(int64_t begin, int64_t end, F&& f) {
    for (; begin + kRows <= end; begin += kRows) f(std::integral_constant<int, kRows>{}, begin);
    for (; begin < end; ++begin) f(std::integral_constant<int, 1>{}, begin);
  }

  void forward(const T* packed, int64_t begin, int64_t end) const {
    thread_local Arena arena;
    const Work work(*this, arena);
    const bool only_add = !c.head_dim && !c.norm_weight.data && c.base.stride[3] == 1 && c.out.stride[3] == 1;
    in_groups(begin, end, [&](auto rows, int64_t row) {
      constexpr int M = rows();
      for (int m = 0; m < M; ++m) load_reads(work, row + m, m);
      if (only_add) return with_dtype(c.base.dtype, [&](auto tag) { add_correction<M>(packed, work.reads, row, tag); });
      store_corrections<M>(packed, work.reads, work.x);
      for (int m = 0; m < M; ++m) finish(work, row + m, work.x + m * width);
    });
  }

  template <int M, class X>
  void add_correction(const T* packed, const T* reads, int64_t row, X) const {
    const X* from[M];
    X* to[M];
    for (int m = 0; m < M; ++m) {
      from[m] = place<const X>(c.base, batch(row + m), token(row + m), 0);
      to[m] = place<X>(c.out, batch(row + m), token(row + m), 0);
    }
    corrections<M>(packed, reads, [&](int m, int64_t d, const L(&u)[kVectors]) __attribute__((always_inline)) {
      if (d + kBlock <= c.D) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          T x[W];
          convert<W>(from[m] + d + i * W, x);
          (L::load(x) + u[i]).store(x);
          convert<W>(x, to[m] + d + i * W);
        }
      } else {
        T x[kBlock] = {};
        convert_row(from[m] + d, x, c.D - d);
        for (int i = 0; i < kVectors; ++i) (L::load(x + i * W) + u[i]).store(x + i * W);
        convert_row(x, to[m] + d, c.D - d);
      }
    });
  }

  // From the correction x of a row to the result.
  void finish(const Work& work, int64_t row, T* x) const {
    if (!c.head_dim && c.norm_weight.data) norm(x, work.norm_weight, c.D);
    add_base(row, x, work.y);
    if (c.head_dim) load_rotary(work, row);
    for (int64_t d = 0; c.head_dim && d < c.D; d += c.head_dim) {
      if (c.norm_weight.data) norm(x + d, work.norm_weight, c.head_dim);
      if (c.cos.data) rotate<false>(x + d, work.cos, work.sin, c.head_dim / 2);
    }
    unstage_row(x, c.D, c.out, batch(row), token(row));
  }
  void add_base(int64_t row, T* x, T* staged) const {
    stage_row(c.base, batch(row), token(row), 0, c.D, staged);
    add(x, staged, c.D);
  }

  // Backward. Sums over rows: a group of rows adds up its own, [width K] of the weights in their packed order, those
  // of the norm, and that of the scale; finish_sums adds the groups in their order.

  size_t sums_size() const { return packed_size() + norm_size() + 1; }

  void backward(const CorrectionGradients& out, const T* packed, T* sums, int64_t begin, int64_t end) const {
    thread_local Arena arena;
    const Work work(*this, arena);
    const int64_t rows = c.B * c.T;
    for (int64_t group = begin; group < end; ++group) {
      T* d_weight = sums + group * sums_size();
      fill(d_weight, int64_t(sums_size()), T(0));
      const Sums of{d_weight, d_weight + packed_size(), d_weight + packed_size() + norm_size()};
      in_groups(rows * group / out.groups, rows * (group + 1) / out.groups, [&](auto count, int64_t row) {
        backward_rows<count()>(out, packed, work, of, row);
      });
    }
  }
  struct Sums {
    T *weight, *norm, *gain;
  };

  template <int M>
  void backward_rows(const CorrectionGradients& out, const T* packed, const Work& work, const Sums& sums,
                     int64_t row) const {
    for (int m = 0; m < M; ++m) load_reads(work, row + m, m);
    if (c.norm_weight.data)
      store_corrections<M>(packed, work.reads, work.x);
    for (int m = 0; m < M; ++m) {
      T *x = work.x + m * width, *g = work.y + m * width;
      if (c.head_dim && c.norm_weight.data) add_base(row + m, x, g);
      stage_row(out.d_out, batch(row + m), token(row + m), 0, c.D, g);
      fill(g + c.D, width - c.D, T(0));
      adjoint(work, row + m, x, g, sums.norm);
      if (out.base.data) unstage_row(g, c.D, out.base, batch(row + m), token(row + m));
    }
    if (out.reads.data || out.gain.data) backward_reads<M>(out, packed, work, sums, row);
    if (!out.weight.data) return;
    T* sum = sums.weight;
    for (int64_t d = 0; d < width; d += kBlock)
      for (int64_t j = 0; j < c.K; ++j, sum += kBlock)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          L total = L::load(sum + i * W);
          for (int m = 0; m < M; ++m)
            total = fma(L::splat(work.reads[m * c.K + j]), L::load(work.y + m * width + d + i * W), total);
          total.store(sum + i * W);
        }
  }

  // The gradient g of a row's result to that of its correction.
  void adjoint(const Work& work, int64_t row, const T* x, T* g, T* d_norm) const {
    if (!c.head_dim) {
      if (c.norm_weight.data) norm_adjoint(g, x, work.norm_weight, c.D, d_norm);
      return;
    }
    load_rotary(work, row);
    for (int64_t d = 0; d < c.D; d += c.head_dim) {
      if (c.cos.data) rotate<true>(g + d, work.cos, work.sin, c.head_dim / 2);
      if (c.norm_weight.data) norm_adjoint(g + d, x + d, work.norm_weight, c.head_dim, d_norm);
    }
  }

  template <int M>
  void backward_reads(const CorrectionGradients& out, const T* packed, const Work& work, const Sums& sums,
                      int64_t row) const {
    T* d_reads = work.x;  // done with
    for (int64_t j = 0; j < c.K; ++j) {
      L total[M] = {};
      for (int64_t d = 0; d < width; d += kBlock)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const L w = L::load(packed + d * c.K + j * kBlock + i * W);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) total[m] = fma(w, L::load(work.y + m * width + d + i * W), total[m]);
        }
      for (int m = 0; m < M; ++m) d_reads[m * c.K + j] = sum_of(total[m]);
    }
    for (int m = 0; m < M; ++m) {
      T* of_row = d_reads + m * c.K;
      *sums.gain += sum_of_products(of_row, work.raw + m * c.K, c.K);
      for (int64_t j = 0; j < c.K; ++j) of_row[j] *= factor;
      if (out.reads.data) unstage_row(of_row, c.K, out.reads, batch(row + m), token(row + m));
    }
  }

  void finish_sums(const CorrectionGradients& out, T* sums) const {
    const int64_t size = int64_t(sums_size());
    for (int64_t group = 1; group < out.groups; ++group) add(sums, sums + group * size, size);
    for (int64_t d = 0; out.weight.data && d < c.D; ++d) {
      T row[kMaxColumns];
      for (int64_t j = 0; j < c.K; j += kMaxColumns) {
        const int64_t columns = c.K - j < kMaxColumns ? c.K - j : kMaxColumns;
        for (int64_t k = 0; k < columns; ++k) row[k] = sums[d / kBlock * kBlock * c.K + (j + k) * kBlock + d % kBlock];
        unstage_row(row, columns, out.weight, d, j);
      }
    }
    T* rest = sums + packed_size();
    if (out.norm_weight.data) unstage_row(rest, norm_size(), out.norm_weight, 0, 0);
    rest[norm_size()] *= T(c.scale);
    if (out.gain.data) unstage_row(rest + norm_size(), 1, out.gain, 0, 0);
  }
  static constexpr int kMaxColumns = 64;
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
