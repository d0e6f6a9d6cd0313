// Tiles of the CUDA kernels as the emulation runs them. A system header, as GCC has no other way to
// let nvcc's pragmas pass without a warning.
#ifndef NLK_TEST_CUDA_TILE_H_
#define NLK_TEST_CUDA_TILE_H_

#pragma GCC system_header

#define NLK_CUDA_EMULATION
#include "cuda/tile.cuh"

#endif  // NLK_TEST_CUDA_TILE_H_
