// Planes of one channel, or lines of positions, are tasks; a vector of outputs looks at each number of
// its windows in turn. Neighbours are told apart where windows are two wide.
#include "nlk/pool.h"

#include "cpu/simd.h"
#include "nlk/parallel.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Numbers of x that a task reads at least.
constexpr std::int64_t kTaskNumbers = 16 << 10;

// ---- neighbours --------------------------------------------------------------------------------

template <int... I>
struct Lanes {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
  typedef Lanes<I...> Type;
};
template <typename Number>
using AllLanes = typename UpTo<kLanes<Number>>::Type;

// Every second lane of a and b, from `first` on.
template <int kFirst, typename V, int... I>
NLK_INLINE V every_second(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + kFirst)...);
}
// Lanes of a and b by turns: those of the first half, or of the second.
template <int kHalf, typename V, int... I>
NLK_INLINE V by_turns(V a, V b, Lanes<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (kHalf * lanes / 2 + I / 2 + I % 2 * lanes)...);
}
template <int kApart, typename V, int... I>
NLK_INLINE V swapped(V a, Lanes<I...>) {
  return __builtin_shufflevector(a, a, (I ^ kApart)...);
}

NLK_INLINE int clamped(std::int64_t number, int most) {
  return number < 0 ? 0 : number < most ? static_cast<int>(number) : most;
}

// ---- pooling -----------------------------------------------------------------------------------

template <typename T>
class MaxPool {
  typedef Computed<T> Number;
  typedef Vector<Number> Numbers;
  typedef IntegerVector<Number> Integers;
  typedef decltype(+Integers{}[0]) Integer;
  static constexpr int kLength = kLanes<Number>;

  // How the numbers of a window that lie in one line of x reach a vector of outputs.
  enum class Step { kOne, kTwo, kAny };

 public:
  MaxPool(const PoolArguments& arguments, const std::int64_t* large, const std::int64_t* small)
      : a_(arguments), large_(large), small_(small) {
    for (int axis = 0; axis < 3; ++axis) {
      counts_[axis] = a_.sizes[axis + 2] / a_.window[axis];
      taps_ *= a_.window[axis];
    }
    bits_ = pool_bits(taps_);
    const bool last = a_.channels_inner;
    inner_ = last ? a_.sizes[1] : counts_[2];
    inner_step_ = last ? large_[1] : a_.window[2] * large_[4];
    small_step_ = last ? small_[1] : small_[4];
    rows_ = last ? counts_[2] : counts_[1];
    row_step_ = last ? a_.window[2] * large_[4] : a_.window[1] * large_[3];
    small_row_ = last ? small_[4] : small_[3];
    planes_ = a_.sizes[0] * counts_[0] * (last ? counts_[1] : a_.sizes[1]);
    row_bytes_ = (inner_ * bits_ + 7) / 8;
    step_ = inner_step_ == 1 ? Step::kOne : Step::kAny;
    if (!last && a_.window[2] == 2 && large_[4] == 1) step_ = Step::kTwo;
    for (std::int64_t tap = 0; tap < taps_; ++tap) offsets_[tap] = offset(tap);
  }

  bool forward() { return run<&MaxPool::reduce>(); }
  bool backward() { return run<&MaxPool::spread>(); }

 private:
  template <void (MaxPool::*kRow)(std::int64_t, std::int64_t, std::uint8_t*)>
  bool run() {
    const std::int64_t numbers = rows_ * inner_ * taps_ + 1;
    at_once_ = numbers < kTaskNumbers ? kTaskNumbers / numbers : 1;
    return parallel_for(
        a_.threads, (planes_ + at_once_ - 1) / at_once_,
        [](void* pool, std::int64_t task, int) {
          auto& own = *static_cast<MaxPool*>(pool);
          const std::int64_t end = (task + 1) * own.at_once_;
          for (std::int64_t plane = task * own.at_once_; plane < end && plane < own.planes_; ++plane) {
            std::int64_t large = own.of_plane(plane, own.large_, true);
            std::int64_t small = own.of_plane(plane, own.small_, false);
            std::uint8_t* winners = own.a_.winners + plane * own.rows_ * own.row_bytes_;
            for (std::int64_t row = 0; row < own.rows_; ++row) {
              (own.*kRow)(large, small, winners);
              large += own.row_step_, small += own.small_row_, winners += own.row_bytes_;
            }
          }
        },
        this);
  }

  // Where a plane begins; its numbers are (item, channel, frame), or (item, frame, line).
  std::int64_t of_plane(std::int64_t plane, const std::int64_t* strides, bool windows) const {
    const std::int64_t t_step = strides[2] * (windows ? a_.window[0] : 1);
    const std::int64_t h_step = strides[3] * (windows ? a_.window[1] : 1);
    const std::int64_t inner = a_.channels_inner ? counts_[1] : counts_[0];
    const std::int64_t outer = a_.channels_inner ? counts_[0] : a_.sizes[1];
    const std::int64_t low = plane % inner, middle = plane / inner % outer;
    const std::int64_t item = plane / inner / outer * strides[0];
    return item + (a_.channels_inner ? middle * t_step + low * h_step
                                     : middle * strides[1] + low * t_step);
  }

  // Distance of a window's number `tap` from its first.
  std::int64_t offset(std::int64_t tap) const {
    const std::int64_t w = tap % a_.window[2], h = tap / a_.window[2] % a_.window[1];
    return tap / (a_.window[2] * a_.window[1]) * large_[2] + h * large_[3] + w * large_[4];
  }

  // ---- forward ---------------------------------------------------------------------------------

  static NLK_INLINE Integers all(std::int64_t number) {
    return Integers{} + static_cast<Integer>(number);
  }

  struct Best {
    Numbers largest;
    Integers number;
  };

  void reduce(std::int64_t large, std::int64_t small, std::uint8_t* winners) {
    const T* from = static_cast<const T*>(a_.x) + large;
    T* to = static_cast<T*>(a_.out) + small;
    for (std::int64_t i = 0; i < inner_; i += kLength) {
      const int some = clamped(inner_ - i, kLength);
      const Best best = step_ == Step::kTwo   ? best_of_pairs(from + 2 * i, some)
                        : step_ == Step::kOne ? best_of<true>(from + i, some)
                                              : best_of<false>(from + i * inner_step_, some);
      if (small_step_ == 1) {
        store_some(to + i, best.largest, some);
      } else {
        for (int k = 0; k < some; ++k) to[(i + k) * small_step_] = narrow<T>(best.largest[k]);
      }
      keep(winners, i, best.number, some);
    }
  }

  static NLK_INLINE void compare(Best& best, Numbers candidate, std::int64_t tap) {
    const auto wins = candidate > best.largest || candidate != candidate;
    best.largest = wins ? candidate : best.largest;
    best.number = wins ? all(tap) : best.number;
  }

  template <bool kNeighbours>
  NLK_INLINE Best best_of(const T* from, int some) {
    Best best{};
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      const T* at = from + offsets_[tap];
      Numbers numbers{};
      if constexpr (kNeighbours) {
        numbers = load_some(at, some);
      } else {
        for (int k = 0; k < some; ++k) numbers[k] = widen(at[k * inner_step_]);
      }
      if (tap == 0) {
        best.largest = numbers;
      } else {
        compare(best, numbers, tap);
      }
    }
    return best;
  }

  NLK_INLINE Best best_of_pairs(const T* from, int some) {
    Best best{};
    for (std::int64_t tap = 0; tap < taps_; tap += 2) {
      const T* at = from + offsets_[tap];
      const Numbers a = load_some(at, clamped(2 * some, kLength));
      const Numbers b = 2 * some > kLength ? load_some(at + kLength, 2 * some - kLength) : Numbers{};
      const Numbers even = every_second<0>(a, b, AllLanes<Number>{});
      if (tap == 0) {
        best.largest = even;
      } else {
        compare(best, even, tap);
      }
      compare(best, every_second<1>(a, b, AllLanes<Number>{}), tap + 1);
    }
    return best;
  }

  // ---- winners ---------------------------------------------------------------------------------

  // Those of a vector of outputs, from output `first` of a row on. Two bits of each lane are a word.
  void keep(std::uint8_t* winners, std::int64_t first, Integers numbers, int some) const {
    if (kLength >= 4 && bits_ == 2) {
      numbers = all_ored(numbers << twice_the_lane(AllLanes<Number>{}));
      const std::uint32_t word = static_cast<std::uint32_t>(numbers[0]);
      std::memcpy(winners + first / 4, &word, (some + 3) / 4);
      return;
    }
    for (int k = 0; k < some; ++k) {
      const std::int64_t bit = (first + k) * bits_;
      const unsigned before = bit % 8 == 0 ? 0 : winners[bit / 8];
      winners[bit / 8] =
          static_cast<std::uint8_t>(before | static_cast<unsigned>(numbers[k]) << bit % 8);
    }
  }

  Integers kept(const std::uint8_t* winners, std::int64_t first, int some) const {
    if (kLength >= 4 && bits_ == 2) {
      std::uint32_t word = 0;
      std::memcpy(&word, winners + first / 4, (some + 3) / 4);
      return all(word) >> twice_the_lane(AllLanes<Number>{}) & 3;
    }
    Integers numbers{};
    for (int k = 0; k < some; ++k) {
      const std::int64_t bit = (first + k) * bits_;
      numbers[k] = winners[bit / 8] >> bit % 8 & ((1 << bits_) - 1);
    }
    return numbers;
  }

  template <int... I>
  static NLK_INLINE Integers twice_the_lane(Lanes<I...>) {
    return Integers{(2 * I)...};
  }

  static NLK_INLINE Integers all_ored(Integers numbers) {
    numbers |= swapped<1>(numbers, AllLanes<Number>{});
    if constexpr (kLength > 2) numbers |= swapped<2>(numbers, AllLanes<Number>{});
    if constexpr (kLength > 4) numbers |= swapped<4>(numbers, AllLanes<Number>{});
    if constexpr (kLength > 8) numbers |= swapped<8>(numbers, AllLanes<Number>{});
    return numbers;
  }

  // ---- backward --------------------------------------------------------------------------------

  void spread(std::int64_t large, std::int64_t small, std::uint8_t* winners) {
    T* to = static_cast<T*>(a_.d_x) + large;
    const T* from = static_cast<const T*>(a_.grad) + small;
    for (std::int64_t i = 0; i < inner_; i += kLength) {
      const int some = clamped(inner_ - i, kLength);
      const Integers numbers = kept(winners, i, some);
      Numbers grad{};
      if (small_step_ == 1) {
        grad = load_some(from + i, some);
      } else {
        for (int k = 0; k < some; ++k) grad[k] = widen(from[(i + k) * small_step_]);
      }
      if (step_ == Step::kAny) {
        for (int k = 0; k < some; ++k) {
          T* sum = to + (i + k) * inner_step_ + offsets_[numbers[k]];
          *sum = narrow<T>(widen(*sum) + grad[k]);
        }
      } else if (step_ == Step::kOne) {
        for (std::int64_t tap = 0; tap < taps_; ++tap) {
          add(to + i + offsets_[tap], of_tap(grad, numbers, tap), some);
        }
      } else {
        for (std::int64_t tap = 0; tap < taps_; tap += 2) {
          const Numbers even = of_tap(grad, numbers, tap), odd = of_tap(grad, numbers, tap + 1);
          T* at = to + 2 * i + offsets_[tap];
          add(at, by_turns<0>(even, odd, AllLanes<Number>{}), clamped(2 * some, kLength));
          add(at + kLength, by_turns<1>(even, odd, AllLanes<Number>{}),
              clamped(2 * some - kLength, kLength));
        }
      }
    }
  }

  static NLK_INLINE Numbers of_tap(Numbers grad, Integers numbers, std::int64_t tap) {
    return numbers == all(tap) ? grad : Numbers{};
  }

  static NLK_INLINE void add(T* to, Numbers numbers, int some) {
    if (some > 0) store_some(to, load_some(to, some) + numbers, some);
  }

  PoolArguments a_;
  const std::int64_t *large_, *small_;  // strides of what windows are in, and of what is pooled
  std::int64_t counts_[3], taps_ = 1, inner_, inner_step_, small_step_;
  std::int64_t rows_, row_step_, small_row_, planes_, row_bytes_, at_once_ = 1;
  std::int64_t offsets_[256];
  int bits_;
  Step step_;
};

}  // namespace

bool pool_forward(const PoolArguments& call) {
  return with_dtype(call.dtype, [&](auto number) {
    return MaxPool<decltype(number)>(call, call.x_strides, call.out_strides).forward();
  });
}

bool pool_backward(const PoolArguments& call) {
  return with_dtype(call.dtype, [&](auto number) {
    return MaxPool<decltype(number)>(call, call.d_x_strides, call.grad_strides).backward();
  });
}

}  // namespace NLK_ISA
}  // namespace nlk
