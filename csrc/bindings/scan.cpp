// delta_update on a CPU: threads over sequences and heads.
#include "cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

namespace deltamem {
namespace {

// The bounds of the sequences, which have to outlive the call.
struct PackedScanArgs {
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

PackedScanArgs packed_scan_args(const ScanOperands& s) {
  PackedScanArgs packed{scan_args(s), {}};
  if (s.cu_seqlens) {
    read_bounds(*s.cu_seqlens, packed.args.T, packed.bounds);
    packed.args.N = s.cu_seqlens->numel() - 1;
    packed.args.cu_seqlens = packed.bounds.data();
  }
  return packed;
}

// Threads share sequences x heads. Below a few microseconds of work a second thread costs more than it brings.
template <class F>
void for_each_task(const ScanArgs& p, F&& f) {
  const int64_t tasks = p.N * p.H;
  if (tasks == 0) return;
  const int64_t tokens = p.cu_seqlens ? p.T / p.N + 1 : p.T;
  const int64_t work = (tokens + 4) * p.R * (p.R + 8);  // about 15 numbers per nanosecond
  at::parallel_for(0, tasks, std::max<int64_t>(1, 200000 / work), f);
}

std::vector<ChunkIndex> chunks(const ScanArgs& p) {
  std::vector<ChunkIndex> all;
  for (int64_t task = 0; task < p.N * p.H; ++task) {
    const int64_t n = task / p.H, length = p.cu_seqlens ? p.cu_seqlens[n + 1] - p.cu_seqlens[n] : p.T;
    // A sequence without tokens has one chunk too, which copies its state.
    for (int64_t first = 0; first == 0 || first < length; first += kCheckpointInterval) all.push_back({task, first});
  }
  return all;
}

// The states between the chunks, [B, T / 64, H, R, R], from those before the first tokens; or, with d_reads, their
// gradients, from those of the final states.
void fill_between(const ScanArgs& p, const std::vector<ChunkIndex>& chunks, const Operand* d_reads,
                  const Operand& end_state, const Tensor& states) {
  Tensor maps = at::empty({p.B * (p.T / kCheckpointInterval) * p.H * map_size(p.R)}, states.options());
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    kernels()->maps(p, d_reads, maps.data_ptr(), chunks.data(), begin, end);
  });
  at::parallel_for(0, p.N * p.H, 1, [&](int64_t begin, int64_t end) {
    kernels()->fold(p, d_reads != nullptr, end_state, maps.data_ptr(), states.data_ptr(), begin, end);
  });
}

}  // namespace

ScanResult scan(const ScanOperands& s, bool save, bool chunked) {
  const PackedScanArgs packed = packed_scan_args(s);
  const ScanArgs& p = packed.args;
  const Tensor& q = *s.q;
  const auto type = arithmetic(q, p.double_precision);
  Tensor reads = at::empty(q.sizes(), q.options());
  Tensor final_state = at::empty({p.N, p.H, p.R, p.R}, type);
  // Slots between packed sequences are never read. Zeros make the result the same on every run.
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

std::vector<MaybeTensor> scan_backward(const ScanOperands& s, const Tensor& checkpoints,
                                       const ScanCotangents& cotangents, const std::vector<bool>& needs,
                                       bool chunked) {
  const PackedScanArgs packed = packed_scan_args(s);
  const ScanArgs& p = packed.args;
  const std::vector<MaybeTensor> grads = empty_gradients(s, needs);
  const ScanGradients out = scan_gradients(grads);
  const Operand of_reads = operand(cotangents.reads), of_final = operand(cotangents.final_state);
  {
    py::gil_scoped_release release;
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

}  // namespace deltamem
