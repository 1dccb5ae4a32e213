// From operand records to the arguments of the scan's kernels: raw pointers and strides. Only bindings include this.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/scan_args.h"
#include "records.h"

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

// Whether the arithmetic is float64: as soon as one operand is.
bool any_double(std::initializer_list<TensorPtr> operands) {
  for (TensorPtr x : operands)
    if (x && x->scalar_type() == at::kDouble) return true;
  return false;
}

// The dtype of the arithmetic.
at::TensorOptions arithmetic(const Tensor& like, bool double_precision) {
  return like.options().dtype(double_precision ? at::kDouble : at::kFloat);
}

// A gate per head, [B, T, H], has stride 0 over the rows. Without tokens ([N, H, R], one token each) the second stride
// is 0.
Operand operand(const Tensor& x, bool tokens = true) {
  Operand o{x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < x.dim(); ++i) o.stride[i && !tokens ? i + 1 : i] = x.stride(i);
  return o;
}
Operand operand(TensorPtr x, bool tokens = true) { return x ? operand(*x, tokens) : Operand{}; }
Operand operand(const MaybeTensor& x) { return x ? operand(*x) : Operand{}; }

// Everything but cu_seqlens, which is read on a CPU and not on a GPU.
ScanArgs scan_args(const ScanOperands& s) {
  ScanArgs a{};
  const Tensor& q = *s.q;
  const bool tokens = q.dim() == 4;
  a.B = q.size(0), a.T = tokens ? q.size(1) : 1, a.H = q.size(-2), a.R = q.size(-1), a.N = a.B;
  a.mode = s.mode;
  a.double_precision = any_double({s.q, s.k, s.v, s.beta, s.decay, s.write, s.initial_state});
  a.q = operand(q, tokens), a.k = operand(s.k, tokens), a.v = operand(s.v, tokens), a.beta = operand(s.beta, tokens);
  a.decay = operand(s.decay, tokens), a.write = operand(s.write, tokens), a.initial_state = operand(s.initial_state);
  if (s.mask) {
    a.mask = s.mask->const_data_ptr<bool>();
    a.mask_stride[0] = s.mask->stride(0), a.mask_stride[1] = s.mask->stride(1);
  }
  return a;
}

// The operands of the tokens of a step, which are scanned from the states of a pool.
ScanArgs scan_args(const StepOperands& s) {
  ScanArgs a = scan_args(ScanOperands{s.q, s.k, s.v, s.beta, s.decay, nullptr, nullptr, nullptr, nullptr, s.mode});
  a.double_precision = a.double_precision || s.state->scalar_type() == at::kDouble;
  return a;
}

// Empty tensors like q, k, v, beta, decay, write and initial_state, contiguous, where a gradient is needed.
std::vector<MaybeTensor> empty_gradients(const ScanOperands& s, const std::vector<bool>& needs) {
  const TensorPtr like[] = {s.q, s.k, s.v, s.beta, s.decay, s.write, s.initial_state};
  std::vector<MaybeTensor> grads(7);
  for (size_t i = 0; i < 7; ++i)
    if (needs[i]) grads[i] = at::empty(like[i]->sizes(), like[i]->options());
  return grads;
}

ScanGradients scan_gradients(const std::vector<MaybeTensor>& grads) {
  const auto per_head = [&](int i) { return grads[i] && grads[i]->dim() == 3; };
  return {operand(grads[0]), operand(grads[1]), operand(grads[2]), operand(grads[3]), operand(grads[4]),
          operand(grads[5]), per_head(3),       per_head(4),       per_head(5),       operand(grads[6])};
}

// The values of an int32 or int64 tensor.
Indices indices(TensorPtr x) {
  Indices found;
  if (!x) return found;
  found.data = x->const_data_ptr(), found.wide = x->scalar_type() == at::kLong;
  for (int64_t i = 0; i < x->dim(); ++i) found.stride[i] = x->stride(i);
  return found;
}

// The first row of intermediate_states, [T, H, R, R] or [H, R, R].
Operand intermediate_row(TensorPtr x) {
  if (!x) return {};
  const int64_t token = x->dim() == 5 ? x->stride(1) : 0;
  return {x->data_ptr(), dtype(*x), {token, x->stride(-3), x->stride(-2), x->stride(-1)}};
}

}  // namespace
}  // namespace deltamem
