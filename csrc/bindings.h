// What the bindings share: tensors to raw pointers, and the instruction set in use. The bindings alone know torch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/problem.h"

namespace py = pybind11;
using at::Tensor;
typedef std::optional<Tensor> MaybeTensor;

namespace deltamem {

// The kernels of the instruction set in use.
const Kernels*& kernels();

DType dtype(const Tensor& x);

// Numbers of an int32 or int64 tensor; null where it is absent.
struct Indices {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride[2] = {};
  explicit Indices(const MaybeTensor& x) {
    if (!x) return;
    data = x->const_data_ptr(), wide = x->scalar_type() == at::kLong;
    for (int64_t i = 0; i < x->dim(); ++i) stride[i] = x->stride(i);
  }
  int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * stride[0] + j * stride[1];
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

void bind_projection(py::module_& m);
void bind_correction(py::module_& m);

}  // namespace deltamem
