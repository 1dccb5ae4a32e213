// What the bindings of the CPU kernels share.
#pragma once

#include <ATen/Parallel.h>

#include <tuple>

#include "../cpu/kernel_table.h"
#include "tensors.h"

namespace deltamem {

const Kernels*& kernels();  // of the instruction set in use

// The operations that memory_decode is made of. The weights as the kernel reads them are kept alive in `held`; where
// the results go is left to the caller.
ProjectionArgs held_projection(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight,
                           const MaybeTensor& beta_bias, const MaybeTensor& decay_weight, const MaybeTensor& decay_bias,
                           int64_t heads, bool normalize, Tensor (&held)[3]);
void run_projection(const ProjectionArgs& p);
// ScanArgs of the tokens' operands; reads as they are.
void run_step(ScanArgs p, const Tensor& state, const MaybeTensor& state_indices, const MaybeTensor& num_accepted_tokens,
              const MaybeTensor& intermediate_states, const Operand& reads, int64_t pad_slot_id, bool update_state);
Tensor correct(const Tensor& base, const Tensor& reads, const Tensor& weight, const MaybeTensor& gain,
               const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin, double scale,
               double norm_eps, int64_t head_dim, const MaybeTensor& given);

void bind_fingerprint(py::module_& m);
void bind_layer(py::module_& m);
void bind_projection(py::module_& m);
void bind_correction(py::module_& m);

}  // namespace deltamem
