// Which vector instructions may be used on the machine the program runs on.
#ifndef NLK_ISA_H_
#define NLK_ISA_H_

#include <cstdint>

namespace nlk {

// Ordered: a machine of one level runs the code of every level below it.
enum class Isa : int {
  kPortable = 0,    // plain C++ only; every machine that is not x86-64
  kAvx2 = 1,        // AVX2, FMA and F16C
  kAvx512 = 2,      // AVX-512 F, BW, DQ and VL
  kAvx512Bf16 = 3,  // AVX512_BF16
};

// The register values detection rests on, as CPUID and XGETBV return them; zero where the
// machine has no such leaf.
struct CpuRegisters {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0;
  std::uint32_t leaf7_1_eax = 0;
  std::uint64_t xcr0 = 0;  // the register states that the operating system saves
};

CpuRegisters read_cpu_registers() noexcept;

// Highest level whose instructions exist and whose registers the operating system saves.
Isa classify_isa(const CpuRegisters& registers) noexcept;

// classify_isa(read_cpu_registers()), computed once; safe to call from any thread.
Isa detect_isa() noexcept;

// "portable", "avx2", "avx512" or "avx512_bf16".
const char* isa_name(Isa isa) noexcept;

}  // namespace nlk

#endif  // NLK_ISA_H_
