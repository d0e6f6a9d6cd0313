// Which copies of the kernels a build holds: one for each instruction set, in its own namespace.
#ifndef NLK_DISPATCH_H_
#define NLK_DISPATCH_H_

#include "nlk/isa.h"

// Declares an entry point of a unit in the namespace of every instruction set.
#define NLK_PER_ISA(...)                         \
  namespace portable { __VA_ARGS__; }            \
  namespace avx2 { __VA_ARGS__; }                \
  namespace avx512 { __VA_ARGS__; }              \
  namespace avx512_bf16 { __VA_ARGS__; }

// In a function that returns what the call returns: runs the copy of an instruction set. Only for
// files that are compiled with -DNLK_WITH_... for every set of the build.
#ifdef NLK_WITH_PORTABLE
#define NLK_CASE_PORTABLE(...) case Isa::kPortable: return portable::__VA_ARGS__;
#else
#define NLK_CASE_PORTABLE(...)
#endif
#ifdef NLK_WITH_AVX2
#define NLK_CASE_AVX2(...) case Isa::kAvx2: return avx2::__VA_ARGS__;
#else
#define NLK_CASE_AVX2(...)
#endif
#ifdef NLK_WITH_AVX512
#define NLK_CASE_AVX512(...) case Isa::kAvx512: return avx512::__VA_ARGS__;
#else
#define NLK_CASE_AVX512(...)
#endif
#ifdef NLK_WITH_AVX512_BF16
#define NLK_CASE_AVX512_BF16(...) case Isa::kAvx512Bf16: return avx512_bf16::__VA_ARGS__;
#else
#define NLK_CASE_AVX512_BF16(...)
#endif
#define NLK_ON_ISA(isa, ...)            \
  switch (isa) {                        \
    NLK_CASE_PORTABLE(__VA_ARGS__)      \
    NLK_CASE_AVX2(__VA_ARGS__)          \
    NLK_CASE_AVX512(__VA_ARGS__)        \
    NLK_CASE_AVX512_BF16(__VA_ARGS__)   \
    default: not_built(isa);            \
  }

namespace nlk {

// What NLK_ON_ISA does for a set that this build lacks: throws std::invalid_argument.
[[noreturn]] void not_built(Isa isa);

// Whether this build holds the kernels of an instruction set.
bool is_built(Isa isa) noexcept;

// The highest level that is built and runs here; kPortable where only that could run.
Isa best_isa() noexcept;

}  // namespace nlk

#endif  // NLK_DISPATCH_H_
