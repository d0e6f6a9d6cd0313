// Checks of cpu/simd.h, compiled for every instruction set.
#ifndef NLK_TEST_NUMBERS_H_
#define NLK_TEST_NUMBERS_H_

#include "nlk/dispatch.h"

namespace nlk {

// Prints what is wrong and returns how much.
NLK_PER_ISA(int check_numbers())

}  // namespace nlk

#endif  // NLK_TEST_NUMBERS_H_
