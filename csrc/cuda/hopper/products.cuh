// The two products of attention for one warpgroup, and the copies that feed them.
#ifndef NLK_CUDA_HOPPER_PRODUCTS_CUH_
#define NLK_CUDA_HOPPER_PRODUCTS_CUH_

#include "cuda/hopper/pipeline.cuh"

namespace nlk::cuda::hopper {

// How a kernel takes its operands. kKeys: keys of a tile. kBlocks: blocks of a cluster that share keys
// and values. kChannelFirst: all operands are (B,C,N) in memory. kStreamed: chunks of the queries are
// copied again for every tile of keys, each into the slot of the chunk of keys it meets, behind it.
template <class Number_, int kKeys_, int kBlocks_, bool kChannelFirst_, bool kStreamed_>
struct Form {
  using Number = Number_;
  static constexpr int kKeys = kKeys_, kBlocks = kBlocks_;
  static constexpr bool kChannelFirst = kChannelFirst_, kStreamed = kStreamed_;
  static constexpr int kKeyChunk = kKeys * kLineBytes;
  static_assert(kKeys % 16 == 0, "a step of wgmma sums 16 keys");
  static_assert(!kChannelFirst || kKeys == kLineNumbers, "lines of channel-first keys are 64 long");
};

// Copies, by one thread, which has few registers: nothing is unrolled.

// One chunk of channels of kRows rows, 64 at a time: as many bytes further on.
template <class Form, int kRows>
__device__ __forceinline__ void copy_rows(const TensorMap& map, std::uint32_t destination,
                                          std::uint32_t barrier, int row, int chunk, int item) {
#pragma unroll
  for (int part = 0; part < kRows; part += 64) {
    copy_chunk<Form::kChannelFirst>(map, destination + static_cast<std::uint32_t>(part * kLineBytes),
                                    barrier, row + part, chunk, item);
  }
}

// Chunks of keys of one tile after the other; of the kRows queries from `row` on too where those are
// streamed.
template <class Form, int kRows>
__device__ __forceinline__ void copy_keys(const TensorMap& query_map, const TensorMap& key_map,
                                          Channel& keys, int tile, int row, int item, int rank,
                                          int chunks) {
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    keys.await_empty();
    const std::uint32_t to = keys.at(keys.ring.slot), full = keys.full(keys.ring.slot);
    barrier_expect(full, keys.slot_bytes);
    copy_shared_chunk<Form::kChannelFirst, Form::kBlocks>(key_map, to, full, tile * Form::kKeys, chunk,
                                                          item, rank);
    if constexpr (Form::kStreamed) {
      copy_rows<Form, kRows>(query_map, to + Form::kKeyChunk, full, row, chunk, item);
    }
    keys.ring.advance();
  }
}

// 256 channels, from chunk `first` on, of one tile of values.
template <class Form>
__device__ __forceinline__ void copy_values(const TensorMap& value_map, Channel& values, int tile,
                                            int first, int item, int rank) {
  values.await_empty();
  const std::uint32_t full = values.full(values.ring.slot);
  barrier_expect(full, values.slot_bytes);
#pragma unroll 1
  for (int chunk = 0; chunk < kValueChunks; ++chunk) {
    const std::uint32_t to =
        values.at(values.ring.slot) + static_cast<std::uint32_t>(chunk * Form::kKeyChunk);
    copy_shared_chunk<Form::kChannelFirst, Form::kBlocks>(value_map, to, full, tile * Form::kKeys,
                                                          first + chunk, item, rank);
  }
  values.ring.advance();
}

// The queries of a tile. They are one slot, with a barrier for "full" and one for "empty".
template <class Form, int kRows>
__device__ __forceinline__ void copy_queries(const TensorMap& query_map, std::uint32_t query,
                                             std::uint32_t full, int row, int item,
                                             const ForwardParameters& p) {
  constexpr int kQueryChunk = kRows * kLineBytes;
  barrier_expect(full, p.depth_chunks * kQueryChunk);
#pragma unroll 1
  for (int chunk = 0; chunk < p.depth_chunks; ++chunk, query += kQueryChunk) {
    copy_rows<Form, kRows>(query_map, query, full, row, chunk, item);
  }
}

// Issues one chunk of S = Q K^T, of the oldest keys. Where the queries are streamed, `query` is where
// those of this warpgroup begin in their chunk, else where their chunk lies.
template <class Form>
__device__ __forceinline__ void issue_chunk(float (&scores)[Form::kKeys / 2], const Channel& keys,
                                            std::uint32_t query, bool accumulate) {
  constexpr bool kTransposed = Form::kChannelFirst;
  const std::uint32_t key = keys.at(keys.ring.slot);
  const std::uint64_t a = descriptor(Form::kStreamed ? key + Form::kKeyChunk + query : query, 0);
  const std::uint64_t b = descriptor(key, 0);
  keys.await_full();
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kLineNumbers / 16; ++k) {
    const std::uint64_t step = descriptor_step(kTransposed, k);
    wgmma_ss<typename Form::Number, Form::kKeys, kTransposed, kTransposed>(scores, a + step, b + step,
                                                                           accumulate || k > 0);
  }
  wgmma_commit();
}

// Issues S = Q K^T of the next tile; chunks of queries that stay lie `query_chunk` bytes apart. All
// chunks of keys but the last have been read and released when this returns; returns the slot of the
// last.
// The first chunk stands before the loop: inside, ptxas serialises all products (C7515).
template <class Form>
__device__ __forceinline__ int issue_scores(float (&scores)[Form::kKeys / 2], Channel& keys,
                                            std::uint32_t query, int query_chunk, int lane,
                                            int chunks) {
  issue_chunk<Form>(scores, keys, query, false);
  int last = keys.ring.slot;
  keys.ring.advance();
  for (int chunk = 1; chunk < chunks; ++chunk) {
    if constexpr (!Form::kStreamed) query += static_cast<std::uint32_t>(query_chunk);
    issue_chunk<Form>(scores, keys, query, true);
    wgmma_wait<1>();
    keys.template release<Form::kBlocks>(last, lane);
    last = keys.ring.slot;
    keys.ring.advance();
  }
  return last;
}

// Until S is complete, while the kPending groups issued after it may run on.
template <class Form, int kPending>
__device__ __forceinline__ void await_scores(float (&scores)[Form::kKeys / 2], const Channel& keys,
                                             int last, int lane) {
  wgmma_wait<kPending>();
  pin(scores);
  keys.template release<Form::kBlocks>(last, lane);
}

// Issues O += P V of the oldest values, with P in registers.
template <class Form>
__device__ __forceinline__ void issue_sums(float (&sums)[kValues / 2],
                                           std::uint32_t (&weights)[Form::kKeys / 4],
                                           const Channel& values, bool accumulate) {
  constexpr bool kTransposed = !Form::kChannelFirst;
  const std::uint64_t b = descriptor(values.at(values.ring.slot), Form::kKeyChunk);
  values.await_full();
  pin(weights);
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Form::kKeys / 16; ++k) {
    wgmma_rs<typename Form::Number, kValues, kTransposed>(
        sums, weights + 4 * k, b + descriptor_step(kTransposed, k), accumulate || k > 0);
  }
  wgmma_commit();
}

// The same with P (64 x 64) in shared memory.
template <class Form>
__device__ __forceinline__ void issue_sums(float (&sums)[kValues / 2], std::uint32_t weights,
                                           const Channel& values, bool accumulate) {
  constexpr bool kTransposed = !Form::kChannelFirst;
  const std::uint64_t a = descriptor(weights, 0);
  const std::uint64_t b = descriptor(values.at(values.ring.slot), Form::kKeyChunk);
  values.await_full();
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Form::kKeys / 16; ++k) {
    wgmma_ss<typename Form::Number, kValues, false, kTransposed>(
        sums, a + descriptor_step(false, k), b + descriptor_step(kTransposed, k), accumulate || k > 0);
  }
  wgmma_commit();
}

// Until O is complete; its values may be overwritten.
template <class Form>
__device__ __forceinline__ void await_sums(float (&sums)[kValues / 2], Channel& values, int lane) {
  wgmma_wait<0>();
  pin(sums);
  values.template release<Form::kBlocks>(values.ring.slot, lane);
  values.ring.advance();
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_PRODUCTS_CUH_
