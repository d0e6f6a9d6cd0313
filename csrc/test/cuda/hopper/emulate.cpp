// The kernels of csrc/cuda/hopper in the model of the machine, for ctypes: tests/cuda/hopper.py.
#define NLK_HOPPER_EMULATION
#include "cuda/hopper/forward_rows.cu"
#include "cuda/hopper/forward_split.cu"

using nlk::cuda::HopperForward;
using nlk::cuda::Operand;

static nlk::cuda::HopperPlan plan_of(const int* plan) {
  return {plan[0] != 0, plan[1] != 0, plan[2] != 0, plan[3], plan[4], plan[5], plan[6]};
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
  Operand* operands[3] = {&a.query, &a.key, &a.value};
  for (int i = 0; i < 3; ++i)
    *operands[i] = {data[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  a.out = out;
  a.stats = stats;
  return nlk::cuda::hopper_forward(a, {seed, nullptr});
}
