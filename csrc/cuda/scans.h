// The scans of the plain and of the time-parallel form: whole sequences, and chunks of those that have at least
// chunked_from tokens.
#pragma once

#include "kernels.h"

namespace deltamem {
namespace cuda {

int forward_scan(const Problem& p, const ForwardOutput& out, int64_t chunked_from, Stream stream);
int backward_scan(const Problem& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                  const void* d_checkpoints, const BackwardOutput& out, void* history, int64_t chunked_from,
                  Stream stream);
int64_t history_bytes(const Problem& p, int64_t chunked_from);

}  // namespace cuda
}  // namespace deltamem
