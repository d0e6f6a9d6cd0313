// One pass over the scores, of which all of attention is made. A block has 64 rows and goes through
// all columns, 64 at a time, for a group of the result's channels:
//
//   S = left right^T;  G = grad_left grad_right^T;  W = weights of S and G;  result += W factor
//
//            rows     left right  grad_left grad_right  factor  W
//   forward  queries  Q    K      -         -           V       P, by an online softmax
//   dQ       queries  Q    K      dO        V           K       dS
//   dK       keys     K    Q      V         dO          Q       dS^T
//   dV       keys     K    Q      -         -           dO      P^T
//
// Everything is read in chunks of channels, two of them at a time, the next while this one is
// multiplied; W is rounded to the operands' type. Sums are float32, in an order that sizes fix:
// results repeat bitwise. Channels beyond a group's go to further blocks, which compute W again.
#ifndef NLK_CUDA_ATTENTION_PASS_CUH_
#define NLK_CUDA_ATTENTION_PASS_CUH_

#include <cmath>

#include "cuda/tile.cuh"
#include "nlk/cuda/attention.h"

namespace nlk::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// What a pass computes. Sizes are those of one batch item.
struct Pass {
  Affinity affinity;
  // Factor of scores, and of the results.
  float scale, result_scale;
  std::int64_t items, rows, columns;
  std::int64_t depth, grad_depth, channels;
  Operand left, right, grad_left, grad_right, factor, result;
  // Of the queries of a softmax, (2,B,N) and (B,N): written by the forward, read by the others,
  // where queries are rows or columns.
  float* stats;
  const float* delta;
  bool queries_are_columns;
  // Of an item's W, or null.
  const float* units;
};

// Shared memory of a block: two stages of two tiles, W, and three numbers of each query.
template <typename T>
constexpr int kWeightTiles = kRows / kChunk<T>;
template <typename T>
constexpr int kPassShared = (4 + kWeightTiles<T>)*kTileBytes + 3 * kRows * 4;
static_assert(kPassShared<float> <= 64 * 1024 && kPassShared<Half> <= 48 * 1024);

// The chunks of a pass, in their order: for each tile of columns those of S, of G, of the result.
// They are read into two stages of shared memory by turns.
template <typename T, int kGroup>
struct Stream {
  const Pass& pass;
  std::int64_t item, first_row, first_channel;
  // How many chunks there are of each sort.
  int scores, grads, results;
  T* stages;
  // What is read next, and where to.
  std::int64_t tile = 0;
  int step = 0, stage = 0;

  __device__ Stream(const Pass& pass_, std::int64_t item_, std::int64_t first_row_,
                    std::int64_t group, T* stages_)
      : pass(pass_),
        item(item_),
        first_row(first_row_),
        first_channel(group * kGroup * kChunk<T>),
        scores(chunks(pass_.depth)),
        grads(chunks(pass_.grad_depth)),
        results(chunks(pass_.channels - first_channel)),
        stages(stages_) {
    if (results > kGroup) results = kGroup;
  }

  __device__ static int chunks(std::int64_t channels) {
    return static_cast<int>((channels + kChunk<T> - 1) / kChunk<T>);
  }

  __device__ std::int64_t tiles() const { return (pass.columns + kRows - 1) / kRows; }

  // Left tile of the chunk that has been read; the right one is next to it.
  __device__ T* now() const { return stages + stage * 2 * kTileElements<T>; }

  // Waits for the chunk that was being read, and starts to read the one after it. All threads have
  // finished with the chunk before, whose stage is read into.
  __device__ void advance() {
    copies_end();
    __syncthreads();
    stage = 1 - stage;
    if (tile == tiles()) return;
    read(stages + (1 - stage) * 2 * kTileElements<T>);
    if (++step == scores + grads + results) {
      step = 0;
      ++tile;
    }
  }

  __device__ void read(T* to) const {
    constexpr int kThreads = Products<T>::kThreads;
    const bool of_scores = step < scores, of_result = step >= scores + grads;
    const Operand& left = of_scores ? pass.left : pass.grad_left;
    const Operand& right = of_result ? pass.factor : of_scores ? pass.right : pass.grad_right;
    const int before = of_result ? scores + grads : of_scores ? 0 : scores;
    const std::int64_t depth = of_result ? pass.channels : of_scores ? pass.depth : pass.grad_depth;
    const std::int64_t channel = (of_result ? first_channel : 0) + (step - before) * kChunk<T>;
    if (!of_result)
      read_tile<T, kThreads>(to, matrix<const T>(left, item), first_row, pass.rows, channel, depth);
    read_tile<T, kThreads>(to + kTileElements<T>, matrix<const T>(right, item), tile * kRows,
                           pass.columns, channel, depth);
  }
};

// The softmax of a thread's rows as far as columns were seen. Products are turned round where the
// scale is negative, so that the largest one is the extreme; `sum` has this thread's share.
template <typename T>
struct OnlineSoftmax {
  using Own = Products<T>;
  float turn, scale;
  float top[Own::kSlots], sum[Own::kSlots];

  __device__ explicit OnlineSoftmax(float signed_scale)
      : turn(signed_scale < 0 ? -1.0f : 1.0f), scale(kLog2E * fabsf(signed_scale)) {
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
      top[slot] = -INFINITY;
      sum[slot] = 0.0f;
    }
  }

  // Turns scores into weights; results so far are to be multiplied by `fade`, by slot.
  __device__ void weigh(float (&scores)[Own::kScores], std::int64_t present,
                        float (&fade)[Own::kSlots]) {
    float largest[Own::kSlots];
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) largest[slot] = -INFINITY;
#pragma unroll
    for (int i = 0; i < Own::kScores; ++i) {
      scores[i] = Own::score_column(i) < present ? scores[i] * turn : -INFINITY;
      largest[Own::score_slot(i)] = fmaxf(largest[Own::score_slot(i)], scores[i]);
    }
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
#pragma unroll
      for (int lanes = 1; lanes < Own::kSharing; lanes *= 2)
        largest[slot] = fmaxf(largest[slot], shuffle_xor(largest[slot], lanes));
      const float before = top[slot];
      top[slot] = fmaxf(before, largest[slot]);
      // Before the first column there is nothing to fade, whatever the scale is.
      fade[slot] = before == -INFINITY ? 0.0f : exp2f(scale * (before - top[slot]));
      sum[slot] *= fade[slot];
    }
#pragma unroll
    for (int i = 0; i < Own::kScores; ++i) {
      const bool counts = Own::score_column(i) < present;
      scores[i] = counts ? exp2f(scale * (scores[i] - top[Own::score_slot(i)])) : 0.0f;
      sum[Own::score_slot(i)] += scores[i];
    }
  }

  __device__ void end() {
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
#pragma unroll
      for (int lanes = 1; lanes < Own::kSharing; lanes *= 2)
        sum[slot] += shuffle_xor(sum[slot], lanes);
    }
  }
};

// What weights other than those of an online softmax are made of.
template <typename T>
struct GivenWeights {
  using Own = Products<T>;
  Affinity affinity;
  float scale, softmax_scale;
  bool columns_differ, has_grads;

  // Scores, and gradients of weights where there are any, become W. `stats` has tops, reciprocal
  // sums and deltas of 64 queries.
  __device__ void weigh(float (&scores)[Own::kScores], const float (&grads)[Own::kScores],
                        std::int64_t present, const float* stats) const {
#pragma unroll
    for (int i = 0; i < Own::kScores; ++i) {
      const int column = Own::score_column(i);
      const float grad = has_grads ? grads[i] : 1.0f;
      float weight;
      if (affinity == Affinity::kSoftmax) {
        const int query = columns_differ ? column : Own::row_of_slot(Own::score_slot(i));
        weight = exp2f(softmax_scale * (scores[i] - stats[query])) * stats[kRows + query];
        if (has_grads) weight *= grad - stats[2 * kRows + query];
      } else {
        const float score = scores[i] * scale;
        weight = has_grads ? grad * scale : score;
        // A NaN is kept, as torch.relu does.
        if (affinity == Affinity::kRelu && score <= 0.0f) weight = 0.0f;
      }
      scores[i] = column < present ? weight : 0.0f;
    }
  }
};

// Tops, reciprocal sums and deltas of 64 queries; of none they are such that weights are finite.
__device__ inline void read_stats(float* to, const Pass& pass, std::int64_t item,
                                  std::int64_t first) {
  const std::int64_t queries = pass.queries_are_columns ? pass.columns : pass.rows;
  const int own = threadIdx.x;
  if (own >= kRows) return;
  const bool present = first + own < queries;
  const std::int64_t query = item * queries + first + own;
  to[own] = present ? pass.stats[query] : 0.0f;
  to[kRows + own] = present ? 1.0f / pass.stats[pass.items * queries + query] : 0.0f;
  to[2 * kRows + own] = present && pass.delta != nullptr ? pass.delta[query] : 0.0f;
}

template <typename T, int kGroup, bool kForward>
__global__ void __launch_bounds__(Products<T>::kThreads)
    attention_pass(const __grid_constant__ Pass pass) {
  using Own = Products<T>;
  unsigned char* shared = shared_memory_of_block();
  T* weights = reinterpret_cast<T*>(shared + 4 * kTileBytes);
  float* stats = reinterpret_cast<float*>(shared + (4 + kWeightTiles<T>)*kTileBytes);

  const std::int64_t row_tiles = (pass.rows + kRows - 1) / kRows;
  const std::int64_t groups = (pass.channels + kGroup * kChunk<T> - 1) / (kGroup * kChunk<T>);
  const std::int64_t row = blockIdx.x % row_tiles * kRows;
  const std::int64_t group = blockIdx.x / row_tiles % groups;
  const std::int64_t item = blockIdx.x / row_tiles / groups;

  const bool softmax = pass.affinity == Affinity::kSoftmax;
  const float unit = pass.units == nullptr ? 1.0f : pass.units[item];
  OnlineSoftmax<T> online(pass.scale);
  const GivenWeights<T> given{pass.affinity, pass.scale / unit, kLog2E * pass.scale,
                              pass.queries_are_columns, pass.grad_depth > 0};
  if (!kForward && softmax && !pass.queries_are_columns) read_stats(stats, pass, item, row);

  float results[kGroup][Own::kResults] = {};
  float scores[Own::kScores] = {}, grads[Own::kScores] = {};
  Stream<T, kGroup> stream(pass, item, row, group, reinterpret_cast<T*>(shared));
  const int weighed = stream.scores + stream.grads;
  const std::int64_t tiles = stream.tiles();
  // Nothing is multiplied while the first chunk is read.
  int step = -1;
  for (std::int64_t tile = 0; tile < tiles;) {
    stream.advance();
    const T* left = stream.now();
    const T* right = left + kTileElements<T>;
    if (step < 0) {
    } else if (step < stream.scores) {
      Own::add_scores(scores, left, right);
    } else if (!kForward && step < weighed) {
      Own::add_scores(grads, left, right);
    } else {
#pragma unroll
      for (int part = 0; part < kGroup; ++part)
        if (step == weighed + part) Own::add_results(results[part], weights, right);
    }
    ++step;
    if (step == weighed) {
      const std::int64_t present = pass.columns - tile * kRows;
      if (kForward && softmax) {
        float fade[Own::kSlots];
        online.weigh(scores, present, fade);
#pragma unroll
        for (int part = 0; part < kGroup; ++part) {
#pragma unroll
          for (int i = 0; i < Own::kResults; ++i) results[part][i] *= fade[Own::result_slot(i)];
        }
      } else {
        if (!kForward && softmax && pass.queries_are_columns) {
          read_stats(stats, pass, item, tile * kRows);
          __syncthreads();
        }
        given.weigh(scores, grads, present, stats);
      }
      // Those of the tile before have been read: a barrier of the chunks since was after that.
#pragma unroll
      for (int i = 0; i < Own::kScores; ++i) {
        const int own_row = Own::row_of_slot(Own::score_slot(i));
        weights[at<T>(own_row, Own::score_column(i))] = to<T>(scores[i]);
        scores[i] = grads[i] = 0.0f;
      }
    } else if (step == weighed + stream.results) {
      step = 0;
      ++tile;
    }
  }

  if (kForward && softmax) {
    online.end();
    if (group == 0 && threadIdx.x % Own::kSharing == 0) {
#pragma unroll
      for (int slot = 0; slot < Own::kSlots; ++slot) {
        const std::int64_t query = row + Own::row_of_slot(slot);
        if (query >= pass.rows) continue;
        pass.stats[item * pass.rows + query] = online.turn * online.top[slot];
        pass.stats[(pass.items + item) * pass.rows + query] = online.sum[slot];
      }
    }
  }
  const Matrix<T> out = matrix<T>(pass.result, item);
#pragma unroll
  for (int part = 0; part < kGroup; ++part) {
#pragma unroll
    for (int i = 0; i < Own::kResults; ++i) {
      const int slot = Own::result_slot(i);
      const std::int64_t own_row = row + Own::row_of_slot(slot);
      const std::int64_t channel =
          stream.first_channel + part * kChunk<T> + Own::result_column(i);
      const float scale = kForward && softmax ? 1.0f / online.sum[slot] : pass.result_scale * unit;
      if (part < stream.results && own_row < pass.rows && channel < pass.channels)
        out.data[own_row * out.row + channel * out.channel] = to<T>(results[part][i] * scale);
    }
  }
}

}  // namespace nlk::cuda

#endif  // NLK_CUDA_ATTENTION_PASS_CUH_
