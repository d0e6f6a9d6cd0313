// Context pooling of the channel gate on CPUs: context = sum_p softmax_p(weight . x_p) x_p.
#ifndef NLK_GATE_H_
#define NLK_GATE_H_

#include <cstdint>

#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

// Strides are in elements, any sign. Every size is at least 1.
struct GateArguments {
  Dtype dtype;
  int threads;
  std::int64_t batch, channels;
  std::int64_t positions[3];  // axes that are missing have size 1
  const void* x;              // (batch, channels, *positions)
  std::int64_t x_strides[5];
  const void* weight;  // (channels)
  std::int64_t weight_stride;
  void* out;         // (batch, channels), contiguous; of the forward
  const void* grad;  // (batch, channels); the others of the backward
  std::int64_t grad_strides[2];
  const void* context;  // (batch, channels)
  std::int64_t context_strides[2];
  void* d_x;  // as x; its channels are neighbours, or positions are
  std::int64_t d_x_strides[5];
  void* d_weight;   // (channels), contiguous
  void* workspace;  // of gate_workspace bytes, aligned to 64
};

// Bytes of workspace of a pass; reads sizes, dtype, threads and the strides of x.
std::int64_t gate_workspace(const GateArguments& arguments, bool backward) noexcept;

// False when an interrupt stopped the work; results are unfinished then.
NLK_PER_ISA(bool gate_forward(const GateArguments& arguments))
NLK_PER_ISA(bool gate_backward(const GateArguments& arguments))
bool gate_forward(Isa isa, const GateArguments& arguments);
bool gate_backward(Isa isa, const GateArguments& arguments);

}  // namespace nlk

#endif  // NLK_GATE_H_
