// What the bindings of the CPU kernels share.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/isa.h"
#include "tensors.h"

namespace deltamem {

const Kernels*& kernels();  // of the instruction set in use

void bind_projection(py::module_& m);
void bind_correction(py::module_& m);

}  // namespace deltamem
