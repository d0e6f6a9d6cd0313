// One pass over a tile of positions, the second of which finds it in the cache: logits, then sums.
// Only for units that are compiled once for each instruction set; see simd.h.
#ifndef NLK_CPU_GATE_READ_H_
#define NLK_CPU_GATE_READ_H_

#include "cpu/doubles.h"
#include "cpu/exp2.h"
#include "cpu/gate_plan.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Numbers of T are summed as Summed<T>: float32 in double, as an error of a logit is a relative error
// of its share; in 16 bits the logits' own terms are far less exact than float sums.
template <typename T>
struct SummedAs {
  typedef double Type;
};
template <>
struct SummedAs<Bfloat16> {
  typedef float Type;
};
template <>
struct SummedAs<Float16> {
  typedef float Type;
};
template <typename T>
using Summed = typename SummedAs<T>::Type;

NLK_INLINE DoubleVector load_summed(const double* from) { return load(from); }
NLK_INLINE DoubleVector load_summed(const float* from) { return load_doubles(from); }
NLK_INLINE FloatVector load_summed(const Bfloat16* from) { return load(from); }
NLK_INLINE FloatVector load_summed(const Float16* from) { return load(from); }
NLK_INLINE void store_summed(double* to, DoubleVector numbers) { store(to, numbers); }
NLK_INLINE void store_summed(float* to, DoubleVector numbers) { store_doubles(to, numbers); }
NLK_INLINE void store_summed(Bfloat16* to, FloatVector numbers) { store(to, numbers); }
NLK_INLINE void store_summed(Float16* to, FloatVector numbers) { store(to, numbers); }

// The first `count` lanes and no more of memory.
template <typename T>
NLK_INLINE Vector<Summed<T>> load_summed(const T* from, std::int64_t count) {
  constexpr int lanes = kLanes<Summed<T>>;
  if (count >= lanes) return load_summed(from);
  T numbers[lanes] = {};
  for (std::int64_t lane = 0; lane < count; ++lane) numbers[lane] = from[lane];
  return load_summed(numbers);
}
template <typename T>
NLK_INLINE void store_summed(T* to, Vector<Summed<T>> vector, std::int64_t count) {
  constexpr int lanes = kLanes<Summed<T>>;
  if (count >= lanes) return store_summed(to, vector);
  T numbers[lanes];
  store_summed(numbers, vector);
  for (std::int64_t lane = 0; lane < count; ++lane) to[lane] = numbers[lane];
}

NLK_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

NLK_INLINE std::int64_t offset_of(const GateAxes& axes, std::int64_t position) {
  const std::int64_t run = position / axes.run;
  return run / axes.middle * axes.outer_step + run % axes.middle * axes.middle_step +
         position % axes.run * axes.step;
}

constexpr double kLog2e = 1.4426950408889634074;

// exp(x) for x <= 0 and NaN.
template <typename Number>
NLK_INLINE Vector<Number> exp_of(Vector<Number> x) {
  return exp2<Number>(x * splat<Number>(static_cast<Number>(kLog2e)));
}
NLK_INLINE double exp_of(double x) { return exp_of<double>(splat<double>(x))[0]; }

// What is subtracted: nothing where every logit is -inf, as -inf - -inf is NaN.
NLK_INLINE double origin_of(double top) { return top == -__builtin_inf() ? 0.0 : top; }

// Logits and u of a tile's positions, by slots: a vector after the other, of which the last ends with
// the tile. In it some slots repeat the positions of the vector before.
template <typename Number>
struct Slots {
  static constexpr int kLength = kLanes<Number>;
  std::int64_t count;  // positions
  Number logits[kGateTile];
  Number shares[kGateTile];  // u, then what the rows are multiplied by

  std::int64_t vectors() const { return (count + kLength - 1) / kLength; }
  // The position of a vector's first slot; negative in tiles that are shorter than a vector.
  NLK_INLINE std::int64_t start(std::int64_t vector) const {
    return least(vector * kLength, count - kLength);
  }
  NLK_INLINE int repeated() const { return static_cast<int>(vectors() * kLength - count); }
  // So many slots from one on count for nothing.
  NLK_INLINE void silence(std::int64_t slot, int number) {
    for (int i = 0; i < number; ++i) {
      logits[slot + i] = -__builtin_inff();
      shares[slot + i] = 0;
    }
  }
  // By position.
  NLK_INLINE void save(Number* to, const Number* slots) const {
    const std::int64_t whole = (vectors() - 1) * kLength;
    std::memcpy(to, slots, whole * sizeof(Number));
    std::memcpy(to + whole, slots + whole + repeated(), (count - whole) * sizeof(Number));
  }
};

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Products of kCount vectors of positions with the factors of all channels: with one row of factors,
// or with two at once.
template <int kCount, bool kBoth, typename T, typename Number>
NLK_INLINE void multiply(const T* x, std::int64_t channel_step, std::int64_t channels,
                         const Number* factors, Number* first, Number* second) {
  constexpr int lanes = kLanes<Number>;
  constexpr int ahead = 8;  // channels
  Vector<Number> sums[kCount] = {}, others[kCount] = {};
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    const T* const row = x + channel * channel_step;
    const char* const next = reinterpret_cast<const char*>(
        row + least(ahead, channels - 1 - channel) * channel_step);
#pragma GCC unroll 8
    for (int line = 0; line < kCount * lanes * static_cast<int>(sizeof(T)); line += 64) {
      __builtin_prefetch(next + line);
    }
    const Vector<Number> factor = splat<Number>(factors[channel]);
    const Vector<Number> other = splat<Number>(kBoth ? factors[channels + channel] : Number{0});
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vector<Number> numbers = load_summed(row + i * lanes);
      sums[i] += numbers * factor;
      if (kBoth) others[i] += numbers * other;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    store(first + i * lanes, sums[i]);
    if (kBoth) store(second + i * lanes, others[i]);
  }
}

// A tile whose positions are neighbours: x points at its first position and channel.
template <bool kBoth, typename T, typename Number>
void score_positions(const T* x, std::int64_t channel_step, std::int64_t channels,
                     const Number* factors, Slots<Number>& slots) {
  constexpr int lanes = kLanes<Number>;
  const std::int64_t vectors = slots.vectors();
  std::int64_t vector = 0;
  const auto go = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    const std::int64_t at = vector * lanes;
    multiply<kCount, kBoth>(x + slots.start(vector), channel_step, channels, factors,
                            slots.logits + at, slots.shares + at);
    vector += kCount;
  };
  // The last vector may start early: it goes alone.
  while (vectors - vector > 8) go(Count<8>{});
  if (slots.repeated() == 0 && vectors - vector == 8) go(Count<8>{});
  if (vectors - vector > 4) go(Count<4>{});
  if (slots.repeated() == 0 && vectors - vector == 4) go(Count<4>{});
  while (vector < vectors) go(Count<1>{});
}

// Adds shares . x to the lanes of every channel, after they fade.
template <typename T, typename Number>
void add_positions(const T* x, std::int64_t channel_step, std::int64_t channels,
                   const Slots<Number>& slots, Number fade, Number* lanes_of_channels) {
  constexpr int lanes = kLanes<Number>;
  const std::int64_t last = slots.vectors() - 1;
  const Vector<Number> fades = splat<Number>(fade);
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    const T* const row = x + channel * channel_step;
    Number* const own = lanes_of_channels + channel * lanes;
    Vector<Number> sum = load(own) * fades;
    for (std::int64_t vector = 0; vector < last; ++vector) {
      sum += load(slots.shares + vector * lanes) * load_summed(row + vector * lanes);
    }
    sum += load(slots.shares + last * lanes) * load_summed(row + slots.start(last));
    store(own, sum);
  }
}

// A position whose channels are neighbours.
template <bool kBoth, typename T, typename Number>
NLK_INLINE void score_channels(const T* row, std::int64_t channels, const Number* factors,
                               Number& first, Number& second) {
  constexpr int lanes = kLanes<Number>, wide = 4;
  Vector<Number> sums[wide] = {}, others[wide] = {};
  std::int64_t channel = 0;
  for (; channel + wide * lanes <= channels; channel += wide * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < wide; ++i) {
      const std::int64_t at = channel + i * lanes;
      const Vector<Number> numbers = load_summed(row + at);
      sums[i] += numbers * load(factors + at);
      if (kBoth) others[i] += numbers * load(factors + channels + at);
    }
  }
  for (; channel < channels; channel += lanes) {
    const std::int64_t left = channels - channel;
    const Vector<Number> numbers = load_summed(row + channel, left);
    const int count = static_cast<int>(least(left, lanes));
    sums[0] += numbers * load_some(factors + channel, count);
    if (kBoth) others[0] += numbers * load_some(factors + channels + channel, count);
  }
  first = sum_of_lanes<Number>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (kBoth) second = sum_of_lanes<Number>((others[0] + others[1]) + (others[2] + others[3]));
}

// Adds shares . x to the sums of channels, after they fade; `offsets` are those of the positions.
template <typename T, typename Number>
void add_channels(const T* x, const std::int64_t* offsets, std::int64_t channels,
                  const Slots<Number>& slots, Number fade, Number* sums) {
  constexpr int lanes = kLanes<Number>, wide = 8;
  const Vector<Number> fades = splat<Number>(fade);
  std::int64_t channel = 0;
  for (; channel + wide * lanes <= channels; channel += wide * lanes) {
    Vector<Number> own[wide];
    for (int i = 0; i < wide; ++i) own[i] = load(sums + channel + i * lanes) * fades;
    for (std::int64_t slot = 0; slot < slots.count; ++slot) {
      const Vector<Number> share = splat<Number>(slots.shares[slot]);
      const T* const row = x + offsets[slot] + channel;
#pragma GCC unroll 8
      for (int i = 0; i < wide; ++i) own[i] += share * load_summed(row + i * lanes);
    }
    for (int i = 0; i < wide; ++i) store(sums + channel + i * lanes, own[i]);
  }
  for (; channel < channels; channel += lanes) {
    const std::int64_t left = channels - channel;
    const int count = static_cast<int>(least(left, lanes));
    Vector<Number> own = load_some(sums + channel, count) * fades;
    for (std::int64_t slot = 0; slot < slots.count; ++slot) {
      own += splat<Number>(slots.shares[slot]) * load_summed(x + offsets[slot] + channel, left);
    }
    store_some(sums + channel, own, count);
  }
}

// Copies a tile to rows of `length` positions; what lies before them is zeros, for vectors that start
// before a tile that is shorter than they.
template <typename T>
void pack(const T* x, const std::int64_t* offsets, std::int64_t channel_step, std::int64_t channels,
          std::int64_t count, std::int64_t length, T* packed) {
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    const T* const from = x + channel * channel_step;
    T* const to = packed + channel * length;
    for (std::int64_t at = 0; at < kGatePadding; ++at) to[at] = T{};
    for (std::int64_t at = 0; at < count; ++at) to[kGatePadding + at] = from[offsets[at]];
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_GATE_READ_H_
