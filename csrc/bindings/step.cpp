// delta_step on a CPU: threads over rows. Slots are checked here.
#include "cpu.h"

#include <ATen/Parallel.h>

namespace deltamem {
namespace {

int64_t checked_slot(int64_t s, int64_t pad, int64_t slots) {
  if (s == pad) return kNoSlot;
  if (s < 0 || s >= slots)
    throw std::invalid_argument("state_indices must be from 0 to " + std::to_string(slots - 1) +
                                " or pad_slot_id, got " + std::to_string(s));
  return s;
}

// The slot each row starts from, [N], then the slot that gets the state after each token, [N, T].
std::vector<int64_t> checked_slots(const StepOperands& s, int64_t N, int64_t T) {
  std::vector<int64_t> slots(N * (1 + T), kNoSlot);
  int64_t *from = slots.data(), *to = from + N;
  const bool per_token = s.state_indices && s.state_indices->dim() == 2;
  const Indices given = indices(s.state_indices), accepted_tokens = indices(s.num_accepted_tokens);
  const int64_t pool = s.state->size(0);
  for (int64_t n = 0; T && n < N; ++n) {
    if (!per_token) {
      from[n] = checked_slot(given.data ? given.at(n) : n, s.pad_slot_id, pool);
      if (s.update_state) to[n * T + T - 1] = from[n];
      continue;
    }
    if (given.at(n) == s.pad_slot_id) continue;
    const int64_t accepted = accepted_tokens.data ? accepted_tokens.at(n) : 1;
    if (accepted < 1 || accepted > T)
      throw std::invalid_argument("num_accepted_tokens must be from 1 to T=" + std::to_string(T) + ", got " +
                                  std::to_string(accepted));
    from[n] = checked_slot(given.at(n, accepted - 1), s.pad_slot_id, pool);
    for (int64_t t = 0; s.update_state && t < T; ++t) to[n * T + t] = checked_slot(given.at(n, t), s.pad_slot_id, pool);
  }
  return slots;
}

}  // namespace

void run_step(const ScanArgs& p, const StepOperands& s, const Operand& reads) {
  const std::vector<int64_t> slots = checked_slots(s, p.N, p.T);
  const int64_t row = s.intermediate_states ? s.intermediate_states->stride(0) : 0;
  run_step(p, StepArgs{operand(s.state), intermediate_row(s.intermediate_states), reads, slots.data(),
                       slots.data() + p.N, row});
}

void run_step(const ScanArgs& p, const StepArgs& step) {
  py::gil_scoped_release release;
  if (p.N == 0 || p.T == 0 || p.H == 0) return;
  at::parallel_for(0, p.N, std::max<int64_t>(1, 200000 / (p.T * p.H * p.R * (p.R + 8))),
                   [&](int64_t begin, int64_t end) { kernels()->step(p, step, begin, end); });
}

void step(const StepOperands& s) { run_step(scan_args(s), s, operand(*s.out, s.q->dim() == 4)); }

}  // namespace deltamem
