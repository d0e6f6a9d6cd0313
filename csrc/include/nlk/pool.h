// Max pooling by windows side by side, whose largest number is remembered in a few bits.
#ifndef NLK_POOL_H_
#define NLK_POOL_H_

#include <cstdint>

#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

// x (B,C,T,H,W) and out (B,C,T/t,H/h,W/w), whose windows of (t,h,w) begin at multiples of it; what
// a last window would lack is left out. The largest number of a window is the first of its equals; a
// NaN counts as larger than all before it, as in torch.
//
// winners: of each row of outputs, their numbers within the window, pool_bits() each, the first in
// the lowest bits; rows begin at whole bytes. A row is what a line of neighbours in memory becomes:
// the channels of a position where `channels_inner`, else the positions of a line of W.
struct PoolArguments {
  Dtype dtype;
  int threads;
  bool channels_inner;
  std::int64_t sizes[5];   // of x
  std::int64_t window[3];  // at most 256 numbers
  const void* x;           // forward
  std::int64_t x_strides[5];
  void* out;
  std::int64_t out_strides[5];
  const void* grad;  // backward: (B,C,T/t,H/h,W/w)
  std::int64_t grad_strides[5];
  void* d_x;  // the gradients are added to what it holds
  std::int64_t d_x_strides[5];
  std::uint8_t* winners;
};

// Bits of a number within a window of so many.
constexpr int pool_bits(std::int64_t taps) { return taps <= 4 ? 2 : taps <= 16 ? 4 : 8; }

// Return false when they were interrupted.
NLK_PER_ISA(bool pool_forward(const PoolArguments&); bool pool_backward(const PoolArguments&))

bool pool_forward(Isa, const PoolArguments&);
bool pool_backward(Isa, const PoolArguments&);

}  // namespace nlk

#endif  // NLK_POOL_H_
