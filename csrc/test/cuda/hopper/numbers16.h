// 16-bit numbers on the CPU, for tests: conversions that round to nearest even.
#ifndef NLK_TEST_CUDA_HOPPER_NUMBERS16_H_
#define NLK_TEST_CUDA_HOPPER_NUMBERS16_H_

#include <cmath>
#include <cstdint>
#include <cstring>

namespace nlk::cuda::hopper::machine {

inline float widened(std::uint16_t number, bool bfloat) {
  float wide;
  if (bfloat) {
    const std::uint32_t bits = static_cast<std::uint32_t>(number) << 16;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
  const int exponent = number >> 10 & 31, fraction = number & 1023;
  if (exponent == 31) wide = fraction != 0 ? NAN : INFINITY;
  else if (exponent == 0) wide = std::ldexp(static_cast<float>(fraction), -24);
  else wide = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (number & 0x8000) != 0 ? -wide : wide;
}

inline std::uint16_t rounded(float number, bool bfloat) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, 4);
  if (std::isnan(number)) return 0x7fff;
  if (bfloat) return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(number);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);
  // The last place of a half of this size; rint rounds to even.
  const int place = exponent - 11 < -24 ? -24 : exponent - 11;
  const auto units = static_cast<int>(std::rint(std::ldexp(size, -place)));
  const int code = place == -24 ? units : units + (place + 24) * 1024;
  return static_cast<std::uint16_t>(sign | code);
}

}  // namespace nlk::cuda::hopper::machine

#endif  // NLK_TEST_CUDA_HOPPER_NUMBERS16_H_
