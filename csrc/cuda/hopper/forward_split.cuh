// Softmax attention for V <= 512: 64 queries of a block, whose sums two warpgroups share, for a 64 x 512
// accumulator fills half of the register file.
//
//   warp 0      copies keys, in chunks of 64 channels, into a ring; with them chunks of the queries
//               where these are streamed
//   warps 1, 2  copy the left and the right 256 channels of values
//   warp 3      copies the queries where these stay
//   warps 4-7   S = Q K^T; softmax; the left half of O += P V with P in registers; P, and by how much
//               earlier sums fade, go to the others through shared memory
//   warps 8-11  the right half of O += P V
//
// Products and softmax overlap as in forward_rows.cuh; tiles of keys are taken in the same order.
#ifndef NLK_CUDA_HOPPER_FORWARD_SPLIT_CUH_
#define NLK_CUDA_HOPPER_FORWARD_SPLIT_CUH_

#include "cuda/hopper/forward_copies.cuh"
#include "cuda/hopper/rows.cuh"

namespace nlk::cuda::hopper {

template <class Form_>
struct SplitKernel : ForwardKernel<Form_, 64> {
  using Form = Form_;
  using Base = ForwardKernel<Form, 64>;
  using Base::key_tiles, Base::keys, Base::query_empty, Base::query_full, Base::rank, Base::work;
  static constexpr int kKeys = Form::kKeys, kRows = Base::kRows, kQueryChunk = Base::kQueryChunk;
  static constexpr int kWarps = 4, kWeightSlots = 2;
  static_assert(kKeys == kLineNumbers, "a tile of weights is one chunk");

  Channel left, right, weights;
  std::uint32_t query, fades;

  __device__ __forceinline__ explicit SplitKernel(const ForwardParameters& p)
      : SplitKernel(p, SharedPlan::of(kRows, kKeys, p.depth_chunks, p.key_slots, p.value_slots, true,
                                      Form::kStreamed)) {}
  __device__ __forceinline__ SplitKernel(const ForwardParameters& p, const SharedPlan& plan)
      : Base(p, plan) {
    const std::uint32_t start = shared_start();
    query = Form::kStreamed ? 0 : Base::query;
    fades = start + plan.fades;
    left = Channel::of(start + plan.value, plan.value_slab_bytes, keys.next_barriers(), p.value_slots);
    right = Channel::of(left.at(p.value_slots), plan.value_slab_bytes, left.next_barriers(),
                        p.value_slots);
    weights = Channel::of(start + plan.weights, kRows * kLineBytes, right.next_barriers(), kWeightSlots);
  }

  // By one thread.
  __device__ __forceinline__ void init() const {
    Base::init(kWarps);
    left.init(1, kWarps * Form::kBlocks);
    right.init(1, kWarps * Form::kBlocks);
    weights.init(kWarps, kWarps);
    barrier_init_fence();
  }

  // Of half 0, the left one, or 1.
  template <int kHalf>
  __device__ __forceinline__ void copy_half(const TensorMap& value_map, const ForwardParameters& p) {
    Base::copy_all_values(value_map, kHalf == 0 ? left : right, kHalf * kValueChunks, p);
  }

  __device__ __forceinline__ std::uint32_t fade_of(int thread, int half) const {
    const int row = weights.ring.slot * kRows + fragment_row(thread, 2 * half);
    return fades + static_cast<std::uint32_t>(row * static_cast<int>(sizeof(float)));
  }

  // Factors of rows for the other warpgroup, and what has been written before into the slot.
  __device__ __forceinline__ void send(const float (&factors)[2], int thread) {
    if (thread % 4 == 0) {
      store_shared(fade_of(thread, 0), factors[0]);
      store_shared(fade_of(thread, 1), factors[1]);
    }
    fence_async_proxy();
    warp_sync();
    if (thread % 32 == 0) barrier_arrive(weights.full(weights.ring.slot));
    weights.ring.advance();
  }

  // Weights are rounded here for the others, and later once more for the own product: registers of
  // a product in flight cannot take them, and moved there later ptxas serialises products (C7513).
  __device__ __forceinline__ void send_weights(const float (&unrounded)[kKeys / 2],
                                               const float (&fade)[2], int thread) {
    std::uint32_t rounded[kKeys / 4];
    round_weights<typename Form::Number>(unrounded, rounded);
    weights.await_empty();
    const std::uint32_t to = weights.at(weights.ring.slot);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) store_matrices(to + operand_line(thread, k), rounded + 4 * k);
    send(fade, thread);
  }

  // The first computing warpgroup.
  __device__ __forceinline__ void compute_left(const ForwardParameters& p) {
    const int thread = thread_index() % kWarpgroup, lane = thread % 32;
    for (std::uint32_t parity = 0; work.take(p, rank); parity ^= 1) {
      float scores[kKeys / 2];
      float sums[kValues / 2];
      std::uint32_t rounded[kKeys / 4];
      float fade[2];
      RowState state(p.factor);

      if constexpr (!Form::kStreamed) barrier_wait(query_full, parity);
      int last = issue_scores<Form>(scores, keys, query, kQueryChunk, lane, p.depth_chunks);
      await_scores<Form, 0>(scores, keys, last, lane);
      if (p.keys % kKeys != 0) mask(scores, thread, p.keys % kKeys, p.factor);
      weigh(scores, state, fade, p.factor, p.shift);
      send_weights(scores, fade, thread);
      round_weights<typename Form::Number>(scores, rounded);
      for (int tile = key_tiles - 2; tile >= 0; --tile) {
        last = issue_scores<Form>(scores, keys, query, kQueryChunk, lane, p.depth_chunks);
        issue_sums<Form>(sums, rounded, left, tile < key_tiles - 2);
        await_scores<Form, 1>(scores, keys, last, lane);
        weigh(scores, state, fade, p.factor, p.shift);
        send_weights(scores, fade, thread);
        await_sums<Form>(sums, left, lane);
        pin(rounded);
        round_weights<typename Form::Number>(scores, rounded);
        scale_rows(sums, fade);
      }
      if (!Form::kStreamed && lane == 0) barrier_arrive(query_empty);
      issue_sums<Form>(sums, rounded, left, key_tiles > 1);

      float inverse[2];
      finish(state, inverse);
      weights.await_empty();
      send(inverse, thread);
      store_stats(state, thread, work.item, work.row, p);
      await_sums<Form>(sums, left, lane);
      store_sums<typename Form::Number>(sums, inverse, thread, work.item, work.row, 0, p);
    }
  }

  // The second one.
  __device__ __forceinline__ void compute_right(const ForwardParameters& p) {
    const int thread = thread_index() % kWarpgroup, lane = thread % 32;
    while (work.take(p, rank)) {
      float sums[kValues / 2];
      float factors[2];
      for (int tile = key_tiles - 1; tile >= 0; --tile) {
        receive(factors, thread);
        if (tile < key_tiles - 1) scale_rows(sums, factors);
        issue_sums<Form>(sums, weights.at(weights.ring.slot), right, tile < key_tiles - 1);
        await_sums<Form>(sums, right, lane);
        release_weights(lane);
      }
      receive(factors, thread);
      warp_sync();
      release_weights(lane);
      store_sums<typename Form::Number>(sums, factors, thread, work.item, work.row, kValues, p);
    }
  }

  __device__ __forceinline__ void receive(float (&factors)[2], int thread) const {
    weights.await_full();
    factors[0] = load_shared(fade_of(thread, 0));
    factors[1] = load_shared(fade_of(thread, 1));
  }

  __device__ __forceinline__ void release_weights(int lane) {
    weights.release<1>(weights.ring.slot, lane);
    weights.ring.advance();
  }
};

template <class Form>
__global__ void __launch_bounds__(kThreads, 1)
    attend_split(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                 const __grid_constant__ TensorMap value_map, const __grid_constant__ ForwardParameters p) {
  if (thread_index() == 0) SplitKernel<Form>(p).init();
  sync_blocks<Form::kBlocks>();

  // Each role reckons for itself where things are: what lives across would crowd the copying warps.
  const int group = thread_index() / kWarpgroup;
  if (group == 0) {
    shrink_registers<kCopyRegisters>();
    if (thread_index() == 0) SplitKernel<Form>(p).copy_all_keys(query_map, key_map, p);
    if (thread_index() == 32) SplitKernel<Form>(p).template copy_half<0>(value_map, p);
    if (thread_index() == 64) SplitKernel<Form>(p).template copy_half<1>(value_map, p);
    if (!Form::kStreamed && thread_index() == 96) SplitKernel<Form>(p).copy_all_queries(query_map, p);
  } else if (group == 1) {
    grow_registers<kProductRegisters>();
    SplitKernel<Form>(p).compute_left(p);
  } else {
    grow_registers<kProductRegisters>();
    SplitKernel<Form>(p).compute_right(p);
  }
  leave_blocks<Form::kBlocks>();
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_FORWARD_SPLIT_CUH_
