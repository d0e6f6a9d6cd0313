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

}  // namespace

#endif  // NLK_CUDA_BINDINGS_HOPPER_ATTENTION_H_
