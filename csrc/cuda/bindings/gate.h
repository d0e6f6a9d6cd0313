// The bindings of context pooling: nlkernels/ops/gate/cuda.py calls them.
#ifndef NLK_CUDA_BINDINGS_GATE_H_
#define NLK_CUDA_BINDINGS_GATE_H_

#include "cuda/bindings/common.h"
#include "nlk/cuda/gate.h"

namespace {

// dtype, (B,C,T,H,W), whether channels are neighbours.
using PyGate = std::tuple<int, Sizes<5>, bool>;
// Addresses of x, weight, and in the backward grad and context; of the parts and their statistics.
using PyGateOperands = std::array<std::uintptr_t, 6>;

inline nlk::cuda::GateLayout gate_layout(const Sizes<5>& strides) {
  return {strides[0], strides[1], {strides[2], strides[3], strides[4]}};
}

inline nlk::cuda::GateArguments gate_arguments(const PyGate& from) {
  nlk::cuda::GateArguments arguments{};
  const auto& [dtype, sizes, channels_last] = from;
  arguments.dtype = dtype;
  arguments.batch = sizes[0];
  arguments.channels = sizes[1];
  for (int axis = 0; axis < 3; ++axis) arguments.positions[axis] = sizes[2 + axis];
  arguments.channels_last = channels_last;
  return arguments;
}

inline nlk::cuda::GateArguments gate_arguments(const PyGate& from, const PyGateOperands& operands,
                                               const Sizes<5>& strides) {
  nlk::cuda::GateArguments arguments = gate_arguments(from);
  arguments.x = address<const void>(operands[0]);
  arguments.x_layout = gate_layout(strides);
  arguments.weight = address<const void>(operands[1]);
  arguments.grad = address<const void>(operands[2]);
  arguments.context = address<const void>(operands[3]);
  arguments.parts = address<float>(operands[4]);
  arguments.part_stats = address<float>(operands[5]);
  return arguments;
}

inline void bind_gate(py::module_& module) {
  module.attr("gate_widest") = nlk::cuda::kGateWidest;
  module.def("gate_splits",
             [](const PyGate& gate) { return nlk::cuda::gate_splits(gate_arguments(gate)); });
  module.def("gate_forward", [](const PyLaunch& where, const PyGate& gate,
                                const PyGateOperands& operands, const Sizes<5>& strides,
                                std::uintptr_t context) {
    check(nlk::cuda::gate_forward(gate_arguments(gate, operands, strides), address<void>(context),
                                  launch(where)));
  });
  // Addresses of scores, sums and stats.
  module.def("gate_backward", [](const PyLaunch& where, const PyGate& gate,
                                 const PyGateOperands& operands, const Sizes<5>& strides,
                                 const std::array<std::uintptr_t, 3>& sums, std::uintptr_t d_x,
                                 const Sizes<5>& d_x_strides, std::uintptr_t d_weight) {
    nlk::cuda::GateGradient gradient{};
    gradient.scores = address<float>(sums[0]);
    gradient.sums = address<float>(sums[1]);
    gradient.stats = address<float>(sums[2]);
    gradient.d_x = address<void>(d_x);
    gradient.d_x_layout = gate_layout(d_x_strides);
    gradient.d_weight = address<void>(d_weight);
    check(nlk::cuda::gate_backward(gate_arguments(gate, operands, strides), gradient,
                                   launch(where)));
  });
}

}  // namespace

#endif  // NLK_CUDA_BINDINGS_GATE_H_
