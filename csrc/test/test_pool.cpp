// Max pooling in every instruction set of the build that this machine runs, against naive loops, to
// the last bit: random sizes, windows, strides, dtypes and threads; equal numbers, and NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <random>
#include <vector>

#include "nlk/pool.h"
#include "test/check.h"
#include "test/tensor.h"

namespace {

using nlk::Dtype;
using nlk::Strided;

constexpr unsigned kRounds = 100;
constexpr int kMostThreads = 3;
// 4, 12, 30 numbers, and others whose places take 2, 4 and 8 bits.
constexpr std::int64_t kWindows[][3] = {
    {1, 2, 2}, {2, 3, 2}, {3, 5, 2}, {2, 2, 2}, {1, 1, 2},  {1, 1, 1},
    {3, 1, 1}, {1, 4, 4}, {1, 3, 3}, {2, 1, 3}, {16, 8, 2},
};

typedef std::vector<std::int64_t> Sizes;

// Strides of maps, of channels side by side, and of both with another number behind each.
Sizes strides_of(const Sizes& sizes, int layout) {
  const Sizes order = layout % 2 == 0 ? Sizes{4, 3, 2, 1, 0} : Sizes{1, 4, 3, 2, 0};
  Sizes strides(5);
  std::int64_t stride = layout < 2 ? 1 : 2;
  for (const std::int64_t axis : order) {
    strides[axis] = stride;
    stride *= sizes[axis];
  }
  return strides;
}

void copy(const Sizes& from, std::int64_t* to) { std::copy(from.begin(), from.end(), to); }

struct Indices {
  std::int64_t at[5];
  std::int64_t operator[](int axis) const { return at[axis]; }
};

// All indices of number i.
Indices indices_of(std::int64_t i, const Sizes& sizes) {
  Indices found{};
  for (int axis = 4; axis >= 0; --axis) found.at[axis] = i % sizes[axis], i /= sizes[axis];
  return found;
}

// Whether numbers are the same ones, NaN too.
bool are_same(const char* what, const std::vector<double>& got, const std::vector<double>& wanted) {
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const bool both_nan = got[i] != got[i] && wanted[i] != wanted[i];
    if (got[i] == wanted[i] || both_nan) continue;
    std::printf("%s: number %d is %g, not %g\n", what, int(i), got[i], wanted[i]);
    return false;
  }
  return true;
}

// How many results are wrong.
int check(nlk::Isa isa, unsigned seed) {
  std::mt19937 random(seed);
  const auto draw = [&](unsigned most) { return static_cast<std::int64_t>(random() % most) + 1; };
  nlk::PoolArguments call{};
  call.dtype = static_cast<Dtype>(random() % 4);
  const auto& window = kWindows[random() % std::size(kWindows)];
  std::copy(window, window + 3, call.window);
  // Lines and channels that leave tails of vectors; a last window that lacks some.
  const std::int64_t taps = window[0] * window[1] * window[2];
  Sizes sizes{draw(2), draw(seed % 3 == 0 ? 70 : 6)}, pooled(2);
  for (int axis = 0; axis < 3; ++axis) {
    const unsigned most = axis < 2 ? 3 : seed % 3 == 1 && taps < 40 ? 45 : 6;
    pooled.push_back(draw(most));
    const std::int64_t rest = draw(static_cast<unsigned>(window[axis])) - 1;
    sizes.push_back(pooled[axis + 2] * window[axis] + rest);
  }
  pooled[0] = sizes[0], pooled[1] = sizes[1];
  copy(sizes, call.sizes);
  call.channels_inner = random() % 2 == 0;
  // Results and gradients lie as they like; what has windows mostly as winners.
  const auto layout = [&] { return static_cast<int>(random() % 4); };
  const auto alike = [&] { return random() % 4 ? (call.channels_inner ? 1 : 0) : layout(); };
  const int of_x = alike(), of_out = layout();
  const Sizes x_strides = strides_of(sizes, of_x), out_strides = strides_of(pooled, of_out);
  Strided x(call.dtype, sizes, x_strides);
  const int numbers = seed % 2 ? 4 : 30;  // of few numbers, many in a window are equal
  for (std::int64_t i = 0; i < x.count(); ++i) {
    const double number = (static_cast<int>(random() % numbers) - numbers / 2) / 8.0;
    x.put(i, seed % 4 == 0 && random() % 9 == 0 ? NAN : number);
  }
  const Sizes grad_strides = strides_of(pooled, layout());
  Strided grad(call.dtype, pooled, grad_strides);
  grad.fill(random);
  const Sizes d_x_strides = strides_of(sizes, alike());
  Strided start(call.dtype, sizes, d_x_strides);  // to which the gradients are added
  start.fill(random);

  // By the definition: the largest numbers, where each is, and who gets the gradients.
  const std::int64_t row = call.channels_inner ? sizes[1] : pooled[4], bits = nlk::pool_bits(taps);
  const std::int64_t row_bytes = (row * bits + 7) / 8;
  std::vector<double> true_out, true_d_x = start.numbers();
  std::vector<std::uint8_t> true_winners(grad.count() / row * row_bytes);
  for (std::int64_t i = 0; i < grad.count(); ++i) {
    const Indices at = indices_of(i, pooled);
    double largest = -HUGE_VAL;
    std::int64_t winner = 0, place = 0;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const std::int64_t t = at[2] * window[0] + tap / (window[1] * window[2]);
      const std::int64_t h = at[3] * window[1] + tap / window[2] % window[1];
      const std::int64_t w = at[4] * window[2] + tap % window[2];
      const std::int64_t of_map = (t * sizes[3] + h) * sizes[4] + w;
      const std::int64_t j = (at[0] * sizes[1] + at[1]) * sizes[2] * sizes[3] * sizes[4] + of_map;
      const double number = x.number(j);
      if (tap > 0 && !(number > largest) && number == number) continue;
      largest = number, winner = tap, place = j;
    }
    true_out.push_back(largest);
    true_d_x[place] += grad.number(i);
    const std::int64_t of_row = call.channels_inner ? at[1] : at[4];
    const std::int64_t rows =
        call.channels_inner
            ? ((at[0] * pooled[2] + at[2]) * pooled[3] + at[3]) * pooled[4] + at[4]
            : ((at[0] * sizes[1] + at[1]) * pooled[2] + at[2]) * pooled[3] + at[3];
    true_winners[rows * row_bytes + of_row * bits / 8] |=
        static_cast<std::uint8_t>(winner << of_row * bits % 8);
  }

  int wrong = 0;
  call.x = x.data(), call.grad = grad.data();
  copy(x_strides, call.x_strides);
  copy(out_strides, call.out_strides);
  copy(grad_strides, call.grad_strides);
  copy(d_x_strides, call.d_x_strides);
  for (call.threads = 1; call.threads <= kMostThreads; ++call.threads) {
    Strided out(call.dtype, pooled, out_strides);
    std::vector<std::uint8_t> winners(true_winners.size(), 0xff);
    Strided d_x = start;
    call.out = out.data(), call.winners = winners.data(), call.d_x = d_x.data();
    wrong += !nlk::pool_forward(isa, call) || winners != true_winners;
    wrong += !nlk::pool_backward(isa, call) || winners != true_winners;
    wrong += !are_same("out", out.numbers(), true_out) || !out.is_clean_between();
    wrong += !are_same("d_x", d_x.numbers(), true_d_x) || !d_x.is_clean_between();
  }
  if (wrong > 0) {
    std::printf("  seed %u: dtype %d, %dx%dx%dx%dx%d, window %dx%dx%d, x lies as %d, out as %d\n",
                seed, static_cast<int>(call.dtype), int(sizes[0]), int(sizes[1]), int(sizes[2]),
                int(sizes[3]), int(sizes[4]), int(window[0]), int(window[1]), int(window[2]), of_x,
                of_out);
  }
  return wrong;
}

}  // namespace

int main() {
  return nlk::on_every_isa([](nlk::Isa isa) {
    int wrong = 0;
    for (unsigned seed = 0; seed < kRounds; ++seed) wrong += check(isa, seed);
    return wrong;
  });
}
