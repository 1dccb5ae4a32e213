// segment_mean on a CPU. Ids are checked here.
#include <ATen/Parallel.h>

#include "cpu.h"

namespace deltamem {

std::tuple<Tensor, Tensor> segment_mean(const SegmentOperands& o) {
  const Tensor& x = *o.x;
  const Operand tokens{x.data_ptr(), dtype(x), {}};
  SegmentArgs s{x.size(0), x.size(1), x.size(2), o.num_segments, tokens, nullptr, nullptr, nullptr};
  for (int64_t i = 0; i < 3; ++i) s.x.stride[i] = x.stride(i);
  Tensor means = at::empty({s.B, s.M, s.D}, x.options());
  Tensor counts = at::empty({s.B, s.M}, x.options().dtype(at::kInt));
  counts.zero_();
  int32_t* count = counts.data_ptr<int32_t>();
  std::vector<int64_t> ids(s.B * s.T, -1);
  const Indices given = indices(o.segment_ids);
  const bool* masked = o.mask ? o.mask->const_data_ptr<bool>() : nullptr;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t t = 0; t < s.T; ++t) {
      if (masked && !masked[b * o.mask->stride(0) + t * o.mask->stride(1)]) continue;
      const int64_t id = given.at(b, t);
      if (id < 0) continue;
      if (id >= s.M)
        throw std::invalid_argument("segment_ids must be below num_segments=" + std::to_string(s.M) + ", got " +
                                    std::to_string(id));
      ids[b * s.T + t] = id;
      ++count[b * s.M + id];
    }
  s.ids = ids.data(), s.counts = count, s.means = means.data_ptr();
  py::gil_scoped_release release;
  const int64_t tasks = s.M ? s.B * ((s.D + kernels()->columns - 1) / kernels()->columns) : 0;
  const int64_t work = (s.T + s.M + 1) * kernels()->columns;  // about 10 numbers per nanosecond
  at::parallel_for(0, tasks, std::max<int64_t>(1, 100000 / work),
                   [&](int64_t begin, int64_t end) { kernels()->segments(s, begin, end); });
  return {means, counts};
}

}  // namespace deltamem
