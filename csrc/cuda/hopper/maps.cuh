// Tensor maps of the operands of one call.
#ifndef NLK_CUDA_HOPPER_MAPS_CUH_
#define NLK_CUDA_HOPPER_MAPS_CUH_

#include "cuda/hopper/launch.cuh"

namespace nlk::cuda::hopper {

constexpr int kBfloat16Code = 2;

struct Maps {
  bool bfloat, channel_first;
  std::int64_t items;

  // A (B,R,C) operand in boxes of `box_rows` x 64; where channels come first, boxes are 64 x 64 and a line
  // runs along the rows. Where there is one item, its stride may be anything.
  Error make(TensorMap& map, const Operand& from, std::int64_t rows, std::int64_t channels,
             int box_rows) const {
    const std::int64_t line = channel_first ? from.channel : from.row;
    const std::int64_t sizes[3] = {channel_first ? rows : channels, channel_first ? channels : rows,
                                   items};
    const std::int64_t strides[3] = {channel_first ? from.row : from.channel, line,
                                     items == 1 ? line : from.item};
    if (strides[0] != 1) return cudaErrorInvalidValue;
    return make_map(map, bfloat, from.data, sizes, strides, channel_first ? kLineNumbers : box_rows);
  }
};

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_MAPS_CUH_
