// What the kernels of the forward share: where their keys and queries lie, and the copies of them.
#ifndef NLK_CUDA_HOPPER_FORWARD_COPIES_CUH_
#define NLK_CUDA_HOPPER_FORWARD_COPIES_CUH_

#include "cuda/hopper/products.cuh"

namespace nlk::cuda::hopper {

template <class Form_, int kRows_>
struct ForwardKernel {
  using Form = Form_;
  static constexpr int kKeys = Form::kKeys, kBlocks = Form::kBlocks, kRows = kRows_;
  static constexpr int kQueryChunk = kRows * kLineBytes;

  Channel keys;
  std::uint32_t query, query_full, query_empty;
  int rank, key_tiles;
  Work<kBlocks, kRows> work;

  __device__ __forceinline__ ForwardKernel(const ForwardParameters& p, const SharedPlan& plan)
      : work(p) {
    const std::uint32_t start = shared_start();
    query = start + plan.query;
    query_full = start + plan.barriers;
    query_empty = query_full + kBarrierBytes;
    keys = Channel::of(start + plan.key, plan.key_slot_bytes, query_empty + kBarrierBytes, p.key_slots);
    rank = kBlocks == 1 ? 0 : cluster_rank();
    key_tiles = divide_up(p.keys, kKeys);
  }

  // By one thread: the queries are read by so many warps, the keys by those of every block.
  __device__ __forceinline__ void init(int warps) const {
    barrier_init(query_full, 1);
    barrier_init(query_empty, warps);
    keys.init(1, warps * kBlocks);
  }

  // By one thread each.
  __device__ __forceinline__ void copy_all_queries(const TensorMap& query_map,
                                                   const ForwardParameters& p) {
#pragma unroll 1
    for (std::uint32_t parity = 1; work.take(p, rank); parity ^= 1) {
      barrier_wait(query_empty, parity);
      copy_queries<Form, kRows>(query_map, query, query_full, work.row, work.item, p);
    }
  }

  __device__ __forceinline__ void copy_all_keys(const TensorMap& query_map, const TensorMap& key_map,
                                                const ForwardParameters& p) {
#pragma unroll 1
    while (work.take(p, rank)) {
#pragma unroll 1
      for (int tile = key_tiles - 1; tile >= 0; --tile) {
        copy_keys<Form, kRows>(query_map, key_map, keys, tile, work.row, work.item, rank,
                               p.depth_chunks);
      }
    }
  }

  // 256 channels, from chunk `first` on.
  __device__ __forceinline__ void copy_all_values(const TensorMap& value_map, Channel& values, int first,
                                                  const ForwardParameters& p) {
#pragma unroll 1
    while (work.take(p, rank)) {
#pragma unroll 1
      for (int tile = key_tiles - 1; tile >= 0; --tile) {
        copy_values<Form>(value_map, values, tile, first, work.item, rank);
      }
    }
  }
};

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_FORWARD_COPIES_CUH_
