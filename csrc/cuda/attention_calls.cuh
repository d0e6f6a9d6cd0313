// Attention of operands of one type: which passes it takes, and their launches.
#ifndef NLK_CUDA_ATTENTION_CALLS_CUH_
#define NLK_CUDA_ATTENTION_CALLS_CUH_

#include "cuda/attention_pass.cuh"

namespace nlk::cuda {

namespace {

constexpr std::int64_t kMostBlocks = 2147483647;
// cudaErrorInvalidConfiguration.
constexpr Error kTooManyBlocks = 9;
// Channels of a block's results; the narrow variant leaves registers to more blocks.
constexpr int kNarrow = 64, kWide = 256;

template <typename T, int kChannels, bool kForward>
Error launch_pass(const Pass& pass, const Launch& where) {
  constexpr int kGroup = kChannels / kChunk<T>;
  const std::int64_t tiles = (pass.rows + kRows - 1) / kRows;
  const std::int64_t groups = (pass.channels + kChannels - 1) / kChannels;
  const std::int64_t blocks = tiles * groups * pass.items;
  if (blocks > kMostBlocks) return kTooManyBlocks;
  return launch(attention_pass<T, kGroup, kForward>, dim3(static_cast<unsigned>(blocks)),
                Products<T>::kThreads, kPassShared<T>, where, pass);
}

template <typename T, bool kForward>
Error run_pass(const Pass& pass, const Launch& where) {
  return pass.channels <= kNarrow ? launch_pass<T, kNarrow, kForward>(pass, where)
                                  : launch_pass<T, kWide, kForward>(pass, where);
}

// Row sums of grad out, by one warp each.
constexpr int kDeltaThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta(const Operand grad, const Operand out, std::int64_t items, std::int64_t rows,
                    std::int64_t channels, float* delta) {
  const std::int64_t own =
      static_cast<std::int64_t>(blockIdx.x) * (kDeltaThreads / kWarp) + threadIdx.x / kWarp;
  if (own >= items * rows) return;
  const std::int64_t item = own / rows, row = own % rows;
  const auto left = matrix<const T>(grad, item), right = matrix<const T>(out, item);
  float sum = 0.0f;
  for (std::int64_t channel = threadIdx.x % kWarp; channel < channels; channel += kWarp)
    sum += to_float(left.data[row * left.row + channel * left.channel]) *
           to_float(right.data[row * right.row + channel * right.channel]);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (threadIdx.x % kWarp == 0) delta[own] = sum;
}

template <typename T>
Error run_delta(const AttentionBackward& call, const Launch& where) {
  const AttentionProblem& problem = call.problem;
  constexpr int kWarps = kDeltaThreads / kWarp;
  const std::int64_t blocks = (problem.batch * problem.queries + kWarps - 1) / kWarps;
  if (blocks > kMostBlocks) return kTooManyBlocks;
  return launch(attention_delta<T>, dim3(static_cast<unsigned>(blocks)), kDeltaThreads, 0, where,
                call.grad, call.out, problem.batch, problem.queries, problem.value_depth,
                call.delta);
}

template <typename T>
Error run_forward(const AttentionForward& call, const Launch& where) {
  const AttentionProblem& problem = call.problem;
  Pass pass{};
  pass.affinity = problem.affinity;
  pass.scale = problem.scale;
  pass.result_scale = 1.0f;
  pass.items = problem.batch;
  pass.rows = problem.queries;
  pass.columns = problem.keys;
  pass.depth = problem.depth;
  pass.channels = problem.value_depth;
  pass.left = call.query;
  pass.right = call.key;
  pass.factor = call.value;
  pass.result = call.out;
  pass.stats = call.stats;
  pass.units = call.units;
  return run_pass<T, true>(pass, where);
}

template <typename T>
Error run_backward(const AttentionBackward& call, const Launch& where) {
  const AttentionProblem& problem = call.problem;
  const bool softmax = problem.affinity == Affinity::kSoftmax;
  if (softmax) {
    if (const Error error = run_delta<T>(call, where)) return error;
  }
  Pass pass{};
  pass.affinity = problem.affinity;
  pass.scale = problem.scale;
  pass.items = problem.batch;
  pass.stats = const_cast<float*>(call.stats);
  pass.delta = call.delta;
  pass.depth = problem.depth;

  // The weights of a softmax leave out its scale, which the gradients of its scores have.
  Pass d_query = pass;
  d_query.result_scale = softmax ? problem.scale : 1.0f;
  d_query.units = call.gradient_units;
  d_query.grad_depth = problem.value_depth;
  d_query.channels = problem.depth;
  // Gradients of plain scores need none of the scores.
  if (problem.affinity == Affinity::kScores) d_query.depth = 0;
  Pass d_key = d_query;
  d_query.rows = problem.queries;
  d_query.columns = problem.keys;
  d_query.left = call.query;
  d_query.right = call.key;
  d_query.grad_left = call.grad;
  d_query.grad_right = call.value;
  d_query.factor = call.key;
  d_query.result = call.d_query;

  d_key.queries_are_columns = true;
  d_key.rows = problem.keys;
  d_key.columns = problem.queries;
  d_key.left = call.key;
  d_key.right = call.query;
  d_key.grad_left = call.value;
  d_key.grad_right = call.grad;
  d_key.factor = call.query;
  d_key.result = call.d_key;

  Pass d_value = pass;
  d_value.queries_are_columns = true;
  d_value.result_scale = 1.0f;
  d_value.units = call.weight_units;
  d_value.rows = problem.keys;
  d_value.columns = problem.queries;
  d_value.left = call.key;
  d_value.right = call.query;
  d_value.channels = problem.value_depth;
  d_value.factor = call.grad;
  d_value.result = call.d_value;

  for (const Pass* each : {&d_query, &d_key, &d_value}) {
    if (const Error error = run_pass<T, false>(*each, where)) return error;
  }
  return 0;
}

}  // namespace

// Of each type, in a unit of its own: they are compiled side by side.
Error attention_forward_float16(const AttentionForward& call, const Launch& where);
Error attention_forward_bfloat16(const AttentionForward& call, const Launch& where);
Error attention_forward_float32(const AttentionForward& call, const Launch& where);
Error attention_delta_float16(const AttentionBackward& call, const Launch& where);
Error attention_delta_bfloat16(const AttentionBackward& call, const Launch& where);
Error attention_delta_float32(const AttentionBackward& call, const Launch& where);
Error attention_backward_float16(const AttentionBackward& call, const Launch& where);
Error attention_backward_bfloat16(const AttentionBackward& call, const Launch& where);
Error attention_backward_float32(const AttentionBackward& call, const Launch& where);

}  // namespace nlk::cuda

#endif  // NLK_CUDA_ATTENTION_CALLS_CUH_
