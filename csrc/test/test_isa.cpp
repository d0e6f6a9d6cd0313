// Detection on made-up machines, then on this one against the compiler's own detection.
// The last line printed is the level of this machine.
#include <cstdio>

#include "nlk/isa.h"

namespace {

int failures = 0;

void expect(nlk::Isa got, nlk::Isa wanted, const char* machine) {
  if (got == wanted) return;
  std::printf("%s: expected %s, got %s\n", machine, nlk::isa_name(wanted), nlk::isa_name(got));
  ++failures;
}

// A machine of the highest level, with the bits that detection looks at and no other.
nlk::CpuRegisters complete_machine() {
  nlk::CpuRegisters registers;
  registers.leaf1_ecx = 0x38001000;    // OSXSAVE, AVX, F16C, FMA
  registers.leaf7_ebx = 0xC0030020;    // AVX2, AVX512F, DQ, BW, VL
  registers.leaf7_1_eax = 0x00000020;  // AVX512_BF16
  registers.xcr0 = 0xE7;
  return registers;
}

void test_made_up_machines() {
  expect(nlk::classify_isa(nlk::CpuRegisters{}), nlk::Isa::kPortable, "no leaf at all");
  expect(nlk::classify_isa(complete_machine()), nlk::Isa::kAvx512Bf16, "complete machine");

  auto no_bf16 = complete_machine();
  no_bf16.leaf7_1_eax = 0;
  expect(nlk::classify_isa(no_bf16), nlk::Isa::kAvx512, "no AVX512_BF16");

  auto no_avx512 = complete_machine();
  no_avx512.leaf7_ebx = 0x00000020;
  expect(nlk::classify_isa(no_avx512), nlk::Isa::kAvx2, "no AVX-512, stray AVX512_BF16 bit");

  auto only_avx512f = complete_machine();
  only_avx512f.leaf7_ebx = 0x00010020;
  expect(nlk::classify_isa(only_avx512f), nlk::Isa::kAvx2, "AVX512F without BW, DQ, VL");

  auto no_fma = complete_machine();
  no_fma.leaf1_ecx &= ~0x1000u;
  expect(nlk::classify_isa(no_fma), nlk::Isa::kPortable, "no FMA");

  auto no_zmm_saved = complete_machine();
  no_zmm_saved.xcr0 = 0x07;
  expect(nlk::classify_isa(no_zmm_saved), nlk::Isa::kAvx2, "kernel does not save ZMM");

  auto no_ymm_saved = complete_machine();
  no_ymm_saved.xcr0 = 0x03;
  expect(nlk::classify_isa(no_ymm_saved), nlk::Isa::kPortable, "kernel does not save YMM");

  auto no_xgetbv = complete_machine();
  no_xgetbv.leaf1_ecx &= ~0x08000000u;
  expect(nlk::classify_isa(no_xgetbv), nlk::Isa::kPortable, "XGETBV switched off");
}

nlk::Isa isa_of_compiler_runtime() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!avx2) return nlk::Isa::kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return nlk::Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? nlk::Isa::kAvx512Bf16 : nlk::Isa::kAvx512;
#else
  return nlk::Isa::kPortable;
#endif
}

}  // namespace

int main() {
  test_made_up_machines();
  expect(nlk::detect_isa(), isa_of_compiler_runtime(), "this machine");
  std::printf("%s\n", nlk::isa_name(nlk::detect_isa()));
  return failures == 0 ? 0 : 1;
}
