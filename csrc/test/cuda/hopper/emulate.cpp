// The kernels of csrc/cuda/hopper in the model of the machine, for ctypes: tests/cuda/hopper.py.
#define NLK_HOPPER_EMULATION
#include "cuda/hopper/forward_rows.cu"
#include "cuda/hopper/forward_split.cu"
#include "cuda/hopper/d_scores.cu"

using nlk::cuda::HopperDScores;
using nlk::cuda::HopperForward;
using nlk::cuda::Operand;

static nlk::cuda::HopperPlan plan_of(const int* plan) {
  return {plan[0] != 0, plan[1] != 0, plan[2] != 0, plan[3], plan[4], plan[5], plan[6]};
}

// Addresses, and three strides each.
static void take(std::initializer_list<Operand*> operands, void* const* data, const long long* strides) {
  for (Operand* operand : operands) {
    *operand = {*data++, strides[0], strides[1], strides[2]};
    strides += 3;
  }
}

extern "C" int emulate_shared(const int* plan, long long depth) {
  return nlk::cuda::hopper_forward_shared(plan_of(plan), depth);
}

// plan: split, streamed, channel_first, tile_keys, cluster, key_slots, value_slots. sizes: B, N, M, D, V.
// Strides: three for each of query, key, value. Returns 0, or an error.
extern "C" int emulate_forward(
    const int* plan, int dtype, int blocks, const float* factors, const long long* sizes,
    void* const* data, const long long* strides, void* out, float* stats, int seed) {
  HopperForward a{};
  a.plan = plan_of(plan);
  a.dtype = dtype;
  a.blocks = blocks;
  a.factor = factors[0];
  a.shift = factors[1];
  a.unit = factors[2];
  a.batch = sizes[0];
  a.queries = sizes[1];
  a.keys = sizes[2];
  a.depth = sizes[3];
  a.value_depth = sizes[4];
  take({&a.query, &a.key, &a.value}, data, strides);
  a.out = out;
  a.stats = stats;
  return nlk::cuda::hopper_forward(a, {seed, nullptr});
}

static nlk::cuda::HopperBackwardPlan backward_plan_of(const int* plan) {
  return {plan[0] != 0, plan[1], plan[2], plan[3]};
}

extern "C" int emulate_d_scores_shared(const int* plan) {
  return nlk::cuda::hopper_d_scores_shared(backward_plan_of(plan));
}

// Arguments as bindings/hopper_attention.h names them.
extern "C" int emulate_d_scores(
    const int* plan, int dtype, int blocks, const float* factors, const long long* sizes,
    void* const* data, const long long* strides, void* const* given, void* const* workspace, int seed) {
  HopperDScores a{};
  a.plan = backward_plan_of(plan);
  a.dtype = dtype;
  a.blocks = blocks;
  a.factor = factors[0];
  a.scale = factors[1];
  a.tolerance = factors[2];
  a.items = sizes[0];
  a.queries = sizes[1];
  a.first = sizes[2];
  a.rows = sizes[3];
  a.keys = sizes[4];
  a.depth = sizes[5];
  a.value_depth = sizes[6];
  take({&a.query, &a.key, &a.grad, &a.value}, data, strides);
  a.top = static_cast<const float*>(given[0]);
  a.total = static_cast<const float*>(given[1]);
  a.delta = static_cast<const float*>(given[2]);
  a.sums = static_cast<float*>(workspace[0]);
  a.weights = workspace[1];
  a.d_scores = workspace[2];
  return nlk::cuda::hopper_d_scores(a, {seed, nullptr});
}
