// Tiles of 64 rows in shared memory, and products of them by the threads of a block.
//
// A tile has rows of 128 bytes: kChunk channels. Its 16-byte pieces are permuted within each row,
// piece ^ (row % 8), so that neither rows nor columns of pieces meet in one bank.
#ifndef NLK_CUDA_TILE_CUH_
#define NLK_CUDA_TILE_CUH_

#include "cuda/ptx.cuh"

namespace nlk::cuda {

constexpr int kRows = 64;
constexpr int kRowBytes = 128;
constexpr int kTileBytes = kRows * kRowBytes;

template <typename T>
constexpr int kChunk = kRowBytes / static_cast<int>(sizeof(T));
// Elements of a piece.
template <typename T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kTileElements = kRows * kChunk<T>;

// Where the element of a row and a channel lies. Matrices wider than kChunk are tiles side by side.
template <typename T>
__host__ __device__ constexpr int at(int row, int channel) {
  const int tile = channel / kChunk<T>, piece = channel % kChunk<T> / kPiece<T>;
  return tile * kTileElements<T> + row * kChunk<T> + (piece ^ (row % 8)) * kPiece<T> +
         channel % kPiece<T>;
}

// One matrix of a batch item: address, and element strides of rows and channels.
template <typename T>
struct Matrix {
  T* data;
  std::int64_t row, channel;
};

template <typename T>
__device__ inline Matrix<T> matrix(const Operand& operand, std::int64_t item) {
  return {static_cast<T*>(operand.data) + item * operand.item, operand.row, operand.channel};
}

// Whether rows can be read in pieces of 16 bytes.
template <typename T>
__device__ inline bool has_pieces(const Matrix<const T>& from) {
  return from.channel == 1 && from.row % kPiece<T> == 0 &&
         reinterpret_cast<std::uintptr_t>(from.data) % 16 == 0;
}

// Starts reading 64 rows and kChunk channels into a tile; zeros beyond the last row or channel.
// `copies_end` and a barrier complete it.
template <typename T, int kThreads>
__device__ inline void read_tile(T* tile, const Matrix<const T>& from, std::int64_t first_row,
                                 std::int64_t rows, std::int64_t first_channel,
                                 std::int64_t channels) {
  const int thread = threadIdx.x;
  if (has_pieces(from)) {
    constexpr int kPieces = kChunk<T> / kPiece<T>;
    for (int i = thread; i < kRows * kPieces; i += kThreads) {
      const int row = i / kPieces, inside = i % kPieces * kPiece<T>;
      const std::int64_t left = channels - first_channel - inside;
      int valid = left >= kPiece<T> ? 16 : left > 0 ? static_cast<int>(left * sizeof(T)) : 0;
      if (first_row + row >= rows) valid = 0;
      const T* source = from.data;
      if (valid > 0) source += (first_row + row) * from.row + first_channel + inside;
      copy_16_bytes(tile + at<T>(row, inside), source, valid);
    }
    return;
  }
  // Neighbouring threads take what lies closest in memory.
  const bool by_rows = from.row < from.channel;
#pragma unroll 4
  for (int i = thread; i < kTileElements<T>; i += kThreads) {
    const int row = by_rows ? i % kRows : i / kChunk<T>;
    const int inside = by_rows ? i / kRows : i % kChunk<T>;
    const std::int64_t from_row = first_row + row, channel = first_channel + inside;
    const bool present = from_row < rows && channel < channels;
    tile[at<T>(row, inside)] =
        present ? from.data[from_row * from.row + channel * from.channel] : T{};
  }
}

// Products of tiles. Every thread holds some elements of a 64 x 64 matrix of scores, kScores of
// them, and of a 64 x kChunk tile of results, kResults. Element i is in the slot(i)-th of the
// thread's kSlots rows, which it shares with kSharing lanes whose numbers differ in the lowest bits.
template <typename T>
struct Products;

// By tensor cores: 4 warps, each of 16 rows.
template <typename T>
struct TensorProducts {
  static constexpr int kThreads = 128, kScores = 32, kResults = 32, kSlots = 2, kSharing = 4;

  __device__ static constexpr int score_slot(int i) { return i / 2 % 2; }
  __device__ static constexpr int result_slot(int i) { return score_slot(i); }
  __device__ static int row_of_slot(int slot) {
    return threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + 8 * slot;
  }
  __device__ static int score_column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
  __device__ static int result_column(int i) { return score_column(i); }

  // scores += left right^T, of two tiles.
  __device__ static void add_scores(float (&scores)[kScores], const T* left, const T* right) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16;
#pragma unroll
    for (int k = 0; k < kChunk<T>; k += 16) {
      std::uint32_t a[4];
      load_matrices(a, left + at<T>(first + lane % 16, k + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < kRows; n += 16) {
        std::uint32_t b[4];
        load_matrices(b, right + at<T>(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
        multiply_add(&scores[n / 2], a, b[0], b[1], T{});
        multiply_add(&scores[n / 2 + 4], a, b[2], b[3], T{});
      }
    }
  }

  // results += weights (64 x 64) factor, of a tile.
  __device__ static void add_results(float (&results)[kResults], const T* weights,
                                     const T* factor) {
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16;
#pragma unroll
    for (int k = 0; k < kRows; k += 16) {
      std::uint32_t a[4];
      load_matrices(a, weights + at<T>(first + lane % 16, k + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < kChunk<T>; n += 16) {
        std::uint32_t b[4];
        load_matrices_transposed(
            b, factor + at<T>(k + lane % 8 + lane / 8 % 2 * 8, n + lane / 16 * 8));
        multiply_add(&results[n / 2], a, b[0], b[1], T{});
        multiply_add(&results[n / 2 + 4], a, b[2], b[3], T{});
      }
    }
  }
};

template <>
struct Products<Half> : TensorProducts<Half> {};
template <>
struct Products<Bfloat16> : TensorProducts<Bfloat16> {};

// In float32: 256 threads, each of every sixteenth row and column. Each chunk is summed by itself, so
// that errors grow with the number of chunks, not of elements.
template <>
struct Products<float> {
  static constexpr int kThreads = 256, kScores = 16, kResults = 8, kSlots = 4, kSharing = 16;

  __device__ static constexpr int score_slot(int i) { return i / 4; }
  __device__ static constexpr int result_slot(int i) { return i / 2; }
  __device__ static int row_of_slot(int slot) { return threadIdx.x / 16 + 16 * slot; }
  __device__ static int score_column(int i) { return threadIdx.x % 16 + i % 4 * 16; }
  __device__ static int result_column(int i) { return threadIdx.x % 16 + i % 2 * 16; }

  __device__ static void add_scores(float (&scores)[kScores], const float* left,
                                    const float* right) {
    const int across = threadIdx.x % 16;
    float part[kScores] = {};
#pragma unroll 1
    for (int k = 0; k < kChunk<float>; k += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const float4*>(left + at<float>(row_of_slot(i), k));
        b[i] = *reinterpret_cast<const float4*>(right + at<float>(across + 16 * i, k));
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float4 x = a[i / 4], y = b[i % 4];
        part[i] += x.x * y.x;
        part[i] += x.y * y.y;
        part[i] += x.z * y.z;
        part[i] += x.w * y.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) scores[i] += part[i];
  }

  __device__ static void add_results(float (&results)[kResults], const float* weights,
                                     const float* factor) {
    const int across = threadIdx.x % 16;
    float part[kResults] = {};
#pragma unroll 2
    for (int k = 0; k < kRows; k += 4) {
      float4 a[4];
      float b[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const float4*>(weights + at<float>(row_of_slot(i), k));
        b[i][0] = factor[at<float>(k + i, across)];
        b[i][1] = factor[at<float>(k + i, across + 16)];
      }
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        const float4 x = a[i / 2];
        part[i] += x.x * b[0][i % 2];
        part[i] += x.y * b[1][i % 2];
        part[i] += x.z * b[2][i % 2];
        part[i] += x.w * b[3][i % 2];
      }
    }
#pragma unroll
    for (int i = 0; i < kResults; ++i) results[i] += part[i];
  }
};

}  // namespace nlk::cuda

#endif  // NLK_CUDA_TILE_CUH_
