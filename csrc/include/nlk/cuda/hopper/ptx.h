// A thin layer over PTX for Hopper: tensor copies, barriers, clusters, registers. One function is one
// instruction or the shortest idiom of it; names are the PTX ISA's. Addresses of shared memory are
// its 32-bit offsets throughout. With NLK_HOPPER_EMULATION the same names come from the tests' model of the
// machine, and a kernel runs on the CPU as it stands.
#ifndef NLK_CUDA_HOPPER_PTX_H_
#define NLK_CUDA_HOPPER_PTX_H_

#ifdef NLK_HOPPER_EMULATION
#include "test/cuda/hopper/machine.h"
#else

#include <cuda.h>

#include <cstdint>

#include "nlk/cuda/hopper/layout.h"
#include "nlk/cuda/hopper/number.h"
#include "nlk/cuda/hopper/wgmma.h"

namespace nlk::cuda::hopper {

using TensorMap = CUtensorMap;

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_index() { return static_cast<int>(blockIdx.x); }
// Volatile, so that it is read where it is needed: copying warps have no register to keep it in.
__device__ __forceinline__ int block_count() {
  std::uint32_t count;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(count));
  return static_cast<int>(count);
}

// First address of dynamic shared memory that a swizzle atom may begin at.
__device__ __forceinline__ std::uint32_t shared_start() {
  extern __shared__ std::uint8_t nlk_dynamic_shared[];
  const auto start = static_cast<std::uint32_t>(__cvta_generic_to_shared(nlk_dynamic_shared));
  return (start + kAtomBytes - 1) & ~static_cast<std::uint32_t>(kAtomBytes - 1);
}

__device__ __forceinline__ void store_shared(std::uint32_t address, float number) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(number) : "memory");
}
__device__ __forceinline__ float load_shared(std::uint32_t address) {
  float number;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(number) : "r"(address) : "memory");
  return number;
}

// Four 8 x 8 matrices of 16-bit numbers, one register of a thread each; lane l addresses line l % 8
// of matrix l / 8.
__device__ __forceinline__ void store_matrices(std::uint32_t address, const std::uint32_t* registers) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// Barriers between threads and copies (mbarrier).
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the cluster and to copies; a barrier of the threads follows.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(barrier) : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(std::uint32_t barrier, int rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Arrives, and has the phase wait for `bytes` more of copies.
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over. What peers' arrivals guard is read and written by copies and
// products alone, so the block's scope is enough; the cluster's would empty the cache at every wait.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies one box to shared memory: coordinates from the innermost, zeros beyond the tensor's sizes.
__device__ __forceinline__ void copy_box(const TensorMap& map, std::uint32_t destination,
                                         std::uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// The same to the same place, signalling the same barrier, of every block in `blocks`.
__device__ __forceinline__ void copy_box_to(const TensorMap& map, std::uint32_t destination,
                                            std::uint32_t barrier, int x, int y, int z,
                                            std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// What ordinary stores have put into shared memory is seen by products and copies after a barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" :: : "memory");
}
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// This warpgroup's registers per thread from here on.
template <int kCount>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ __forceinline__ float shuffle_xor(float number, int distance) {
  return __shfl_xor_sync(0xffffffffu, number, distance);
}
__device__ __forceinline__ std::uint32_t shuffle_xor(std::uint32_t word, int distance) {
  return __shfl_xor_sync(0xffffffffu, word, distance);
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to 16 bits each, the first in the low half.
template <class Number>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t word;
  if constexpr (Number::kIsBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// One of the two, the high one where asked.
template <class Number>
__device__ __forceinline__ float unpack(std::uint32_t word, bool high) {
  const auto half = static_cast<std::uint16_t>(high ? word >> 16 : word);
  float wide;
  if constexpr (Number::kIsBfloat16) {
    wide = __uint_as_float(static_cast<std::uint32_t>(half) << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
  }
  return wide;
}

struct alignas(16) Words {
  std::uint32_t word[4];
};

}  // namespace nlk::cuda::hopper

#endif  // NLK_HOPPER_EMULATION

#endif  // NLK_CUDA_HOPPER_PTX_H_
