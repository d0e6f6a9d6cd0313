// The host side of the Hopper forward kernels: from a problem and its plan to a launch.
#ifndef NLK_CUDA_HOPPER_FORWARD_HOST_CUH_
#define NLK_CUDA_HOPPER_FORWARD_HOST_CUH_

#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/parameters.h"
#include "nlk/cuda/hopper_attention.h"

namespace nlk::cuda::hopper {

// What a file of kernels offers: each serves the plans of one form.
Error forward_rows(const HopperForward&, const Launch&);
Error forward_split(const HopperForward&, const Launch&);

template <class Form>
bool serves(const HopperForward& a) {
  const HopperPlan& plan = a.plan;
  return (a.dtype == kBfloat16Code) == Form::Number::kIsBfloat16 && plan.tile_keys == Form::kKeys &&
         plan.cluster == Form::kBlocks && plan.channel_first == Form::kChannelFirst &&
         plan.streamed == Form::kStreamed;
}

inline SharedPlan shared_plan(const HopperPlan& plan, std::int64_t depth) {
  return SharedPlan::of(plan.split ? 64 : 128, plan.tile_keys,
                        divide_up(static_cast<int>(depth), kLineNumbers), plan.key_slots,
                        plan.value_slots, plan.split, plan.streamed);
}

template <class Form>
Error run_forward(void (*kernel)(TensorMap, TensorMap, TensorMap, ForwardParameters),
                  const HopperForward& a, const Launch& where) {
  const SharedPlan shared = shared_plan(a.plan, a.depth);
  if (shared.bytes() > kSharedLimit) return cudaErrorInvalidValue;
  // Of the maps too: a thread that has not used the device yet has no context to make them in.
  const OnDevice device(where.device);
  TensorMap query, key, value;
  const Maps maps{a.dtype == kBfloat16Code, a.plan.channel_first, a.batch};
  Error error = device.error();
  if (error == cudaSuccess) error = maps.make(query, a.query, a.queries, a.depth, 64);
  if (error == cudaSuccess) error = maps.make(key, a.key, a.keys, a.depth, Form::kKeys);
  if (error == cudaSuccess) error = maps.make(value, a.value, a.keys, a.value_depth, Form::kKeys);
  if (error != cudaSuccess) return error;
  const ForwardParameters parameters{static_cast<int>(a.batch),
                                     static_cast<int>(a.queries),
                                     static_cast<int>(a.keys),
                                     static_cast<int>(a.value_depth),
                                     divide_up(static_cast<int>(a.depth), kLineNumbers),
                                     a.plan.key_slots,
                                     a.plan.value_slots,
                                     a.factor,
                                     a.shift,
                                     a.unit,
                                     a.out,
                                     a.stats};
  const int rows = (a.plan.split ? 64 : 128) * Form::kBlocks;
  const std::int64_t clusters = (a.queries + rows - 1) / rows * a.batch;
  const std::int64_t most = a.blocks / Form::kBlocks > 1 ? a.blocks / Form::kBlocks : 1;
  const int blocks = static_cast<int>(clusters < most ? clusters : most) * Form::kBlocks;
  return launch_clusters(kernel, blocks, Form::kBlocks, kThreads, shared.bytes(), where, query, key, value,
                         parameters);
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_FORWARD_HOST_CUH_
