// What is not a tensor operator: the choice of instruction set and facts of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.def("active_isa", [] { return qk::isa_name(qk::active_isa()); });
  m.def("force_isa", &qk::force_isa, py::arg("name"));
  m.def("usable_isas", &qk::usable_isas);
  m.def("build_facts", [] {
    py::dict facts;
    facts["compiler"] = QK_COMPILER;
    facts["torch"] = QK_BUILT_WITH_TORCH;
    facts["cuda"] = QK_CUDA_VERSION;  // empty: built without CUDA
    facts["cuda_archs"] = QK_CUDA_ARCHS;
    return facts;
  });
}
