// From operand records to the arguments in core/layer_args.h, as tensors.h for the scan.
#pragma once

#include <tuple>

#include "../core/layer_args.h"
#include "tensors.h"

namespace deltamem {
namespace {

// The weights of q, k and v, each [H R, D].
void set_qkv(const QkvWeight& given, Operand (&weights)[3]) {
  for (int i = 0; i < 3; ++i) {
    weights[i] = operand(*given.parts[given.count == 3 ? i : 0]);
    if (given.count == 3) continue;
    const Tensor& packed = *given.parts[0];
    const int64_t part = packed.size(0) / 3 * packed.stride(0) * packed.element_size();
    weights[i].data = static_cast<char*>(weights[i].data) + i * part;
  }
}

// H R, the rows of q's weight.
int64_t memory_width(const QkvWeight& given) { return given.parts[0]->size(0) / (given.count == 3 ? 1 : 3); }

// The results are not allocated yet.
ProjectionArgs projection_args(const ProjectionOperands& o) {
  ProjectionArgs p{};
  const Tensor& x = *o.x;
  const bool tokens = x.dim() == 3;
  p.B = tokens ? x.size(0) : 1, p.T = x.size(-2), p.D = x.size(-1);
  p.H = o.heads, p.R = memory_width(o.qkv_weight) / o.heads, p.normalize = o.normalize;
  const QkvWeight& qkv = o.qkv_weight;
  p.double_precision = any_double({o.x, qkv.parts[0], qkv.parts[1], qkv.parts[2], o.beta_weight, o.beta_bias,
                                   o.decay_weight, o.decay_bias});
  p.x = {x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < x.dim(); ++i) p.x.stride[tokens ? i : i + 1] = x.stride(i);
  set_qkv(qkv, p.qkv_weight);
  p.gates[0] = {operand(o.beta_weight), operand(o.beta_bias), o.beta_weight->size(0), nullptr};
  p.gates[1] = {operand(o.decay_weight), operand(o.decay_bias), o.decay_weight ? o.decay_weight->size(0) : 0, nullptr};
  return p;
}

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> Projected;

// Allocates q, k, v, beta, decay and norms, and sets p's pointers to them.
Projected allocate_results(ProjectionArgs& p, const Tensor& x) {
  const bool tokens = x.dim() == 3;
  const auto options = arithmetic(x, p.double_precision);
  const auto rows = [&](int64_t numbers) {  // [B, T, H, R], or [B, T, H], as `numbers` says
    return numbers == p.H * p.R
               ? tokens ? at::empty({p.B, p.T, p.H, p.R}, options) : at::empty({p.T, p.H, p.R}, options)
               : tokens ? at::empty({p.B, p.T, p.H}, options) : at::empty({p.T, p.H}, options);
  };
  Tensor q = rows(p.H * p.R), k = rows(p.H * p.R), v = rows(p.H * p.R), beta = rows(p.gates[0].rows);
  Tensor decay = p.gates[1].rows ? rows(p.gates[1].rows) : at::empty({0}, options);
  Tensor norms = !p.normalize ? at::empty({0}, options)
                 : tokens     ? at::empty({2, p.B, p.T, p.H}, options)
                              : at::empty({2, p.T, p.H}, options);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.norms = norms.data_ptr();
  p.gates[0].out = beta.data_ptr(), p.gates[1].out = decay.data_ptr();
  return {q, k, v, beta, decay, norms};
}

// Strides of batch row, token, head and number, where a row's numbers are x's last dimension. A dimension of size 1 has
// stride 0, so that it broadcasts.
Operand rows(const Tensor& x, int64_t leading, bool heads = false) {
  Operand o{x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < leading; ++i) o.stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
  if (heads) o.stride[2] = x.stride(-2);
  if (x.dim() > 0) o.stride[3] = x.stride(-1);
  return o;
}
Operand rows(TensorPtr x, int64_t leading, bool heads = false) { return x ? rows(*x, leading, heads) : Operand{}; }
Operand rows(const MaybeTensor& x, int64_t leading) { return x ? rows(*x, leading) : Operand{}; }

// The correction of rows shaped like `like`, which is base or the gradient of the result. `out` is not set.
CorrectionArgs correction_args(const CorrectionOperands& o, const Tensor& like) {
  CorrectionArgs c{};
  const int64_t leading = like.dim() - 1;
  const Tensor& reads = *o.reads;
  const bool heads = reads.dim() == like.dim() + 1;
  c.B = like.size(0), c.T = leading == 2 ? like.size(1) : 1, c.D = like.size(-1), c.K = o.weight->size(1);
  c.H = heads ? reads.size(-2) : 1, c.R = reads.size(-1);
  c.scale = o.scale, c.norm_eps = o.norm_eps, c.head_dim = o.head_dim;
  c.base = rows(o.base, leading), c.reads = rows(reads, leading, heads), c.weight = rows(o.weight, 0, true);
  c.weight.stride[1] = c.weight.stride[3];  // columns take the place of tokens: a row can start at any column
  c.gain = rows(o.gain, 0), c.norm_weight = rows(o.norm_weight, 0);
  c.cos = rows(o.cos, leading), c.sin = rows(o.sin, leading);
  c.double_precision = any_double({&like, o.reads, o.weight, o.gain, o.norm_weight, o.cos, o.sin});
  return c;
}

}  // namespace
}  // namespace deltamem
