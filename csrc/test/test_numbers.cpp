// Conversions of 16-bit numbers in every instruction set of the build that this machine runs.
#include <cstdio>

#include "test/numbers.h"

namespace nlk {
namespace {

int check(Isa isa) { NLK_ON_ISA(isa, check_numbers()) }

}  // namespace
}  // namespace nlk

int main() {
  int failures = 0;
  for (int level = 0; level <= static_cast<int>(nlk::Isa::kAvx512Bf16); ++level) {
    const auto isa = static_cast<nlk::Isa>(level);
    if (!nlk::is_built(isa)) continue;
    if (isa > nlk::detect_isa()) {
      std::printf("%s: skipped, this machine does not run it\n", nlk::isa_name(isa));
      continue;
    }
    const int wrong = nlk::check(isa);
    std::printf("%s: %d wrong\n", nlk::isa_name(isa), wrong);
    failures += wrong;
  }
  return failures == 0 ? 0 : 1;
}
