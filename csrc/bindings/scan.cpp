// torch's tensors for the CPU kernels of the delta rule: threads, values that are looked at. And the instruction set.
#include "cpu.h"

#include <ATen/ops/zeros.h>

#include <cstring>

namespace deltamem {
namespace {

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
    found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
  found.push_back(&kBaseline);
  return found;
}

}  // namespace

const Kernels*& kernels() {
  static const Kernels* chosen = supported_kernels().front();
  return chosen;
}

namespace {

void use_isa(const std::string& name) {
  for (const Kernels* k : supported_kernels())
    if (name == k->isa) {
      kernels() = k;
      return;
    }
  throw std::invalid_argument("this processor has no instruction set " + name);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : supported_kernels()) names.emplace_back(k->isa);
  return names;
}

struct Inputs {
  ScanArgs args;
  std::vector<int64_t> bounds;
};

void read_bounds(const Tensor& cu_seqlens, int64_t T, std::vector<int64_t>& bounds) {
  const int64_t n = cu_seqlens.numel(), stride = cu_seqlens.stride(0);
  bounds.resize(n);
  bool good = true;
  for (int64_t i = 0; i < n; ++i) {
    bounds[i] = cu_seqlens.scalar_type() == at::kInt ? cu_seqlens.const_data_ptr<int32_t>()[i * stride]
                                                     : cu_seqlens.const_data_ptr<int64_t>()[i * stride];
    good = good && (i ? bounds[i] >= bounds[i - 1] : bounds[i] == 0);
  }
  if (!good || bounds.back() != T) {
    std::string values;
    for (int64_t i = 0; i < n && i < 16; ++i) values += (i ? ", " : "") + std::to_string(bounds[i]);
    throw std::invalid_argument("cu_seqlens must rise from 0 to T=" + std::to_string(T) + ", got [" + values +
                                (n > 16 ? ", ...]" : "]"));
  }
}

Inputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const MaybeTensor& decay,
              const MaybeTensor& write, const MaybeTensor& initial_state, const MaybeTensor& mask,
              const MaybeTensor& cu_seqlens, const std::string& mode) {
  Inputs in{scan_args(q, k, v, beta, decay, write, initial_state, mask, mode), {}};
  if (cu_seqlens) {
    read_bounds(*cu_seqlens, in.args.T, in.bounds);
    in.args.N = cu_seqlens->numel() - 1;
    in.args.cu_seqlens = in.bounds.data();
  }
  return in;
}

// Threads share sequences x heads. Below a few microseconds of work a second thread costs more than it brings.
template <class F>
void for_each_task(const ScanArgs& p, F&& f) {
  const int64_t tasks = p.N * p.H;
  if (tasks == 0) return;
  const int64_t tokens = p.cu_seqlens ? p.T / p.N + 1 : p.T;
  const int64_t work = (tokens + 4) * p.R * (p.R + 8);  // about 15 numbers a nanosecond
  at::parallel_for(0, tasks, std::max<int64_t>(1, 200000 / work), f);
}

std::vector<ChunkIndex> chunks(const ScanArgs& p) {
  std::vector<ChunkIndex> all;
  for (int64_t task = 0; task < p.N * p.H; ++task) {
    const int64_t n = task / p.H, length = p.cu_seqlens ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.T;
    // A sequence without tokens is one piece as well: its state has to be handed on.
    for (int64_t first = 0; first == 0 || first < length; first += kCheckpointInterval) all.push_back({task, first});
  }
  return all;
}

// The states between the chunks, [B, T / 64, H, R, R], from those before the first tokens; or, with d_reads, their
// gradients, from those of the final states.
void fill_between(const ScanArgs& p, const std::vector<ChunkIndex>& chunks, const Operand* d_reads, const Operand& end_state,
                  const Tensor& states) {
  Tensor maps = at::empty({p.B * (p.T / kCheckpointInterval) * p.H * map_size(p.R)}, states.options());
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    kernels()->maps(p, d_reads, maps.data_ptr(), chunks.data(), begin, end);
  });
  at::parallel_for(0, p.N * p.H, 1, [&](int64_t begin, int64_t end) {
    kernels()->fold(p, d_reads != nullptr, end_state, maps.data_ptr(), states.data_ptr(), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                                           const MaybeTensor& decay, const MaybeTensor& write,
                                           const MaybeTensor& initial_state, const MaybeTensor& mask,
                                           const MaybeTensor& cu_seqlens, const std::string& mode, bool save,
                                           bool chunked) {
  const Inputs in = inputs(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode);
  const ScanArgs& p = in.args;
  const auto type = q.options().dtype(p.double_precision ? at::kDouble : at::kFloat);
  Tensor reads = at::empty(q.sizes(), q.options());
  Tensor final_state = at::empty({p.N, p.H, p.R, p.R}, type);
  // Slots between packed sequences are never read: zeros keep what is returned the same on every run.
  Tensor checkpoints = !save && !chunked ? at::empty({0}, type)
                       : p.cu_seqlens ? at::zeros({p.B, p.T / kCheckpointInterval, p.H, p.R, p.R}, type)
                                      : at::empty({p.B, p.T / kCheckpointInterval, p.H, p.R, p.R}, type);
  const ScanOutput out{operand(reads), final_state.data_ptr(), save || chunked ? checkpoints.data_ptr() : nullptr};
  {
    py::gil_scoped_release release;
    if (chunked) {
      const std::vector<ChunkIndex> all = chunks(p);
      fill_between(p, all, nullptr, p.initial_state, checkpoints);
      at::parallel_for(0, all.size(), 1, [&](int64_t begin, int64_t end) {
        kernels()->forward_chunks(p, out, all.data(), begin, end);
      });
    } else {
      for_each_task(p, [&](int64_t begin, int64_t end) { kernels()->forward(p, out, begin, end); });
    }
  }
  return {reads, final_state, save ? checkpoints : at::empty({0}, type)};
}

std::vector<MaybeTensor> backward(const MaybeTensor& d_reads, const MaybeTensor& d_final_state, const Tensor& q,
                                  const Tensor& k, const Tensor& v, const Tensor& beta, const MaybeTensor& decay,
                                  const MaybeTensor& write, const MaybeTensor& initial_state, const MaybeTensor& mask,
                                  const MaybeTensor& cu_seqlens, const Tensor& checkpoints, const std::string& mode,
                                  const std::vector<bool>& needs, bool chunked) {
  const Inputs in = inputs(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode);
  const ScanArgs& p = in.args;
  const std::vector<MaybeTensor> grads = gradients({q, k, v, beta, decay, write, initial_state}, needs);
  const ScanGradients out = backward_output(grads);
  {
    py::gil_scoped_release release;
    const Operand of_reads = operand(d_reads), of_final = operand(d_final_state);
    if (chunked) {
      const std::vector<ChunkIndex> all = chunks(p);
      Tensor d_checkpoints = at::empty(checkpoints.sizes(), checkpoints.options());
      fill_between(p, all, &of_reads, of_final, d_checkpoints);
      at::parallel_for(0, all.size(), 1, [&](int64_t begin, int64_t end) {
        kernels()->backward_chunks(p, of_reads, of_final, checkpoints.data_ptr(), d_checkpoints.data_ptr(), out,
                                   all.data(), begin, end);
      });
    } else {
      for_each_task(p, [&](int64_t begin, int64_t end) {
        kernels()->backward(p, of_reads, of_final, checkpoints.data_ptr(), out, begin, end);
      });
    }
  }
  return grads;
}

int64_t checked_slot(int64_t s, int64_t pad, int64_t slots) {
  if (s == pad) return kNoSlot;
  if (s < 0 || s >= slots)
    throw std::invalid_argument("state_indices must be from 0 to " + std::to_string(slots - 1) +
                                " or pad_slot_id, got " + std::to_string(s));
  return s;
}

}  // namespace

void run_step(ScanArgs p, const Tensor& state, const MaybeTensor& state_indices, const MaybeTensor& num_accepted_tokens,
              const MaybeTensor& intermediate_states, const Operand& reads, int64_t pad_slot_id, bool update_state) {
  p.double_precision = p.double_precision || state.scalar_type() == at::kDouble;
  // One vector: the slots to start from, then those to write to.
  std::vector<int64_t> slots(p.N * (1 + p.T), kNoSlot);
  int64_t *from = slots.data(), *to = from + p.N;
  const bool per_token = state_indices && state_indices->dim() == 2;
  const Indices indices = numbers(state_indices), accepted_tokens = numbers(num_accepted_tokens);
  const int64_t pool = state.size(0);
  for (int64_t n = 0; n < p.N; ++n) {
    if (!per_token) {
      from[n] = indices.data ? checked_slot(indices.at(n), pad_slot_id, pool) : n;
      if (update_state && p.T) to[n * p.T + p.T - 1] = from[n];
      continue;
    }
    if (indices.at(n) == pad_slot_id) continue;
    const int64_t accepted = accepted_tokens.data ? accepted_tokens.at(n) : 1;
    if (accepted < 1 || accepted > p.T)
      throw std::invalid_argument("num_accepted_tokens must be from 1 to T=" + std::to_string(p.T) + ", got " +
                                  std::to_string(accepted));
    from[n] = checked_slot(indices.at(n, accepted - 1), pad_slot_id, pool);
    for (int64_t t = 0; update_state && t < p.T; ++t)
      to[n * p.T + t] = checked_slot(indices.at(n, t), pad_slot_id, pool);
  }
  const StepArgs s{operand(state), intermediate(intermediate_states), reads, from, to,
               intermediate_states ? intermediate_states->stride(0) : 0};
  py::gil_scoped_release release;
  if (p.N == 0 || p.T == 0 || p.H == 0) return;
  at::parallel_for(0, p.N, std::max<int64_t>(1, 200000 / (p.T * p.H * p.R * (p.R + 8))),
                   [&](int64_t begin, int64_t end) { kernels()->step(p, s, begin, end); });
}

namespace {

void step(const Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
          const MaybeTensor& decay, const MaybeTensor& state_indices, const MaybeTensor& num_accepted_tokens,
          const MaybeTensor& intermediate_states, const Tensor& out, const std::string& mode, int64_t pad_slot_id,
          bool update_state) {
  run_step(scan_args(q, k, v, beta, decay, {}, {}, {}, mode), state, state_indices, num_accepted_tokens,
           intermediate_states, operand(out, q.dim() == 4), pad_slot_id, update_state);
}

}  // namespace
}  // namespace deltamem

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &deltamem::forward);
  m.def("backward", &deltamem::backward);
  m.def("step", &deltamem::step);
  deltamem::bind_correction(m);
  deltamem::bind_fingerprint(m);
  deltamem::bind_layer(m);
  deltamem::bind_projection(m);
  m.def("isas", &deltamem::isas, "The instruction sets this processor has, the best first.");
  m.def("use_isa", &deltamem::use_isa, "Run the kernels of this instruction set from now on.");
  m.def("isa", [] { return std::string(deltamem::kernels()->isa); });
}
