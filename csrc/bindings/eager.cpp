// The fast path of eager calls: from the public Python function to the kernel, without the dispatcher and the checks in
// Python.
//
// Each function has three answers. The results, where the call is plain: nothing but a kernel on CPU tensors has to
// run. False, where the operands fit but the call needs the registered operator: a gradient is wanted, or another
// backend. None in all other cases: Python then checks the operands, and raises if one does not fit.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "fits.h"

namespace deltamem {
namespace {

// Whether a set has no keys but those of another, backends included.
bool is_subset(c10::DispatchKeySet keys, c10::DispatchKeySet of) { return (keys.raw_repr() & ~of.raw_repr()) == 0; }

// Whether forward-mode differentiation is active, in any thread: then Python looks for tangents, and raises.
bool has_dual_level() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

// Whether nothing in this thread traces, fakes, maps, records or differentiates operators in forward mode.
bool dispatch_is_plain() {
  static const c10::DispatchKeySet plain({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return is_subset(c10::impl::tls_local_dispatch_key_set().included_, plain) &&
         !at::impl::torch_function_mode_enabled() && !at::hasCallbacks() && !has_dual_level();
}

// Whether `cpu` is the backend of CPU tensors: by name, by the environment, or because it comes first.
bool cpu_is_chosen(PyObject* backend) {
  if (backend == Py_None) {
    const char* const name = std::getenv("DELTAMEM_BACKEND");
    return !name || !*name || std::strcmp(name, "cpu") == 0;
  }
  return PyUnicode_Check(backend) && PyUnicode_CompareWithASCIIString(backend, "cpu") == 0;
}

// What is known of the tensors of a call.
struct Tensors {
  bool dense = true;      // each is a plain dense tensor, all on one device
  bool gradient = false;  // one wants a gradient
  TensorPtr first = nullptr;

  void add(PyObject* object) {
    static const c10::DispatchKeySet allowed(
        {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
         c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCPU,
         c10::DispatchKey::AutocastCUDA});
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    const Tensor& x = THPVariable_Unpack(object);
    dense = dense && (type == THPVariableClass || type == ParameterClass) && is_subset(x.key_set(), allowed);
    if (!first) first = &x;
    dense = dense && x.device() == first->device();
    gradient = gradient || (at::GradMode::is_enabled() && x.requires_grad());
  }
  // Adds the tensors of a record, and those of a sequence in it.
  void add_all(PyObject* items) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items); ++i) {
      PyObject* const item = PySequence_Fast_GET_ITEM(items, i);
      if (PyTuple_Check(item) || PyList_Check(item))
        add_all(item);
      else if (THPVariable_Check(item))
        add(item);
    }
  }
  bool on_cpu() const { return first && first->is_cpu(); }
};

// Whether a tensor can be written without autograd taking part.
bool is_writable_in_place(TensorPtr x) {
  if (!x) return true;
  if (at::GradMode::is_enabled() && x->is_view()) return false;  // perhaps of a leaf
  return !x->is_inference() || c10::InferenceMode::is_enabled();
}

enum class Answer { run, needs_operator, unknown };

// Reads a record and looks at the call. `tensors` and `out` hold what the call writes outside of the record.
// An operation without a gradient is not differentiable: where one is wanted, Python raises.
template <bool differentiable = true, class Record, class... Out>
Answer examine(py::handle operands, py::handle backend, Record& record, Tensors tensors, Out... out) {
  if (!dispatch_is_plain() || !read_record(operands.ptr(), record)) return Answer::unknown;
  tensors.add_all(operands.ptr());
  if (!tensors.dense || !fits(record, out...)) return Answer::unknown;
  if (!differentiable && tensors.gradient) return Answer::unknown;
  if (backend.ptr() != Py_None && !PyUnicode_Check(backend.ptr())) return Answer::unknown;
  return tensors.on_cpu() && !tensors.gradient && cpu_is_chosen(backend.ptr()) ? Answer::run : Answer::needs_operator;
}

// The answer without results.
py::object declined(Answer answer) { return answer == Answer::needs_operator ? py::cast(false) : py::none(); }

void bump_version(TensorPtr x) {
  if (x) x->unsafeGetTensorImpl()->bump_version();
}

py::object eager_scan(py::handle operands, py::handle backend) {
  ScanOperands s;
  const Answer answer = examine(operands, backend, s, {});
  if (answer != Answer::run) return declined(answer);
  auto [reads, final_state, checkpoints] = scan(s, false, false);
  return py::make_tuple(reads, final_state);
}

py::object eager_step(py::handle operands, py::handle backend) {
  StepOperands s;
  const Answer answer = examine<false>(operands, backend, s, {});
  if (answer == Answer::unknown) return py::none();
  for (TensorPtr x : {s.state, s.intermediate_states, s.out})
    if (!is_writable_in_place(x)) return py::none();
  if (answer != Answer::run) return declined(answer);
  step(s);
  bump_version(s.state), bump_version(s.intermediate_states), bump_version(s.out);
  return py::cast(true);
}

py::object eager_correct(py::handle operands, py::handle out, py::handle backend) {
  CorrectionOperands c;
  Tensors tensors;
  TensorPtr written = nullptr;
  if (!out.is_none()) {
    if (!THPVariable_Check(out.ptr())) return py::none();
    written = &THPVariable_Unpack(out.ptr());
    tensors.add(out.ptr());
    if (tensors.gradient || !is_writable_in_place(written)) return py::none();
  }
  const Answer answer = examine(operands, backend, c, tensors, written);
  if (answer != Answer::run) return declined(answer);
  if (!written) return py::cast(correct(c, std::nullopt));
  correct(c, *written);
  bump_version(written);
  return py::reinterpret_borrow<py::object>(out);
}

py::object eager_project(py::handle operands, py::handle backend) {
  ProjectionOperands o;
  const Answer answer = examine(operands, backend, o, {});
  if (answer != Answer::run) return declined(answer);
  auto [q, k, v, beta, decay, norms] = project(o);
  return py::make_tuple(q, k, v, beta, decay);
}

py::object eager_prefill(py::handle operands, py::handle backend) {
  PrefillOperands p;
  const Answer answer = examine(operands, backend, p, {});
  if (answer != Answer::run) return declined(answer);
  auto [q, k, v, beta, decay, norms] = project(p.projection());
  const TensorPtr given_decay = p.decay_weight ? &decay : nullptr;
  auto [reads, final_state, checkpoints] =
      scan({&q, &k, &v, &beta, given_decay, nullptr, p.initial_state, p.mask, p.cu_seqlens, p.mode}, false, false);
  return py::make_tuple(reads, final_state);
}

py::object eager_decode(py::handle operands, py::handle backend) {
  DecodeOperands d;
  const Answer answer = examine<false>(operands, backend, d, {});
  if (answer == Answer::unknown) return py::none();
  if (!is_writable_in_place(d.state) || !is_writable_in_place(d.out)) return py::none();
  if (answer != Answer::run) return declined(answer);
  auto [reads, corrected] = decode(d);
  bump_version(d.state), bump_version(d.out);
  return py::make_tuple(reads, corrected);
}

py::object eager_layer_step(py::handle operands, py::handle backend) {
  LayerStepOperands o;
  const Answer answer = examine<false>(operands, backend, o, {});
  if (answer != Answer::run) return declined(answer);
  LayerStepResult result = layer_step(o);
  py::tuple corrections(result.corrections.size());
  for (size_t i = 0; i < result.corrections.size(); ++i) corrections[i] = std::move(result.corrections[i]);
  return py::make_tuple(std::move(result.reads), std::move(result.state), std::move(corrections));
}

}  // namespace

void bind_eager(py::module_& m) {
  m.def("eager_scan", &eager_scan);
  m.def("eager_step", &eager_step);
  m.def("eager_correct", &eager_correct);
  m.def("eager_project", &eager_project);
  m.def("eager_prefill", &eager_prefill);
  m.def("eager_decode", &eager_decode);
  m.def("eager_layer_step", &eager_layer_step);
}

}  // namespace deltamem
