// Copies between tensors and the scratch of region aggregation, see region_plan.h.
#ifndef NLK_CPU_REGION_PACK_H_
#define NLK_CPU_REGION_PACK_H_

#include "cpu/region_plan.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// One task's part of a tensor (B,C,T,H,W): an item and its channels from `channel` on.
template <typename E>
struct Part {
  E* numbers;              // at frame, row and column 0
  const std::int64_t* strides;
  std::int64_t channels;   // that exist, of a group

  E* at(std::int64_t frame, std::int64_t row) const {
    return numbers + frame * strides[2] + row * strides[3];
  }
};

template <typename E>
Part<E> part_of(E* tensor, const std::int64_t* strides, const Plan& plan, std::int64_t item,
                std::int64_t group) {
  const std::int64_t channel = group * plan.group;
  return Part<E>{tensor + item * strides[0] + channel * strides[1], strides,
                 at_most(plan.group, plan.channels - channel)};
}

// ---- by lines ----------------------------------------------------------------------------------

// Rows [first, last) into lines whose first position is at `lines`; false when one of the numbers
// is an infinity or NaN.
template <typename E, typename T>
bool pack_lines(const Part<const E>& from, const Plan& plan, std::int64_t first, std::int64_t last,
                T* lines, std::int64_t line) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t stride = from.strides[4];
  Vector<T> zeros = {};  // NaN after a number that is not finite
  T zero = 0;
  for (std::int64_t frame = 0; frame < plan.frames; ++frame) {
    T* to = lines + frame * plan.pitch;
    for (std::int64_t row = first; row < last; ++row, to += line) {
      const E* numbers = from.at(frame, row);
      if (stride == 1 || plan.width == 1) {
        for (std::int64_t column = 0; column < plan.width; column += lanes) {
          const Vector<T> some =
              load_some(numbers + column, static_cast<int>(at_most(lanes, plan.width - column)));
          zeros += some * T{0};
          store(to + column, some);
        }
      } else {
        for (std::int64_t column = 0; column < plan.width; ++column) {
          to[column] = widen(numbers[column * stride]);
          zero += to[column] * T{0};
        }
      }
    }
  }
  return sum_of_lanes<T>(zeros) + zero == 0;
}

// Rows [first, last) from lines whose first position is at `lines`.
template <typename E, typename T>
void unpack_lines(const T* lines, std::int64_t line, const Plan& plan, std::int64_t first,
                  std::int64_t last, const Part<E>& to) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t stride = to.strides[4];
  for (std::int64_t frame = 0; frame < plan.frames; ++frame) {
    const T* from = lines + frame * plan.pitch;
    for (std::int64_t row = first; row < last; ++row, from += line) {
      E* numbers = to.at(frame, row);
      if (stride == 1 || plan.width == 1) {
        for (std::int64_t column = 0; column < plan.width; column += lanes) {
          store_some(numbers + column, load(from + column),
                     static_cast<int>(at_most(lanes, plan.width - column)));
        }
      } else {
        for (std::int64_t column = 0; column < plan.width; ++column) {
          numbers[column * stride] = narrow<E>(from[column]);
        }
      }
    }
  }
}

// ---- by channels -------------------------------------------------------------------------------

// Rows [first, last) into (rows, T, W, lanes); zeros in the lanes of channels that do not exist.
template <typename E, typename T>
void pack_channels(const Part<const E>& from, const Plan& plan, std::int64_t first,
                   std::int64_t last, T* packed, std::int64_t packed_row) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t stride = from.strides[1];
  const int channels = static_cast<int>(from.channels);
  for (std::int64_t frame = 0; frame < plan.frames; ++frame) {
    for (std::int64_t row = first; row < last; ++row) {
      T* to = packed + (row - first) * packed_row + frame * plan.pitch;
      const E* numbers = from.at(frame, row);
      if (stride == 1 || channels == 1) {
        for (std::int64_t column = 0; column < plan.width; ++column, numbers += from.strides[4]) {
          // Of the next row: neighbours are too far from each other for the machine to foresee.
          __builtin_prefetch(numbers + from.strides[3]);
          store(to + column * lanes, load_some(numbers, channels));
        }
        continue;
      }
      for (int lane = 0; lane < lanes; ++lane) {
        for (std::int64_t column = 0; column < plan.width; ++column) {
          to[column * lanes + lane] =
              lane < channels ? widen(numbers[lane * stride + column * from.strides[4]]) : T{0};
        }
      }
    }
  }
}

// One position of a group of channels.
template <typename E, typename T>
NLK_INLINE void unpack_channels(const T* lanes, const Part<E>& to, E* numbers) {
  if (to.strides[1] == 1 || to.channels == 1) {
    store_some(numbers, load(lanes), static_cast<int>(to.channels));
  } else {
    for (std::int64_t lane = 0; lane < to.channels; ++lane) {
      numbers[lane * to.strides[1]] = narrow<E>(lanes[lane]);
    }
  }
}

// ---- taps --------------------------------------------------------------------------------------

// Where the taps that reach a position begin along an axis.
NLK_INLINE std::int64_t first_tap(std::int64_t taps, int reaching) { return (taps - reaching) / 2; }

// The taps of a group as (kt, kw, kh, lanes), or (kt, kw, kh) by lines; from the last to the first
// when `flip`. False when one of them is an infinity or NaN.
template <typename E, typename T>
bool pack_taps(const RegionArguments& arguments, const Plan& plan, std::int64_t group, bool flip,
               T* taps) {
  const std::int64_t* strides = arguments.weight_strides;
  const std::int64_t lanes = plan.tap_lanes();
  const std::int64_t channel = group * plan.group;
  const std::int64_t count = at_most(lanes, plan.channels - channel);
  const E* weight = static_cast<const E*>(arguments.weight) + channel * strides[0] +
                    first_tap(arguments.kernel[0], plan.kt) * strides[1] +
                    first_tap(arguments.kernel[1], plan.kh) * strides[2] +
                    first_tap(arguments.kernel[2], plan.kw) * strides[3];
  std::int64_t tap = 0;
  for (int i = 0; i < plan.kt; ++i) {
    for (int k = 0; k < plan.kw; ++k) {
      const E* from = weight + i * strides[1] + k * strides[3];
      for (int j = 0; j < plan.kh; ++j, ++tap, from += strides[2]) {
        T* to = taps + (flip ? plan.taps() - 1 - tap : tap) * lanes;
        for (std::int64_t lane = 0; lane < count; ++lane) to[lane] = widen(from[lane * strides[0]]);
        for (std::int64_t lane = count; lane < lanes; ++lane) to[lane] = 0;
      }
    }
  }
  Vector<T> zeros = {};
  for (std::int64_t at = 0; at < plan.taps() * lanes; at += kLanes<T>) {
    zeros += load_some(taps + at, static_cast<int>(at_most(kLanes<T>, plan.taps() * lanes - at))) *
             T{0};
  }
  return sum_of_lanes<T>(zeros) == 0;
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_REGION_PACK_H_
