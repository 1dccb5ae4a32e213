// A program that runs the CUDA kernels on CPU threads with random operands and compares them with a plain float64 loop
// over tokens. It is built with sanitizers, so each array has memory of its own without padding. Argument: the seed.
// The exit status is 1 on a mismatch.
#include "cuda_host_check.h"

constexpr int64_t kPlain = INT64_MAX;  // the chunked_from with which no sequence runs in chunks

struct Case {
  int64_t T, H, R;
  Mode mode = Mode::standard;
  bool coupled = true, per_head = false, masked = false;
  DType dtype = DType::f32;
  int64_t chunked_from = kPlain;
  std::vector<int64_t> lengths = {};  // packed sequences, or a batch of 2
};

struct Tokens {
  const Case& c;
  int64_t B, N;
  std::vector<int64_t> bounds;
  std::unique_ptr<bool[]> mask;
  Array q, k, v, beta, decay, write, initial;

  explicit Tokens(const Case& c) : c(c), B(c.lengths.empty() ? 2 : 1), N(B), bounds{0} {
    for (int64_t length : c.lengths) bounds.push_back(bounds.back() + length);
    if (!c.lengths.empty()) N = c.lengths.size();
    const int64_t rows = B * c.T * c.H, count = rows * c.R, gates = c.per_head ? rows : count;
    const double unit = 1 / std::sqrt(double(c.R));
    q = {c.dtype, size_t(count), -unit, unit}, k = {c.dtype, size_t(count), -unit, unit};
    // In chunks the gates forget little, so that the state at the end of a chunk depends on the state at its start.
    const double most = c.chunked_from < kPlain ? 0.05 : 1, least_decay = c.chunked_from < kPlain ? 0.97 : 0.01;
    v = {c.dtype, size_t(count), -1, 1}, beta = {c.dtype, size_t(gates), 0.01, most};
    if (!c.coupled || c.mode == Mode::affine) decay = {c.dtype, size_t(gates), least_decay, 1};
    if (c.mode == Mode::affine) write = {c.dtype, size_t(count), 0.01, 1};
    initial = {DType::f32, size_t(N * c.H * c.R * c.R), -1, 1};
    mask.reset(c.masked ? new bool[B * c.T] : nullptr);
    for (int64_t i = 0; c.masked && i < B * c.T; ++i) mask[i] = uniform(0, 1) < 0.7;
  }
  Operand rows(const Array& x) const { return x.operand(c.T * c.H * c.R, c.H * c.R, c.R, 1); }
  Operand gates(const Array& x) const {
    if (!x.count) return {};
    return int64_t(x.count) == B * c.T * c.H * c.R ? rows(x) : x.operand(c.T * c.H, c.H, 1, 0);
  }
  Operand states(const Array& x) const { return x.operand(c.H * c.R * c.R, c.R * c.R, c.R, 1); }
  double at(const Array& x, int64_t token, int64_t h, int64_t i) const {
    const int64_t head = token * c.H + h;
    return x.at(int64_t(x.count) == B * c.T * c.H ? head : head * c.R + i);
  }
  ScanArgs args() const {
    ScanArgs p{};
    p.B = B, p.T = c.T, p.H = c.H, p.R = c.R, p.N = N, p.mode = c.mode, p.double_precision = c.dtype == DType::f64;
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.beta = gates(beta), p.decay = gates(decay), p.write = gates(write);
    p.initial_state = states(initial), p.mask = mask.get(), p.mask_stride[0] = c.T, p.mask_stride[1] = 1;
    if (!c.lengths.empty()) p.cu_seqlens = bounds.data();
    return p;
  }

  // The exact results, one state row after another. The gradients are those of q, k, v, beta, decay, write and initial,
  // in this order, for the cotangents d_reads and d_final.
  void exact(const Array& d_reads, const Array& d_final, std::vector<double>& reads, std::vector<double>& finals,
             std::vector<double>* grads) const {
    const int64_t R = c.R, H = c.H;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < R; ++i) {
          const int64_t first = c.lengths.empty() ? n * c.T : bounds[n];
          const int64_t length = c.lengths.empty() ? c.T : c.lengths[n], state = ((n * H + h) * R + i) * R;
          std::vector<double> S(R), G(R), history, key(R), query(R), d_q(R), d_k(R);
          for (int64_t j = 0; j < R; ++j) S[j] = initial.at(state + j), G[j] = d_final.at(state + j);
          auto token = [&](int64_t t, double& b, double& d) {
            for (int64_t j = 0; j < R; ++j) key[j] = at(k, t, h, j), query[j] = at(q, t, h, j);
            b = at(beta, t, h, i), d = decay.count ? at(decay, t, h, i) : 1;
            return gates_of(b, d, write.count ? at(write, t, h, i) : b);
          };
          double b, d;
          for (int64_t t = first; t < first + length; ++t) {
            history.insert(history.end(), S.begin(), S.end());
            if (mask && !mask[t]) continue;
            const Gates<double> g = token(t, b, d);
            reads[(t * H + h) * R + i] = dot(S.data(), query.data(), int(R));
            const double held = dot(S.data(), key.data(), int(R)), value = g.write * at(v, t, h, i);
            write_token(S.data(), key.data(), g.keep, change_by(g.erase, held, value), int(R));
          }
          for (int64_t j = 0; j < R; ++j) finals[state + j] = S[j];
          for (int64_t t = first + length - 1; t >= first; --t) {
            if (mask && !mask[t]) continue;
            const double* before = history.data() + (t - first) * R;
            const Gates<double> g = token(t, b, d);
            const double x = at(v, t, h, i), d_read = d_reads.at((t * H + h) * R + i);
            const auto back = token_adjoint(G.data(), before, query.data(), key.data(), g.keep, g.erase, g.write * x,
                                            dot(before, key.data(), int(R)), d_read, d_q.data(), d_k.data(), int(R));
            for (int64_t j = 0; j < R; ++j) {
              grads[0][(t * H + h) * R + j] += d_q[j], grads[1][(t * H + h) * R + j] += d_k[j];
            }
            const auto of = gates_adjoint(c.mode, !decay.count, 1.0, b, d,
                                          Gates<double>{back.keep, back.erase, back.value * x});
            const int64_t row = (t * H + h) * R + i, gate = c.per_head ? t * H + h : row;
            grads[2][row] += back.value * g.write, grads[3][gate] += of.beta;
            grads[4][gate] += of.decay, grads[5][row] += of.write;
          }
          for (int64_t j = 0; j < R; ++j) grads[6][state + j] = G[j];
        }
  }
  Gates<double> gates_of(double b, double d, double w) const {
    return deltamem::gates(c.mode, !decay.count, 1.0, b, d, w);
  }
};

void sequences(const Case& c) {
  const Tokens x(c);
  const ScanArgs p = x.args();
  const DType type = p.double_precision ? DType::f64 : DType::f32;
  const int64_t count = x.q.count, gates = x.beta.count, states = x.initial.count;
  const Array d_reads(c.dtype, count, -1, 1), d_final(type, states, -1, 1);
  std::vector<double> reads(count), finals(states), exact[7];
  for (int i = 0; i < 7; ++i) exact[i].resize(i == 6 ? states : i == 3 || i == 4 ? gates : count);
  x.exact(d_reads, d_final, reads, finals, exact);

  Array our_reads(c.dtype, count), our_finals(type, states);
  Array checkpoints(type, x.B * (c.T / kCheckpointInterval) * c.H * c.R * c.R);
  auto forward_memory = std::make_unique<char[]>(cuda::forward_needs(p, c.chunked_from).workspace);
  const ScanOutput out{x.rows(our_reads), our_finals.bytes.get(), checkpoints.bytes.get()};
  cuda::forward(p, c.chunked_from, out, forward_memory.get(), nullptr);
  compare("reads", our_reads, reads), compare("final_state", our_finals, finals);

  Array d[7];
  for (int i = 0; i < 7; ++i) d[i] = Array(i == 6 ? DType::f32 : c.dtype, exact[i].size());
  ScanGradients back{x.rows(d[0]), x.rows(d[1]), x.rows(d[2]), x.gates(d[3]), {}, {}, c.per_head, c.per_head, false,
                      x.states(d[6])};
  if (x.decay.count) back.decay = x.gates(d[4]);
  if (x.write.count) back.write = x.rows(d[5]);
  auto memory = std::make_unique<char[]>(cuda::backward_needs(p, c.chunked_from).workspace);
  cuda::backward(p, c.chunked_from, x.rows(d_reads), x.states(d_final), checkpoints.bytes.get(), back, memory.get(),
                 nullptr);
  const char* names[] = {"d_q", "d_k", "d_v", "d_beta", "d_decay", "d_write", "d_initial_state"};
  for (int i = 0; i < 7; ++i)
    if ((i != 4 || back.decay.data) && (i != 5 || back.write.data)) compare(names[i], d[i], exact[i]);
}

// The host does not read cu_seqlens. Wrong ones must not cause accesses outside of any array.
void wrong_bounds(const Case& c, std::vector<int64_t> bounds) {
  Tokens x(c);
  x.bounds = bounds;
  const ScanArgs p = x.args();
  const int64_t states = x.initial.count;
  Array reads(c.dtype, x.q.count), finals(DType::f32, states), d_reads(c.dtype, x.q.count, -1, 1);
  Array checkpoints(DType::f32, (c.T / kCheckpointInterval) * c.H * c.R * c.R, -1, 1), d_q(c.dtype, x.q.count);
  auto memory = std::make_unique<char[]>(cuda::forward_needs(p, c.chunked_from).workspace);
  cuda::forward(p, c.chunked_from, {x.rows(reads), finals.bytes.get(), checkpoints.bytes.get()}, memory.get(), nullptr);
  memory = std::make_unique<char[]>(cuda::backward_needs(p, c.chunked_from).workspace);
  ScanGradients out{};
  out.q = x.rows(d_q);
  cuda::backward(p, c.chunked_from, x.rows(d_reads), {}, checkpoints.bytes.get(), out, memory.get(), nullptr);
}

// Rows 0 and 1 use slots 2 and 0 of three; slot 1 must not change.
void decoding(int64_t T, int64_t H, int64_t R) {
  Case c{T, H, R};
  const Tokens x(c);
  ScanArgs p = x.args();
  p.initial_state = {};
  const int64_t size = H * R * R, slots[] = {2, 0};
  Array pool(DType::f32, 3 * size, -1, 1), reads(DType::f32, x.q.count);
  std::vector<double> expected(3 * size), exact_reads(x.q.count), finals(2 * size), grads[7];
  Tokens start(c);
  for (int i = 0; i < 7; ++i) grads[i].resize(i == 6 ? 2 * size : x.q.count);
  for (int64_t i = 0; i < 3 * size; ++i) expected[i] = pool.at(i);
  for (int64_t n = 0; n < 2; ++n)
    for (int64_t i = 0; i < size; ++i) const_cast<Array&>(x.initial).put(n * size + i, pool.at(slots[n] * size + i));
  x.exact(Array(DType::f32, x.q.count, -1, 1), Array(DType::f32, 2 * size, -1, 1), exact_reads, finals, grads);
  for (int64_t n = 0; n < 2; ++n)
    for (int64_t i = 0; i < size; ++i) expected[slots[n] * size + i] = finals[n * size + i];
  PoolStepArgs s{};
  s.state = x.states(pool), s.reads = x.rows(reads), s.slots = 3, s.pad = -1, s.last = true;
  s.indices = {slots, true, {1, 0}};
  cuda::step(p, s, nullptr);
  compare("reads", reads, exact_reads), compare("pool", pool, expected);
}

int main(int count, char** arguments) {
  engine.seed(count > 1 ? unsigned(std::atoi(arguments[1])) : 0);
  const Mode modes[] = {Mode::standard, Mode::lambda_outside, Mode::no_lambda, Mode::affine};
  const auto run = [](const char* name, const Case& c) {
    std::printf("%s: T=%d H=%d R=%d\n", name, int(c.T), int(c.H), int(c.R));
    std::fflush(stdout);
    sequences(c);
  };
  for (Mode mode : modes)
    for (bool coupled : {true, false})
      if (!(coupled && mode == Mode::affine) && (coupled || mode != Mode::no_lambda))
        run("mode", {9, 2, 4, mode, coupled, mode != Mode::affine && !coupled, !coupled, DType::f32, kPlain, {}});
  run("packed", {69, 1, 4, Mode::standard, true, false, true, DType::f32, kPlain, {0, 1, 66, 2, 0}});
  run("in chunks", {133, 1, 4, Mode::lambda_outside, false, false, true, DType::f32, 65, {}});
  run("packed, in chunks", {140, 1, 8, Mode::standard, true, false, false, DType::f32, 65, {0, 3, 129, 8, 0}});
  run("in chunks", {66, 1, 16, Mode::standard, true, false, false, DType::bf16, 65, {}});
  run("three heads of 16 bits", {5, 3, 8, Mode::standard, true, false, false, DType::f16, kPlain, {}});
  run("float64", {5, 1, 5, Mode::standard, true, false, true, DType::f64, kPlain, {}});
  for (int64_t R : {1, 3, 16, 33, 65})
    run("rank", {R > 16 ? 2 : 5, 1, R, Mode::standard, true, false, false, DType::f32, kPlain, {}});
  for (int64_t chunked_from : {kPlain, int64_t(65)}) {
    std::printf("wrong cu_seqlens\n");
    const Case c{140, 1, 4, Mode::standard, true, false, false, DType::f32, chunked_from, {70, 70, 0}};
    wrong_bounds(c, {9, -5, 1000, 70});
    wrong_bounds(c, {140, 0, 139, 7});
  }
  for (int64_t R : {4, 8, 33}) {
    std::printf("step: R=%d\n", int(R));
    decoding(3, 2, R);
  }
  layer();
  std::printf(failed ? "WRONG\n" : "right\n");
  return failed;
}
