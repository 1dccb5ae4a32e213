// What the bindings of the CUDA kernels share.
#pragma once

#ifdef DELTAMEM_CUDA_HOST  // the kernels on threads, for tests: tensors are the CPU's
#include "tensors.h"
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "tensors.h"
#endif

#include "../cuda/launchers.h"

namespace deltamem {

void bind_layer(py::module_& m);

namespace {

#ifdef DELTAMEM_CUDA_HOST
struct Guard {
  explicit Guard(c10::Device) {}
};
Stream current_stream() { return nullptr; }
void check_launch(int) {}
#else
typedef c10::cuda::CUDAGuard Guard;
Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
#endif

}  // namespace
}  // namespace deltamem
