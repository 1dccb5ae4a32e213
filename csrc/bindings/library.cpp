// The library of the CPU kernels: what Python calls, and the choice of an instruction set. One translation unit,
// because reading torch's headers takes longer than compiling these files.
#include "scan.cpp"
#include "step.cpp"
#include "correction.cpp"
#include "projection.cpp"
#include "segment_mean.cpp"
#include "decode.cpp"
#include "layer_step.cpp"
#include "eager.cpp"

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

}  // namespace

py::dict record_fields() {
  py::dict fields;
  fields["ScanOperands"] = field_names<ScanOperands>();
  fields["ScanCotangents"] = field_names<ScanCotangents>();
  fields["StepOperands"] = field_names<StepOperands>();
  fields["CorrectionOperands"] = field_names<CorrectionOperands>();
  fields["ProjectionOperands"] = field_names<ProjectionOperands>();
  fields["PrefillOperands"] = field_names<PrefillOperands>();
  fields["DecodeOperands"] = field_names<DecodeOperands>();
  fields["LayerStepWeights"] = field_names<LayerStepWeights>();
  fields["LayerStepOperands"] = field_names<LayerStepOperands>();
  fields["SegmentOperands"] = field_names<SegmentOperands>();
  return fields;
}

}  // namespace deltamem

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace deltamem;
  m.def("scan", &scan);
  m.def("scan_backward", &scan_backward);
  m.def("step", &step);
  m.def("correct", &correct);
  m.def("correct_backward", &correct_backward);
  m.def("project", &project);
  m.def("segment_mean", &segment_mean);
  m.def("decode", &decode);
  bind_eager(m);
  m.def("record_fields", &record_fields, "The names of each record's fields.");
  m.def("isas", &isas, "The instruction sets of this processor, the best first.");
  m.def("use_isa", &use_isa, "Use the kernels of this instruction set from now on.");
  m.def("isa", [] { return std::string(kernels()->isa); });
}
