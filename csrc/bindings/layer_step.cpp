// layer_step on a CPU: all that a layer's memory does for one token, in one call.
//
// Between two calls the layer's own weights have passed through the caches. Those of the memory, 110 KB at D = 576 and
// R = 8, come from memory, and the call lasts about as long as reading them. They are prefetched all at once, since
// the kernels alone do not have enough cache misses in flight.
#include <ATen/ops/zeros.h>

#include <array>
#include <cstring>

#include "cpu.h"

namespace deltamem {
namespace {

constexpr int64_t kMostPrefetched = 256 << 10;  // bytes of one tensor: about what an L2 cache has room for

void prefetch(TensorPtr x) {
  if (!x || !x->is_contiguous()) return;
  const char* const p = static_cast<const char*>(x->data_ptr());
  const int64_t bytes = std::min<int64_t>(x->numel() * x->element_size(), kMostPrefetched);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

}  // namespace

LayerStepResult layer_step(const LayerStepOperands& o) {
  const LayerStepWeights& w = o.weights;
  for (int i = 0; i < w.qkv_weight.count; ++i) prefetch(w.qkv_weight.parts[i]);
  prefetch(w.beta_weight), prefetch(w.decay_weight);
  for (int i = 0; i < w.delta_weights.count; ++i) prefetch(w.delta_weights.items[i]);

  const Tensor& x = *o.x;
  const int64_t B = x.size(0);
  const bool double_state = (o.state ? *o.state : x).scalar_type() == at::kDouble;
  const TokenArgs token = project_token(o.projection(), w.mode, double_state);
  const std::array<int64_t, 4> sizes{B, token.step.H, token.step.R, token.step.R};
  Tensor state;
  if (o.state) {
    state = at::empty(sizes, o.state->options());
    if (o.state->is_contiguous())
      std::memcpy(state.data_ptr(), o.state->data_ptr(), state.nbytes());
    else
      state.copy_(*o.state);
  } else {
    state = at::zeros(sizes, arithmetic(x, double_state));
  }
  std::vector<int64_t> rows(B);
  for (int64_t n = 0; n < B; ++n)
    rows[n] = !o.mask || static_cast<const bool*>(o.mask->data_ptr())[n * o.mask->stride(0)] ? n : kNoSlot;
  run_step(token.step, StepArgs{operand(&state), {}, token.reads_rows, rows.data(), rows.data(), 0});

  LayerStepResult result{token.reads, state, {}};
  for (int i = 0; i < w.delta_weights.count; ++i) {
    const int64_t out = w.delta_weights.items[i]->size(0);
    Tensor correction = x.dim() == 3 ? at::zeros({B, 1, out}, token.reads.options())
                                     : at::zeros({B, out}, token.reads.options());
    correct(o.correction(i, &correction, &token.reads), correction);
    result.corrections.push_back(std::move(correction));
  }
  return result;
}

}  // namespace deltamem
