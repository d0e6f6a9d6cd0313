#include "nlk/peak.h"

#include "cpu/simd.h"
#include "nlk/parallel.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Sums that do not wait for each other: more than the latency of a multiply-add times what a core
// starts in that time, and few enough to stay in the registers with the factor.
#if NLK_VECTOR_BYTES == 64
constexpr int kSums = 20;
#else
constexpr int kSums = 12;
#endif
// Steps of each sum in a round.
constexpr int kSteps = 8;

// One multiply-add on every lane: a vector's of Number, or of pairs of bfloat16.
template <typename Number>
struct MultiplyAdd {
  typedef Number Lane;
  typedef Vector<Number> Sum;
  static constexpr std::int64_t kOperations = 2 * kLanes<Number>;
  Sum factor;

  explicit MultiplyAdd(double number) : factor(splat<Number>(static_cast<Number>(number))) {}
  NLK_INLINE Sum operator()(Sum sum) const { return sum * factor + factor; }
};

#if NLK_BF16_DOT
template <>
struct MultiplyAdd<Bfloat16> {
  typedef float Lane;
  typedef FloatVector Sum;
  static constexpr std::int64_t kOperations = 4 * kLanes<float>;
  __m512bh factor;

  explicit MultiplyAdd(double number) {
    const FloatVector wide = splat<float>(static_cast<float>(number));
    factor = _mm512_cvtne2ps_pbh(bit_copy<__m512>(wide), bit_copy<__m512>(wide));
  }
  NLK_INLINE Sum operator()(Sum sum) const {
    return bit_copy<Sum>(_mm512_dpbf16_ps(bit_copy<__m512>(sum), factor, factor));
  }
};
#endif

template <typename Step>
void run_task(void* context, std::int64_t, int) {
  const auto& arguments = *static_cast<const PeakArguments*>(context);
  const Step step(arguments.factor);
  typedef typename Step::Lane Lane;
  typename Step::Sum sums[kSums];
  // Sums that begin alike would be one to a compiler.
  for (int i = 0; i < kSums; ++i) sums[i] = splat<Lane>(static_cast<Lane>(i));
  for (std::int64_t round = 0; round < arguments.rounds; ++round) {
    for (int k = 0; k < kSteps; ++k) {
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
  // Something that a compiler cannot see reads the result.
  __asm__ volatile("" : : "m"(sums[0]));
}

template <typename With>
auto with_step(Dtype dtype, double factor, With with) {
  if (dtype == Dtype::kFloat64) return with(MultiplyAdd<double>(factor));
#if NLK_BF16_DOT
  if (dtype == Dtype::kBfloat16) return with(MultiplyAdd<Bfloat16>(factor));
#endif
  return with(MultiplyAdd<float>(factor));
}

}  // namespace

std::int64_t peak_operations(const PeakArguments& arguments) {
  return with_step(arguments.dtype, arguments.factor, [&](auto step) {
    return decltype(step)::kOperations * kSums * kSteps * arguments.rounds * arguments.tasks;
  });
}

bool peak_run(const PeakArguments& arguments) {
  return with_step(arguments.dtype, arguments.factor, [&](auto step) {
    return parallel_for(arguments.threads, arguments.tasks, &run_task<decltype(step)>,
                        const_cast<PeakArguments*>(&arguments));
  });
}

}  // namespace NLK_ISA
}  // namespace nlk
