// Context pooling of the channel gate on GPUs: context = sum_p softmax_p(weight . x_p) x_p.
//
// With logits l_p = weight . x_p, and the largest so far subtracted ("online" softmax):
//   forward   read     sums += a_p x_p, total += a_p                  a block: a split of an item
//             combine  context = sums of splits / totals
//   backward  read     u_p = grad . (x_p - context); sums += a_p u_p x_p, error += a_p u_p
//             combine  e = errors / totals; d_weight = sums / totals - e context, over the items
//             write    d_x_p = a_p / total (grad + (u_p - e) weight)   does not read x
// x is read once in each pass. Sums are float32 in a unit in which all a_p sum to less than 1.
#ifndef NLK_CUDA_GATE_H_
#define NLK_CUDA_GATE_H_

#include <cstdint>

#include "nlk/cuda/launch.h"

namespace nlk::cuda {

// All channels of a tile lie in the registers of one block.
constexpr int kGateWidest = 2048;

// How a (B,C,T,H,W) tensor lies in memory.
struct GateLayout {
  std::int64_t item, channel, positions[3];
};

struct GateArguments {
  int dtype;  // of every tensor: 1 float32, 2 bfloat16, 3 float16
  std::int64_t batch, channels, positions[3];  // each at least 1; all positions below 2^31
  bool channels_last;      // whether neighbours in memory are channels, or positions
  const void* x;
  GateLayout x_layout;
  const void* weight;      // (channels), contiguous
  const void* grad;        // (batch, channels), contiguous, as is context; null in the forward
  const void* context;
  float* parts;            // (batch, splits, channels)
  float* part_stats;       // (batch, splits, 3): the largest logit, total, error
};

// Splits of an item, by the sizes and the layout.
std::int64_t gate_splits(const GateArguments& arguments);

// context (batch, channels), contiguous.
Error gate_forward(const GateArguments& arguments, void* context, const Launch& where);

struct GateGradient {
  float* scores;     // (batch, 2, positions): logits, and products with grad
  float* sums;       // (batch, channels)
  float* stats;      // (batch, 3)
  void* d_x;
  GateLayout d_x_layout;
  void* d_weight;    // (channels), contiguous
};
Error gate_backward(const GateArguments& arguments, const GateGradient& gradient,
                    const Launch& where);

}  // namespace nlk::cuda

#endif  // NLK_CUDA_GATE_H_
