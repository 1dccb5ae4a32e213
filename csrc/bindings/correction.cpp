// attention_correction and its fused form.
#include "cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "layer_tensors.h"

namespace deltamem {
namespace {

void for_range(int64_t n, int64_t grain, const void* body, void (*call)(const void*, int64_t, int64_t)) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { call(body, begin, end); });
}

}  // namespace

Tensor correct(const Tensor& base, const Tensor& reads, const Tensor& weight, const MaybeTensor& gain,
               const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin, double scale,
               double norm_eps, int64_t head_dim, const MaybeTensor& given) {
  CorrectionArgs c = correction_of(base, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
  Tensor out = given ? *given : at::empty(base.sizes(), base.options());
  c.out = rows(out, base.dim() - 1);
  if (base.numel()) {
    py::gil_scoped_release release;
    kernels()->correct(c, for_range);
  }
  return out;
}

namespace {

constexpr int64_t kRowsOfAGroup = 32, kMostGroups = 16;

std::vector<MaybeTensor> correct_backward(const Tensor& d_out, const MaybeTensor& base, const Tensor& reads,
                                          const Tensor& weight, const MaybeTensor& gain,
                                          const MaybeTensor& norm_weight, const MaybeTensor& cos,
                                          const MaybeTensor& sin, double scale, double norm_eps, int64_t head_dim,
                                          const std::vector<bool>& needs) {
  const CorrectionArgs c =
      correction_of(d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
  const MaybeTensor wanted[5] = {d_out, reads, weight, gain, norm_weight};
  std::vector<MaybeTensor> grads(5);
  for (int i = 0; i < 5; ++i)
    if (needs[i]) grads[i] = at::empty(wanted[i]->sizes(), wanted[i]->options());
  CorrectionGradients out{rows(d_out, d_out.dim() - 1), {}, {}, {}, rows(grads[3], 0), rows(grads[4], 0), 1};
  // Contiguous, whatever their dimensions.
  const auto by_row = [&](const MaybeTensor& x, int64_t width) {
    return x ? Operand{x->data_ptr(), dtype(*x), {c.T * width, width, 0, 1}} : Operand{};
  };
  out.base = by_row(grads[0], c.D), out.reads = by_row(grads[1], c.K);
  if (grads[2]) out.weight = {grads[2]->data_ptr(), dtype(*grads[2]), {c.K, 1, 0, 1}};
  out.groups = std::max<int64_t>(1, std::min(kMostGroups, (c.B * c.T + kRowsOfAGroup - 1) / kRowsOfAGroup));
  py::gil_scoped_release release;
  kernels()->correct_backward(c, out, for_range);
  return grads;
}

}  // namespace

void bind_correction(py::module_& m) {
  m.def("correct", &correct);
  m.def("correct_backward", &correct_backward);
}

}  // namespace deltamem
