// memory_projection and the correction, as in cuda.cpp.
#include "cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "layer_tensors.h"

namespace deltamem {
namespace {

Projected project(const ProjectionOperands& o) {
  const Guard guard(o.x->device());
  ProjectionArgs p = projection_args(o);
  const Projected results = allocate_results(p, *o.x);
  py::gil_scoped_release release;
  check_launch(cuda::project(p, current_stream()));
  return results;
}

Tensor correct(const CorrectionOperands& o, const MaybeTensor& given) {
  const Tensor& base = *o.base;
  const Guard guard(base.device());
  CorrectionArgs c = correction_args(o, base);
  Tensor out = given ? *given : at::empty(base.sizes(), base.options());
  c.out = rows(out, base.dim() - 1);
  py::gil_scoped_release release;
  check_launch(cuda::correct(c, current_stream()));
  return out;
}

constexpr int64_t kMostGroups = 256;  // of rows, where the norm's weight adds them up

// Returns four gradients: g, of what the norm is over (absent where it is d_out); of base (absent where it is g or
// d_out); of the reads before the scale, `[..., K]`; of the norm's weight by groups of rows, `[groups, D]`.
// needs: of base, reads, weight, gain, norm_weight.
std::vector<MaybeTensor> correct_adjoint(const CorrectionOperands& o, const Tensor& d_out,
                                         const std::vector<bool>& needs) {
  const Guard guard(d_out.device());
  CorrectionArgs c = correction_args(o, d_out);
  const int64_t leading = d_out.dim() - 1;
  const auto options = arithmetic(d_out, c.double_precision);
  const bool turned = o.norm_weight || o.cos, sums = needs[4] && o.norm_weight;
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
  m.def("project", &project);
  m.def("correct", &correct);
  m.def("correct_adjoint", &correct_adjoint);
}

}  // namespace deltamem
