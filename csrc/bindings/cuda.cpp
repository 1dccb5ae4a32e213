// delta_update and delta_step for the CUDA kernels, on torch's current stream. Values on the GPU are not read back.
#include <ATen/ops/zeros.h>

#include "cuda.h"

namespace deltamem {
namespace {

// The arguments, and cu_seqlens as int64, which has to outlive the call.
struct PackedScanArgs {
  ScanArgs args;
  MaybeTensor cu_seqlens;
};

PackedScanArgs packed_scan_args(const ScanOperands& s) {
  PackedScanArgs packed{scan_args(s), {}};
  if (s.cu_seqlens) {
    packed.cu_seqlens = s.cu_seqlens->to(at::kLong).contiguous();
    packed.args.N = packed.cu_seqlens->numel() - 1;
    packed.args.cu_seqlens = packed.cu_seqlens->const_data_ptr<int64_t>();
  }
  return packed;
}

// Memory of the current stream, which may be released before the kernels have finished.
Tensor workspace(const Tensor& like, int64_t bytes) { return at::empty({bytes}, like.options().dtype(at::kByte)); }

std::tuple<Tensor, Tensor, Tensor> scan(const ScanOperands& s, bool save, int64_t chunked_from) {
  const Tensor& q = *s.q;
  const Guard guard(q.device());
  const PackedScanArgs packed = packed_scan_args(s);
  const ScanArgs& p = packed.args;
  const cuda::Needs needs = cuda::forward_needs(p, chunked_from);
  const auto type = arithmetic(q, p.double_precision);
  // Zeros where cu_seqlens might leave tokens to no sequence, and where slots lie between packed sequences.
  const auto output = [&](at::IntArrayRef sizes, const at::TensorOptions& options) {
    return packed.cu_seqlens ? at::zeros(sizes, options) : at::empty(sizes, options);
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

std::vector<MaybeTensor> scan_backward(const ScanOperands& s, const Tensor& checkpoints,
                                       const ScanCotangents& cotangents, const std::vector<bool>& needs,
                                       int64_t chunked_from) {
  const Guard guard(s.q->device());
  const PackedScanArgs packed = packed_scan_args(s);
  const ScanArgs& p = packed.args;
  const std::vector<MaybeTensor> grads = empty_gradients(s, needs);
  for (size_t i = 0; packed.cu_seqlens && i < 6; ++i)
    if (grads[i]) grads[i]->zero_();
  const Tensor memory = workspace(*s.q, cuda::backward_needs(p, chunked_from).workspace);
  {
    py::gil_scoped_release release;
    check_launch(cuda::backward(p, chunked_from, operand(cotangents.reads), operand(cotangents.final_state),
                                checkpoints.data_ptr(), scan_gradients(grads), memory.data_ptr(), current_stream()));
  }
  return grads;
}

void step(const StepOperands& s) {
  const Guard guard(s.q->device());
  const bool each = s.update_state && s.state_indices && s.state_indices->dim() == 2;
  const PoolStepArgs pool{operand(s.state),
                          intermediate_row(s.intermediate_states),
                          operand(*s.out, s.q->dim() == 4),
                          s.intermediate_states ? s.intermediate_states->stride(0) : 0,
                          s.state->size(0),
                          s.pad_slot_id,
                          indices(s.state_indices),
                          indices(s.num_accepted_tokens),
                          each,
                          s.update_state && !each};
  const ScanArgs p = scan_args(s);
  py::gil_scoped_release release;
  check_launch(cuda::step(p, pool, current_stream()));
}

}  // namespace
}  // namespace deltamem

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("scan", &deltamem::scan);
  m.def("scan_backward", &deltamem::scan_backward);
  m.def("step", &deltamem::step);
  deltamem::bind_layer(m);
}
