// What the bindings of the CPU kernels share.
#pragma once

#include <ATen/Parallel.h>

#include <tuple>

#include "cpu/isa.h"
#include "tensors.h"

namespace deltamem {

const Kernels*& kernels();  // of the instruction set in use

// What the operations are on torch's tensors, as in backends/reference*.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projection(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight, const MaybeTensor& beta_bias,
    const MaybeTensor& decay_weight, const MaybeTensor& decay_bias, int64_t heads, bool normalize);
void step(const Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
          const MaybeTensor& decay, const MaybeTensor& state_indices, const MaybeTensor& num_accepted_tokens,
          const MaybeTensor& intermediate_states, const Tensor& out, const std::string& mode, int64_t pad_slot_id,
          bool update_state);
Tensor correct(const Tensor& base, const Tensor& reads, const Tensor& weight, const MaybeTensor& gain,
               const MaybeTensor& norm_weight, const MaybeTensor& cos, const MaybeTensor& sin, double scale,
               double norm_eps, int64_t head_dim, const MaybeTensor& given);

void bind_layer(py::module_& m);
void bind_projection(py::module_& m);
void bind_correction(py::module_& m);

}  // namespace deltamem
