// Every 16-bit number is widened and narrowed back; floats around every number and every tie, and
// a million others, are rounded. What is right is computed in double from the formats' definition.
#include "test/numbers.h"

#include <cstdint>
#include <cstdio>

#include "cpu/simd.h"

namespace nlk {
namespace NLK_ISA {
namespace {

constexpr int kShown = 10;
constexpr int kWidth = kLanes<float>;

int failures = 0;

void wrong(const char* what, std::uint32_t from, std::uint32_t got, std::uint32_t expected) {
  if (++failures > kShown) return;
  std::printf("%s of 0x%08x: expected 0x%08x, got 0x%08x\n", what, from, expected, got);
}

std::uint32_t bits_of(float number) { return bit_copy<std::uint32_t>(number); }
float float_of(std::uint32_t bits) { return bit_copy<float>(bits); }
bool is_nan(std::uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

double power_of_two(int exponent) {
  double power = 1;
  for (; exponent > 0; --exponent) power *= 2;
  for (; exponent < 0; ++exponent) power /= 2;
  return power;
}

// A format of 16 bits: its infinity, how many bits its mantissa stores, its exponent's bias.
template <typename T>
struct Format;
template <>
struct Format<Bfloat16> {
  static constexpr int kInfinity = 0x7f80, kMantissa = 7, kBias = 127;
  static constexpr const char* kName = "bfloat16";
#if NLK_BF16_DOT
  // VCVTNEPS2BF16 takes subnormal floats for zeros.
  static constexpr bool kVectorsLoseSubnormals = true;
#else
  static constexpr bool kVectorsLoseSubnormals = false;
#endif
};
template <>
struct Format<Float16> {
  static constexpr int kInfinity = 0x7c00, kMantissa = 10, kBias = 15;
  static constexpr const char* kName = "float16";
  static constexpr bool kVectorsLoseSubnormals = false;
};

// The number that positive, finite bits stand for; the bits of infinity give the next power of two.
template <typename T>
double defined_value(int bits) {
  const int stored = 1 << Format<T>::kMantissa;
  const int exponent = bits / stored, mantissa = bits % stored;
  if (exponent == 0) return mantissa * power_of_two(1 - Format<T>::kBias - Format<T>::kMantissa);
  return (stored + mantissa) * power_of_two(exponent - Format<T>::kBias - Format<T>::kMantissa);
}

// defined_value, computed once.
template <typename T>
double value_of(int bits) {
  static double values[Format<T>::kInfinity + 1];
  if (values[Format<T>::kInfinity] == 0) {
    for (int each = 0; each <= Format<T>::kInfinity; ++each) values[each] = defined_value<T>(each);
  }
  return values[bits];
}

// The nearest number of 16 bits, of two equally near ones the even one.
template <typename T>
std::uint16_t rounded(float number) {
  const std::uint16_t sign = bits_of(number) >> 31 ? 0x8000 : 0;
  const double magnitude = float_of(bits_of(number) & 0x7fffffffu);
  int low = 0, high = Format<T>::kInfinity;
  if (magnitude >= value_of<T>(high)) return static_cast<std::uint16_t>(sign | high);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (value_of<T>(middle) <= magnitude ? low : high) = middle;
  }
  const double tie = (value_of<T>(low) + value_of<T>(high)) / 2;
  const bool up = magnitude > tie || (magnitude == tie && low % 2 == 1);
  return static_cast<std::uint16_t>(sign | (up ? high : low));
}

template <typename T>
void check_narrow(const float* numbers) {
  T together[kWidth];
  store(together, load(numbers));
  for (int lane = 0; lane < kWidth; ++lane) {
    const std::uint32_t from = bits_of(numbers[lane]);
    const std::uint32_t one = narrow<T>(numbers[lane]).bits, vector = together[lane].bits;
    if (is_nan(from)) {
      const int infinity = Format<T>::kInfinity;
      if (static_cast<int>(one & 0x7fffu) <= infinity) wrong("narrow", from, one, 0x7fffu);
      if (static_cast<int>(vector & 0x7fffu) <= infinity) wrong("store", from, vector, 0x7fffu);
      continue;
    }
    const std::uint32_t expected = rounded<T>(numbers[lane]);
    if (one != expected) wrong("narrow", from, one, expected);
    const bool lost = Format<T>::kVectorsLoseSubnormals && (from & 0x7f800000u) == 0;
    const std::uint32_t stored = lost ? expected & 0x8000u : expected;
    if (vector != stored) wrong("store", from, vector, stored);
  }
}

template <typename T>
void check_widen() {
  for (int first = 0; first < 0x10000; first += kWidth) {
    T numbers[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      numbers[lane].bits = static_cast<std::uint16_t>(first + lane);
    }
    float together[kWidth];
    store(together, load(numbers));
    for (int lane = 0; lane < kWidth; ++lane) {
      const std::uint32_t from = numbers[lane].bits, sign = (from & 0x8000u) << 16;
      const int magnitude = static_cast<int>(from & 0x7fffu);
      const std::uint32_t one = bits_of(widen(numbers[lane])), vector = bits_of(together[lane]);
      if (magnitude > Format<T>::kInfinity) {
        if (!is_nan(one)) wrong("widen", from, one, 0x7fc00000u);
        if (!is_nan(vector)) wrong("load", from, vector, 0x7fc00000u);
        continue;
      }
      const float value = static_cast<float>(value_of<T>(magnitude));
      const bool infinite = magnitude == Format<T>::kInfinity;
      const std::uint32_t expected = (infinite ? 0x7f800000u : bits_of(value)) | sign;
      if (one != expected) wrong("widen", from, one, expected);
      if (vector != expected) wrong("load", from, vector, expected);
    }
  }
}

// Each number, the tie above it, and the floats next to these, of both signs.
template <typename T>
void check_ties() {
  float numbers[kWidth] = {};
  int count = 0;
  for (int low = 0; low < Format<T>::kInfinity; ++low) {
    const double exact[] = {value_of<T>(low), (value_of<T>(low) + value_of<T>(low + 1)) / 2};
    for (double centre : exact) {
      const std::uint32_t bits = bits_of(static_cast<float>(centre));
      for (std::uint32_t which = 0; which < 6; ++which) {
        const std::uint32_t near = bits + which / 2 - (bits > 0 ? 1 : 0);
        numbers[count++] = float_of(near | (which % 2) << 31);
        if (count == kWidth) check_narrow<T>(numbers);
        count %= kWidth;
      }
    }
  }
  check_narrow<T>(numbers);
}

template <typename T>
void check_others() {
  float numbers[kWidth];
  std::uint32_t state = 1;
  for (int round = 0; round < 1000000 / kWidth; ++round) {
    for (int lane = 0; lane < kWidth; ++lane) {
      state = state * 1664525u + 1013904223u;
      numbers[lane] = float_of(state);
    }
    check_narrow<T>(numbers);
  }
  const std::uint32_t special[] = {0x7f800000u, 0xff800000u, 0x7f800001u, 0xffc00000u,
                                   0x7fffffffu, 0x00000001u, 0x807fffffu, 0x7f7fffffu};
  for (int lane = 0; lane < kWidth; ++lane) numbers[lane] = float_of(special[lane % 8]);
  check_narrow<T>(numbers);
  for (int lane = 0; lane < kWidth; ++lane) numbers[lane] = float_of(special[(lane + 4) % 8]);
  check_narrow<T>(numbers);
}

// The first lanes only: zeros are read behind them, and nothing is written there.
template <typename T>
void check_some() {
  constexpr int lanes = kLanes<Computed<T>>;
  for (int count = 0; count <= lanes; ++count) {
    T from[lanes] = {}, to[lanes] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      from[lane] = narrow<T>(static_cast<Computed<T>>(lane + 1));
      to[lane] = narrow<T>(Computed<T>(-1));
    }
    const auto read = load_some(from, count);
    store_some(to, splat<Computed<T>>(7), count);
    for (int lane = 0; lane < lanes; ++lane) {
      const bool inside = lane < count;
      if (read[lane] != (inside ? lane + 1 : 0)) wrong("load_some", count, lane, 0);
      if (widen(to[lane]) != (inside ? 7 : -1)) wrong("store_some", count, lane, 0);
    }
  }
}

template <typename T>
void check_format() {
  const int before = failures;
  check_widen<T>();
  check_ties<T>();
  check_others<T>();
  check_some<T>();
  if (failures > before) std::printf("%s: %d wrong\n", Format<T>::kName, failures - before);
}

}  // namespace

int check_numbers() {
  failures = 0;
  check_format<Bfloat16>();
  check_format<Float16>();
  check_some<float>();
  check_some<double>();
  return failures;
}

}  // namespace NLK_ISA
}  // namespace nlk
