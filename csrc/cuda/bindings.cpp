// The module nlkernels._C_cuda. Python passes addresses as integers and strides as tuples, counted
// in elements; the checks are in Python. Every call enqueues its kernels and returns.
#include "cuda/bindings/attention.h"
#include "cuda/bindings/common.h"
#include "cuda/bindings/concat.h"
#include "cuda/bindings/gate.h"
#include "cuda/bindings/region.h"
#ifdef NLK_WITH_SM_90A
#include "cuda/bindings/hopper_attention.h"
#endif

namespace {

// Every architecture of this build by its name, with its number.
py::dict built_architectures() {
  py::dict found;
#ifdef NLK_WITH_SM_75
  found["sm_75"] = 75;
#endif
#ifdef NLK_WITH_SM_80
  found["sm_80"] = 80;
#endif
#ifdef NLK_WITH_SM_89
  found["sm_89"] = 89;
#endif
#ifdef NLK_WITH_SM_90A
  found["sm_90a"] = 90;
#endif
#ifdef NLK_WITH_SM_120
  found["sm_120"] = 120;
#endif
  return found;
}

void bind_machine(py::module_& module) {
  module.attr("sources") = NLK_SOURCES;
  module.attr("isas") = built_architectures();
  module.def("device_count", &nlk::cuda::device_count);
  module.def("runtime_version", &nlk::cuda::runtime_version);
  module.def("driver_version", &nlk::cuda::driver_version);
  module.def("shared_memory", &nlk::cuda::shared_memory, py::arg("device"));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "Kernels of nlkernels for NVIDIA GPUs. Internal: use the functions of nlkernels.";
  bind_machine(module);
  bind_attention(module);
  bind_concat(module);
  bind_gate(module);
  bind_region(module);
#ifdef NLK_WITH_SM_90A
  bind_hopper_attention(module);
  bind_hopper_d_scores(module);
#endif
}
