// What the files that know torch share.
#pragma once

#include <ATen/core/Tensor.h>
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

const Kernels*& kernels();  // of the instruction set in use
DType dtype(const Tensor& x);

void bind_correction(py::module_& m);

}  // namespace deltamem
