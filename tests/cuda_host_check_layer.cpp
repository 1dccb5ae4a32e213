// Like cuda_host_check.cpp, for the operations around the scan.
#include "cuda_host_check.h"

namespace {

typedef std::vector<double> Numbers;

struct OfTokens {
  int64_t B, T, D, H, R, beta_rows, decay_rows;
  bool normalize;
  DType x, weights;
};

void projection(const OfTokens& of) {
  std::printf("projection: B=%d T=%d D=%d H=%d R=%d\n", int(of.B), int(of.T), int(of.D), int(of.H), int(of.R));
  const int64_t all = of.H * of.R, tokens = of.B * of.T;
  const DType type = of.weights == DType::f64 ? DType::f64 : DType::f32;
  const Array x(of.x, tokens * of.D, -1, 1);
  // q, k, v, beta, decay
  const int64_t rows[] = {all, all, all, of.beta_rows, of.decay_rows};
  Array weights[5], biases[5], results[5], norms(type, of.normalize ? 2 * tokens * of.H : 0);
  for (int i = 0; i < 5; ++i) {
    weights[i] = Array(of.weights, rows[i] * of.D, -1, 1);
    if (i >= 3) biases[i] = Array(of.weights, rows[i], -1, 1);
    results[i] = Array(type, tokens * rows[i]);
  }
  ProjectionArgs p{};
  p.B = of.B, p.T = of.T, p.D = of.D, p.H = of.H, p.R = of.R, p.normalize = of.normalize;
  p.double_precision = type == DType::f64;
  p.x = x.operand(of.T * of.D, of.D, 1, 0);
  for (int i = 0; i < 3; ++i) p.qkv_weight[i] = weights[i].operand(of.D, 1, 0, 0);
  for (int i = 3; i < 5; ++i)
    p.gates[i - 3] = {weights[i].operand(of.D, 1, 0, 0), biases[i].operand(1, 0, 0, 0), rows[i],
                      results[i].bytes.get()};
  p.q = results[0].bytes.get(), p.k = results[1].bytes.get(), p.v = results[2].bytes.get();
  p.norms = norms.bytes.get();
  cuda::project(p, nullptr);

  Numbers exact[5], exact_norms(norms.count);
  for (int i = 0; i < 5; ++i) {
    exact[i].resize(results[i].count);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t row = 0; row < rows[i]; ++row) {
        double y = i >= 3 ? biases[i].at(row) : 0;
        for (int64_t d = 0; d < of.D; ++d) y += weights[i].at(row * of.D + d) * x.at(t * of.D + d);
        if (i >= 3) y = 1 / (1 + std::exp(-y));
        exact[i][t * rows[i] + row] = i < 2 && of.normalize ? std::tanh(y) : y;
      }
    for (int64_t head = 0; i < 2 && of.normalize && head < tokens * of.H; ++head) {
      double squares = 0;
      for (int64_t r = 0; r < of.R; ++r) squares += std::pow(exact[i][head * of.R + r], 2);
      const double norm = exact_norms[i * tokens * of.H + head] = std::fmax(std::sqrt(squares), kNormEps);
      for (int64_t r = 0; r < of.R; ++r) exact[i][head * of.R + r] /= norm;
    }
  }
  const char* names[] = {"q", "k", "v", "beta", "decay"};
  for (int i = 0; i < 5; ++i) compare(names[i], results[i], exact[i]);
  compare("norms", norms, exact_norms);
}

struct OfRows {
  int64_t B, T, D, H, R, head_dim;
  bool normed, rotary, in_place;
  DType base, weight;
};

// Checks that the gradients of the reads are the products of the weight with g. Whether g is right is tested for every
// backend in Python.
void adjoint(const OfRows& of, CorrectionArgs c) {
  const DType type = c.double_precision ? DType::f64 : DType::f32;
  const int64_t rows = of.B * of.T, groups = 2;
  const bool turned = of.normed || of.rotary;
  const Array d_out(of.base, rows * of.D, -1, 1);
  Array g(type, turned ? d_out.count : 0), d_base(of.base, turned ? d_out.count : 0), d_reads(type, rows * c.K);
  Array d_norm(type, of.normed ? groups * of.D : 0);
  CorrectionGradients out{};
  out.d_out = d_out.operand(of.T * of.D, of.D, 0, 1), out.groups = groups;
  c.out = turned ? g.operand(of.T * of.D, of.D, 0, 1) : Operand{};
  if (turned) out.base = d_base.operand(0, 0, 0, 1);
  out.reads = d_reads.operand(0, 0, 0, 1);
  if (of.normed) out.norm_weight = d_norm.operand(0, 0, 0, 1);
  cuda::correct_adjoint(c, out, nullptr);
  Numbers exact(d_reads.count);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t d = 0; d < of.D; ++d) {
        double w = 0;
        with_dtype(c.weight.dtype, [&](auto tag) {
          w = convert<double>(static_cast<const decltype(tag)*>(c.weight.data)[d * c.K + k]);
        });
        exact[row * c.K + k] += w * (turned ? g : d_out).at(row * of.D + d);
      }
  compare("gradient of the reads", d_reads, exact);
}

void correction(const OfRows& of) {
  std::printf("correction: B=%d T=%d D=%d H=%d R=%d head_dim=%d\n", int(of.B), int(of.T), int(of.D), int(of.H),
              int(of.R), int(of.head_dim));
  const int64_t rows = of.B * of.T, K = of.H * of.R, segment = of.head_dim ? of.head_dim : of.D;
  const Array base(of.base, rows * of.D, -1, 1), reads(DType::f32, rows * K, -1, 1), weight(of.weight, of.D * K, -1, 1);
  const Array gain(DType::f32, 1, 1, 2), norm(of.weight, of.normed ? segment : 0, 0.5, 1.5);
  const Array cos(DType::f32, of.rotary ? of.T * segment : 0, -1, 1), sin(DType::f32, cos.count, -1, 1);
  Array out(of.base, base.count);
  if (of.in_place)
    for (size_t i = 0; i < base.count; ++i) out.put(i, base.at(i));
  CorrectionArgs c{};
  c.B = of.B, c.T = of.T, c.D = of.D, c.H = of.H, c.R = of.R, c.K = K, c.head_dim = of.head_dim;
  c.double_precision = of.base == DType::f64, c.scale = 0.7, c.norm_eps = 0.1;
  c.out = out.operand(of.T * of.D, of.D, 0, 1);
  c.base = of.in_place ? c.out : base.operand(of.T * of.D, of.D, 0, 1);
  c.reads = reads.operand(of.T * K, K, of.R, 1), c.weight = weight.operand(0, 1, K, 1);
  c.gain = gain.operand(0, 0, 0, 0);
  if (of.normed) c.norm_weight = norm.operand(0, 0, 0, 1);
  if (of.rotary) c.cos = cos.operand(0, segment, 0, 1), c.sin = sin.operand(0, segment, 0, 1);
  cuda::correct(c, nullptr);

  Numbers exact(base.count), y(of.D);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < of.D; ++d) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += weight.at(d * K + k) * reads.at(row * K + k);
      y[d] = c.scale * gain.at(0) * sum + (of.head_dim ? base.at(row * of.D + d) : 0);
    }
    for (int64_t begin = 0; begin < of.D; begin += segment) {
      double squares = 0;
      for (int64_t i = 0; i < segment; ++i) squares += y[begin + i] * y[begin + i];
      for (int64_t i = 0; of.normed && i < segment; ++i)
        y[begin + i] *= norm.at(i) / std::sqrt(squares / segment + c.norm_eps);
      for (int64_t i = 0; of.rotary && i < segment / 2; ++i) {
        const int64_t at = row % of.T * segment, other = at + segment / 2;
        const double a = y[begin + i], b = y[begin + segment / 2 + i];
        y[begin + i] = a * cos.at(at + i) - b * sin.at(at + i);
        y[begin + segment / 2 + i] = b * cos.at(other + i) + a * sin.at(other + i);
      }
    }
    for (int64_t d = 0; d < of.D; ++d) exact[row * of.D + d] = y[d] + (of.head_dim ? 0 : base.at(row * of.D + d));
  }
  compare("corrected", out, exact);
  if (!of.in_place) adjoint(of, c);
}

}  // namespace

void layer() {
  const DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32, f64 = DType::f64;
  projection({1, 5, 40, 2, 4, 8, 2, true, f32, f32});
  projection({2, 3, 33, 1, 11, 11, 1, true, bf16, f16});
  projection({1, 1, 7, 3, 1, 3, 0, false, f32, f32});
  projection({1, 2, 9, 1, 3, 1, 3, true, f32, f64});
  correction({2, 3, 140, 1, 8, 0, false, false, false, f32, f32});
  correction({1, 5, 37, 2, 3, 0, true, false, true, bf16, f32});
  for (bool in_place : {false, true}) correction({2, 3, 144, 1, 4, 48, true, true, in_place, f32, bf16});
  correction({1, 2, 12, 1, 5, 4, false, true, true, f16, f32});
  correction({1, 2, 9, 1, 2, 3, true, false, false, f64, f64});
}
