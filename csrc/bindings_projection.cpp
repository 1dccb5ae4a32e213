// memory_projection and segment_mean.
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;
using at::Tensor;

namespace deltamem {
namespace {

// The tensor's numbers as the kernels read them, and what keeps them alive where they had to be converted.
struct Weight {
  Tensor held;
  Operand operand;
  Weight(const Tensor& x, at::ScalarType type) : held(x) {
    if (x.scalar_type() != type) held = x.to(type);
    if (x.dim() > 1 && x.stride(-1) != 1) held = held.contiguous();
    operand = {held.data_ptr(), dtype(held), {}};
    for (int64_t i = 0; i < held.dim(); ++i) operand.stride[i] = held.stride(i);
  }
};

}  // namespace

Projection projection_of(const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight,
                         const MaybeTensor& beta_bias, const MaybeTensor& decay_weight, const MaybeTensor& decay_bias,
                         int64_t heads, bool normalize, Tensor (&held)[3]) {
  const bool tokens = x.dim() == 3;
  Projection p{};
  p.B = tokens ? x.size(0) : 1, p.T = x.size(-2), p.D = x.size(-1);
  p.H = heads, p.R = qkv_weight.size(0) / (3 * heads), p.normalize = normalize;
  const auto is = [](const MaybeTensor& w, at::ScalarType type) { return w && w->scalar_type() == type; };
  for (const MaybeTensor& w : {MaybeTensor(x), MaybeTensor(qkv_weight), MaybeTensor(beta_weight), beta_bias,
                               decay_weight, decay_bias})
    p.double_precision = p.double_precision || is(w, at::kDouble);
  const at::ScalarType type = p.double_precision ? at::kDouble : at::kFloat;
  const at::ScalarType shared = qkv_weight.scalar_type();
  const bool one_type = is(beta_weight, shared) && (!decay_weight || is(decay_weight, shared));
  const at::ScalarType of_weights = one_type && !p.double_precision ? shared : type;

  const Weight qkv(qkv_weight, of_weights), beta(beta_weight, of_weights);
  const Weight decay = decay_weight ? Weight(*decay_weight, of_weights) : Weight(beta.held, of_weights);
  const auto bias = [](const MaybeTensor& b) {
    return b ? Operand{b->data_ptr(), dtype(*b), {b->stride(0)}} : Operand{};
  };
  const int64_t s = tokens ? 0 : 1;
  p.x = {x.data_ptr(), dtype(x), {}};
  for (int64_t i = 0; i < x.dim(); ++i) p.x.stride[i + s] = x.stride(i);
  p.qkv_weight = qkv.operand;
  p.gates[0] = {beta.operand, bias(beta_bias), beta_weight.size(0), nullptr};
  p.gates[1] = {decay.operand, bias(decay_bias), decay_weight ? decay_weight->size(0) : 0, nullptr};
  held[0] = qkv.held, held[1] = beta.held, held[2] = decay.held;
  return p;
}

void run_projection(const Projection& p) {
  if (!(p.B * p.T)) return;
  py::gil_scoped_release release;
  const int64_t group = kernels()->group, groups = (p.B * p.T + group - 1) / group;
  const int64_t work = group * p.rows() * (p.D + 8);  // about 60 products a nanosecond
  at::parallel_for(0, groups, std::max<int64_t>(1, 600000 / work),
                   [&](int64_t begin, int64_t end) { kernels()->project(p, begin, end); });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projection(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& beta_weight, const MaybeTensor& beta_bias,
    const MaybeTensor& decay_weight, const MaybeTensor& decay_bias, int64_t heads, bool normalize) {
  Tensor held[3];
  Projection p =
      projection_of(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, held);
  const bool tokens = x.dim() == 3;
  const auto options = x.options().dtype(p.double_precision ? at::kDouble : at::kFloat);
  const auto rows = [&](int64_t numbers) {  // [B, T, H, R], or [B, T, H], as `numbers` says
    return numbers == p.H * p.R ? tokens ? at::empty({p.B, p.T, p.H, p.R}, options) : at::empty({p.T, p.H, p.R}, options)
                                : tokens ? at::empty({p.B, p.T, p.H}, options) : at::empty({p.T, p.H}, options);
  };
  Tensor q = rows(p.H * p.R), k = rows(p.H * p.R), v = rows(p.H * p.R), betas = rows(p.gates[0].rows);
  Tensor decays = decay_weight ? rows(p.gates[1].rows) : at::empty({0}, options);
  Tensor norms = !normalize ? at::empty({0}, options)
                 : tokens   ? at::empty({2, p.B, p.T, p.H}, options)
                            : at::empty({2, p.T, p.H}, options);
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.norms = norms.data_ptr();
  p.gates[0].out = betas.data_ptr(), p.gates[1].out = decays.data_ptr();
  run_projection(p);
  return {q, k, v, betas, decays, norms};
}

std::tuple<Tensor, Tensor> segment_means(const Tensor& x, const Tensor& segment_ids, int64_t num_segments,
                                         const MaybeTensor& mask) {
  Segments s{x.size(0), x.size(1), x.size(2), num_segments, {x.data_ptr(), dtype(x), {}}, nullptr, nullptr, nullptr};
  for (int64_t i = 0; i < 3; ++i) s.x.stride[i] = x.stride(i);
  Tensor means = at::empty({s.B, s.M, s.D}, x.options());
  Tensor counts = at::empty({s.B, s.M}, x.options().dtype(at::kInt));
  counts.zero_();
  int32_t* count = counts.data_ptr<int32_t>();
  std::vector<int64_t> ids(s.B * s.T, -1);
  const Indices given = numbers(segment_ids);
  const bool* masked = mask ? mask->const_data_ptr<bool>() : nullptr;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t t = 0; t < s.T; ++t) {
      if (masked && !masked[b * mask->stride(0) + t * mask->stride(1)]) continue;
      const int64_t id = given.at(b, t);
      if (id < 0) continue;
      if (id >= s.M)
        throw std::invalid_argument("segment_ids must be below num_segments=" + std::to_string(s.M) + ", got " +
                                    std::to_string(id));
      ids[b * s.T + t] = id;
      ++count[b * s.M + id];
    }
  s.ids = ids.data(), s.counts = count, s.means = means.data_ptr();
  py::gil_scoped_release release;
  const int64_t tasks = s.M ? s.B * ((s.D + kernels()->columns - 1) / kernels()->columns) : 0;
  const int64_t work = (s.T + s.M + 1) * kernels()->columns;  // about 10 numbers a nanosecond
  at::parallel_for(0, tasks, std::max<int64_t>(1, 100000 / work),
                   [&](int64_t begin, int64_t end) { kernels()->segments(s, begin, end); });
  return {means, counts};
}

}  // namespace

void bind_projection(py::module_& m) {
  m.def("memory_projection", &projection);
  m.def("segment_mean", &segment_means);
}

}  // namespace deltamem
