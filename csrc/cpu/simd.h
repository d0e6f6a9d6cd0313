// Vectors of one instruction set, and numbers as they lie in memory. Only for units that are compiled
// once for each instruction set: everything is in an anonymous namespace, so that no linker takes
// one set's copy for another's.
//
// Vectors are those of GCC and Clang: + - * / and comparisons work on them, a comparison gives a
// vector of integers (-1 or 0), and `mask ? a : b` selects. An fma is written a * b + c: the flag
// -ffp-contract=fast fuses it where the machine can.
#ifndef NLK_CPU_SIMD_H_
#define NLK_CPU_SIMD_H_

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "nlk/number.h"

namespace nlk {
namespace NLK_ISA {
namespace {

#define NLK_INLINE inline __attribute__((always_inline))

template <typename T>
constexpr int kLanes = NLK_VECTOR_BYTES / static_cast<int>(sizeof(T));

typedef float FloatVector __attribute__((vector_size(NLK_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(NLK_VECTOR_BYTES)));
typedef std::int32_t IntVector __attribute__((vector_size(NLK_VECTOR_BYTES)));
typedef std::int64_t LongVector __attribute__((vector_size(NLK_VECTOR_BYTES)));
// As many 16-bit numbers as a FloatVector has lanes.
typedef std::uint16_t HalfBits __attribute__((vector_size(NLK_VECTOR_BYTES / 2)));
typedef std::uint32_t UintVector __attribute__((vector_size(NLK_VECTOR_BYTES)));

// Vector<T> is the vector of T, IntegerVector<T> what its comparisons give.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef FloatVector Type;
  typedef IntVector Integers;
};
template <>
struct VectorOf<double> {
  typedef DoubleVector Type;
  typedef LongVector Integers;
};
template <typename T>
using Vector = typename VectorOf<T>::Type;
template <typename T>
using IntegerVector = typename VectorOf<T>::Integers;

// 16-bit numbers in memory.
struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The type that numbers of T are computed in.
template <typename T>
struct ComputedAs {
  typedef float Type;
};
template <>
struct ComputedAs<double> {
  typedef double Type;
};
template <typename T>
using Computed = typename ComputedAs<T>::Type;

// Calls `with` with a number of the type that a dtype stands for.
template <typename With>
NLK_INLINE auto with_dtype(Dtype dtype, With with) {
  switch (dtype) {
    case Dtype::kFloat64:
      return with(double{});
    case Dtype::kBfloat16:
      return with(Bfloat16{});
    case Dtype::kFloat16:
      return with(Float16{});
    default:
      return with(float{});
  }
}

template <typename To, typename From>
NLK_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_copy needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
NLK_INLINE Vector<T> splat(T number) {
  return number - Vector<T>{};  // compilers know that x - 0 is x, even for x = -0; x + 0 is not
}

// ---- one number --------------------------------------------------------------------------------

NLK_INLINE float widen(float number) { return number; }
NLK_INLINE double widen(double number) { return number; }
NLK_INLINE float widen(Bfloat16 number) {
  return bit_copy<float>(static_cast<std::uint32_t>(number.bits) << 16);
}
NLK_INLINE float widen(Float16 number) {
#if defined(__F16C__)
  return _cvtsh_ss(number.bits);
#else
  // Exponent and mantissa moved into place; 2^112 corrects the bias, for subnormals, too.
  const std::uint32_t sign = static_cast<std::uint32_t>(number.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(number.bits & 0x7fffu) << 13;
  float wide = bit_copy<float>(magnitude) * 0x1p112f;
  if ((number.bits & 0x7c00u) == 0x7c00u) wide = bit_copy<float>(magnitude | 0x7f800000u);
  return bit_copy<float>(bit_copy<std::uint32_t>(wide) | sign);
#endif
}

// Rounds to the nearest, ties to even.
template <typename T>
NLK_INLINE T narrow(Computed<T> number);
template <>
NLK_INLINE float narrow<float>(float number) {
  return number;
}
template <>
NLK_INLINE double narrow<double>(double number) {
  return number;
}
template <>
NLK_INLINE Bfloat16 narrow<Bfloat16>(float number) {
  const std::uint32_t bits = bit_copy<std::uint32_t>(number);
  if (number != number) return Bfloat16{static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  return Bfloat16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
NLK_INLINE Float16 narrow<Float16>(float number) {
#if defined(__F16C__)
  return Float16{static_cast<std::uint16_t>(_cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT))};
#else
  const std::uint32_t bits = bit_copy<std::uint32_t>(number);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below the smallest normal number
    // Adding 0.5 puts the last kept bit of a subnormal at the end of the sum's mantissa.
    half = bit_copy<std::uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Float16{static_cast<std::uint16_t>(half | sign)};
#endif
}

// ---- vectors -----------------------------------------------------------------------------------

template <typename V, typename T>
NLK_INLINE V load_bits(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(V));
  return vector;
}

NLK_INLINE FloatVector load(const float* from) { return load_bits<FloatVector>(from); }
NLK_INLINE DoubleVector load(const double* from) { return load_bits<DoubleVector>(from); }
NLK_INLINE FloatVector load(const Bfloat16* from) {
  const auto bits = __builtin_convertvector(load_bits<HalfBits>(from), UintVector) << 16;
  return bit_copy<FloatVector>(bits);
}
NLK_INLINE FloatVector load(const Float16* from) {
#if defined(__AVX512F__)
  return bit_copy<FloatVector>(_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(from)));
#elif defined(__F16C__)
  return bit_copy<FloatVector>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
#else
  FloatVector vector;
  for (int lane = 0; lane < kLanes<float>; ++lane) vector[lane] = widen(from[lane]);
  return vector;
#endif
}

NLK_INLINE void store(float* to, FloatVector vector) { std::memcpy(to, &vector, sizeof(vector)); }
NLK_INLINE void store(double* to, DoubleVector vector) { std::memcpy(to, &vector, sizeof(vector)); }
NLK_INLINE HalfBits narrow_bits(FloatVector vector) {
#if NLK_BF16_DOT
  return bit_copy<HalfBits>(_mm512_cvtneps_pbh(bit_copy<__m512>(vector)));
#else
  const UintVector bits = bit_copy<UintVector>(vector);
  const UintVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVector quiet = (bits >> 16) | 0x40u;
  const IntVector is_nan = vector != vector;
  return __builtin_convertvector(is_nan ? quiet : rounded, HalfBits);
#endif
}
NLK_INLINE void store(Bfloat16* to, FloatVector vector) {
  const HalfBits bits = narrow_bits(vector);
  std::memcpy(to, &bits, sizeof(bits));
}
NLK_INLINE void store(Float16* to, FloatVector vector) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, bit_copy<__m512>(vector), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof(bits));
#elif defined(__F16C__)
  const __m128i bits = _mm256_cvtps_ph(bit_copy<__m256>(vector), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof(bits));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow<Float16>(vector[lane]);
#endif
}

// The first `count` lanes, zeros behind them; reads nothing else.
template <typename T>
NLK_INLINE Vector<Computed<T>> load_some(const T* from, int count) {
  constexpr int lanes = kLanes<Computed<T>>;
  if (count >= lanes) return load(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const std::uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    return bit_copy<Vector<Computed<T>>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from));
  } else if constexpr (sizeof(T) == 4) {
    return bit_copy<Vector<Computed<T>>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from));
  } else {
    const __m256i some = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    return load(reinterpret_cast<const T*>(&some));
  }
#endif
  T numbers[lanes] = {};
  for (int lane = 0; lane < count; ++lane) numbers[lane] = from[lane];
  return load(numbers);
}

// The first `count` lanes; writes nothing else.
template <typename T>
NLK_INLINE void store_some(T* to, Vector<Computed<T>> vector, int count) {
  constexpr int lanes = kLanes<Computed<T>>;
  if (count >= lanes) return store(to, vector);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const std::uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), bit_copy<__m512d>(vector));
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), bit_copy<__m512>(vector));
  } else {
    T numbers[lanes];
    store(numbers, vector);
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), load_bits<__m256i>(numbers));
  }
#endif
  T numbers[lanes];
  store(numbers, vector);
  for (int lane = 0; lane < count; ++lane) to[lane] = numbers[lane];
}

// The larger of each pair; NaN where b is NaN, b where a is.
template <typename V>
NLK_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// A vector plus itself, its second half beside the first.
template <int kHalf, typename V, std::size_t... I>
NLK_INLINE V with_half(V vector, std::index_sequence<I...>) {
  constexpr int lanes = sizeof...(I);
  return vector +
         __builtin_shufflevector(vector, vector, ((static_cast<int>(I) + kHalf) % lanes)...);
}

template <typename T>
NLK_INLINE T sum_of_lanes(Vector<T> vector) {
  // Halves upon halves: the order of a tree.
  constexpr std::make_index_sequence<kLanes<T>> lanes;
  if constexpr (kLanes<T> > 8) vector = with_half<8>(vector, lanes);
  if constexpr (kLanes<T> > 4) vector = with_half<4>(vector, lanes);
  if constexpr (kLanes<T> > 2) vector = with_half<2>(vector, lanes);
  return with_half<1>(vector, lanes)[0];
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_SIMD_H_
