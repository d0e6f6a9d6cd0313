// The host side of the Hopper forward kernels: from a problem and its plan to a launch.
#ifndef NLK_CUDA_HOPPER_FORWARD_HOST_CUH_
#define NLK_CUDA_HOPPER_FORWARD_HOST_CUH_

#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/parameters.h"
#include "nlk/cuda/hopper_attention.h"

namespace nlk::cuda::hopper {

constexpr int kBfloat16Code = 2;

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

// A (B,R,C) operand in boxes of `rows` x 64; where channels come first, boxes are 64 x 64 and a line runs
// along the rows. Where there is one item, its stride may be anything.
inline Error operand_map(TensorMap& map, const HopperForward& a, const Operand& from, std::int64_t rows,
                         std::int64_t channels, int box_rows) {
  const bool first = a.plan.channel_first;
  const std::int64_t line = first ? from.channel : from.row;
  const std::int64_t sizes[3] = {first ? rows : channels, first ? channels : rows, a.batch};
  const std::int64_t strides[3] = {first ? from.row : from.channel, line,
                                   a.batch == 1 ? line : from.item};
  if (strides[0] != 1) return cudaErrorInvalidValue;
  return make_map(map, a.dtype == kBfloat16Code, from.data, sizes, strides,
                  first ? kLineNumbers : box_rows);
}

template <class Form>
Error run_forward(void (*kernel)(TensorMap, TensorMap, TensorMap, ForwardParameters),
                  const HopperForward& a, const Launch& where) {
  const SharedPlan shared = shared_plan(a.plan, a.depth);
  if (shared.bytes() > kSharedLimit) return cudaErrorInvalidValue;
  // Of the maps too: a thread that has not used the device yet has no context to make them in.
  const OnDevice device(where.device);
  TensorMap query, key, value;
  Error error = device.error();
  if (error == cudaSuccess) error = operand_map(query, a, a.query, a.queries, a.depth, 64);
  if (error == cudaSuccess) error = operand_map(key, a, a.key, a.keys, a.depth, Form::kKeys);
  if (error == cudaSuccess)
    error = operand_map(value, a, a.value, a.keys, a.value_depth, Form::kKeys);
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
