// Softmax attention for V <= 256: 128 queries of a block, 64 of each computing warpgroup.
//
//   warp 0     copies the queries, then keys in chunks of 64 channels into a ring
//   warp 1     copies values, kKeys x 256 at a time, into another
//   warps 4-11 S = Q K^T from shared memory; softmax; O += P V with P in registers. The products of a
//              tile run beside the softmax of the one before: S(j) and O += P(j-1) V are issued
//              together, then S(j) is awaited and weighed while O is still being added to.
// Tiles of keys are taken from the last to the first, so only the first one taken needs a mask.
#ifndef NLK_CUDA_HOPPER_FORWARD_ROWS_CUH_
#define NLK_CUDA_HOPPER_FORWARD_ROWS_CUH_

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/rows.cuh"

namespace nlk::cuda::hopper {

// Blocks of kRows = 128 queries; kKeys keys a tile; kBlocks blocks of a cluster share keys and values;
// kChannelFirst: all operands are (B,C,N) in memory.
template <class Number_, int kKeys_, int kBlocks_, bool kChannelFirst_>
struct RowsKernel {
  using Number = Number_;
  static constexpr int kKeys = kKeys_, kBlocks = kBlocks_, kRows = 2 * 64;
  static constexpr bool kChannelFirst = kChannelFirst_;
  static_assert(kKeys % 16 == 0, "a step of wgmma sums 16 keys");
  static_assert(!kChannelFirst || kKeys == kLineNumbers, "lines of channel-first keys are 64 long");

  static constexpr int kKeyChunk = kKeys * kLineBytes;
  static constexpr int kQueryChunk = kRows * kLineBytes;

  Channel keys, values;
  std::uint32_t query, query_full, query_empty;
  int thread, rank, key_tiles;
  Work<kBlocks, kRows> work;

  __device__ __forceinline__ explicit RowsKernel(const ForwardParameters& p) : work(p) {
    const auto plan = SharedPlan::of(kRows, kKeys, p.depth_chunks, p.key_slots, p.value_slots, false,
                                     false);
    const std::uint32_t start = shared_start();
    query = start + plan.query;
    query_full = start + plan.barriers;
    query_empty = query_full + kBarrierBytes;
    keys = Channel::of(start + plan.key, plan.key_slot_bytes, query_empty + kBarrierBytes, p.key_slots);
    values = Channel::of(start + plan.value, plan.value_slab_bytes, keys.next_barriers(), p.value_slots);
    thread = thread_index() % kWarpgroup;
    rank = kBlocks == 1 ? 0 : cluster_rank();
    key_tiles = divide_up(p.keys, kKeys);
  }

  __device__ __forceinline__ void init() const {
    barrier_init(query_full, 1);
    barrier_init(query_empty, 8);
    keys.init(1, 8 * kBlocks);
    values.init(1, 8 * kBlocks);
    barrier_init_fence();
  }

  // By one thread, which has few registers: nothing is unrolled.
  __device__ __forceinline__ void copy_queries_and_keys(const TensorMap& query_map,
                                                        const TensorMap& key_map,
                                                        const ForwardParameters& p) {
    for (std::uint32_t parity = 1; work.take(p, rank); parity ^= 1) {
      barrier_wait(query_empty, parity);
      barrier_expect(query_full, p.depth_chunks * kQueryChunk);
#pragma unroll 1
      for (int chunk = 0; chunk < p.depth_chunks; ++chunk) {
        const std::uint32_t to = query + static_cast<std::uint32_t>(chunk * kQueryChunk);
        copy_chunk<kChannelFirst>(query_map, to, query_full, work.row, chunk, work.item);
        copy_chunk<kChannelFirst>(query_map, to + kQueryChunk / 2, query_full, work.row + 64, chunk,
                                  work.item);
      }
#pragma unroll 1
      for (int tile = key_tiles - 1; tile >= 0; --tile) {
#pragma unroll 1
        for (int chunk = 0; chunk < p.depth_chunks; ++chunk) {
          keys.await_empty();
          const std::uint32_t full = keys.full(keys.ring.slot);
          barrier_expect(full, kKeyChunk);
          copy_shared_chunk<kChannelFirst, kBlocks>(key_map, keys.at(keys.ring.slot), full,
                                                    tile * kKeys, chunk, work.item, rank);
          keys.ring.advance();
        }
      }
    }
  }

  // By one thread.
  __device__ __forceinline__ void copy_values(const TensorMap& value_map, const ForwardParameters& p) {
    while (work.take(p, rank)) {
#pragma unroll 1
      for (int tile = key_tiles - 1; tile >= 0; --tile) {
        values.await_empty();
        const std::uint32_t full = values.full(values.ring.slot);
        barrier_expect(full, kValueChunks * kKeyChunk);
#pragma unroll 1
        for (int chunk = 0; chunk < kValueChunks; ++chunk) {
          const std::uint32_t to =
              values.at(values.ring.slot) + static_cast<std::uint32_t>(chunk * kKeyChunk);
          copy_shared_chunk<kChannelFirst, kBlocks>(value_map, to, full, tile * kKeys, chunk, work.item,
                                                    rank);
        }
        values.ring.advance();
      }
    }
  }

  // Issues one chunk of S = Q K^T.
  __device__ __forceinline__ void issue_chunk(float (&products)[kKeys / 2], int group, int chunk,
                                              bool accumulate) {
    const auto offset = static_cast<std::uint32_t>(chunk * kQueryChunk + group * kQueryChunk / 2);
    const std::uint64_t a = descriptor(query + offset, 0);
    const std::uint64_t b = descriptor(keys.at(keys.ring.slot), 0);
    keys.await_full();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kLineNumbers / 16; ++k) {
      const std::uint64_t step = descriptor_step(kChannelFirst, k);
      wgmma_ss<Number, kKeys, kChannelFirst, kChannelFirst>(products, a + step, b + step,
                                                            accumulate || k > 0);
    }
    wgmma_commit();
  }

  // Issues S = Q K^T of the next tile. All chunks but the last have been read and released when this
  // returns; returns the slot of the last.
  __device__ __forceinline__ int issue_products(float (&products)[kKeys / 2], int group,
                                                const ForwardParameters& p) {
    issue_chunk(products, group, 0, false);
    int last = keys.ring.slot;
    keys.ring.advance();
    for (int chunk = 1; chunk < p.depth_chunks; ++chunk) {
      issue_chunk(products, group, chunk, true);
      wgmma_wait<1>();
      keys.template release<kBlocks>(last, lane_of(thread));
      last = keys.ring.slot;
      keys.ring.advance();
    }
    return last;
  }

  // Issues O += P V of the oldest tile of values.
  __device__ __forceinline__ void issue_sums(float (&sums)[kValues / 2],
                                             std::uint32_t (&weights)[kKeys / 4], bool accumulate) {
    const std::uint64_t b = descriptor(values.at(values.ring.slot), kKeyChunk);
    values.await_full();
    pin(weights);
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma_rs<Number, kValues, !kChannelFirst>(sums, weights + 4 * k,
                                                b + descriptor_step(!kChannelFirst, k),
                                                accumulate || k > 0);
    }
    wgmma_commit();
  }

  // Until O is complete; its values may be overwritten.
  __device__ __forceinline__ void await_sums(float (&sums)[kValues / 2],
                                             std::uint32_t (&weights)[kKeys / 4]) {
    wgmma_wait<0>();
    pin(sums);
    pin(weights);
    values.template release<kBlocks>(values.ring.slot, lane_of(thread));
    values.ring.advance();
  }

  // By a warpgroup: 64 rows of every tile of queries.
  __device__ __forceinline__ void compute(int group, const ForwardParameters& p) {
    for (std::uint32_t parity = 0; work.take(p, rank); parity ^= 1) {
      float products[kKeys / 2];
      float sums[kValues / 2];
      std::uint32_t weights[kKeys / 4];
      float fade[2];
      RowState state(p.factor);

      barrier_wait(query_full, parity);
      int last = issue_products(products, group, p);
      wgmma_wait<0>();
      pin(products);
      keys.template release<kBlocks>(last, lane_of(thread));
      if (p.keys % kKeys != 0) mask(products, thread, p.keys % kKeys, p.factor);
      weigh(products, state, fade, p);
      round_weights<Number>(products, weights);
      for (int tile = key_tiles - 2; tile >= 0; --tile) {
        last = issue_products(products, group, p);
        issue_sums(sums, weights, tile < key_tiles - 2);
        wgmma_wait<1>();
        pin(products);
        keys.template release<kBlocks>(last, lane_of(thread));
        weigh(products, state, fade, p);
        await_sums(sums, weights);
        round_weights<Number>(products, weights);
        scale_rows(sums, fade);
      }
      if (lane_of(thread) == 0) barrier_arrive(query_empty);
      issue_sums(sums, weights, key_tiles > 1);
      await_sums(sums, weights);

      float inverse[2];
      finish(state, inverse);
      const int first = work.row + 64 * group;
      store_stats(state, thread, work.item, first, p);
      store_sums<Number>(sums, inverse, thread, work.item, first, 0, p);
    }
  }
};

template <class Kernel>
__global__ void __launch_bounds__(kThreads, 1)
    attend_rows(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                const __grid_constant__ TensorMap value_map, const __grid_constant__ ForwardParameters p) {
  Kernel kernel(p);
  if (thread_index() == 0) {
    prefetch_map(query_map);
    prefetch_map(key_map);
    prefetch_map(value_map);
    kernel.init();
  }
  sync_blocks<Kernel::kBlocks>();

  const int group = thread_index() / kWarpgroup;
  if (group == 0) {
    shrink_registers<kCopyRegisters>();
    if (thread_index() == 0) kernel.copy_queries_and_keys(query_map, key_map, p);
    if (thread_index() == 32) kernel.copy_values(value_map, p);
  } else {
    grow_registers<kProductRegisters>();
    kernel.compute(group - 1, p);
  }
  if constexpr (Kernel::kBlocks > 1) {
    warp_sync();
    cluster_sync();
  }
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_FORWARD_ROWS_CUH_
