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

struct LayerStepResult {
  Tensor reads, state;
  std::vector<Tensor> corrections;
};

// Each takes checked operands; values of indices are checked here.
ScanResult scan(const ScanOperands& s, bool save, bool chunked);
void step(const StepOperands& s);
void run_step(const ScanArgs& p, const StepOperands& s, const Operand& reads);  // p and reads need not be s's own
void run_step(const ScanArgs& p, const StepArgs& step);
Tensor correct(const CorrectionOperands& c, const MaybeTensor& given_out);
Projected project(const ProjectionOperands& p);
DecodeResult decode(const DecodeOperands& d);
LayerStepResult layer_step(const LayerStepOperands& o);

// The projection's arguments with its weights in one dtype and with unit stride along D. Weights that had to be
// converted for this are kept alive in `held`. The caller sets where the results go.
ProjectionArgs with_converted_weights(const ProjectionOperands& o, std::vector<Tensor>& held);
void run_projection(const ProjectionArgs& p);

// One token of each of N rows, projected, as a step takes it.
struct TokenArgs {
  std::vector<Tensor> held;
  Tensor projected, reads;  // reads are allocated, and computed by the step
  ScanArgs step{};
  Operand reads_rows;
};
TokenArgs project_token(const ProjectionOperands& o, Mode mode, bool double_state);

void bind_eager(py::module_& m);

}  // namespace deltamem
