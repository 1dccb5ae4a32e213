// memory_projection and segment_mean.
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "layer_tensors.h"

namespace py = pybind11;
using at::Tensor;

namespace deltamem {
namespace {

// The tensor's numbers as the kernels read them, and what keeps them alive where they had to be converted.
struct Weight {
  Tensor held;
  Operand operand;
  Weight(const Tensor& x, at::ScalarType type) : held(x) {
    if (x.scalar_type() != type) held = x.to(type);
    if (x.dim() > 1 && x.stride(-1) != 1) held = held.contiguous();
    operand = deltamem::operand(held);
  }
};

}  // namespace

ProjectionArgs held_projection(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight,
                           const MaybeTensor& beta_bias, const MaybeTensor& decay_weight, const MaybeTensor& decay_bias,
                           int64_t heads, bool normalize, Tensor (&held)[3]) {
  ProjectionArgs p = projection_of(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize);
  const at::ScalarType type = p.double_precision ? at::kDouble : at::kFloat;
  const at::ScalarType shared = qkv_weight.scalar_type();
  const bool one_type =
      beta_weight.scalar_type() == shared && (!decay_weight || decay_weight->scalar_type() == shared);
  const at::ScalarType of_weights = one_type && !p.double_precision ? shared : type;
  const Weight qkv(qkv_weight, of_weights), beta(beta_weight, of_weights);
  const Weight decay(decay_weight ? *decay_weight : beta.held, of_weights);
  split_qkv(qkv.held, p.qkv_weight);
  p.gates[0].weight = beta.operand, p.gates[1].weight = decay.operand;
  held[0] = qkv.held, held[1] = beta.held, held[2] = decay.held;
  return p;
}

void run_projection(const ProjectionArgs& p) {
  if (!(p.B * p.T)) return;
  py::gil_scoped_release release;
  const int64_t group = kernels()->group, groups = (p.B * p.T + group - 1) / group;
  const int64_t work = group * p.rows() * (p.D + 8);  // about 60 products a nanosecond
  at::parallel_for(0, groups, std::max<int64_t>(1, 600000 / work),
                   [&](int64_t begin, int64_t end) { kernels()->project(p, begin, end); });
}

namespace {

Projected projection(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight, const MaybeTensor& beta_bias,
                     const MaybeTensor& decay_weight, const MaybeTensor& decay_bias, int64_t heads, bool normalize) {
  Tensor held[3];
  ProjectionArgs p =
      held_projection(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, held);
  const Projected results = projected(p, x);
  run_projection(p);
  return results;
}

std::tuple<Tensor, Tensor> segment_means(const Tensor& x, const Tensor& segment_ids, int64_t num_segments,
                                         const MaybeTensor& mask) {
  SegmentArgs s{x.size(0), x.size(1), x.size(2), num_segments, {x.data_ptr(), dtype(x), {}}, nullptr, nullptr, nullptr};
  for (int64_t i = 0; i < 3; ++i) s.x.stride[i] = x.stride(i);
  Tensor means = at::empty({s.B, s.M, s.D}, x.options());
  Tensor counts = at::empty({s.B, s.M}, x.options().dtype(at::kInt));
  counts.zero_();
  int32_t* count = counts.data_ptr<int32_t>();
  std::vector<int64_t> ids(s.B * s.T, -1);
  const Indices given = numbers(segment_ids);
  const bool* masked = mask ? mask->const_data_ptr<bool>() : nullptr;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t t = 0; t < s.T; ++t) {
      if (masked && !masked[b * mask->stride(0) + t * mask->stride(1)]) continue;
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
  const int64_t work = (s.T + s.M + 1) * kernels()->columns;  // about 10 numbers a nanosecond
  at::parallel_for(0, tasks, std::max<int64_t>(1, 100000 / work),
                   [&](int64_t begin, int64_t end) { kernels()->segments(s, begin, end); });
  return {means, counts};
}

}  // namespace

void bind_projection(py::module_& m) {
  m.def("memory_projection", &projection);
  m.def("segment_mean", &segment_means);
}

}  // namespace deltamem
