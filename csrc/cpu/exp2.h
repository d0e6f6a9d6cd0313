// 2 to the power of each lane, none of which is above 0.
#ifndef NLK_CPU_EXP2_H_
#define NLK_CPU_EXP2_H_

#include "cpu/simd.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// x = n + f with |f| <= 1/2; 2^f by the Taylor series of exp(f ln 2), whose next term is below the
// rounding of the result; 2^n by its bits. Results below the smallest normal number are zero.
template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kSmallest = -126.0f;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the integer in the last bits
  static constexpr int kMantissa = 23;
  static constexpr int kTerms = 8;
};
template <>
struct Exp2<double> {
  static constexpr double kSmallest = -1022.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissa = 52;
  static constexpr int kTerms = 14;
};

// ln(2)^k / k!
constexpr double kPowers[] = {
    1.0,
    6.931471805599453094e-1,
    2.402265069591007123e-1,
    5.550410866482157995e-2,
    9.618129107628477162e-3,
    1.333355814642844343e-3,
    1.540353039338160996e-4,
    1.525273380405984028e-5,
    1.321548679014430950e-6,
    1.017808600923969973e-7,
    7.054911620801123331e-9,
    4.445538271870811498e-10,
    2.567843599348820513e-11,
    1.369148885390412889e-12,
};

// For x <= 0 and NaN.
template <typename T>
NLK_INLINE Vector<T> exp2(Vector<T> x) {
  typedef Exp2<T> Constants;
  const Vector<T> shifted = x + splat<T>(Constants::kRound);
  const Vector<T> f = x - (shifted - splat<T>(Constants::kRound));
  Vector<T> power = splat<T>(static_cast<T>(kPowers[Constants::kTerms - 1]));
#pragma GCC unroll 16
  for (int k = Constants::kTerms - 2; k >= 0; --k) {
    power = power * f + splat<T>(static_cast<T>(kPowers[k]));
  }
  // The integer n stands in the last bits of `shifted`.
  const auto bits = (bit_copy<IntegerVector<T>>(shifted) << Constants::kMantissa) +
                    bit_copy<IntegerVector<T>>(splat<T>(1));
  const Vector<T> result = power * bit_copy<Vector<T>>(bits);
  return x < splat<T>(Constants::kSmallest) ? Vector<T>{} : result;
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_EXP2_H_
