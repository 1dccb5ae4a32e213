// memory_projection and the correction, as in cuda.cpp.
#include "cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "layer_tensors.h"

namespace deltamem {
namespace {

Projected project(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight, const MaybeTensor& beta_bias,
                  const MaybeTensor& decay_weight, const MaybeTensor& decay_bias, int64_t heads, bool normalize) {
  const Guard guard(x.device());
  ProjectionArgs p = projection_of(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize);
  const Projected results = projected(p, x);
  py::gil_scoped_release release;
  check_launch(cuda::project(p, current_stream()));
  return results;
}

Tensor correct(const Tensor& base, const Tensor& reads, const Tensor& weight, const MaybeTensor& gain,
               const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin, double scale,
               double norm_eps, int64_t head_dim, const MaybeTensor& given) {
  const Guard guard(base.device());
  CorrectionArgs c = correction_of(base, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
  Tensor out = given ? *given : at::empty(base.sizes(), base.options());
  c.out = rows(out, base.dim() - 1);
  py::gil_scoped_release release;
  check_launch(cuda::correct(c, current_stream()));
  return out;
}

constexpr int64_t kMostGroups = 256;  // of rows, where the norm's weight adds them up

// g, that of what the norm is over (absent where it is d_out), and the gradients of base (where it is no other than g
// or d_out: absent), of the reads before the scale `[..., K]`, and of the norm's weight by groups of rows `[groups,
// D]`. needs: of base, reads, weight, gain, norm_weight.
std::vector<MaybeTensor> correct_adjoint(const Tensor& d_out, const MaybeTensor& base, const Tensor& reads,
                                         const Tensor& weight, const MaybeTensor& gain, const MaybeTensor& norm_weight,
                                         const MaybeTensor& cos, const MaybeTensor& sin, double scale, double norm_eps,
                                         int64_t head_dim, const std::vector<bool>& needs) {
  const Guard guard(d_out.device());
  CorrectionArgs c = correction_of(d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
  const int64_t leading = d_out.dim() - 1;
  const auto options = d_out.options().dtype(c.double_precision ? at::kDouble : at::kFloat);
  const bool turned = norm_weight || cos, sums = needs[4] && norm_weight;
  std::vector<MaybeTensor> results(4);
  CorrectionGradients out{};
  out.d_out = rows(d_out, leading), out.groups = std::max<int64_t>(1, c.B * c.T);
  if (turned) c.out = rows(*(results[0] = at::empty(d_out.sizes(), options)), leading);
  if (turned && needs[0] && d_out.scalar_type() != options.dtype())
    out.base = rows(*(results[1] = at::empty(d_out.sizes(), d_out.options())), leading);
  if (needs[1] || needs[3]) {
    std::vector<int64_t> sizes = d_out.sizes().vec();
    sizes.back() = c.K;
    out.reads = rows(*(results[2] = at::empty(sizes, options)), leading);
  }
  if (sums) {
    out.groups = kMostGroups;
    out.norm_weight = rows(*(results[3] = at::zeros({out.groups, c.D}, options)), 1);
  }
  if (turned || out.reads.data) {
    py::gil_scoped_release release;
    check_launch(cuda::correct_adjoint(c, out, current_stream()));
  }
  return results;
}

}  // namespace

void bind_layer(py::module_& m) {
  m.def("memory_projection", &project);
  m.def("correct", &correct);
  m.def("correct_adjoint", &correct_adjoint);
}

}  // namespace deltamem
