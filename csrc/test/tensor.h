// Operands of tests: numbers of any dtype at any strides, in buffers that end where the last number
// does, so that AddressSanitizer sees each read and write beyond; the workspace, too.
#ifndef NLK_TEST_TENSOR_H_
#define NLK_TEST_TENSOR_H_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "nlk/attention.h"
#include "nlk/number.h"

namespace nlk {

inline std::size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

inline double read(Dtype dtype, const char* at) {
  if (dtype == Dtype::kFloat64) {
    double number;
    std::memcpy(&number, at, sizeof(number));
    return number;
  }
  float number;
  if (dtype == Dtype::kFloat32) {
    std::memcpy(&number, at, sizeof(number));
    return number;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  if (dtype == Dtype::kBfloat16) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    std::memcpy(&number, &wide, sizeof(number));
    return number;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double beyond = mantissa == 0 ? HUGE_VAL : NAN;
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? beyond
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// Cuts off what a format does not hold; of float16, all numbers below its smallest normal one.
inline void write(Dtype dtype, char* at, double value) {
  const float number = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
  if (dtype == Dtype::kFloat16) {
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const bool small = magnitude < 0x38800000u;
    half = static_cast<std::uint16_t>(small ? 0 : (magnitude - 0x38000000u) >> 13);
    if (number != number) half = 0x7e00u;
    half = static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000u));
  }
  if (dtype == Dtype::kFloat64) std::memcpy(at, &value, sizeof(value));
  if (dtype == Dtype::kFloat32) std::memcpy(at, &number, sizeof(number));
  if (bytes_of(dtype) == 2) std::memcpy(at, &half, sizeof(half));
}

// Numbers that are counted in the order of their indices, the last axis first.
class Strided {
 public:
  Strided(Dtype dtype, const std::vector<std::int64_t>& sizes,
          const std::vector<std::int64_t>& strides)
      : dtype_(dtype), places_{0} {
    for (std::size_t axis = 0; axis < sizes.size(); ++axis) {
      std::vector<std::int64_t> finer;
      for (const std::int64_t place : places_) {
        for (std::int64_t i = 0; i < sizes[axis]; ++i) finer.push_back(place + i * strides[axis]);
      }
      places_.swap(finer);
    }
    std::size_t numbers = 0;
    for (const std::int64_t place : places_) {
      if (numbers < static_cast<std::size_t>(place) + 1) numbers = place + 1;
    }
    memory_.assign(numbers * bytes_of(dtype), '\xff');  // NaN, between numbers and before results
  }
  std::int64_t count() const { return static_cast<std::int64_t>(places_.size()); }
  double number(std::int64_t i) const { return read(dtype_, &memory_[offset(i)]); }
  void put(std::int64_t i, double value) { write(dtype_, &memory_[offset(i)], value); }
  // Multiples of 1/8 below 2: exact in every dtype, as are sums of some hundreds of their products.
  void fill(std::mt19937& random) {
    for (std::int64_t i = 0; i < count(); ++i) put(i, (static_cast<int>(random() % 31) - 15) / 8.0);
  }
  // Numbers of as many digits as the dtype has.
  void fill_finely(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < count(); ++i) put(i, normal(random));
  }
  std::vector<double> numbers() const {
    std::vector<double> all;
    for (std::int64_t i = 0; i < count(); ++i) all.push_back(number(i));
    return all;
  }
  // Of all bytes, those between the numbers included.
  bool is_bitwise(const Strided& other) const { return memory_ == other.memory_; }
  // Whether nothing has been written between the numbers.
  bool is_clean_between() const {
    std::vector<char> bytes = memory_;
    for (const std::int64_t place : places_) {
      std::memset(&bytes[place * bytes_of(dtype_)], 0xff, bytes_of(dtype_));
    }
    for (const char byte : bytes) {
      if (byte != '\xff') return false;
    }
    return true;
  }
  char* data() { return memory_.data(); }

 private:
  std::size_t offset(std::int64_t i) const { return places_[i] * bytes_of(dtype_); }

  Dtype dtype_;
  std::vector<std::int64_t> places_;
  std::vector<char> memory_;
};

// A (batch, rows, channels) operand: rows, maps of a channel each, or every second number.
class Tensor : public Strided {
 public:
  Tensor(Dtype dtype, std::int64_t batch, std::int64_t rows, std::int64_t channels, int layout)
      : Tensor(dtype, batch, rows, channels, strides_of(rows, channels, layout)) {}
  // A copy would name the memory of what it is one of.
  Tensor(Tensor&&) = default;
  double at(std::int64_t b, std::int64_t r, std::int64_t c) const {
    return number((b * rows_ + r) * channels_ + c);
  }
  Operand operand;

 private:
  static Operand strides_of(std::int64_t rows, std::int64_t channels, int layout) {
    Operand strides{};
    strides.channel = layout == 1 ? rows : layout == 2 ? 2 : 1;
    strides.row = layout == 1 ? 1 : layout == 2 ? 2 * channels + 1 : channels;
    strides.item = layout == 2 ? rows * strides.row + 3 : rows * channels;
    return strides;
  }
  Tensor(Dtype dtype, std::int64_t batch, std::int64_t rows, std::int64_t channels, Operand strides)
      : Strided(dtype, {batch, rows, channels}, {strides.item, strides.row, strides.channel}),
        operand(strides),
        rows_(rows),
        channels_(channels) {
    operand.data = data();
  }
  std::int64_t rows_, channels_;
};

// Memory of exactly so many bytes at a multiple of 64.
struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
inline std::unique_ptr<char, Free> workspace(std::int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<std::size_t>(bytes))) std::abort();
  std::memset(memory, 0xff, static_cast<std::size_t>(bytes));
  return std::unique_ptr<char, Free>(static_cast<char*>(memory));
}

}  // namespace nlk

#endif  // NLK_TEST_TENSOR_H_
