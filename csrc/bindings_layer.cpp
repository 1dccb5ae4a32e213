// memory_decode: a decoding step of a layer, between one call from Python and its return.
#include "bindings.h"

namespace deltamem {
namespace {

std::tuple<Tensor, Tensor> memory_decode(
    const Tensor& state, const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight,
    const MaybeTensor& beta_bias, const MaybeTensor& decay_weight, const MaybeTensor& decay_bias,
    const MaybeTensor& state_indices, const MaybeTensor& base, const MaybeTensor& delta_weight,
    const MaybeTensor& gain, const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin,
    const MaybeTensor& out, int64_t heads, bool normalize, const std::string& mode, int64_t pad_slot_id, double scale,
    double norm_eps, int64_t head_dim) {
  const auto [q, k, v, beta, decay, norms] =
      projection(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize);
  Tensor reads = at::empty(q.sizes(), q.options());
  step(state, q, k, v, beta, decay_weight ? MaybeTensor(decay) : MaybeTensor(), state_indices, {}, {}, reads, mode,
       pad_slot_id, true);
  if (!delta_weight) return {reads, at::empty({0}, x.options())};
  Tensor corrected =
      correct(base ? *base : *out, reads, *delta_weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out);
  return {reads, out ? at::empty({0}, x.options()) : corrected};
}

}  // namespace

void bind_layer(py::module_& m) { m.def("memory_decode", &memory_decode); }

}  // namespace deltamem
