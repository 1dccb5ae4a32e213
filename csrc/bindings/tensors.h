// From torch's tensors to what the kernels are given: raw pointers and strides. Only bindings include this.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/scan_args.h"

namespace py = pybind11;
using at::Tensor;
typedef std::optional<Tensor> MaybeTensor;

namespace deltamem {
namespace {

DType dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    default: throw std::invalid_argument(std::string("no kernel for dtype ") + c10::toString(x.scalar_type()));
  }
}

// A gate per head, [B, T, H], has the same number in all rows: stride 0. Without tokens ([N, H, R], one token each)
// the second stride is not there, and is left 0.
Operand operand(const Tensor& x, bool tokens = true) {
  Operand o{x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < x.dim(); ++i) o.stride[i && !tokens ? i + 1 : i] = x.stride(i);
  return o;
}
Operand operand(const MaybeTensor& x, bool tokens = true) { return x ? operand(*x, tokens) : Operand{}; }

Mode mode_named(const std::string& name) {
  if (name == "standard") return Mode::standard;
  if (name == "lambda_outside") return Mode::lambda_outside;
  if (name == "no_lambda") return Mode::no_lambda;
  if (name == "affine") return Mode::affine;
  throw std::invalid_argument("no mode " + name);
}

// All but cu_seqlens, which the CPU reads and a GPU does not.
ScanArgs scan_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const MaybeTensor& decay,
                const MaybeTensor& write, const MaybeTensor& initial_state, const MaybeTensor& mask,
                const std::string& mode) {
  ScanArgs p{};
  const bool tokens = q.dim() == 4;
  p.B = q.size(0), p.T = tokens ? q.size(1) : 1, p.H = q.size(-2), p.R = q.size(-1), p.N = p.B;
  p.mode = mode_named(mode);
  for (const MaybeTensor& x : {MaybeTensor(q), MaybeTensor(k), MaybeTensor(v), MaybeTensor(beta), decay, write,
                               initial_state})
    p.double_precision = p.double_precision || (x && x->scalar_type() == at::kDouble);
  p.q = operand(q, tokens), p.k = operand(k, tokens), p.v = operand(v, tokens), p.beta = operand(beta, tokens);
  p.decay = operand(decay, tokens), p.write = operand(write, tokens), p.initial_state = operand(initial_state);
  if (mask) {
    p.mask = mask->const_data_ptr<bool>();
    p.mask_stride[0] = mask->stride(0), p.mask_stride[1] = mask->stride(1);
  }
  return p;
}

// Of q, k, v, beta, decay, write and initial_state those that are needed, like them but contiguous.
std::vector<MaybeTensor> gradients(const std::vector<MaybeTensor>& like, const std::vector<bool>& needs) {
  std::vector<MaybeTensor> grads(like.size());
  for (size_t i = 0; i < like.size(); ++i)
    if (needs[i]) grads[i] = at::empty(like[i]->sizes(), like[i]->options());
  return grads;
}

ScanGradients backward_output(const std::vector<MaybeTensor>& grads) {
  const auto per_head = [&](int i) { return grads[i] && grads[i]->dim() == 3; };
  return {operand(grads[0]), operand(grads[1]), operand(grads[2]), operand(grads[3]), operand(grads[4]),
          operand(grads[5]), per_head(3),       per_head(4),       per_head(5),       operand(grads[6])};
}

// Numbers of an int32 or int64 tensor.
Indices numbers(const MaybeTensor& x) {
  Indices found;
  if (!x) return found;
  found.data = x->const_data_ptr(), found.wide = x->scalar_type() == at::kLong;
  for (int64_t i = 0; i < x->dim(); ++i) found.stride[i] = x->stride(i);
  return found;
}

// One row of intermediate_states, [T, H, R, R] or [H, R, R].
Operand intermediate(const MaybeTensor& x) {
  if (!x) return {};
  return {x->data_ptr(), dtype(*x), {x->stride(-4), x->stride(-3), x->stride(-2), x->stride(-1)}};
}

}  // namespace
}  // namespace deltamem
