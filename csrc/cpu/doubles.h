// Rows of numbers of any dtype, read and written as vectors of doubles. Only for units that are
// compiled once for each instruction set; see simd.h.
#ifndef NLK_CPU_DOUBLES_H_
#define NLK_CPU_DOUBLES_H_

#include "cpu/simd.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// As many numbers of 32 and 16 bits as a DoubleVector has lanes.
typedef float FewFloats __attribute__((vector_size(NLK_VECTOR_BYTES / 2)));
typedef std::uint32_t FewWords __attribute__((vector_size(NLK_VECTOR_BYTES / 2)));
typedef std::int32_t FewInts __attribute__((vector_size(NLK_VECTOR_BYTES / 2)));
typedef std::uint16_t FewHalves __attribute__((vector_size(NLK_VECTOR_BYTES / 4)));

NLK_INLINE DoubleVector load_doubles(const double* from) { return load(from); }
NLK_INLINE DoubleVector load_doubles(const float* from) {
  return __builtin_convertvector(load_bits<FewFloats>(from), DoubleVector);
}
NLK_INLINE DoubleVector load_doubles(const Bfloat16* from) {
  const FewWords bits = __builtin_convertvector(load_bits<FewHalves>(from), FewWords) << 16;
  return __builtin_convertvector(bit_copy<FewFloats>(bits), DoubleVector);
}
NLK_INLINE DoubleVector load_doubles(const Float16* from) {
#if defined(__AVX512F__)
  const FewFloats numbers = bit_copy<FewFloats>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
#elif defined(__F16C__)
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const FewFloats numbers = bit_copy<FewFloats>(_mm_cvtph_ps(bits));
#else
  FewFloats numbers;
  for (int lane = 0; lane < kLanes<double>; ++lane) numbers[lane] = widen(from[lane]);
#endif
  return __builtin_convertvector(numbers, DoubleVector);
}

NLK_INLINE void store_doubles(double* to, DoubleVector numbers) { store(to, numbers); }
NLK_INLINE void store_doubles(float* to, DoubleVector numbers) {
  const FewFloats floats = __builtin_convertvector(numbers, FewFloats);
  std::memcpy(to, &floats, sizeof(floats));
}
NLK_INLINE void store_doubles(Bfloat16* to, DoubleVector numbers) {
  const FewFloats floats = __builtin_convertvector(numbers, FewFloats);
  const FewWords bits = bit_copy<FewWords>(floats);
  const FewWords rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FewWords quiet = (bits >> 16) | 0x40u;
  const FewInts is_nan = floats != floats;
  const FewHalves halves = __builtin_convertvector(is_nan ? quiet : rounded, FewHalves);
  std::memcpy(to, &halves, sizeof(halves));
}
NLK_INLINE void store_doubles(Float16* to, DoubleVector numbers) {
  const FewFloats floats = __builtin_convertvector(numbers, FewFloats);
#if defined(__AVX512F__)
  const __m128i bits = _mm256_cvtps_ph(bit_copy<__m256>(floats), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof(bits));
#elif defined(__F16C__)
  const __m128i bits = _mm_cvtps_ph(bit_copy<__m128>(floats), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, 8);
#else
  for (int lane = 0; lane < kLanes<double>; ++lane) to[lane] = narrow<Float16>(floats[lane]);
#endif
}

// Up to kWidth numbers of a row as one vector after the other; those that are missing are zeros.
template <int kWidth>
struct Row {
  static constexpr int kVectors = kWidth / kLanes<double>;
  DoubleVector at[kVectors];

  NLK_INLINE void clear() {
    for (int i = 0; i < kVectors; ++i) at[i] = DoubleVector{};
  }
  NLK_INLINE void read(const double* from) {
    for (int i = 0; i < kVectors; ++i) at[i] = load(from + i * kLanes<double>);
  }
  NLK_INLINE void write(double* to) const {
    for (int i = 0; i < kVectors; ++i) store(to + i * kLanes<double>, at[i]);
  }
  // this += factor * other
  NLK_INLINE void add(double factor, const Row& other) {
    const DoubleVector factors = splat(factor);
    for (int i = 0; i < kVectors; ++i) at[i] += factors * other.at[i];
  }
  NLK_INLINE void add(const Row& other) {
    for (int i = 0; i < kVectors; ++i) at[i] += other.at[i];
  }
  NLK_INLINE double dot(const Row& other) const {
    DoubleVector sums = at[0] * other.at[0];
    for (int i = 1; i < kVectors; ++i) sums += at[i] * other.at[i];
    return sum_of_lanes<double>(sums);
  }
};

// Where the rows of an operand lie: `count` channels of them, `step` elements from each other.
template <typename T>
struct Rows {
  const T* first;
  std::int64_t stride, step;
  int count;

  // Brings a row to the cache before it is read.
  template <int kWidth>
  NLK_INLINE void prefetch(std::int64_t row) const {
    const char* line = reinterpret_cast<const char*>(first + row * stride);
    if (step != 1) return;
    for (int at = 0; at < kWidth * static_cast<int>(sizeof(T)); at += 64) {
      __builtin_prefetch(line + at);
    }
  }

  // `buffer` takes rows that are shorter or not contiguous; zeros behind `count` stay in it.
  template <int kWidth>
  NLK_INLINE Row<kWidth> read(std::int64_t row, T* buffer) const {
    const T* from = first + row * stride;
    if (step != 1 || count != kWidth) {
      for (int i = 0; i < count; ++i) buffer[i] = from[i * step];
      from = buffer;
    }
    Row<kWidth> numbers;
    for (int i = 0; i < Row<kWidth>::kVectors; ++i) {
      numbers.at[i] = load_doubles(from + i * kLanes<double>);
    }
    return numbers;
  }
};

// Brings a row of contiguous numbers to the cache before it is written: stores leave the core one after
// the other, so that each would wait for its line.
template <typename T>
NLK_INLINE void prefetch_written(T* row, int count) {
  char* const line = reinterpret_cast<char*>(row);
  for (int at = 0; at < count * static_cast<int>(sizeof(T)); at += 64) {
    __builtin_prefetch(line + at, 1);
  }
}

// Writes factor * row to `count` contiguous numbers.
template <typename T, int kWidth>
NLK_INLINE void write_row(T* to, const Row<kWidth>& row, double factor, int count) {
  const DoubleVector factors = splat(factor);
  T buffer[kWidth];
  T* const target = count == kWidth ? to : buffer;
  for (int i = 0; i < Row<kWidth>::kVectors; ++i) {
    store_doubles(target + i * kLanes<double>, row.at[i] * factors);
  }
  if (count == kWidth) return;
  for (int i = 0; i < count; ++i) to[i] = buffer[i];
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_DOUBLES_H_
