// As tensors.h, for the operations of core/layer_args.h.
#pragma once

#include <tuple>

#include "../core/layer_args.h"
#include "tensors.h"

namespace deltamem {
namespace {

// The weights of q, k and v, each [H R, D], of the packed [3 H R, D].
void split_qkv(const Tensor& packed, Operand (&weights)[3]) {
  const int64_t part = packed.size(0) / 3 * packed.stride(0) * packed.element_size();
  for (int i = 0; i < 3; ++i) {
    weights[i] = operand(packed);
    weights[i].data = static_cast<char*>(weights[i].data) + i * part;
  }
}

// memory_projection of operands as they are; what it results in is not there yet.
ProjectionArgs projection_of(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight,
                         const MaybeTensor& beta_bias, const MaybeTensor& decay_weight, const MaybeTensor& decay_bias,
                         int64_t heads, bool normalize) {
  ProjectionArgs p{};
  const bool tokens = x.dim() == 3;
  p.B = tokens ? x.size(0) : 1, p.T = x.size(-2), p.D = x.size(-1);
  p.H = heads, p.R = qkv_weight.size(0) / (3 * heads), p.normalize = normalize;
  for (const MaybeTensor& w : {MaybeTensor(x), MaybeTensor(qkv_weight), MaybeTensor(beta_weight), beta_bias,
                               decay_weight, decay_bias})
    p.double_precision = p.double_precision || (w && w->scalar_type() == at::kDouble);
  p.x = {x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < x.dim(); ++i) p.x.stride[tokens ? i : i + 1] = x.stride(i);
  split_qkv(qkv_weight, p.qkv_weight);
  p.gates[0] = {operand(beta_weight), operand(beta_bias), beta_weight.size(0), nullptr};
  p.gates[1] = {operand(decay_weight), operand(decay_bias), decay_weight ? decay_weight->size(0) : 0, nullptr};
  return p;
}

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> Projected;

// q, k, v, beta, decay and norms, empty, of which p has the pointers from now on.
Projected projected(ProjectionArgs& p, const Tensor& x) {
  const bool tokens = x.dim() == 3;
  const auto options = x.options().dtype(p.double_precision ? at::kDouble : at::kFloat);
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

// The correction of rows like `like`; where the result goes is not said yet.
CorrectionArgs correction_of(const Tensor& like, const MaybeTensor& base, const Tensor& reads, const Tensor& weight,
                         const MaybeTensor& gain, const MaybeTensor& norm_weight, const MaybeTensor& cos,
                         const MaybeTensor& sin, double scale, double norm_eps, int64_t head_dim) {
  CorrectionArgs c{};
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

}  // namespace
}  // namespace deltamem
