// Whether operands fit, for the fast path. These functions mirror the checks in deltamem_kernels/operands, which raise
// the errors.
#pragma once

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "layer_tensors.h"
#include "records.h"

namespace deltamem {
namespace {

constexpr int64_t kMaxRank = 128;
typedef std::vector<int64_t> Sizes;

bool is_float(const Tensor& x) {
  const auto type = x.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}
bool is_index(const Tensor& x) { return x.scalar_type() == at::kInt || x.scalar_type() == at::kLong; }
bool is_rank(int64_t R) { return 1 <= R && R <= kMaxRank; }

bool has_sizes(const Tensor& x, at::IntArrayRef sizes) { return is_float(x) && x.sizes() == sizes; }
// A gate per row, of `sizes`, or per head.
bool is_gate(const Tensor& x, at::IntArrayRef sizes) {
  return is_float(x) && (x.sizes() == sizes || x.sizes() == sizes.slice(0, sizes.size() - 1));
}

// Whether no dimension is expanded. Like the check in Python, this finds no other internal overlap.
bool is_writable(const Tensor& x) {
  for (int64_t i = 0; i < x.dim(); ++i)
    if (x.stride(i) == 0 && x.size(i) > 1) return false;
  return true;
}
// Whether x shares its storage with no operand. The check in Python looks closer.
bool is_apart(const Tensor& x, std::initializer_list<TensorPtr> operands) {
  const auto* storage = x.storage().unsafeGetStorageImpl();
  return std::none_of(operands.begin(), operands.end(), [&](TensorPtr other) {
    return other && other->storage().unsafeGetStorageImpl() == storage;
  });
}

bool mode_fits(Mode mode, TensorPtr decay) { return mode != Mode::affine && !(mode == Mode::no_lambda && decay); }

// Whether states of H heads of rank R, a mask and bounds fit `tokens`, [B, T].
bool sequences_fit(at::IntArrayRef tokens, int64_t H, int64_t R, TensorPtr initial_state, TensorPtr mask,
                   TensorPtr cu_seqlens) {
  int64_t sequences = tokens[0];
  if (cu_seqlens) {
    if (!is_index(*cu_seqlens) || cu_seqlens->dim() != 1 || cu_seqlens->size(0) < 1 || tokens[0] != 1) return false;
    sequences = cu_seqlens->size(0) - 1;
  }
  if (initial_state && !has_sizes(*initial_state, {sequences, H, R, R})) return false;
  return !mask || (mask->scalar_type() == at::kBool && mask->sizes() == tokens);
}

bool fits(const ScanOperands& s) {
  const Tensor& q = *s.q;
  if (!is_float(q) || q.dim() != 4 || !is_rank(q.size(3)) || q.size(2) < 1 || s.write) return false;
  const auto sizes = q.sizes();
  if (!has_sizes(*s.k, sizes) || !has_sizes(*s.v, sizes) || !is_gate(*s.beta, sizes)) return false;
  if (!mode_fits(s.mode, s.decay) || (s.decay && !is_gate(*s.decay, sizes))) return false;
  return sequences_fit(sizes.slice(0, 2), q.size(2), q.size(3), s.initial_state, s.mask, s.cu_seqlens);
}

bool pool_fits(const Tensor& state, int64_t H, int64_t R) {
  return is_float(state) && state.dim() == 4 && state.size(1) == H && state.size(2) == R && state.size(3) == R;
}

bool fits(const StepOperands& s) {
  const Tensor& q = *s.q;
  const int64_t dim = q.dim();
  if (!is_float(q) || (dim != 3 && dim != 4) || !is_rank(q.size(-1))) return false;
  const auto sizes = q.sizes();
  const int64_t N = q.size(0), T = dim == 4 ? q.size(1) : 1, H = q.size(-2), R = q.size(-1);
  for (TensorPtr x : {s.k, s.v, s.out})
    if (!has_sizes(*x, sizes)) return false;
  if (!is_gate(*s.beta, sizes) || (s.decay && !is_gate(*s.decay, sizes)) || !mode_fits(s.mode, s.decay)) return false;
  if (!pool_fits(*s.state, H, R)) return false;
  if (s.state_indices) {
    const Tensor& slots = *s.state_indices;
    const bool per_row = slots.dim() == 1, per_token = slots.dim() == 2;
    if (!is_index(slots) || !(per_row || per_token) || slots.size(0) != N || (per_token && slots.size(1) != T))
      return false;
  } else if (s.state->size(0) < N) {
    return false;
  }
  if (s.num_accepted_tokens) {
    const Tensor& accepted = *s.num_accepted_tokens;
    if (!is_index(accepted) || accepted.dim() != 1 || accepted.size(0) != N) return false;
    if (!s.state_indices || s.state_indices->dim() != 2) return false;
  }
  if (s.update_state && !(is_writable(*s.state) && is_apart(*s.state, {s.q, s.k, s.v, s.beta, s.decay}))) return false;
  if (s.intermediate_states) {
    const Tensor& states = *s.intermediate_states;
    const bool sized = dim == 4 ? has_sizes(states, {N, T, H, R, R}) : has_sizes(states, {N, H, R, R});
    if (!sized || !is_writable(states) || !is_apart(states, {s.q, s.k, s.v, s.beta, s.decay})) return false;
  }
  return is_writable(*s.out) && is_apart(*s.out, {s.q, s.k, s.v, s.beta, s.decay, s.state, s.intermediate_states});
}

// A gate's weight and bias, where q has `width` rows of D numbers.
bool gate_fits(const Tensor& weight, TensorPtr bias, int64_t width, int64_t H, int64_t D) {
  if (!is_float(weight) || weight.dim() != 2 || weight.size(1) != D) return false;
  if (weight.size(0) != width && weight.size(0) != H) return false;
  return !bias || has_sizes(*bias, {weight.size(0)});
}

bool fits(const ProjectionOperands& o) {
  const Tensor& x = *o.x;
  if (!is_float(x) || (x.dim() != 2 && x.dim() != 3) || o.heads < 1) return false;
  const int64_t D = x.size(-1);
  for (int i = 0; i < o.qkv_weight.count; ++i) {
    const Tensor& weight = *o.qkv_weight.parts[i];
    if (!is_float(weight) || weight.dim() != 2 || weight.size(1) != D || o.heads > weight.size(0)) return false;
    const int64_t of_rows = o.qkv_weight.count == 3 ? o.heads : 3 * o.heads;
    if (weight.size(0) % of_rows || !is_rank(weight.size(0) / of_rows)) return false;
    if (weight.size(0) != o.qkv_weight.parts[0]->size(0)) return false;
  }
  const int64_t width = memory_width(o.qkv_weight);
  if (!gate_fits(*o.beta_weight, o.beta_bias, width, o.heads, D)) return false;
  return o.decay_weight ? gate_fits(*o.decay_weight, o.decay_bias, width, o.heads, D) : !o.decay_bias;
}

bool fits(const PrefillOperands& p) {
  if (!fits(p.projection()) || p.x->dim() != 3 || !mode_fits(p.mode, p.decay_weight)) return false;
  const int64_t R = memory_width(p.qkv_weight) / p.heads;
  return sequences_fit(p.x->sizes().slice(0, 2), p.heads, R, p.initial_state, p.mask, p.cu_seqlens);
}

// Whether everything but reads and weight fits.
bool options_fit(const CorrectionOperands& c, TensorPtr out) {
  const Tensor& base = *c.base;
  const int64_t D = base.size(-1), head_dim = c.head_dim;
  if (c.gain && !has_sizes(*c.gain, {})) return false;
  if (head_dim < 0 || (head_dim && D % head_dim) || !(c.norm_eps >= 0)) return false;
  if (c.norm_weight && !has_sizes(*c.norm_weight, {head_dim ? head_dim : D})) return false;
  if (!c.cos != !c.sin || (c.cos && (!head_dim || head_dim % 2))) return false;
  for (TensorPtr table : {c.cos, c.sin}) {
    if (!table) continue;
    if (at::GradMode::is_enabled() && table->requires_grad()) return false;  // there is no gradient for it
    if (!is_float(*table) || table->dim() != base.dim() || table->size(-1) != head_dim) return false;
    if (table->size(0) != base.size(0) && table->size(0) != 1) return false;
    if (base.dim() == 3 && table->size(1) != base.size(1)) return false;
  }
  if (!out) return true;
  if (out->scalar_type() != base.scalar_type() || out->sizes() != base.sizes() || !is_writable(*out)) return false;
  if (!is_apart(*out, {c.reads, c.weight, c.gain, c.norm_weight, c.cos, c.sin})) return false;
  return out == c.base || is_apart(*out, {c.base});
}

bool fits(const CorrectionOperands& c, TensorPtr out) {
  if (!c.base || !is_float(*c.base) || (c.base->dim() != 2 && c.base->dim() != 3)) return false;
  const Tensor &base = *c.base, &reads = *c.reads, &weight = *c.weight;
  if (!is_float(weight) || weight.dim() != 2 || weight.size(0) != base.size(-1) || weight.size(1) < 1) return false;
  const int64_t leading = base.dim() - 1;
  const bool heads = reads.dim() == leading + 2;
  if (!is_float(reads) || !(heads || reads.dim() == leading + 1)) return false;
  if (reads.sizes().slice(0, leading) != base.sizes().slice(0, leading)) return false;
  if ((heads ? reads.size(-2) : 1) * reads.size(-1) != weight.size(1)) return false;
  return options_fit(c, out);
}

bool fits(const DecodeOperands& d) {
  const ProjectionOperands projection = d.projection();
  if (!fits(projection) || !mode_fits(d.mode, d.decay_weight)) return false;
  const Tensor& x = *d.x;
  const int64_t N = x.size(0), width = memory_width(d.qkv_weight);
  if ((x.dim() == 3 && x.size(1) != 1) || !pool_fits(*d.state, d.heads, width / d.heads)) return false;
  if (d.state_indices ? !is_index(*d.state_indices) || d.state_indices->dim() != 1 || d.state_indices->size(0) != N
                      : d.state->size(0) < N)
    return false;
  const TensorPtr base = d.base ? d.base : d.out;
  if (!is_writable(*d.state) || !is_apart(*d.state, {d.x, d.base, d.out})) return false;
  if (!base) return !d.delta_weight && !d.norm_weight && !d.cos && !d.sin && !d.gain && !d.head_dim && d.scale == 1;
  const int64_t leading = x.dim() - 1;
  if (!is_float(*base) || base->dim() != x.dim()) return false;
  if (base->sizes().slice(0, leading) != x.sizes().slice(0, leading)) return false;
  if (!d.delta_weight || !has_sizes(*d.delta_weight, {base->size(-1), width})) return false;
  return options_fit(d.correction(nullptr), d.out);
}

bool fits(const LayerStepOperands& o) {
  const LayerStepWeights& w = o.weights;
  if (!fits(o.projection()) || !mode_fits(w.mode, w.decay_weight)) return false;
  const Tensor& x = *o.x;
  const int64_t B = x.size(0), width = memory_width(w.qkv_weight), R = width / w.heads;
  if (x.dim() == 3 && x.size(1) != 1) return false;
  if (o.state && !has_sizes(*o.state, {B, w.heads, R, R})) return false;
  if (o.mask && !(o.mask->scalar_type() == at::kBool && o.mask->sizes() == x.sizes().slice(0, x.dim() - 1)))
    return false;
  if (w.gains.count && w.gains.count != w.delta_weights.count) return false;
  for (int i = 0; i < w.delta_weights.count; ++i) {
    const Tensor& weight = *w.delta_weights.items[i];
    if (!is_float(weight) || weight.dim() != 2 || weight.size(1) != width) return false;
    if (w.gains.count && !has_sizes(*w.gains.items[i], {})) return false;
  }
  if (!(w.norm_eps >= 0)) return false;
  if (!w.norm_weight) return true;
  return w.delta_weights.count && has_sizes(*w.norm_weight, {w.delta_weights.items[w.delta_weights.count - 1]->size(0)});
}

}  // namespace
}  // namespace deltamem
