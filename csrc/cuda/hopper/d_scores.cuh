// The scores' part of the softmax backward, for any D and V: tiles of 128 queries, 64 of each computing
// warpgroup, by kKeys keys, for the workspace of which library products make the gradients.
//
//   warp 0      copies chunks of 64 channels of both operands of S = Q K^T, then of dP = dO V^T, into
//               the slots of one ring, each with its rows and its keys
//   warps 4-11  S, then dP, from shared memory; while dP is multiplied, P = exp2(factor (S - top)) / total
//               is weighed and stored; then dS = scale P (dP - delta)
//
// Where one tile holds all keys, top, total and delta are its own: a single key gets a dS of exactly 0.
// Else they are given, and each row's sums of dS, of its size and of P in a tile are stored, from which
// `correct_rows` sees where they do not fit: nlkernels/ops/softmax/staged_backward.py says why.
#ifndef NLK_CUDA_HOPPER_D_SCORES_CUH_
#define NLK_CUDA_HOPPER_D_SCORES_CUH_

#include "cuda/hopper/products.cuh"
#include "cuda/hopper/rows.cuh"

namespace nlk::cuda::hopper {

template <class Form_>
struct DScoresKernel {
  using Form = Form_;
  using Number = typename Form::Number;
  static_assert(Form::kStreamed, "rows come with their keys");
  static constexpr int kKeys = Form::kKeys, kBlocks = Form::kBlocks;
  static constexpr int kRows = 2 * 64, kWarps = 8;
  static constexpr int kGroupBytes = 64 * kLineBytes;
  // The last chunks of dP, which are multiplied while P is weighed. Their slots are emptied after it.
  static constexpr int kAhead = 3;
  using Fragment = float[kKeys / 2];

  Channel chunks;
  int rank;
  ChunkWork<kBlocks, kRows> work;

  __device__ __forceinline__ explicit DScoresKernel(const DScoresParameters& p) : work(p, kKeys) {
    const auto plan = SharedPlan::of(kRows, kKeys, 0, p.slots, 0, false, true);
    const std::uint32_t start = shared_start();
    chunks = Channel::of(start + plan.key, plan.key_slot_bytes, start + plan.barriers, p.slots);
    rank = kBlocks == 1 ? 0 : cluster_rank();
  }

  // By one thread.
  __device__ __forceinline__ void init() const {
    chunks.init(1, kWarps * kBlocks);
    barrier_init_fence();
  }

  // By one thread.
  __device__ __forceinline__ void copy_all(const TensorMap& query_map, const TensorMap& key_map,
                                           const TensorMap& grad_map, const TensorMap& value_map,
                                           const DScoresParameters& p) {
#pragma unroll 1
    while (work.take(p, rank)) {
      const int row = p.first + work.row;
      copy_keys<Form, kRows>(query_map, key_map, chunks, work.tile, row, work.item, rank,
                             p.depth_chunks);
      copy_keys<Form, kRows>(grad_map, value_map, chunks, work.tile, row, work.item, rank,
                             p.value_chunks);
    }
  }

  // By a warpgroup: 64 rows of every tile.
  __device__ __forceinline__ void compute(int group, const DScoresParameters& p) {
    const int thread = thread_index() % kWarpgroup, lane = thread % 32;
    const auto rows = static_cast<std::uint32_t>(group * kGroupBytes);
    while (work.take(p, rank)) {
      Fragment weights, d_weights;
      float delta[2];
      const int first = work.row + 64 * group, present = p.keys - work.tile * kKeys;

      const int last = issue_scores<Form>(weights, chunks, rows, 0, lane, p.depth_chunks);
      Ring oldest = chunks.ring;
      issue_chunk<Form>(d_weights, chunks, rows, false);
      chunks.ring.advance();
      await_scores<Form, 1>(weights, chunks, last, lane);
      for (int chunk = 1; chunk < p.value_chunks; ++chunk) {
        issue_chunk<Form>(d_weights, chunks, rows, true);
        chunks.ring.advance();
        if (chunk <= p.value_chunks - kAhead) {
          wgmma_wait<1>();
          chunks.template release<kBlocks>(oldest.slot, lane);
          oldest.advance();
        }
      }
      if (present < kKeys) mask(weights, thread, present, p.factor);
      if (work.key_tiles == 1) {
        weigh_alone(weights, p);
      } else {
        weigh_given(weights, delta, thread, first, p);
      }
      store(weights, 1.0f, p.weights, thread, first, p);

      wgmma_wait<0>();
      pin(d_weights);
      for (; oldest.slot != chunks.ring.slot; oldest.advance()) {
        chunks.template release<kBlocks>(oldest.slot, lane);
      }
      if (work.key_tiles == 1) {
        differentiate_alone(d_weights, weights);
      } else {
        differentiate_given(d_weights, weights, delta, thread, first, p);
      }
      store(d_weights, p.scale, p.d_scores, thread, first, p);
    }
  }

  // Products become weights: of a tile that holds all keys.
  __device__ __forceinline__ static void weigh_alone(Fragment& products, const DScoresParameters& p) {
    RowState state(p.factor);
    float fade[2], inverse[2];
    weigh(products, state, fade, p.factor, 0.0f);
    finish(state, inverse);
    scale_rows(products, inverse);
  }

  // Of any tile, by the forward's statistics; reads delta on the way, while there is time.
  __device__ __forceinline__ void weigh_given(Fragment& products, float (&delta)[2], int thread,
                                              int first, const DScoresParameters& p) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + fragment_row(thread, 2 * half);
      const bool inside = row < p.rows;
      const float top = inside ? p.top[given(row, p)] : 0.0f;
      const float inverse = inside ? reciprocal(p.total[given(row, p)]) : 0.0f;
      delta[half] = inside ? p.delta[given(row, p)] : 0.0f;
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) {
        products[i] = exp2_fast((products[i] - top) * p.factor) * inverse;
        products[i + 1] = exp2_fast((products[i + 1] - top) * p.factor) * inverse;
      }
    }
  }

  // dP becomes dS / scale, with delta = sum of P dP.
  __device__ __forceinline__ static void differentiate_alone(Fragment& d_weights,
                                                             const Fragment& weights) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float delta = 0;
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) {
        delta += weights[i] * d_weights[i] + weights[i + 1] * d_weights[i + 1];
      }
      delta = sum_of_row(delta);
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) {
        d_weights[i] = weights[i] * (d_weights[i] - delta);
        d_weights[i + 1] = weights[i + 1] * (d_weights[i + 1] - delta);
      }
    }
  }

  // The same with the given delta; stores what shows whether it fits.
  __device__ __forceinline__ void differentiate_given(Fragment& d_weights, const Fragment& weights,
                                                      const float (&delta)[2], int thread, int first,
                                                      const DScoresParameters& p) const {
    const std::int64_t positions = static_cast<std::int64_t>(p.items) * p.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + fragment_row(thread, 2 * half);
      float error = 0, size = 0, sum = 0;
#pragma unroll
      for (int i = 2 * half; i < kKeys / 2; i += 4) {
#pragma unroll
        for (int at = i; at < i + 2; ++at) {
          const float d_score = weights[at] * (d_weights[at] - delta[half]);
          error += d_score;
          size += fabsf(d_score);
          sum += weights[at];
          d_weights[at] = d_score;
        }
      }
      error = sum_of_row(error);
      size = sum_of_row(size);
      sum = sum_of_row(sum);
      if (thread % 4 == 0 && row < p.rows) {
        float* to = p.sums + work.tile * positions + static_cast<std::int64_t>(work.item) * p.rows + row;
        to[0] = error;
        to[work.key_tiles * positions] = size;
        to[2 * work.key_tiles * positions] = sum;
      }
    }
  }

  // Where the statistics of a row of the chunk are.
  __device__ __forceinline__ std::int64_t given(int row, const DScoresParameters& p) const {
    return static_cast<std::int64_t>(work.item) * p.queries + p.first + row;
  }

  // 64 rows of a tile, times a factor. A line has room for whole units of eight columns.
  __device__ __forceinline__ void store(const Fragment& numbers, float factor, void* workspace,
                                        int thread, int first, const DScoresParameters& p) const {
    const int column = work.tile * kKeys + thread % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + fragment_row(thread, 2 * half);
      const std::int64_t line = static_cast<std::int64_t>(work.item) * p.rows + row;
      auto* to = static_cast<std::uint16_t*>(workspace) + line * p.line + column;
#pragma unroll
      for (int block = 0; block < kKeys / 32; ++block) {
        const Words words = words_of_row<Number>(numbers, factor, thread, half, block);
        if (row < p.rows && column + 32 * block < p.keys) {
          *reinterpret_cast<Words*>(to + 32 * block) = words;
        }
      }
    }
  }
};

template <class Form>
__global__ void __launch_bounds__(kThreads, 1)
    fill_d_scores(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                  const __grid_constant__ TensorMap grad_map,
                  const __grid_constant__ TensorMap value_map,
                  const __grid_constant__ DScoresParameters p) {
  if (thread_index() == 0) DScoresKernel<Form>(p).init();
  sync_blocks<Form::kBlocks>();

  const int group = thread_index() / kWarpgroup;
  if (group == 0) {
    shrink_registers<kCopyRegisters>();
    if (thread_index() == 0) {
      DScoresKernel<Form>(p).copy_all(query_map, key_map, grad_map, value_map, p);
    }
  } else {
    grow_registers<kProductRegisters>();
    DScoresKernel<Form>(p).compute(group - 1, p);
  }
  leave_blocks<Form::kBlocks>();
}

// Threads of a block of the next kernel, which takes a row with each warp.
constexpr int kCorrectThreads = 128;
constexpr int kCorrectRows = kCorrectThreads / 32;

__device__ __forceinline__ float sum_of_warp(float part) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) part += shuffle_xor(part, distance);
  return part;
}

// Where a row's sums E of dS / scale and F of P over all its tiles are not 0 and 1, to the rounding of its
// numbers, P becomes P / F, and dS becomes (dS - scale E P / F) / F.
template <class Number>
__global__ void __launch_bounds__(kCorrectThreads)
    correct_rows(const __grid_constant__ DScoresParameters p, const int key_tiles) {
  const std::int64_t positions = static_cast<std::int64_t>(p.items) * p.rows;
  const std::int64_t row =
      static_cast<std::int64_t>(block_index()) * kCorrectRows + thread_index() / 32;
  if (row >= positions) return;
  const int lane = thread_index() % 32;
  float error = 0, size = 0, sum = 0;
  for (int tile = lane; tile < key_tiles; tile += 32) {
    const float* from = p.sums + tile * positions + row;
    error += from[0];
    size += from[key_tiles * positions];
    sum += from[2 * key_tiles * positions];
  }
  error = sum_of_warp(error);
  size = sum_of_warp(size);
  sum = sum_of_warp(sum);
  if (!(fabsf(error) > p.tolerance * size || fabsf(sum - 1.0f) > p.tolerance)) return;
  const float share = 1.0f / sum, shift = error * p.scale;
  auto* weights = static_cast<std::uint16_t*>(p.weights) + row * p.line;
  auto* d_scores = static_cast<std::uint16_t*>(p.d_scores) + row * p.line;
  for (int column = 8 * lane; column < p.keys; column += 8 * 32) {
    auto* weight_words = reinterpret_cast<Words*>(weights + column);
    auto* d_score_words = reinterpret_cast<Words*>(d_scores + column);
    Words w = *weight_words, ds = *d_score_words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float right[2], d_right[2];
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        right[high] = unpack<Number>(w.word[i], high) * share;
        d_right[high] = share * (unpack<Number>(ds.word[i], high) - right[high] * shift);
      }
      w.word[i] = pack<Number>(right[0], right[1]);
      ds.word[i] = pack<Number>(d_right[0], d_right[1]);
    }
    *weight_words = w;
    *d_score_words = ds;
  }
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_D_SCORES_CUH_
