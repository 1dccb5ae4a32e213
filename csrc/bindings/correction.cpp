// attention_correction and its form with norm and rotary embedding, on a CPU.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "cpu.h"

namespace deltamem {
namespace {

void for_range(int64_t n, int64_t grain, const void* body, void (*call)(const void*, int64_t, int64_t)) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { call(body, begin, end); });
}

constexpr int64_t kRowsOfAGroup = 32, kMostGroups = 16;

}  // namespace

Tensor correct(const CorrectionOperands& o, const MaybeTensor& given_out) {
  const Tensor& base = *o.base;
  CorrectionArgs c = correction_args(o, base);
  Tensor out = given_out ? *given_out : at::empty(base.sizes(), base.options());
  c.out = rows(out, base.dim() - 1);
  if (base.numel()) {
    py::gil_scoped_release release;
    kernels()->correct(c, for_range);
  }
  return out;
}

std::vector<MaybeTensor> correct_backward(const CorrectionOperands& o, const Tensor& d_out,
                                          const std::vector<bool>& needs) {
  const CorrectionArgs c = correction_args(o, d_out);
  const TensorPtr like[5] = {&d_out, o.reads, o.weight, o.gain, o.norm_weight};
  std::vector<MaybeTensor> grads(5);
  for (int i = 0; i < 5; ++i)
    if (needs[i]) grads[i] = at::empty(like[i]->sizes(), like[i]->options());
  CorrectionGradients out{rows(d_out, d_out.dim() - 1), {}, {}, {}, rows(grads[3], 0), rows(grads[4], 0), 1};
  // Gradients are contiguous, whatever their dimensions.
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

}  // namespace deltamem
