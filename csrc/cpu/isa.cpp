#include "nlk/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nlk {
namespace {

constexpr std::uint32_t bit(int position) { return std::uint32_t{1} << position; }

// Bit positions: Intel SDM volume 2A, CPUID, and volume 1, 13.3 (XCR0).
constexpr std::uint32_t kLeaf1EcxFma = bit(12);
constexpr std::uint32_t kLeaf1EcxOsxsave = bit(27);
constexpr std::uint32_t kLeaf1EcxF16c = bit(29);
constexpr std::uint32_t kLeaf7EbxAvx2 = bit(5);
constexpr std::uint32_t kLeaf7EbxAvx512 = bit(16) | bit(17) | bit(30) | bit(31);  // F, DQ, BW, VL
constexpr std::uint32_t kLeaf71EaxAvx512Bf16 = bit(5);
constexpr std::uint64_t kXcr0Avx = bit(1) | bit(2);                       // XMM, YMM
constexpr std::uint64_t kXcr0Avx512 = kXcr0Avx | bit(5) | bit(6) | bit(7);  // masks, ZMM

template <typename Word>
constexpr bool has_all(Word word, Word wanted) {
  return (word & wanted) == wanted;
}

}  // namespace

CpuRegisters read_cpu_registers() noexcept {
  CpuRegisters registers;
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) registers.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    registers.leaf7_ebx = ebx;
    const unsigned last_subleaf = eax;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
      registers.leaf7_1_eax = eax;
    }
  }
  // XGETBV faults unless the operating system has switched it on.
  if (has_all(registers.leaf1_ecx, kLeaf1EcxOsxsave)) {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    registers.xcr0 = (std::uint64_t{high} << 32) | low;
  }
#endif
  return registers;
}

Isa classify_isa(const CpuRegisters& registers) noexcept {
  const bool avx2 = has_all(registers.leaf1_ecx, kLeaf1EcxOsxsave | kLeaf1EcxFma | kLeaf1EcxF16c) &&
                    has_all(registers.leaf7_ebx, kLeaf7EbxAvx2) &&
                    has_all(registers.xcr0, kXcr0Avx);
  if (!avx2) return Isa::kPortable;
  const bool avx512 =
      has_all(registers.leaf7_ebx, kLeaf7EbxAvx512) && has_all(registers.xcr0, kXcr0Avx512);
  if (!avx512) return Isa::kAvx2;
  return has_all(registers.leaf7_1_eax, kLeaf71EaxAvx512Bf16) ? Isa::kAvx512Bf16 : Isa::kAvx512;
}

Isa detect_isa() noexcept {
  static const Isa isa = classify_isa(read_cpu_registers());
  return isa;
}

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace nlk
