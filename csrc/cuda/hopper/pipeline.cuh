// How the warps of the Hopper kernels hand work on: rings of slots in shared memory, and tiles.
#ifndef NLK_CUDA_HOPPER_PIPELINE_CUH_
#define NLK_CUDA_HOPPER_PIPELINE_CUH_

#include "cuda/hopper/parameters.h"
#include "nlk/cuda/hopper/ptx.h"

namespace nlk::cuda::hopper {

// A ring with its data and barriers: of each slot one for "full", behind them one for "empty".
struct Channel {
  std::uint32_t data, barriers;
  int slot_bytes;
  Ring ring;

  __device__ __forceinline__ static Channel of(std::uint32_t data, int slot_bytes,
                                               std::uint32_t barriers, int slots) {
    return {data, barriers, slot_bytes, {slots}};
  }
  // The first barrier behind those of this channel.
  __device__ __forceinline__ std::uint32_t next_barriers() const {
    return barriers + static_cast<std::uint32_t>(2 * ring.slots * kBarrierBytes);
  }
  __device__ __forceinline__ std::uint32_t full(int slot) const {
    return barriers + static_cast<std::uint32_t>(slot * kBarrierBytes);
  }
  __device__ __forceinline__ std::uint32_t empty(int slot) const { return full(ring.slots + slot); }
  __device__ __forceinline__ std::uint32_t at(int slot) const {
    return data + static_cast<std::uint32_t>(slot * slot_bytes);
  }

  // By one thread: `emptying` warps of the cluster empty a slot, `filling` arrivals fill it.
  __device__ __forceinline__ void init(int filling, int emptying) const {
    for (int slot = 0; slot < ring.slots; ++slot) {
      barrier_init(full(slot), filling);
      barrier_init(empty(slot), emptying);
    }
  }
  // The producer's side: until the current slot is empty.
  __device__ __forceinline__ void await_empty() const {
    barrier_wait(empty(ring.slot), ring.parity ^ 1);
  }
  // The consumers' side.
  __device__ __forceinline__ void await_full() const { barrier_wait(full(ring.slot), ring.parity); }

  // By whole warps that have read a slot: tells the producers of all blocks that write it.
  template <int kBlocks>
  __device__ __forceinline__ void release(int slot, int lane) const {
    if constexpr (kBlocks == 1) {
      if (lane == 0) barrier_arrive(empty(slot));
    } else {
      if (lane < kBlocks) barrier_arrive_at(empty(slot), lane);
    }
  }
};

// Tiles of queries, one after the other. Blocks of a cluster take neighbouring ones of one item, so that
// they share its keys; a block beyond the last tile goes along, computes zeros and stores none of them.
template <int kBlocks, int kRows>
struct Work {
  int tiles, tile, item, row;

  __device__ __forceinline__ explicit Work(const ForwardParameters& p)
      : tiles(divide_up(divide_up(p.queries, kRows), kBlocks)), tile(block_index() / kBlocks), item(0),
        row(0) {}

  // Whether there is one more, for the whole cluster. Counts instead of dividing, which takes registers
  // that copying warps do not have.
  __device__ __forceinline__ bool take(const ForwardParameters& p, int rank) {
    while (tile >= tiles) {
      tile -= tiles;
      ++item;
    }
    if (item >= p.batch) return false;
    row = (tile * kBlocks + rank) * kRows;
    tile += block_count() / kBlocks;
    return true;
  }
};

// Tiles of queries and keys of a chunk, the same way: the next rows of the same keys come first, then the
// next keys. A row is one of the chunk.
template <int kBlocks, int kRows>
struct ChunkWork {
  int row_tiles, key_tiles, row_tile, tile, item, row;

  __device__ __forceinline__ ChunkWork(const DScoresParameters& p, int keys_of_tile)
      : row_tiles(divide_up(divide_up(p.rows, kRows), kBlocks)), key_tiles(divide_up(p.keys, keys_of_tile)),
        row_tile(block_index() / kBlocks), tile(0), item(0), row(0) {}

  __device__ __forceinline__ bool take(const DScoresParameters& p, int rank) {
    while (row_tile >= row_tiles) {
      row_tile -= row_tiles;
      if (++tile == key_tiles) {
        tile = 0;
        ++item;
      }
    }
    if (item >= p.items) return false;
    row = (row_tile * kBlocks + rank) * kRows;
    row_tile += block_count() / kBlocks;
    return true;
  }
};

// Chunk `chunk` of channels of the rows from `row` on; lines run along rows where those are innermost.
template <bool kChannelFirst>
__device__ __forceinline__ void copy_chunk(const TensorMap& map, std::uint32_t destination,
                                           std::uint32_t barrier, int row, int chunk, int item) {
  const int channel = chunk * kLineNumbers;
  copy_box(map, destination, barrier, kChannelFirst ? row : channel, kChannelFirst ? channel : row,
           item);
}

// The same for keys and values, which the blocks of a cluster share: they copy chunks in turn, each
// to all of them.
template <bool kChannelFirst, int kBlocks>
__device__ __forceinline__ void copy_shared_chunk(const TensorMap& map, std::uint32_t destination,
                                                  std::uint32_t barrier, int row, int chunk, int item,
                                                  int rank) {
  if constexpr (kBlocks == 1) {
    copy_chunk<kChannelFirst>(map, destination, barrier, row, chunk, item);
  } else if (chunk % kBlocks == rank) {
    const int channel = chunk * kLineNumbers;
    copy_box_to(map, destination, barrier, kChannelFirst ? row : channel,
                kChannelFirst ? channel : row, item, (1 << kBlocks) - 1);
  }
}

// After the initialisation of barriers, before anything uses them.
template <int kBlocks>
__device__ __forceinline__ void sync_blocks() {
  if constexpr (kBlocks == 1) {
    block_sync();
  } else {
    warp_sync();
    cluster_sync();
  }
}

// At the end: no block may leave while others of its cluster still signal its barriers.
template <int kBlocks>
__device__ __forceinline__ void leave_blocks() {
  if constexpr (kBlocks > 1) {
    warp_sync();
    cluster_sync();
  }
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_PIPELINE_CUH_
