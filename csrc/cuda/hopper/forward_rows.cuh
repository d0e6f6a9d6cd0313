// Softmax attention for V <= 256: 128 queries of a block, 64 of each computing warpgroup.
//
//   warp 0      copies keys, in chunks of 64 channels, into a ring
//   warp 1      copies values, kKeys x 256 at a time, into another
//   warp 2      copies the queries
//   warps 4-11  S = Q K^T from shared memory; softmax; O += P V with P in registers. The products of
//               a tile run beside the softmax of the next: S(j) and O += P(j-1) V(j-1) are issued
//               together, S(j) is awaited and weighed while O is still being added to.
//
// Tiles of keys are taken from the last to the first, so only the first one taken needs a mask.
#ifndef NLK_CUDA_HOPPER_FORWARD_ROWS_CUH_
#define NLK_CUDA_HOPPER_FORWARD_ROWS_CUH_

#include "cuda/hopper/forward_copies.cuh"
#include "cuda/hopper/rows.cuh"

namespace nlk::cuda::hopper {

template <class Form_>
struct RowsKernel : ForwardKernel<Form_, 2 * 64> {
  using Form = Form_;
  using Base = ForwardKernel<Form, 2 * 64>;
  using Base::key_tiles, Base::keys, Base::query, Base::query_empty, Base::query_full, Base::rank,
      Base::work;
  static_assert(!Form::kStreamed, "the queries of a block stay");
  static constexpr int kKeys = Form::kKeys, kQueryChunk = Base::kQueryChunk, kWarps = 8;

  Channel values;

  __device__ __forceinline__ explicit RowsKernel(const ForwardParameters& p)
      : RowsKernel(p, SharedPlan::of(Base::kRows, kKeys, p.depth_chunks, p.key_slots, p.value_slots,
                                     false, false)) {}
  __device__ __forceinline__ RowsKernel(const ForwardParameters& p, const SharedPlan& plan)
      : Base(p, plan),
        values(Channel::of(shared_start() + plan.value, plan.value_slab_bytes, keys.next_barriers(),
                           p.value_slots)) {}

  // By one thread.
  __device__ __forceinline__ void init() const {
    Base::init(kWarps);
    values.init(1, kWarps * Form::kBlocks);
    barrier_init_fence();
  }

  // By one thread.
  __device__ __forceinline__ void copy_all_values(const TensorMap& value_map,
                                                  const ForwardParameters& p) {
    Base::copy_all_values(value_map, values, 0, p);
  }

  // By a warpgroup: 64 rows of every tile of queries.
  __device__ __forceinline__ void compute(int group, const ForwardParameters& p) {
    const int thread = thread_index() % kWarpgroup, lane = thread % 32;
    const std::uint32_t rows = query + static_cast<std::uint32_t>(group * kQueryChunk / 2);
    for (std::uint32_t parity = 0; work.take(p, rank); parity ^= 1) {
      float scores[kKeys / 2];
      float sums[kValues / 2];
      std::uint32_t weights[kKeys / 4];
      float fade[2];
      RowState state(p.factor);

      barrier_wait(query_full, parity);
      int last = issue_scores<Form>(scores, keys, rows, kQueryChunk, lane, p.depth_chunks);
      await_scores<Form, 0>(scores, keys, last, lane);
      if (p.keys % kKeys != 0) mask(scores, thread, p.keys % kKeys, p.factor);
      weigh(scores, state, fade, p.factor, p.shift);
      round_weights<typename Form::Number>(scores, weights);
      for (int tile = key_tiles - 2; tile >= 0; --tile) {
        last = issue_scores<Form>(scores, keys, rows, kQueryChunk, lane, p.depth_chunks);
        issue_sums<Form>(sums, weights, values, tile < key_tiles - 2);
        await_scores<Form, 1>(scores, keys, last, lane);
        weigh(scores, state, fade, p.factor, p.shift);
        await_sums<Form>(sums, values, lane);
        pin(weights);
        round_weights<typename Form::Number>(scores, weights);
        scale_rows(sums, fade);
      }
      if (lane == 0) barrier_arrive(query_empty);
      issue_sums<Form>(sums, weights, values, key_tiles > 1);
      await_sums<Form>(sums, values, lane);

      float inverse[2];
      finish(state, inverse);
      const int first = work.row + 64 * group;
      store_stats(state, thread, work.item, first, p);
      store_sums<typename Form::Number>(sums, inverse, thread, work.item, first, 0, p);
    }
  }
};

template <class Form>
__global__ void __launch_bounds__(kThreads, 1)
    attend_rows(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                const __grid_constant__ TensorMap value_map, const __grid_constant__ ForwardParameters p) {
  if (thread_index() == 0) RowsKernel<Form>(p).init();
  sync_blocks<Form::kBlocks>();

  // Each role reckons for itself where things are: what lives across would crowd the copying warps.
  const int group = thread_index() / kWarpgroup;
  if (group == 0) {
    shrink_registers<kCopyRegisters>();
    if (thread_index() == 0) RowsKernel<Form>(p).copy_all_keys(query_map, key_map, p);
    if (thread_index() == 32) RowsKernel<Form>(p).copy_all_values(value_map, p);
    if (thread_index() == 64) RowsKernel<Form>(p).copy_all_queries(query_map, p);
  } else {
    grow_registers<kProductRegisters>();
    RowsKernel<Form>(p).compute(group - 1, p);
  }
  leave_blocks<Form::kBlocks>();
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_FORWARD_ROWS_CUH_
