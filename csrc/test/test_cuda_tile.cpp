// Tiles of the CUDA kernels in the emulation: where elements lie, and products of all three types
// against plain loops.
#include "test/cuda/tile.h"

#include <cstdio>
#include <set>
#include <vector>

using namespace nlk::cuda;

int wrong = 0;

void check(bool right, const char* what) {
  if (right) return;
  ++wrong;
  std::printf("wrong: %s\n", what);
}
#define CHECK(right) check(right, #right)

template <typename T>
void check_places() {
  std::set<int> places;
  for (int row = 0; row < kRows; ++row)
    for (int channel = 0; channel < kChunk<T>; ++channel) places.insert(at<T>(row, channel));
  CHECK(static_cast<int>(places.size()) == kTileElements<T>);
  CHECK(*places.rbegin() == kTileElements<T> - 1);
  // Eight rows of one piece, as one phase of ldmatrix reads, lie in different banks.
  for (int piece = 0; piece < 8; ++piece) {
    std::set<int> banks;
    for (int row = 0; row < 8; ++row)
      banks.insert(at<T>(row, piece * kPiece<T>) * static_cast<int>(sizeof(T)) % 128);
    CHECK(banks.size() == 8);
    CHECK(*banks.rbegin() % 16 == 0);
  }
}

// A number that is exact in every type, so that sums are, too.
float number(int row, int column, int seed) {
  return static_cast<float>((row * 7 + column * 5 + seed) % 9 - 4);
}

// scores = left right^T + 1, results = right-hand tile times W, into global memory.
template <typename T>
void multiply(float* scores, float* results) {
  using Own = Products<T>;
  T* left = reinterpret_cast<T*>(shared_memory_of_block());
  T* right = left + kTileElements<T>;
  T* weights = right + kTileElements<T>;
  for (int i = threadIdx.x; i < kRows * kRows; i += Own::kThreads) {
    const int row = i / kRows, column = i % kRows;
    weights[at<T>(row, column)] = to<T>(number(row, column, 2));
    if (column >= kChunk<T>) continue;
    left[at<T>(row, column)] = to<T>(number(row, column, 0));
    right[at<T>(row, column)] = to<T>(number(row, column, 1));
  }
  __syncthreads();
  float own_scores[Own::kScores], own_results[Own::kResults] = {};
  for (float& score : own_scores) score = 1.0f;
  Own::add_scores(own_scores, left, right);
  Own::add_results(own_results, weights, right);
  for (int i = 0; i < Own::kScores; ++i)
    scores[Own::row_of_slot(Own::score_slot(i)) * kRows + Own::score_column(i)] = own_scores[i];
  for (int i = 0; i < Own::kResults; ++i)
    results[Own::row_of_slot(Own::result_slot(i)) * kRows + Own::result_column(i)] = own_results[i];
}

template <typename T>
void check_products() {
  std::vector<float> scores(kRows * kRows, NAN), results(kRows * kRows, NAN);
  const Error error = launch(multiply<T>, dim3(1), Products<T>::kThreads, 40 * 1024, Launch{0, nullptr},
                             scores.data(), results.data());
  CHECK(error == 0);
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kRows; ++column) {
      float score = 1.0f, result = 0.0f;
      for (int k = 0; k < kChunk<T>; ++k) score += number(row, k, 0) * number(column, k, 1);
      for (int k = 0; k < kRows; ++k) result += number(row, k, 2) * number(k, column, 1);
      CHECK(scores[row * kRows + column] == score);
      if (column < kChunk<T>) CHECK(results[row * kRows + column] == result);
    }
  }
}

void check_rounding() {
  const float tie = 1.0f + 1.0f / 2048;
  CHECK(to_float(to<Half>(tie)) == 1.0f);
  CHECK(to_float(to<Half>(3.0f * 5.9604645e-8f)) == 3.0f * 5.9604645e-8f);
  CHECK(std::isinf(to_float(to<Half>(65520.0f))));
  CHECK(to_float(to<Half>(65519.0f)) == 65504.0f);
  CHECK(to_float(to<Bfloat16>(1.0f + 1.0f / 256)) == 1.0f);
  CHECK(std::isnan(to_float(to<Bfloat16>(NAN))));
}

int main() {
#ifdef __SANITIZE_THREAD__
  std::puts("not run: ThreadSanitizer does not know the emulation's fibers");
  return 0;
#endif
  check_places<Half>();
  check_places<float>();
  check_products<Half>();
  check_products<Bfloat16>();
  check_products<float>();
  check_rounding();
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
