// Bindings of attention on every GPU.
#ifndef NLK_CUDA_BINDINGS_ATTENTION_H_
#define NLK_CUDA_BINDINGS_ATTENTION_H_

#include "cuda/bindings/common.h"
#include "nlk/cuda/attention.h"

namespace {

inline void bind_attention(py::module_& module) {
  using nlk::cuda::AttentionProblem;
  py::class_<AttentionProblem>(module, "AttentionProblem", py::module_local())
      .def(py::init([](int affinity, int dtype, float scale, Sizes<5> sizes) {
             return AttentionProblem{static_cast<nlk::cuda::Affinity>(affinity),
                                     static_cast<nlk::cuda::Dtype>(dtype),
                                     scale,
                                     sizes[0],
                                     sizes[1],
                                     sizes[2],
                                     sizes[3],
                                     sizes[4]};
           }),
           py::arg("affinity"), py::arg("dtype"), py::arg("scale"), py::arg("sizes"));
  module.def("attention_forward",
             [](const PyLaunch& where, const AttentionProblem& problem, const PyOperand& query,
                const PyOperand& key, const PyOperand& value, const PyOperand& out,
                std::uintptr_t stats, std::uintptr_t units) {
               const nlk::cuda::AttentionForward call{problem,
                                                      operand(query),
                                                      operand(key),
                                                      operand(value),
                                                      operand(out),
                                                      address<float>(stats),
                                                      address<const float>(units)};
               check(nlk::cuda::attention_forward(call, launch(where)));
             });
  // delta (B,N) of grad and out (B,N,V), whose sizes these are.
  module.def("attention_delta", [](const PyLaunch& where, int dtype, const Sizes<3>& sizes,
                                   const PyOperand& grad, const PyOperand& out,
                                   std::uintptr_t delta) {
    nlk::cuda::AttentionBackward call{};
    call.problem.dtype = static_cast<nlk::cuda::Dtype>(dtype);
    call.problem.batch = sizes[0];
    call.problem.queries = sizes[1];
    call.problem.value_depth = sizes[2];
    call.grad = operand(grad);
    call.out = operand(out);
    call.delta = address<float>(delta);
    check(nlk::cuda::attention_delta(call, launch(where)));
  });
  module.def("attention_backward",
             [](const PyLaunch& where, const AttentionProblem& problem, const PyOperand& grad,
                const PyOperand& query, const PyOperand& key, const PyOperand& value,
                const PyOperand& out, const PyOperand& d_query, const PyOperand& d_key,
                const PyOperand& d_value, std::uintptr_t stats, std::uintptr_t delta,
                std::uintptr_t weight_units, std::uintptr_t gradient_units) {
               const nlk::cuda::AttentionBackward call{problem,
                                                       operand(grad),
                                                       operand(query),
                                                       operand(key),
                                                       operand(value),
                                                       operand(out),
                                                       operand(d_query),
                                                       operand(d_key),
                                                       operand(d_value),
                                                       address<const float>(stats),
                                                       address<float>(delta),
                                                       address<const float>(weight_units),
                                                       address<const float>(gradient_units)};
               check(nlk::cuda::attention_backward(call, launch(where)));
             });
}

}  // namespace

#endif  // NLK_CUDA_BINDINGS_ATTENTION_H_
