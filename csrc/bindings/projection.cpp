// memory_projection on a CPU.
#include <ATen/Parallel.h>

#include "cpu.h"

namespace deltamem {

ProjectionArgs with_converted_weights(const ProjectionOperands& o, std::vector<Tensor>& held) {
  ProjectionArgs p = projection_args(o);
  const at::ScalarType shared = o.qkv_weight.parts[0]->scalar_type();
  bool one_type = o.beta_weight->scalar_type() == shared;
  one_type = one_type && (!o.decay_weight || o.decay_weight->scalar_type() == shared);
  for (int i = 1; i < o.qkv_weight.count; ++i) one_type = one_type && o.qkv_weight.parts[i]->scalar_type() == shared;
  const at::ScalarType type = p.double_precision ? at::kDouble : one_type ? shared : at::kFloat;
  held.reserve(5);  // pointers into it are kept
  const auto converted = [&](TensorPtr x) {
    if (x->scalar_type() == type && x->stride(-1) == 1) return x;
    held.push_back(x->to(type).contiguous());
    return TensorPtr(&held.back());
  };
  QkvWeight qkv = o.qkv_weight;
  for (int i = 0; i < qkv.count; ++i) qkv.parts[i] = converted(qkv.parts[i]);
  set_qkv(qkv, p.qkv_weight);
  p.gates[0].weight = operand(converted(o.beta_weight));
  if (o.decay_weight) p.gates[1].weight = operand(converted(o.decay_weight));
  return p;
}

void run_projection(const ProjectionArgs& p) {
  if (!(p.B * p.T)) return;
  py::gil_scoped_release release;
  const int64_t group = kernels()->group, groups = (p.B * p.T + group - 1) / group;
  const int64_t work = group * p.rows() * (p.D + 8);  // about 60 products per nanosecond
  at::parallel_for(0, groups, std::max<int64_t>(1, 600000 / work),
                   [&](int64_t begin, int64_t end) { kernels()->project(p, begin, end); });
}

Projected project(const ProjectionOperands& o) {
  std::vector<Tensor> held;
  ProjectionArgs p = with_converted_weights(o, held);
  const Projected results = allocate_results(p, *o.x);
  run_projection(p);
  return results;
}

}  // namespace deltamem
