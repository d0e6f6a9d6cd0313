// Region aggregation by lines for numbers that are not finite: zeros around x never meet them. One
// number a step; every step knows what is inside.
#ifndef NLK_CPU_REGION_EXACT_H_
#define NLK_CPU_REGION_EXACT_H_

#include "cpu/region_plan.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// For every tap and every pair of lines that it joins: body(tap, offset of the output's line from
// row `top` on, offset of the input's from row top - kh/2 on, columns of the output, shift).
template <typename Body>
void each_pair_of_lines(const Plan& plan, std::int64_t top, std::int64_t bottom, const Body& body) {
  std::int64_t tap = 0;
  for (int i = 0; i < plan.kt; ++i) {
    for (int k = 0; k < plan.kw; ++k) {
      for (int j = 0; j < plan.kh; ++j, ++tap) {
        const std::int64_t later = i - plan.kt / 2;
        const std::int64_t below = j - plan.kh / 2;
        const std::int64_t shift = k - plan.kw / 2;
        const std::int64_t first = at_least(0, -shift);
        const std::int64_t last = at_most(plan.width, plan.width - shift);
        for (std::int64_t row = at_least(top, -below);
             row < at_most(bottom, plan.height - below); ++row) {
          for (std::int64_t frame = at_least(0, -later);
               frame < at_most(plan.frames, plan.frames - later); ++frame) {
            body(tap, (row - top) * plan.grad_row + frame * plan.pitch,
                 (row - top + j) * plan.row + (frame + later) * plan.pitch + plan.front + shift,
                 first, last);
          }
        }
      }
    }
  }
}

// Rows [top, bottom) of `sums`, from packed rows from top - kh/2 on.
template <typename T>
void correlate_exactly(const Plan& plan, std::int64_t top, std::int64_t bottom, const T* input,
                       const T* taps, T* sums) {
  for (std::int64_t at = 0; at < (bottom - top) * plan.grad_row; ++at) sums[at] = 0;
  each_pair_of_lines(plan, top, bottom,
                     [&](std::int64_t tap, std::int64_t to, std::int64_t from, std::int64_t first,
                         std::int64_t last) {
                       for (std::int64_t column = first; column < last; ++column) {
                         sums[to + column] += taps[tap] * input[from + column];
                       }
                     });
}

// Adds to the first lane of each tap's totals.
template <typename T>
void correlate_gradient_exactly(const Plan& plan, std::int64_t top, std::int64_t bottom,
                                const T* input, const T* grad, double* totals) {
  each_pair_of_lines(plan, top, bottom,
                     [&](std::int64_t tap, std::int64_t to, std::int64_t from, std::int64_t first,
                         std::int64_t last) {
                       T sum = 0;
                       for (std::int64_t column = first; column < last; ++column) {
                         sum += grad[to + column] * input[from + column];
                       }
                       totals[tap * kLanes<T>] += sum;
                     });
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_REGION_EXACT_H_
