// attention_correction and its fused form.
#include "bindings.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace deltamem {
namespace {

// Strides of batch row, token, head and number; those of a row's numbers are the last of x. A dimension of one number
// has the stride 0: it is the same for all.
Operand rows(const Tensor& x, int64_t leading, bool heads = false) {
  Operand o{x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < leading; ++i) o.stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
  if (heads) o.stride[2] = x.stride(-2);
  if (x.dim() > 0) o.stride[3] = x.stride(-1);
  return o;
}
Operand rows(const MaybeTensor& x, int64_t leading, bool heads = false) {
  return x ? rows(*x, leading, heads) : Operand{};
}

Correction correction(const Tensor& like, const MaybeTensor& base, const Tensor& reads, const Tensor& weight,
                      const MaybeTensor& gain, const MaybeTensor& norm_weight, const MaybeTensor& cos,
                      const MaybeTensor& sin, double scale, double norm_eps, int64_t head_dim) {
  Correction c{};
  const int64_t leading = like.dim() - 1;
  const bool heads = reads.dim() == like.dim() + 1;
  c.B = like.size(0), c.T = leading == 2 ? like.size(1) : 1, c.D = like.size(-1), c.K = weight.size(1);
  c.H = heads ? reads.size(-2) : 1, c.R = reads.size(-1);
  c.scale = scale, c.norm_eps = norm_eps, c.head_dim = head_dim;
  c.base = rows(base, leading), c.reads = rows(reads, leading, heads), c.weight = rows(weight, 0, true);
  c.weight.stride[1] = c.weight.stride[3];  // columns as tokens: a row from any column on
  c.gain = rows(gain, 0), c.norm_weight = rows(norm_weight, 0);
  c.cos = rows(cos, leading), c.sin = rows(sin, leading);
  Operand like_rows = rows(like, leading);
  for (Operand* x : {&like_rows, &c.reads, &c.weight, &c.gain, &c.norm_weight, &c.cos, &c.sin})
    c.double_precision = c.double_precision || x->dtype == DType::f64;
  return c;
}

void for_range(int64_t n, int64_t grain, const void* body, void (*call)(const void*, int64_t, int64_t)) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { call(body, begin, end); });
}

}  // namespace

Tensor correct(const Tensor& base, const Tensor& reads, const Tensor& weight, const MaybeTensor& gain,
               const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin, double scale,
               double norm_eps, int64_t head_dim, const MaybeTensor& given) {
  Correction c = correction(base, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
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
  const Correction c =
      correction(d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim);
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
