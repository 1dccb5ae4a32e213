// memory_decode: a decoding step of a layer, between one call from Python and its return.
#include "cpu.h"

namespace deltamem {
namespace {

std::tuple<Tensor, Tensor> memory_decode(
    const Tensor& state, const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight,
    const MaybeTensor& beta_bias, const MaybeTensor& decay_weight, const MaybeTensor& decay_bias,
    const MaybeTensor& state_indices, const MaybeTensor& base, const MaybeTensor& delta_weight,
    const MaybeTensor& gain, const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin,
    const MaybeTensor& out, int64_t heads, bool normalize, const std::string& mode, int64_t pad_slot_id, double scale,
    double norm_eps, int64_t head_dim) {
  Tensor held[3];
  ProjectionArgs p =
      held_projection(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, held);
  const DType type = p.double_precision ? DType::f64 : DType::f32;
  const auto options = x.options().dtype(p.double_precision ? at::kDouble : at::kFloat);
  const int64_t N = p.B * p.T, width = p.H * p.R;
  Tensor reads = x.dim() == 3 ? at::empty({N, 1, p.H, p.R}, options) : at::empty({N, p.H, p.R}, options);

  // What is projected, in one piece of memory, and how the step finds it there.
  Tensor projected = at::empty({N * (p.rows() + 2 * p.H)}, options);
  char* next = static_cast<char*>(projected.data_ptr());
  const auto rows = [&](void*& out, int64_t columns) {  // [N, H, R], or [N, H] for a gate per head
    out = next;
    next += N * columns * projected.element_size();
    return columns == width ? Operand{out, type, {width, 0, p.R, 1}} : Operand{out, type, {p.H, 0, 1, 0}};
  };
  ScanArgs token{};
  token.B = token.N = N, token.T = 1, token.H = p.H, token.R = p.R;
  token.mode = mode_named(mode), token.double_precision = p.double_precision;
  token.q = rows(p.q, width), token.k = rows(p.k, width), token.v = rows(p.v, width);
  token.beta = rows(p.gates[0].out, p.gates[0].rows);
  if (decay_weight) token.decay = rows(p.gates[1].out, p.gates[1].rows);
  p.norms = next;
  run_projection(p);
  run_step(token, state, state_indices, {}, {}, Operand{reads.data_ptr(), type, {width, 0, p.R, 1}}, pad_slot_id, true);
  if (!delta_weight) return {reads, at::empty({0}, x.options())};
  Tensor corrected =
      correct(base ? *base : *out, reads, *delta_weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out);
  return {reads, out ? at::empty({0}, x.options()) : corrected};
}

}  // namespace

void bind_layer(py::module_& m) { m.def("memory_decode", &memory_decode); }

}  // namespace deltamem
