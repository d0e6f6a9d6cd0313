// What a thread does with its two rows of a warpgroup's products: online softmax, and storing.
#ifndef NLK_CUDA_HOPPER_ROWS_CUH_
#define NLK_CUDA_HOPPER_ROWS_CUH_

#include <cmath>

#include "cuda/hopper/parameters.h"
#include "nlk/cuda/hopper/ptx.h"

namespace nlk::cuda::hopper {

// Of the two rows of a thread, over the keys so far: the extreme product (the largest, the smallest
// where the factor is negative) and this thread's part of the sum of weights.
struct RowState {
  float top[2], total[2];

  __device__ __forceinline__ explicit RowState(float factor)
      : top{factor < 0 ? INFINITY : -INFINITY, factor < 0 ? INFINITY : -INFINITY}, total{0, 0} {}
};

// Products of keys from `present` on weigh nothing.
template <int kCount>
__device__ __forceinline__ void mask(float (&products)[kCount], int thread, int present, float factor) {
  const float absent = factor < 0 ? INFINITY : -INFINITY;
  // Only one side of the comparison depends on the thread: one register, not one for each column.
  const int left = present - fragment_column(thread, 0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (fragment_column(0, i) >= left) products[i] = absent;
  }
}

// Products become weights in units of 2^shift. What was summed with earlier tops is to be multiplied by
// `fade`.
template <int kCount>
__device__ __forceinline__ void weigh(float (&products)[kCount], RowState& state, float (&fade)[2],
                                      float factor, float shift) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float before = state.top[half];
    float top = before;
    if (factor < 0) {
#pragma unroll
      for (int i = 2 * half; i < kCount; i += 4) top = fminf(top, fminf(products[i], products[i + 1]));
      top = fminf(top, shuffle_xor(top, 1));
      top = fminf(top, shuffle_xor(top, 2));
    } else {
#pragma unroll
      for (int i = 2 * half; i < kCount; i += 4) top = fmaxf(top, fmaxf(products[i], products[i + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
    }
    state.top[half] = top;
    // Where every product is infinitely far from mattering, infinity minus itself would be NaN.
    const float origin = top == (factor < 0 ? INFINITY : -INFINITY) ? 0.0f : top;
    // 0 for the first tile, whose `before` is infinite.
    fade[half] = exp2_fast((before - origin) * factor);
    float sum = 0;
#pragma unroll
    for (int i = 2 * half; i < kCount; i += 4) {
      products[i] = exp2_fast((products[i] - origin) * factor - shift);
      products[i + 1] = exp2_fast((products[i + 1] - origin) * factor - shift);
      sum += products[i] + products[i + 1];
    }
    state.total[half] = state.total[half] * fade[half] + sum;
  }
}

// Weights rounded to the operands of the second product.
template <class Number, int kCount>
__device__ __forceinline__ void round_weights(const float (&weights)[kCount],
                                              std::uint32_t (&rounded)[kCount / 2]) {
#pragma unroll
  for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int from = operand_source(k, r);
      rounded[4 * k + r] = pack<Number>(weights[from], weights[from + 1]);
    }
  }
}

// Sums of a thread's two rows times a factor for each.
template <int kCount>
__device__ __forceinline__ void scale_rows(float (&sums)[kCount], const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] *= factors[i / 2 % 2];
}

// The sum of the four threads of a row.
__device__ __forceinline__ float sum_of_row(float part) {
  part += shuffle_xor(part, 1);
  return part + shuffle_xor(part, 2);
}

// Adds up the four threads of a row, and returns what normalises its sums.
__device__ __forceinline__ void finish(RowState& state, float (&inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.total[half] = sum_of_row(state.total[half]);
    inverse[half] = reciprocal(state.total[half]);
  }
}

// The statistics of rows `first` ... `first` + 63, as far as there are so many.
__device__ __forceinline__ void store_stats(const RowState& state, int thread, int item, int first,
                                            const ForwardParameters& p) {
  if (thread % 4 != 0) return;
  const std::int64_t plane = static_cast<std::int64_t>(p.batch) * p.queries;
  float* stats = p.stats + static_cast<std::int64_t>(item) * p.queries;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + fragment_row(thread, 2 * half);
    if (row < p.queries) {
      stats[row] = state.top[half];
      stats[plane + row] = state.total[half] * p.unit;
    }
  }
}

// Of 32 columns of a row, the eight neighbouring ones that a thread stores: 8 (thread % 4) ... of
// columns 32 block ..., times a factor and rounded. A quad transposes them among its threads.
template <class Number, int kCount>
__device__ __forceinline__ Words words_of_row(const float (&numbers)[kCount], float factor, int thread,
                                              int half, int block) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 4 * (4 * block + i) + 2 * half;
    words.word[i] = pack<Number>(numbers[at] * factor, numbers[at + 1] * factor);
  }
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      // As values: a choice of places would put them in local memory.
      const std::uint32_t first_word = words.word[i], second_word = words.word[i | distance];
      const bool low = exchanged(thread, distance, i) == i;
      const std::uint32_t came = shuffle_xor(low ? first_word : second_word, distance);
      words.word[i] = low ? came : first_word;
      words.word[i | distance] = low ? second_word : came;
    }
  }
  return words;
}

// 64 rows of sums, times a factor for each row, to channels `channel` ... of out.
template <class Number>
__device__ __forceinline__ void store_sums(const float (&sums)[kValues / 2], const float (&factors)[2],
                                           int thread, int item, int first, int channel,
                                           const ForwardParameters& p) {
  channel += thread % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + fragment_row(thread, 2 * half);
    const std::int64_t line = static_cast<std::int64_t>(item) * p.queries + row;
    auto* out = static_cast<std::uint16_t*>(p.out) + line * p.value_depth + channel;
#pragma unroll
    for (int block = 0; block < kValues / 32; ++block) {
      const Words words = words_of_row<Number>(sums, factors[half], thread, half, block);
      if (row < p.queries && 32 * block < p.value_depth - channel) {
        *reinterpret_cast<Words*>(out + 32 * block) = words;
      }
    }
  }
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_ROWS_CUH_
