// Instructions of warps: tensor-core products of 16-bit numbers, their loads from shared memory,
// copies in the background, shuffles. Every one also has a form in the emulation of the tests.
#ifndef NLK_CUDA_PTX_CUH_
#define NLK_CUDA_PTX_CUH_

#include "cuda/number.cuh"

namespace nlk::cuda {

constexpr int kWarp = 32;

#ifdef NLK_CUDA_EMULATION

inline void load_matrices(std::uint32_t (&out)[4], const void* row) {
  emulation::load_matrices(out, row, false);
}
inline void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) {
  emulation::load_matrices(out, row, true);
}
inline void multiply_add(float* sum, const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1, Half) {
  emulation::multiply_add(sum, a, b0, b1, emulation::half_to_float);
}
inline void multiply_add(float* sum, const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1, Bfloat16) {
  emulation::multiply_add(sum, a, b0, b1, emulation::bfloat16_to_float);
}
inline float shuffle_xor(float x, int lanes) { return emulation::shuffle_xor(x, lanes); }
inline void copy_16_bytes(void* shared, const void* global, int valid) {
  emulation::copy_async(shared, global, valid);
}
inline void copies_end() { emulation::copies_end(); }

#else

// Four 8x8 matrices of 16-bit numbers; each lane gives the address of one of their 32 rows, and
// gets elements 2 (lane % 4) and the next of row lane / 4 of each.
__device__ inline void load_matrices(std::uint32_t (&out)[4], const void* row) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

// As above, of the transposed matrices.
__device__ inline void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

// sum (16x8) += a (16x16) b (16x8). A lane has of `sum` rows lane / 4 and 8 below, columns
// 2 (lane % 4) and the next; of a the same rows and columns, then those 8 columns on; of b rows
// 2 (lane % 4) and the next, then 8 below, of column lane / 4.
__device__ inline void multiply_add(float* sum, const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, Half) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

__device__ inline void multiply_add(float* sum, const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1, Bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // Refused before: there is no such product.
  asm volatile("trap;");
#endif
}

__device__ inline float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

// Starts copying `valid` bytes to 16 bytes of shared memory; the rest become zero. Both addresses
// are multiples of 16.
__device__ inline void copy_16_bytes(void* shared, const void* global, int valid) {
#if __CUDA_ARCH__ >= 800
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(valid)
               : "memory");
#else
  auto* words = static_cast<std::uint16_t*>(shared);
  const auto* read = static_cast<const std::uint16_t*>(global);
  if (valid == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  } else {
    for (int word = 0; word < 8; ++word) words[word] = 2 * word < valid ? read[word] : 0;
  }
#endif
}

// Waits until all copies that this thread started have arrived.
__device__ inline void copies_end() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#endif

}  // namespace nlk::cuda

#endif  // NLK_CUDA_PTX_CUH_
