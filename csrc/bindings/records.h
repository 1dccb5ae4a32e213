// The operand records of deltamem_kernels/operands for C++: the same fields in the same order.
//
// A record arrives as a tuple, since a NamedTuple is one. Its tensors stay where Python holds them: a pointer is valid
// as long as the tuple is, and null where the operand is absent.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <iterator>
#include <string>
#include <vector>

#include "../core/delta_rule.h"

namespace py = pybind11;
using at::Tensor;

namespace deltamem {

typedef const Tensor* TensorPtr;

// One tensor [3 H R, D], or three [H R, D].
struct QkvWeight {
  TensorPtr parts[3] = {};
  int count = 0;
};

// `fields` calls f with the name of each field and where it goes. `tensor` is required, `optional` may be None.

struct ScanOperands {
  TensorPtr q, k, v, beta, decay, write, initial_state, mask, cu_seqlens;
  Mode mode;
  template <class F>
  void fields(F&& f) {
    f.tensor("q", q), f.tensor("k", k), f.tensor("v", v), f.tensor("beta", beta), f.optional("decay", decay);
    f.optional("write", write), f.optional("initial_state", initial_state), f.optional("mask", mask);
    f.optional("cu_seqlens", cu_seqlens), f.mode("mode", mode);
  }
};

struct ScanCotangents {
  TensorPtr reads, final_state;
  template <class F>
  void fields(F&& f) {
    f.optional("reads", reads), f.optional("final_state", final_state);
  }
};

struct StepOperands {
  TensorPtr state, q, k, v, beta, decay, state_indices, num_accepted_tokens, intermediate_states, out;
  Mode mode;
  int64_t pad_slot_id;
  bool update_state;
  template <class F>
  void fields(F&& f) {
    f.tensor("state", state), f.tensor("q", q), f.tensor("k", k), f.tensor("v", v), f.tensor("beta", beta);
    f.optional("decay", decay), f.optional("state_indices", state_indices);
    f.optional("num_accepted_tokens", num_accepted_tokens), f.optional("intermediate_states", intermediate_states);
    f.tensor("out", out), f.mode("mode", mode), f.integer("pad_slot_id", pad_slot_id);
    f.boolean("update_state", update_state);
  }
};

struct CorrectionOperands {
  TensorPtr base, reads, weight, gain, norm_weight, cos, sin;
  double scale, norm_eps;
  int64_t head_dim;
  template <class F>
  void fields(F&& f) {
    f.optional("base", base), f.tensor("reads", reads), f.tensor("weight", weight), f.optional("gain", gain);
    f.optional("norm_weight", norm_weight), f.optional("cos", cos), f.optional("sin", sin);
    f.number("scale", scale), f.number("norm_eps", norm_eps), f.integer("head_dim", head_dim);
  }
};

struct ProjectionOperands {
  TensorPtr x;
  QkvWeight qkv_weight;
  TensorPtr beta_weight, beta_bias, decay_weight, decay_bias;
  int64_t heads;
  bool normalize;
  template <class F>
  void fields(F&& f) {
    f.tensor("x", x), f.qkv("qkv_weight", qkv_weight), f.tensor("beta_weight", beta_weight);
    f.optional("beta_bias", beta_bias), f.optional("decay_weight", decay_weight), f.optional("decay_bias", decay_bias);
    f.integer("heads", heads), f.boolean("normalize", normalize);
  }
};

struct PrefillOperands {
  TensorPtr x;
  QkvWeight qkv_weight;
  TensorPtr beta_weight, beta_bias, decay_weight, decay_bias, initial_state, mask, cu_seqlens;
  int64_t heads;
  bool normalize;
  Mode mode;
  template <class F>
  void fields(F&& f) {
    f.tensor("x", x), f.qkv("qkv_weight", qkv_weight), f.tensor("beta_weight", beta_weight);
    f.optional("beta_bias", beta_bias), f.optional("decay_weight", decay_weight), f.optional("decay_bias", decay_bias);
    f.optional("initial_state", initial_state), f.optional("mask", mask), f.optional("cu_seqlens", cu_seqlens);
    f.integer("heads", heads), f.boolean("normalize", normalize), f.mode("mode", mode);
  }
  ProjectionOperands projection() const {
    return {x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize};
  }
};

struct DecodeOperands {
  TensorPtr state, x;
  QkvWeight qkv_weight;
  TensorPtr beta_weight, beta_bias, decay_weight, decay_bias, state_indices;
  TensorPtr base, delta_weight, gain, norm_weight, cos, sin, out;
  int64_t heads;
  bool normalize;
  Mode mode;
  int64_t pad_slot_id;
  double scale, norm_eps;
  int64_t head_dim;
  template <class F>
  void fields(F&& f) {
    f.tensor("state", state), f.tensor("x", x), f.qkv("qkv_weight", qkv_weight), f.tensor("beta_weight", beta_weight);
    f.optional("beta_bias", beta_bias), f.optional("decay_weight", decay_weight), f.optional("decay_bias", decay_bias);
    f.optional("state_indices", state_indices), f.optional("base", base), f.optional("delta_weight", delta_weight);
    f.optional("gain", gain), f.optional("norm_weight", norm_weight), f.optional("cos", cos), f.optional("sin", sin);
    f.optional("out", out), f.integer("heads", heads), f.boolean("normalize", normalize), f.mode("mode", mode);
    f.integer("pad_slot_id", pad_slot_id), f.number("scale", scale), f.number("norm_eps", norm_eps);
    f.integer("head_dim", head_dim);
  }
  ProjectionOperands projection() const {
    return {x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize};
  }
  // The correction that follows the step. Without a base, `out` holds it.
  CorrectionOperands correction(TensorPtr reads) const {
    return {base ? base : out, reads, delta_weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim};
  }
};

// As many tensors as a layer corrects projections.
struct TensorList {
  TensorPtr items[4] = {};
  int count = 0;
};

struct LayerStepWeights {
  QkvWeight qkv_weight;
  TensorPtr beta_weight, beta_bias, decay_weight, decay_bias;
  TensorList delta_weights, gains;
  TensorPtr norm_weight;
  int64_t heads;
  bool normalize;
  Mode mode;
  double scale, norm_eps;
  template <class F>
  void fields(F&& f) {
    f.qkv("qkv_weight", qkv_weight), f.tensor("beta_weight", beta_weight), f.optional("beta_bias", beta_bias);
    f.optional("decay_weight", decay_weight), f.optional("decay_bias", decay_bias);
    f.tensors("delta_weights", delta_weights), f.tensors("gains", gains), f.optional("norm_weight", norm_weight);
    f.integer("heads", heads), f.boolean("normalize", normalize), f.mode("mode", mode), f.number("scale", scale);
    f.number("norm_eps", norm_eps);
  }
};

struct LayerStepOperands {
  TensorPtr x, state, mask;
  LayerStepWeights weights;
  template <class F>
  void fields(F&& f) {
    f.tensor("x", x), f.optional("state", state), f.optional("mask", mask), f.record("weights", weights);
  }
  ProjectionOperands projection() const {
    const LayerStepWeights& w = weights;
    return {x, w.qkv_weight, w.beta_weight, w.beta_bias, w.decay_weight, w.decay_bias, w.heads, w.normalize};
  }
  // The correction number i of `base`, which is zero and gets the result.
  CorrectionOperands correction(int i, TensorPtr base, TensorPtr reads) const {
    const LayerStepWeights& w = weights;
    const bool last = i == w.delta_weights.count - 1;
    return {base, reads, w.delta_weights.items[i], w.gains.items[i], last ? w.norm_weight : nullptr, nullptr, nullptr,
            w.scale, w.norm_eps, 0};
  }
};

struct SegmentOperands {
  TensorPtr x, segment_ids;
  int64_t num_segments;
  TensorPtr mask;
  template <class F>
  void fields(F&& f) {
    f.tensor("x", x), f.tensor("segment_ids", segment_ids), f.integer("num_segments", num_segments);
    f.optional("mask", mask);
  }
};

namespace {

// Reads a tuple's items into a record's fields. `fits` becomes false at the first item of another type.
class RecordReader {
 public:
  explicit RecordReader(PyObject* tuple)
      : items_(tuple), size_(PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 0), fits_(size_ > 0) {}

  // Whether all items were read, and fitted.
  bool complete() const { return fits_ && next_ == size_; }

  void tensor(const char*, TensorPtr& x) { read_tensor(take(), x); }
  void optional(const char*, TensorPtr& x) {
    PyObject* const item = take();
    x = nullptr;
    if (item != Py_None) read_tensor(item, x);
  }
  void qkv(const char*, QkvWeight& x) {
    PyObject* const item = take();
    if (!item || !(PyTuple_Check(item) || PyList_Check(item))) return fail();
    x.count = int(PySequence_Fast_GET_SIZE(item));
    if (x.count != 1 && x.count != 3) return fail();
    for (int i = 0; i < x.count; ++i) read_tensor(PySequence_Fast_GET_ITEM(item, i), x.parts[i]);
  }
  void tensors(const char*, TensorList& x) {
    PyObject* const item = take();
    if (!item || !(PyTuple_Check(item) || PyList_Check(item))) return fail();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(item);
    if (count > Py_ssize_t(std::size(x.items))) return fail();
    x.count = int(count);
    for (int i = 0; i < x.count; ++i) read_tensor(PySequence_Fast_GET_ITEM(item, i), x.items[i]);
  }
  template <class Record>
  void record(const char*, Record& x) {
    PyObject* const item = take();
    if (!item || !PyTuple_Check(item)) return fail();
    RecordReader inner(item);
    x.fields(inner);
    if (!inner.complete()) fail();
  }
  void mode(const char*, Mode& x) {
    PyObject* const item = take();
    if (!item || !PyUnicode_Check(item)) return fail();
    static constexpr std::pair<const char*, Mode> kModes[] = {{"standard", Mode::standard},
                                                              {"lambda_outside", Mode::lambda_outside},
                                                              {"no_lambda", Mode::no_lambda},
                                                              {"affine", Mode::affine}};
    for (const auto& [name, value] : kModes)
      if (PyUnicode_CompareWithASCIIString(item, name) == 0) {
        x = value;
        return;
      }
    fail();
  }
  void integer(const char*, int64_t& x) {
    PyObject* const item = take();
    int overflow = 0;
    if (!item || !PyLong_CheckExact(item)) return fail();
    x = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow) fail();
  }
  void boolean(const char*, bool& x) {
    PyObject* const item = take();
    if (!item || !PyBool_Check(item)) return fail();
    x = item == Py_True;
  }
  void number(const char*, double& x) {
    PyObject* const item = take();
    if (item && PyFloat_Check(item)) {
      x = PyFloat_AS_DOUBLE(item);
    } else if (item && PyLong_CheckExact(item)) {
      x = PyLong_AsDouble(item);
      if (PyErr_Occurred()) PyErr_Clear(), fail();
    } else {
      fail();
    }
  }

 private:
  PyObject* take() { return next_ < size_ ? PyTuple_GET_ITEM(items_, next_++) : (fail(), nullptr); }
  void read_tensor(PyObject* item, TensorPtr& x) {
    if (item && THPVariable_Check(item))
      x = &THPVariable_Unpack(item);
    else
      fail();
  }
  void fail() { fits_ = false; }

  PyObject* items_;
  Py_ssize_t size_, next_ = 0;
  bool fits_;
};

template <class Record>
bool read_record(PyObject* tuple, Record& record) {
  RecordReader reader(tuple);
  record.fields(reader);
  return reader.complete();
}

// The names of a record's fields, for a test that compares them with Python's.
struct FieldNames {
  std::vector<std::string> names;
  template <class X>
  void add(const char* name, X&) {
    names.emplace_back(name);
  }
  template <class X> void tensor(const char* name, X& x) { add(name, x); }
  template <class X> void optional(const char* name, X& x) { add(name, x); }
  template <class X> void qkv(const char* name, X& x) { add(name, x); }
  template <class X> void tensors(const char* name, X& x) { add(name, x); }
  template <class X> void record(const char* name, X& x) { add(name, x); }
  template <class X> void mode(const char* name, X& x) { add(name, x); }
  template <class X> void integer(const char* name, X& x) { add(name, x); }
  template <class X> void boolean(const char* name, X& x) { add(name, x); }
  template <class X> void number(const char* name, X& x) { add(name, x); }
};

template <class Record>
std::vector<std::string> field_names() {
  Record record;
  FieldNames names;
  record.fields(names);
  return names.names;
}

}  // namespace
}  // namespace deltamem

// A function that takes a record takes its tuple.
namespace pybind11::detail {

template <class Record>
struct record_caster {
  PYBIND11_TYPE_CASTER(Record, const_name("operand record"));
  bool load(handle source, bool) { return deltamem::read_record(source.ptr(), value); }
};

template <> struct type_caster<deltamem::ScanOperands> : record_caster<deltamem::ScanOperands> {};
template <> struct type_caster<deltamem::ScanCotangents> : record_caster<deltamem::ScanCotangents> {};
template <> struct type_caster<deltamem::StepOperands> : record_caster<deltamem::StepOperands> {};
template <> struct type_caster<deltamem::CorrectionOperands> : record_caster<deltamem::CorrectionOperands> {};
template <> struct type_caster<deltamem::ProjectionOperands> : record_caster<deltamem::ProjectionOperands> {};
template <> struct type_caster<deltamem::PrefillOperands> : record_caster<deltamem::PrefillOperands> {};
template <> struct type_caster<deltamem::DecodeOperands> : record_caster<deltamem::DecodeOperands> {};
template <> struct type_caster<deltamem::SegmentOperands> : record_caster<deltamem::SegmentOperands> {};

}  // namespace pybind11::detail
