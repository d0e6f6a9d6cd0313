// The rate at which an instruction set multiplies and adds when nothing else limits it: what rates
// of kernels are stated against.
#ifndef NLK_PEAK_H_
#define NLK_PEAK_H_

#include <cstdint>

#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

struct PeakArguments {
  Dtype dtype;          // as kernels compute it: 16-bit numbers in float, but for products of
                        // bfloat16 pairs where the instruction set has them
  std::int64_t tasks;   // shared out among the threads
  std::int64_t rounds;  // of one task
  int threads;
  double factor;        // each step is sum = sum * factor + factor; below 1, so that sums stay finite
};

// Floating-point operations of the whole call, two for each multiply-add.
NLK_PER_ISA(std::int64_t peak_operations(const PeakArguments& arguments))
std::int64_t peak_operations(Isa isa, const PeakArguments& arguments);

// Multiplies and adds in registers; touches no memory. False when it was interrupted.
NLK_PER_ISA(bool peak_run(const PeakArguments& arguments))
bool peak_run(Isa isa, const PeakArguments& arguments);

}  // namespace nlk

#endif  // NLK_PEAK_H_
