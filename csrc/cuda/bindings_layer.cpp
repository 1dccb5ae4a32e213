// memory_projection and the correction, as in bindings.cpp.
#include "bindings.h"

#include <ATen/ops/empty.h>

#include "../layer_tensors.h"

namespace deltamem {
namespace {

Projected project(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight, const MaybeTensor& beta_bias,
                  const MaybeTensor& decay_weight, const MaybeTensor& decay_bias, int64_t heads, bool normalize) {
  const Guard guard(x.device());
  Projection p = projection_of(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize);
  const Projected results = projected(p, x);
  py::gil_scoped_release release;
  check_launch(cuda::project(p, current_stream()));
  return results;
}

Tensor correct(const Tensor& base, const Tensor& reads, const Tensor& weight, const MaybeTensor& gain,
               const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin, double scale,
               double norm_eps, int64_t head_dim, const MaybeTensor& given) {
  const Guard guard(base.device());
  Correction c = correction_of(base, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
  Tensor out = given ? *given : at::empty(base.sizes(), base.options());
  c.out = rows(out, base.dim() - 1);
  py::gil_scoped_release release;
  check_launch(cuda::correct(c, current_stream()));
  return out;
}

}  // namespace

void bind_layer(py::module_& m) {
  m.def("memory_projection", &project);
  m.def("correct", &correct);
}

}  // namespace deltamem
