// The two 16-bit types of numbers, as wgmma takes them.
#ifndef NLK_CUDA_HOPPER_NUMBER_H_
#define NLK_CUDA_HOPPER_NUMBER_H_

namespace nlk::cuda::hopper {

struct Bfloat16 {
  static constexpr bool kIsBfloat16 = true;
};
struct Float16 {
  static constexpr bool kIsBfloat16 = false;
};

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_NUMBER_H_
