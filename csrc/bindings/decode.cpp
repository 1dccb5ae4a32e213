// memory_decode on a CPU: a decoding step of a layer in one call.
#include "cpu.h"

namespace deltamem {

TokenArgs project_token(const ProjectionOperands& o, Mode mode, bool double_state) {
  TokenArgs t;
  ProjectionArgs p = with_converted_weights(o, t.held);
  const Tensor& x = *o.x;
  const DType type = p.double_precision ? DType::f64 : DType::f32;
  const auto options = arithmetic(x, p.double_precision);
  const int64_t N = p.B * p.T, width = p.H * p.R;
  t.reads = x.dim() == 3 ? at::empty({N, 1, p.H, p.R}, options) : at::empty({N, p.H, p.R}, options);

  // q, k, v and the gates share one allocation, where the step reads them.
  t.projected = at::empty({N * (p.rows() + 2 * p.H)}, options);
  char* next = static_cast<char*>(t.projected.data_ptr());
  const auto rows = [&](void*& out, int64_t columns) {  // [N, H, R], or [N, H] for a gate per head
    out = next;
    next += N * columns * t.projected.element_size();
    return columns == width ? Operand{out, type, {width, 0, p.R, 1}} : Operand{out, type, {p.H, 0, 1, 0}};
  };
  ScanArgs& token = t.step;
  token.B = token.N = N, token.T = 1, token.H = p.H, token.R = p.R, token.mode = mode;
  token.double_precision = p.double_precision || double_state;
  token.q = rows(p.q, width), token.k = rows(p.k, width), token.v = rows(p.v, width);
  token.beta = rows(p.gates[0].out, p.gates[0].rows);
  if (o.decay_weight) token.decay = rows(p.gates[1].out, p.gates[1].rows);
  p.norms = next;
  run_projection(p);
  t.reads_rows = {t.reads.data_ptr(), type, {width, 0, p.R, 1}};
  return t;
}

DecodeResult decode(const DecodeOperands& d) {
  const TokenArgs token = project_token(d.projection(), d.mode, d.state->scalar_type() == at::kDouble);
  StepOperands on_pool{};
  on_pool.state = d.state, on_pool.state_indices = d.state_indices, on_pool.pad_slot_id = d.pad_slot_id;
  on_pool.update_state = true;
  run_step(token.step, on_pool, token.reads_rows);
  if (!d.delta_weight) return {token.reads, at::empty({0}, d.x->options())};
  const MaybeTensor out = d.out ? MaybeTensor(*d.out) : std::nullopt;
  Tensor corrected = correct(d.correction(&token.reads), out);
  return {token.reads, out ? at::empty({0}, d.x->options()) : corrected};
}

}  // namespace deltamem
