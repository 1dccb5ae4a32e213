// memory_decode on a CPU: a decoding step of a layer in one call.
#include "cpu.h"

namespace deltamem {

DecodeResult decode(const DecodeOperands& d) {
  const Tensor& x = *d.x;
  std::vector<Tensor> held;
  ProjectionArgs p = with_converted_weights(d.projection(), held);
  const DType type = p.double_precision ? DType::f64 : DType::f32;
  const auto options = arithmetic(x, p.double_precision);
  const int64_t N = p.B * p.T, width = p.H * p.R;
  Tensor reads = x.dim() == 3 ? at::empty({N, 1, p.H, p.R}, options) : at::empty({N, p.H, p.R}, options);

  // q, k, v and the gates share one allocation, where the step reads them.
  Tensor projected = at::empty({N * (p.rows() + 2 * p.H)}, options);
  char* next = static_cast<char*>(projected.data_ptr());
  const auto rows = [&](void*& out, int64_t columns) {  // [N, H, R], or [N, H] for a gate per head
    out = next;
    next += N * columns * projected.element_size();
    return columns == width ? Operand{out, type, {width, 0, p.R, 1}} : Operand{out, type, {p.H, 0, 1, 0}};
  };
  ScanArgs token{};
  token.B = token.N = N, token.T = 1, token.H = p.H, token.R = p.R, token.mode = d.mode;
  token.double_precision = p.double_precision || d.state->scalar_type() == at::kDouble;
  token.q = rows(p.q, width), token.k = rows(p.k, width), token.v = rows(p.v, width);
  token.beta = rows(p.gates[0].out, p.gates[0].rows);
  if (d.decay_weight) token.decay = rows(p.gates[1].out, p.gates[1].rows);
  p.norms = next;
  run_projection(p);
  StepOperands on_pool{};
  on_pool.state = d.state, on_pool.state_indices = d.state_indices, on_pool.pad_slot_id = d.pad_slot_id;
  on_pool.update_state = true;
  run_step(token, on_pool, Operand{reads.data_ptr(), type, {width, 0, p.R, 1}});
  if (!d.delta_weight) return {reads, at::empty({0}, x.options())};
  const MaybeTensor out = d.out ? MaybeTensor(*d.out) : std::nullopt;
  Tensor corrected = correct(d.correction(&reads), out);
  return {reads, out ? at::empty({0}, x.options()) : corrected};
}

}  // namespace deltamem
