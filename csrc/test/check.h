// What the tests of operations share: the instruction sets, and how results are compared.
#ifndef NLK_TEST_CHECK_H_
#define NLK_TEST_CHECK_H_

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <vector>

#include "nlk/dispatch.h"

namespace nlk {

// The status of a program whose check(isa) returns how many results are wrong, after that of every
// instruction set of the build that this machine runs.
template <typename Check>
int on_every_isa(const Check& check) {
  int wrong = 0;
  for (int level = 0; level <= static_cast<int>(detect_isa()); ++level) {
    const auto isa = static_cast<Isa>(level);
    if (!is_built(isa)) continue;
    const int of_isa = check(isa);
    std::printf("%s: %d wrong\n", isa_name(isa), of_isa);
    wrong += of_isa;
  }
  return wrong == 0 ? 0 : 1;
}

// Whether all numbers are what is wanted but for `limit` times the sum of the largest of these and
// `floor`; prints by how much they are not. NaN and infinities are wrong.
template <typename Number>
bool is_close(const char* what, const std::vector<Number>& got, const std::vector<double>& wanted,
              double limit, double floor) {
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    largest = std::fmax(largest, std::fabs(wanted[i]));
    const double gap = std::fabs(static_cast<double>(got[i]) - wanted[i]);
    error = std::isfinite(gap) ? std::fmax(error, gap) : HUGE_VAL;
  }
  if (std::isfinite(error) && error <= limit * (largest + floor)) return true;
  std::printf("%s: off by %g, the largest is %g\n", what, error, largest);
  return false;
}

}  // namespace nlk

#endif  // NLK_TEST_CHECK_H_
