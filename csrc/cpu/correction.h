// attention_correction on a CPU, with the norm and rotary embedding of an attention layer in its fused form. The
// formulas are in backends/reference/correction.py. Vectors run along a row, so the bits of a row do not depend on the
// others. A few rows share each pass over the weight.
#pragma once

#include "arena.h"
#include "load_store.h"
#include "row_operations.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class T, int W>
struct Correct {
  typedef T Value;
  typedef Vec<T, W> L;
  static constexpr int kVectors = 4, kBlock = kVectors * W;          // vectors and columns of a block
  static constexpr int kRows = DELTAMEM_VECTOR_BYTES >= 64 ? 4 : 2;  // rows at a time, as many as fit in registers

  const CorrectionArgs& c;
  const int64_t width = (c.D + kBlock - 1) / kBlock * kBlock;  // D rounded up to whole blocks
  const T factor = T(c.scale) * (c.gain.data ? scalar(c.gain) : T(1));

  static T scalar(const Operand& x) {
    T value;
    stage_row(x, 0, 0, 0, 1, &value);
    return value;
  }
  int64_t batch(int64_t row) const { return row / c.T; }
  int64_t token(int64_t row) const { return row % c.T; }

  void stage_reads(int64_t row, T* to) const {
    for (int64_t h = 0; h < c.H; ++h) stage_row(c.reads, batch(row), token(row), h, c.R, to + h * c.R);
  }

  // Packs the weight [D, K] as [blocks, K, kBlock], with zeros past row D, by transposing squares of S x S.
  size_t packed_size() const { return width * c.K; }
  void pack(T* packed) const {
    constexpr int S = W < 8 ? W : 8;
    for (int64_t d = 0; d < width; d += S)
      for (int64_t j = 0; j < c.K; j += S) {
        const int64_t rows = c.D - d < 0 ? 0 : c.D - d < S ? c.D - d : S, columns = c.K - j < S ? c.K - j : S;
        Vec<T, S> square[S];
        if (rows == S && columns == S && c.weight.dtype == kDType<T> && c.weight.stride[3] == 1) {
          load_square<S>(row_begin<const T>(c.weight, 0, 0, d) + j, c.weight.stride[2], square);
        } else {
          T staged[S * S] = {};
          for (int64_t i = 0; i < rows; ++i) stage_row(c.weight, 0, j, d + i, columns, staged + i * S);
          load_square<S>(staged, S, square);
        }
        T* to = packed + d / kBlock * kBlock * c.K + d % kBlock;
        for (int64_t k = 0; k < columns; ++k) square[k].store(to + (j + k) * kBlock);
      }
  }

  // Calls f(m, d, vectors) with the correction of row m in columns d to d + kBlock - 1, for each of M rows and each
  // block. reads [M, K] are already multiplied by the factor.
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

  // The scratch memory of a thread.
  struct Work {
    T *raw, *reads;   // [kRows, K]: the reads, without and with the factor
    T *x, *y;         // [kRows, width]; x is used for the gradients of the reads as well
    T* norm_weight;   // [norm_size]
    T *cos, *sin;     // of a token, [head_dim]
    Work(const Correct& of, Arena& arena) {
      const int64_t all = kRows * of.c.K, rows = kRows * of.width > all ? kRows * of.width : all;
      arena.reset(2 * (Arena::bytes<T>(all) + Arena::bytes<T>(rows)) + Arena::bytes<T>(of.c.D) +
                  2 * Arena::bytes<T>(of.c.head_dim));
      raw = arena.take<T>(all), reads = arena.take<T>(all), x = arena.take<T>(rows), y = arena.take<T>(rows);
      norm_weight = arena.take<T>(of.c.D), cos = arena.take<T>(of.c.head_dim), sin = arena.take<T>(of.c.head_dim);
      if (of.c.norm_weight.data) stage_row(of.c.norm_weight, 0, 0, 0, of.norm_size(), norm_weight);
    }
  };
  int64_t norm_size() const { return !c.norm_weight.data ? 0 : c.head_dim ? c.head_dim : c.D; }

  void load_reads(const Work& work, int64_t row, int m) const {
    T *raw = work.raw + m * c.K, *reads = work.reads + m * c.K;
    stage_reads(row, raw);
    for_each_vector<W>(c.K, [&](auto w, int64_t j) {
      typedef Vec<T, w()> V;
      (V::load(raw + j) * V::splat(factor)).store(reads + j);
    });
  }
  void load_rotary(const Work& work, int64_t row) const {
    if (!c.cos.data) return;
    stage_row(c.cos, batch(row), token(row), 0, c.head_dim, work.cos);
    stage_row(c.sin, batch(row), token(row), 0, c.head_dim, work.sin);
  }

  // Calls f(count, row) for the rows [begin, end): kRows at a time, then one at a time.
  template <class F>
  static void in_groups(int64_t begin, int64_t end, F&& f) {
    for (; begin + kRows <= end; begin += kRows) f(std::integral_constant<int, kRows>{}, begin);
    for (; begin < end; ++begin) f(std::integral_constant<int, 1>{}, begin);
  }

  T norm_eps() const { return T(c.norm_eps); }

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

  // base + correction of M rows of dtype X.
  template <int M, class X>
  void add_correction(const T* packed, const T* reads, int64_t row, X) const {
    const X* from[M];
    X* to[M];
    for (int m = 0; m < M; ++m) {
      from[m] = row_begin<const X>(c.base, batch(row + m), token(row + m), 0);
      to[m] = row_begin<X>(c.out, batch(row + m), token(row + m), 0);
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

  // Computes the result of a row from its correction x.
  void finish(const Work& work, int64_t row, T* x) const {
    if (!c.head_dim && c.norm_weight.data) rms_norm<W>(x, work.norm_weight, c.D, norm_eps());
    add_base(row, x, work.y);
    if (c.head_dim) load_rotary(work, row);
    for (int64_t d = 0; c.head_dim && d < c.D; d += c.head_dim) {
      if (c.norm_weight.data) rms_norm<W>(x + d, work.norm_weight, c.head_dim, norm_eps());
      if (c.cos.data) rotate<W, false>(x + d, work.cos, work.sin, c.head_dim / 2);
    }
    unstage_row(x, c.D, c.out, batch(row), token(row));
  }
  void add_base(int64_t row, T* x, T* staged) const {
    stage_row(c.base, batch(row), token(row), 0, c.D, staged);
    add<W>(x, staged, c.D);
  }

  // Backward. The gradients of weight, norm_weight and gain are sums over all rows. Each group of rows adds up its own,
  // and finish_sums adds those of the groups in order, so that the bits do not depend on the threads.

  struct Sums {
    T *weight, *norm, *gain;  // [packed_size], [norm_size], [1]
  };
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

  template <int M>
  void backward_rows(const CorrectionGradients& out, const T* packed, const Work& work, const Sums& sums,
                     int64_t row) const {
    for (int m = 0; m < M; ++m) load_reads(work, row + m, m);
    if (c.norm_weight.data) store_corrections<M>(packed, work.reads, work.x);
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

  // g is the gradient of a row's result and becomes that of its correction x.
  void adjoint(const Work& work, int64_t row, const T* x, T* g, T* d_norm) const {
    if (!c.head_dim) {
      if (c.norm_weight.data) rms_norm_adjoint<W>(g, x, work.norm_weight, c.D, norm_eps(), d_norm);
      return;
    }
    load_rotary(work, row);
    for (int64_t d = 0; d < c.D; d += c.head_dim) {
      if (c.cos.data) rotate<W, true>(g + d, work.cos, work.sin, c.head_dim / 2);
      if (c.norm_weight.data)
        rms_norm_adjoint<W>(g + d, x + d, work.norm_weight, c.head_dim, norm_eps(), d_norm);
    }
  }

  template <int M>
  void backward_reads(const CorrectionGradients& out, const T* packed, const Work& work, const Sums& sums,
                      int64_t row) const {
    T* d_reads = work.x;  // x is not needed any more
    for (int64_t j = 0; j < c.K; ++j) {
      L total[M] = {};
      for (int64_t d = 0; d < width; d += kBlock)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const L w = L::load(packed + d * c.K + j * kBlock + i * W);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) total[m] = fma(w, L::load(work.y + m * width + d + i * W), total[m]);
        }
      for (int m = 0; m < M; ++m) d_reads[m * c.K + j] = sum_of_lanes(total[m]);
    }
    for (int m = 0; m < M; ++m) {
      T* of_row = d_reads + m * c.K;
      *sums.gain += sum_of_products<W>(of_row, work.raw + m * c.K, c.K);
      for (int64_t j = 0; j < c.K; ++j) of_row[j] *= factor;
      if (out.reads.data) unstage_row(of_row, c.K, out.reads, batch(row + m), token(row + m));
    }
  }

  void finish_sums(const CorrectionGradients& out, T* sums) const {
    const int64_t size = int64_t(sums_size());
    for (int64_t group = 1; group < out.groups; ++group) add<W>(sums, sums + group * size, size);
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
