// wgmma: 64 x N products of 16-bit numbers into float32, by the four warps of a warpgroup together.
// N is any multiple of 8 up to 256; A lies in shared memory (SS) or in registers (RS), B in shared
// memory. The products are asynchronous: their accumulators and register operands may be touched
// again only after wgmma_wait. PTX ISA: "Asynchronous warpgroup level matrix instructions".
#ifndef NLK_CUDA_HOPPER_WGMMA_H_
#define NLK_CUDA_HOPPER_WGMMA_H_

#include <cstdint>

#include "nlk/cuda/hopper/number.h"

namespace nlk::cuda::hopper {

// Operands of an asm statement are numbered from its accumulators on: these are the names of the
// first N / 2 of them, and the accumulators themselves.
#define NLK_NAMES_8 "%0,%1,%2,%3"
#define NLK_NAMES_16 NLK_NAMES_8 ",%4,%5,%6,%7"
#define NLK_NAMES_24 NLK_NAMES_16 ",%8,%9,%10,%11"
#define NLK_NAMES_32 NLK_NAMES_24 ",%12,%13,%14,%15"
#define NLK_NAMES_40 NLK_NAMES_32 ",%16,%17,%18,%19"
#define NLK_NAMES_48 NLK_NAMES_40 ",%20,%21,%22,%23"
#define NLK_NAMES_56 NLK_NAMES_48 ",%24,%25,%26,%27"
#define NLK_NAMES_64 NLK_NAMES_56 ",%28,%29,%30,%31"
#define NLK_NAMES_72 NLK_NAMES_64 ",%32,%33,%34,%35"
#define NLK_NAMES_80 NLK_NAMES_72 ",%36,%37,%38,%39"
#define NLK_NAMES_88 NLK_NAMES_80 ",%40,%41,%42,%43"
#define NLK_NAMES_96 NLK_NAMES_88 ",%44,%45,%46,%47"
#define NLK_NAMES_104 NLK_NAMES_96 ",%48,%49,%50,%51"
#define NLK_NAMES_112 NLK_NAMES_104 ",%52,%53,%54,%55"
#define NLK_NAMES_120 NLK_NAMES_112 ",%56,%57,%58,%59"
#define NLK_NAMES_128 NLK_NAMES_120 ",%60,%61,%62,%63"
#define NLK_NAMES_136 NLK_NAMES_128 ",%64,%65,%66,%67"
#define NLK_NAMES_144 NLK_NAMES_136 ",%68,%69,%70,%71"
#define NLK_NAMES_152 NLK_NAMES_144 ",%72,%73,%74,%75"
#define NLK_NAMES_160 NLK_NAMES_152 ",%76,%77,%78,%79"
#define NLK_NAMES_168 NLK_NAMES_160 ",%80,%81,%82,%83"
#define NLK_NAMES_176 NLK_NAMES_168 ",%84,%85,%86,%87"
#define NLK_NAMES_184 NLK_NAMES_176 ",%88,%89,%90,%91"
#define NLK_NAMES_192 NLK_NAMES_184 ",%92,%93,%94,%95"
#define NLK_NAMES_200 NLK_NAMES_192 ",%96,%97,%98,%99"
#define NLK_NAMES_208 NLK_NAMES_200 ",%100,%101,%102,%103"
#define NLK_NAMES_216 NLK_NAMES_208 ",%104,%105,%106,%107"
#define NLK_NAMES_224 NLK_NAMES_216 ",%108,%109,%110,%111"
#define NLK_NAMES_232 NLK_NAMES_224 ",%112,%113,%114,%115"
#define NLK_NAMES_240 NLK_NAMES_232 ",%116,%117,%118,%119"
#define NLK_NAMES_248 NLK_NAMES_240 ",%120,%121,%122,%123"
#define NLK_NAMES_256 NLK_NAMES_248 ",%124,%125,%126,%127"
#define NLK_SUMS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define NLK_SUMS_16 NLK_SUMS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define NLK_SUMS_24 NLK_SUMS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define NLK_SUMS_32 NLK_SUMS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define NLK_SUMS_40 NLK_SUMS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define NLK_SUMS_48 NLK_SUMS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define NLK_SUMS_56 NLK_SUMS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define NLK_SUMS_64 NLK_SUMS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define NLK_SUMS_72 NLK_SUMS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define NLK_SUMS_80 NLK_SUMS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define NLK_SUMS_88 NLK_SUMS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define NLK_SUMS_96 NLK_SUMS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define NLK_SUMS_104 NLK_SUMS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define NLK_SUMS_112 NLK_SUMS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define NLK_SUMS_120 NLK_SUMS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define NLK_SUMS_128 NLK_SUMS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define NLK_SUMS_136 NLK_SUMS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define NLK_SUMS_144 NLK_SUMS_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define NLK_SUMS_152 NLK_SUMS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define NLK_SUMS_160 NLK_SUMS_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define NLK_SUMS_168 NLK_SUMS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define NLK_SUMS_176 NLK_SUMS_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define NLK_SUMS_184 NLK_SUMS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define NLK_SUMS_192 NLK_SUMS_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define NLK_SUMS_200 NLK_SUMS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define NLK_SUMS_208 NLK_SUMS_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define NLK_SUMS_216 NLK_SUMS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define NLK_SUMS_224 NLK_SUMS_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define NLK_SUMS_232 NLK_SUMS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define NLK_SUMS_240 NLK_SUMS_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define NLK_SUMS_248 NLK_SUMS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define NLK_SUMS_256 NLK_SUMS_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

template <int kColumns>
struct Wgmma;

// o0...o5: the numbers N/2 ... N/2 + 5. A product with accumulate = 0 ignores what the accumulators hold.
#define NLK_SS(N, TYPES, o0, o1, o2, o3, o4)                                                       \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #o2 ", 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" NLK_NAMES_##N "}, "     \
               "%" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";}\n"                               \
               : NLK_SUMS_##N                                                                      \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))
#define NLK_RS(N, TYPES, o0, o1, o2, o3, o4, o5, o6)                                               \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #o5 ", 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" NLK_NAMES_##N "}, "     \
               "{%" #o0 ",%" #o1 ",%" #o2 ",%" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";}\n"            \
               : NLK_SUMS_##N                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),              \
                 "n"(kTransposeB))

#define NLK_WGMMA(N, o0, o1, o2, o3, o4, o5, o6)                                                   \
  template <>                                                                                      \
  struct Wgmma<N> {                                                                                \
    template <class Number, int kTransposeA, int kTransposeB>                                      \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, \
                                              int accumulate) {                                    \
      if constexpr (Number::kIsBfloat16) {                                                         \
        NLK_SS(N, "bf16.bf16", o0, o1, o2, o3, o4);                                                \
      } else {                                                                                     \
        NLK_SS(N, "f16.f16", o0, o1, o2, o3, o4);                                                  \
      }                                                                                            \
    }                                                                                              \
    template <class Number, int kTransposeB>                                                       \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const std::uint32_t* a,           \
                                              std::uint64_t b, int accumulate) {                   \
      if constexpr (Number::kIsBfloat16) {                                                         \
        NLK_RS(N, "bf16.bf16", o0, o1, o2, o3, o4, o5, o6);                                        \
      } else {                                                                                     \
        NLK_RS(N, "f16.f16", o0, o1, o2, o3, o4, o5, o6);                                          \
      }                                                                                            \
    }                                                                                              \
  };

NLK_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
NLK_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
NLK_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
NLK_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
NLK_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
NLK_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
NLK_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
NLK_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
NLK_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
NLK_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
NLK_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
NLK_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
NLK_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
NLK_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
NLK_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
NLK_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
NLK_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
NLK_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
NLK_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
NLK_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
NLK_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
NLK_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
NLK_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
NLK_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
NLK_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
NLK_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
NLK_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
NLK_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
NLK_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
NLK_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
NLK_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
NLK_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef NLK_WGMMA
#undef NLK_RS
#undef NLK_SS

// d (64,N) += A B, or = A B. a, b: descriptors of 16 summed indices (layout.h).
template <class Number, int kColumns, bool kTransposeA, bool kTransposeB>
__device__ __forceinline__ void wgmma_ss(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b,
                                         bool accumulate) {
  Wgmma<kColumns>::template ss<Number, kTransposeA, kTransposeB>(d, a, b, accumulate);
}

// The same with A in four registers of each thread.
template <class Number, int kColumns, bool kTransposeB>
__device__ __forceinline__ void wgmma_rs(float (&d)[kColumns / 2], const std::uint32_t* a,
                                         std::uint64_t b, bool accumulate) {
  Wgmma<kColumns>::template rs<Number, kTransposeB>(d, a, b, accumulate);
}

// Registers written before are seen by the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit become one group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups, the last ones, are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers over the wait, or the products, beside this.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_WGMMA_H_
