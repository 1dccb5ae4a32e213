// segment_mean on a CPU. A task is one batch row and a block of columns; it adds up the tokens in order.
#pragma once

#include "arena.h"
#include "load_store.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

constexpr int kSegmentColumns = 256;

template <class T>
void segment_means(const SegmentArgs& s, int64_t begin, int64_t end) {
  const int64_t blocks = (s.D + kSegmentColumns - 1) / kSegmentColumns;
  thread_local Arena arena;
  arena.reset(Arena::bytes<T>(s.M * kSegmentColumns) + Arena::bytes<T>(kSegmentColumns));
  T* sums = arena.take<T>(s.M * kSegmentColumns);
  T* token = arena.take<T>(kSegmentColumns);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, first = task % blocks * kSegmentColumns;
    const int width = int(s.D - first < kSegmentColumns ? s.D - first : kSegmentColumns);
    fill(sums, s.M * kSegmentColumns, T(0));
    with_dtype(s.x.dtype, [&](auto tag) {
      typedef decltype(tag) X;
      const X* x = static_cast<const X*>(s.x.data) + b * s.x.stride[0] + first * s.x.stride[2];
      for (int64_t t = 0; t < s.T; ++t, x += s.x.stride[1]) {
        const int64_t m = s.ids[b * s.T + t];
        if (m < 0) continue;
        T* sum = sums + m * kSegmentColumns;
        if (s.x.stride[2] == 1)
          convert_row(x, token, width);
        else
          for (int d = 0; d < width; ++d) convert<1>(x + d * s.x.stride[2], token + d);
        for (int d = 0; d < width; ++d) sum[d] += token[d];
      }
      for (int64_t m = 0; m < s.M; ++m) {
        const T count = T(s.counts[b * s.M + m] ? s.counts[b * s.M + m] : 1);
        T* sum = sums + m * kSegmentColumns;
        for (int d = 0; d < width; ++d) sum[d] = sum[d] / count;
        convert_row(sum, static_cast<X*>(s.means) + (b * s.M + m) * s.D + first, width);
      }
    });
  }
}

inline void segments(const SegmentArgs& s, int64_t begin, int64_t end) {
  return s.x.dtype == DType::f64 ? segment_means<double>(s, begin, end) : segment_means<float>(s, begin, end);
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem
