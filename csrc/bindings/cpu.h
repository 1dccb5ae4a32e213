// What the bindings of the CPU kernels share.
#pragma once

#include <tuple>

#include "../cpu/kernel_table.h"
#include "layer_tensors.h"
#include "tensors.h"

namespace deltamem {

const Kernels*& kernels();  // of the instruction set in use

typedef std::tuple<Tensor, Tensor, Tensor> ScanResult;  // reads, final_state, checkpoints
typedef std::tuple<Tensor, Tensor> DecodeResult;        // reads, corrected

// Each takes checked operands; values of indices are checked here.
ScanResult scan(const ScanOperands& s, bool save, bool chunked);
void step(const StepOperands& s);
void run_step(const ScanArgs& p, const StepOperands& s, const Operand& reads);  // p and reads need not be s's own
Tensor correct(const CorrectionOperands& c, const MaybeTensor& given_out);
Projected project(const ProjectionOperands& p);
DecodeResult decode(const DecodeOperands& d);

// The projection's arguments with its weights in one dtype and with unit stride along D. Weights that had to be
// converted for this are kept alive in `held`. The caller sets where the results go.
ProjectionArgs with_converted_weights(const ProjectionOperands& o, std::vector<Tensor>& held);
void run_projection(const ProjectionArgs& p);

void bind_eager(py::module_& m);

}  // namespace deltamem
