// How numbers lie in memory. Kernels compute in double for kFloat64, else in float.
#ifndef NLK_NUMBER_H_
#define NLK_NUMBER_H_

#include <cstdint>

namespace nlk {

enum class Dtype : int { kFloat64 = 0, kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

}  // namespace nlk

#endif  // NLK_NUMBER_H_
