// Bindings of the attention kernels that only Hopper has.
#ifndef NLK_CUDA_BINDINGS_HOPPER_ATTENTION_H_
#define NLK_CUDA_BINDINGS_HOPPER_ATTENTION_H_

#include "cuda/bindings/common.h"
#include "nlk/cuda/hopper_attention.h"

namespace {

// split, streamed, channel_first, tile_keys, cluster, key_slots, value_slots: `cuda_hopper_plan.Plan`.
using PyHopperPlan = std::tuple<bool, bool, bool, int, int, int, int>;

inline nlk::cuda::HopperPlan hopper_plan(const PyHopperPlan& from) {
  const auto [split, streamed, channel_first, tile_keys, cluster, key_slots, value_slots] = from;
  return {split, streamed, channel_first, tile_keys, cluster, key_slots, value_slots};
}

inline void bind_hopper_attention(py::module_& module) {
  module.def("hopper_forward_shared", [](const PyHopperPlan& plan, std::int64_t depth) {
    return nlk::cuda::hopper_forward_shared(hopper_plan(plan), depth);
  });
  // factors: factor, shift, unit; sizes: B, N, M, D, V.
  module.def("hopper_forward",
             [](const PyLaunch& where, const PyHopperPlan& plan, int dtype, int blocks,
                const std::array<float, 3>& factors, const Sizes<5>& sizes, const PyOperand& query,
                const PyOperand& key, const PyOperand& value, std::uintptr_t out,
                std::uintptr_t stats) {
               const nlk::cuda::HopperForward arguments{
                   hopper_plan(plan), dtype,          blocks,         factors[0],
                   factors[1],        factors[2],     sizes[0],       sizes[1],
                   sizes[2],          sizes[3],       sizes[4],       operand(query),
                   operand(key),      operand(value), address<void>(out), address<float>(stats)};
               check(nlk::cuda::hopper_forward(arguments, launch(where)));
             });
}

// channel_first, tile_keys, cluster, slots: `cuda_hopper_backward_plan.Plan`.
using PyHopperBackwardPlan = std::tuple<bool, int, int, int>;

inline nlk::cuda::HopperBackwardPlan hopper_plan(const PyHopperBackwardPlan& from) {
  const auto [channel_first, tile_keys, cluster, slots] = from;
  return {channel_first, tile_keys, cluster, slots};
}

inline void bind_hopper_d_scores(py::module_& module) {
  module.def("hopper_d_scores_shared", [](const PyHopperBackwardPlan& plan) {
    return nlk::cuda::hopper_d_scores_shared(hopper_plan(plan));
  });
  // factors: factor, scale, tolerance; sizes: items, N, first row, rows, M, D, V; operands: query, key,
  // grad, value; given: top, total, delta; workspace: sums, weights, d_scores.
  module.def("hopper_d_scores",
             [](const PyLaunch& where, const PyHopperBackwardPlan& plan, int dtype, int blocks,
                const std::array<float, 3>& factors, const Sizes<7>& sizes,
                const std::array<PyOperand, 4>& operands,
                const std::array<std::uintptr_t, 3>& given,
                const std::array<std::uintptr_t, 3>& workspace) {
               nlk::cuda::HopperDScores arguments{};
               arguments.plan = hopper_plan(plan);
               arguments.dtype = dtype;
               arguments.blocks = blocks;
               arguments.factor = factors[0];
               arguments.scale = factors[1];
               arguments.tolerance = factors[2];
               arguments.items = sizes[0];
               arguments.queries = sizes[1];
               arguments.first = sizes[2];
               arguments.rows = sizes[3];
               arguments.keys = sizes[4];
               arguments.depth = sizes[5];
               arguments.value_depth = sizes[6];
               arguments.query = operand(operands[0]);
               arguments.key = operand(operands[1]);
               arguments.grad = operand(operands[2]);
               arguments.value = operand(operands[3]);
               arguments.top = address<const float>(given[0]);
               arguments.total = address<const float>(given[1]);
               arguments.delta = address<const float>(given[2]);
               arguments.sums = address<float>(workspace[0]);
               arguments.weights = address<void>(workspace[1]);
               arguments.d_scores = address<void>(workspace[2]);
               check(nlk::cuda::hopper_d_scores(arguments, launch(where)));
             });
}

}  // namespace

#endif  // NLK_CUDA_BINDINGS_HOPPER_ATTENTION_H_
