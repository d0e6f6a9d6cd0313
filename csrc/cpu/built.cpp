#include <stdexcept>
#include <string>

#include "nlk/dispatch.h"

namespace nlk {

void not_built(Isa isa) {
  throw std::invalid_argument(std::string("nlkernels: expected an instruction set of this build, got ") +
                              isa_name(isa));
}

bool is_built(Isa isa) noexcept {
  switch (isa) {
#ifdef NLK_WITH_PORTABLE
    case Isa::kPortable:
      return true;
#endif
#ifdef NLK_WITH_AVX2
    case Isa::kAvx2:
      return true;
#endif
#ifdef NLK_WITH_AVX512
    case Isa::kAvx512:
      return true;
#endif
#ifdef NLK_WITH_AVX512_BF16
    case Isa::kAvx512Bf16:
      return true;
#endif
    default:
      return false;
  }
}

Isa best_isa() noexcept {
  int level = static_cast<int>(detect_isa());
  while (level > 0 && !is_built(static_cast<Isa>(level))) --level;
  return static_cast<Isa>(level);
}

}  // namespace nlk
