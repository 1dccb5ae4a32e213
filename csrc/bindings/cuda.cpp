// torch's tensors for the CUDA kernels, on torch's current stream. Values on the GPU are not looked at.
#include <ATen/ops/zeros.h>

#include "cuda.h"

namespace deltamem {
namespace {

// With cu_seqlens as int64, which has to outlive the call.
ScanArgs packed_scan_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                          const MaybeTensor& decay, const MaybeTensor& write, const MaybeTensor& initial_state,
                          const MaybeTensor& mask, MaybeTensor& cu_seqlens, const std::string& mode) {
  ScanArgs p = scan_args(q, k, v, beta, decay, write, initial_state, mask, mode);
  if (cu_seqlens) {
    cu_seqlens = cu_seqlens->to(at::kLong).contiguous();
    p.N = cu_seqlens->numel() - 1;
    p.cu_seqlens = cu_seqlens->const_data_ptr<int64_t>();
  }
  return p;
}

// Memory of the current stream: it may be given back before the kernels are done with it.
Tensor workspace(const Tensor& like, int64_t bytes) { return at::empty({bytes}, like.options().dtype(at::kByte)); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                                           const MaybeTensor& decay, const MaybeTensor& write,
                                           const MaybeTensor& initial_state, const MaybeTensor& mask,
                                           MaybeTensor cu_seqlens, const std::string& mode, bool save,
                                           int64_t chunked_from) {
  const Guard guard(q.device());
  const ScanArgs p = packed_scan_args(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode);
  const cuda::Needs needs = cuda::forward_needs(p, chunked_from);
  const auto type = q.options().dtype(p.double_precision ? at::kDouble : at::kFloat);
  // Zeros where cu_seqlens might leave tokens to no sequence, and where slots lie between packed sequences.
  const auto output = [&](at::IntArrayRef sizes, const at::TensorOptions& options) {
    return cu_seqlens ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  Tensor reads = output(q.sizes(), q.options());
  Tensor final_state = at::empty({p.N, p.H, p.R, p.R}, type);
  Tensor checkpoints = save || needs.checkpoints
                           ? output({p.B, p.T / kCheckpointInterval, p.H, p.R, p.R}, type)
                           : at::empty({0}, type);
  const Tensor memory = workspace(q, needs.workspace);
  const ScanOutput out{operand(reads), final_state.data_ptr(),
                          save || needs.checkpoints ? checkpoints.data_ptr() : nullptr};
  {
    py::gil_scoped_release release;
    check_launch(cuda::forward(p, chunked_from, out, memory.data_ptr(), current_stream()));
  }
  return {reads, final_state, save ? checkpoints : at::empty({0}, type)};
}

std::vector<MaybeTensor> backward(const MaybeTensor& d_reads, const MaybeTensor& d_final_state, const Tensor& q,
                                  const Tensor& k, const Tensor& v, const Tensor& beta, const MaybeTensor& decay,
                                  const MaybeTensor& write, const MaybeTensor& initial_state, const MaybeTensor& mask,
                                  MaybeTensor cu_seqlens, const Tensor& checkpoints, const std::string& mode,
                                  const std::vector<bool>& needs, int64_t chunked_from) {
  const Guard guard(q.device());
  const ScanArgs p = packed_scan_args(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode);
  const std::vector<MaybeTensor> grads = gradients({q, k, v, beta, decay, write, initial_state}, needs);
  for (size_t i = 0; cu_seqlens && i < 6; ++i)
    if (grads[i]) grads[i]->zero_();
  const Tensor memory = workspace(q, cuda::backward_needs(p, chunked_from).workspace);
  {
    py::gil_scoped_release release;
    check_launch(cuda::backward(p, chunked_from, operand(d_reads), operand(d_final_state), checkpoints.data_ptr(),
                                backward_output(grads), memory.data_ptr(), current_stream()));
  }
  return grads;
}

void step(const Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
          const MaybeTensor& decay, const MaybeTensor& state_indices, const MaybeTensor& num_accepted_tokens,
          const MaybeTensor& intermediate_states, const Tensor& out, const std::string& mode, int64_t pad_slot_id,
          bool update_state) {
  const Guard guard(q.device());
  ScanArgs p = scan_args(q, k, v, beta, decay, {}, {}, {}, mode);
  p.double_precision = p.double_precision || state.scalar_type() == at::kDouble;
  const bool each = update_state && state_indices && state_indices->dim() == 2;
  const PoolStepArgs s{operand(state),
                   intermediate(intermediate_states),
                   operand(out, q.dim() == 4),
                   intermediate_states ? intermediate_states->stride(0) : 0,
                   state.size(0),
                   pad_slot_id,
                   numbers(state_indices),
                   numbers(num_accepted_tokens),
                   each,
                   update_state && !each};
  py::gil_scoped_release release;
  check_launch(cuda::step(p, s, current_stream()));
}

}  // namespace
}  // namespace deltamem

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &deltamem::forward);
  m.def("backward", &deltamem::backward);
  m.def("step", &deltamem::step);
  deltamem::bind_layer(m);
}
