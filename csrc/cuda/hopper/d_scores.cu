// Kernels of d_scores.cuh, from a chunk and its plan to their launches.
#include "cuda/hopper/d_scores.cuh"

#include "cuda/hopper/maps.cuh"
#include "nlk/cuda/hopper_attention.h"

namespace nlk::cuda {

namespace hopper {

namespace {

constexpr int kTileRows = 128;

SharedPlan d_scores_plan(const HopperBackwardPlan& plan) {
  return SharedPlan::of(kTileRows, plan.tile_keys, 0, plan.slots, 0, false, true);
}

int key_tiles(const HopperDScores& a) {
  return divide_up(static_cast<int>(a.keys), a.plan.tile_keys);
}

DScoresParameters d_scores_parameters(const HopperDScores& a) {
  DScoresParameters p{};
  p.items = static_cast<int>(a.items);
  p.first = static_cast<int>(a.first);
  p.rows = static_cast<int>(a.rows);
  p.queries = static_cast<int>(a.queries);
  p.keys = static_cast<int>(a.keys);
  p.depth_chunks = divide_up(static_cast<int>(a.depth), kLineNumbers);
  p.value_chunks = divide_up(static_cast<int>(a.value_depth), kLineNumbers);
  p.slots = a.plan.slots;
  p.factor = a.factor;
  p.scale = a.scale;
  p.top = a.top;
  p.total = a.total;
  p.delta = a.delta;
  p.sums = a.sums;
  p.weights = a.weights;
  p.d_scores = a.d_scores;
  p.line = (a.keys + 7) / 8 * 8;
  p.tolerance = a.tolerance;
  return p;
}

template <class Form>
Error run_tiles(const HopperDScores& a, const Launch& where) {
  const int shared = d_scores_plan(a.plan).bytes();
  if (shared > kSharedLimit || a.plan.slots <= DScoresKernel<Form>::kAhead) return cudaErrorInvalidValue;
  const Maps maps{Form::Number::kIsBfloat16, Form::kChannelFirst, a.items};
  TensorMap query, key, grad, value;
  Error error = maps.make(query, a.query, a.queries, a.depth, 64);
  if (error == cudaSuccess) error = maps.make(key, a.key, a.keys, a.depth, Form::kKeys);
  if (error == cudaSuccess) error = maps.make(grad, a.grad, a.queries, a.value_depth, 64);
  if (error == cudaSuccess) error = maps.make(value, a.value, a.keys, a.value_depth, Form::kKeys);
  if (error != cudaSuccess) return error;
  const std::int64_t rows = kTileRows * Form::kBlocks;
  const std::int64_t clusters = (a.rows + rows - 1) / rows * a.items * key_tiles(a);
  const std::int64_t most = a.blocks / Form::kBlocks > 1 ? a.blocks / Form::kBlocks : 1;
  const int blocks = static_cast<int>(clusters < most ? clusters : most) * Form::kBlocks;
  return launch_clusters(fill_d_scores<Form>, blocks, Form::kBlocks, kThreads, shared, where, query, key,
                         grad, value, d_scores_parameters(a));
}

template <class Form>
bool try_tiles(const HopperDScores& a, const Launch& where, Error& error) {
  const HopperBackwardPlan& plan = a.plan;
  if ((a.dtype == kBfloat16Code) != Form::Number::kIsBfloat16 || plan.tile_keys != Form::kKeys ||
      plan.cluster != Form::kBlocks || plan.channel_first != Form::kChannelFirst)
    return false;
  error = run_tiles<Form>(a, where);
  return true;
}

template <class Number>
Error run_d_scores(const HopperDScores& a, const Launch& where) {
  Error error = cudaErrorInvalidValue;
  try_tiles<Form<Number, 192, 1, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 192, 2, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 160, 1, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 160, 2, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 128, 1, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 128, 2, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 64, 1, false, true>>(a, where, error) ||
      try_tiles<Form<Number, 64, 1, true, true>>(a, where, error);
  if (error != cudaSuccess || key_tiles(a) == 1) return error;
  const auto blocks = static_cast<int>((a.items * a.rows + kCorrectRows - 1) / kCorrectRows);
  return launch_clusters(correct_rows<Number>, blocks, 1, kCorrectThreads, 0, where,
                         d_scores_parameters(a), key_tiles(a));
}

Error run_on_device(const HopperDScores& a, const Launch& where) {
  // Of the maps too: a thread that has not used the device yet has no context to make them in.
  const OnDevice device(where.device);
  if (device.error() != cudaSuccess) return device.error();
  return a.dtype == kBfloat16Code ? run_d_scores<Bfloat16>(a, where) : run_d_scores<Float16>(a, where);
}

}  // namespace

}  // namespace hopper

Error hopper_d_scores(const HopperDScores& a, const Launch& where) {
  return hopper::run_on_device(a, where);
}

int hopper_d_scores_shared(const HopperBackwardPlan& plan) {
  return hopper::d_scores_plan(plan).bytes();
}

}  // namespace nlk::cuda
