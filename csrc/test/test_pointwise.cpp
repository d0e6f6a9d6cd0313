// Pointwise products and their sums over positions in every instruction set of the build that this
// machine runs, against naive loops: random sizes, strides, dtypes, sources and threads.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "nlk/pointwise.h"
#include "test/check.h"
#include "test/tensor.h"

namespace {

using nlk::Dtype;
using nlk::Strided;
using nlk::Tensor;

constexpr int kRounds = 28, kMostThreads = 3;

// What every round draws.
struct Round {
  explicit Round(unsigned number) : seed(number), random(number) {}
  std::int64_t draw(unsigned most) { return static_cast<std::int64_t>(random() % most) + 1; }
  bool toss() { return random() % 2 == 0; }
  Tensor tensor(std::int64_t batch, std::int64_t rows, std::int64_t channels) {
    Tensor drawn(dtype, batch, rows, channels, static_cast<int>(random() % 3));
    fine ? drawn.fill_finely(random) : drawn.fill(random);
    return drawn;
  }
  // Of results in a dtype: none where they are exact, some of its last bit where they are rounded.
  double limit(Dtype of) const {
    if (of == Dtype::kBfloat16) return 1.0 / 256;
    if (of == Dtype::kFloat16) return 1.0 / 2048;
    if (!fine) return 0;
    return of == Dtype::kFloat64 ? 1e-13 : 3e-6;
  }

  unsigned seed;
  std::mt19937 random;
  Dtype dtype = static_cast<Dtype>(random() % 4);
  // Whether sums are rounded, so that their bits show the order in which they are added.
  bool fine = toss();
};

// Dense numbers of the type that sums have.
Strided sums_of(Dtype dtype, std::int64_t count) {
  return Strided(dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32, {count}, {1});
}

void print(const Round& round, std::int64_t batch, std::int64_t positions, std::int64_t channels,
           std::int64_t others) {
  std::printf("  seed %u: dtype %d, B=%d N=%d P=%d C=%d\n", round.seed,
              static_cast<int>(round.dtype), int(batch), int(positions), int(channels),
              int(others));
}

// Whether they are mean and variance of each channel of what was written.
bool are_moments(const Strided& moments, const std::vector<double>& out, std::int64_t channels) {
  const auto rows = static_cast<std::int64_t>(out.size()) / channels;
  std::vector<double> means(channels), variances(channels), got = moments.numbers();
  for (std::size_t i = 0; i < out.size(); ++i) means[i % channels] += out[i] / rows;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double gap = out[i] - means[i % channels];
    variances[i % channels] += gap * gap / rows;
  }
  const std::vector<double> got_variances(got.begin() + channels, got.end());
  got.resize(channels);
  return nlk::is_close("mean", got, means, 1e-6, 0.01) &&
         nlk::is_close("variance", got_variances, variances, 1e-6, 0.01);
}

// How many results of a product are wrong.
int check_product(nlk::Isa isa, unsigned seed) {
  Round round(seed);
  nlk::PointwiseArguments call{};
  call.dtype = round.dtype;
  // Blocks of positions that end in few; more results than are written at once, rows or maps.
  call.batch = round.draw(3);
  call.positions = round.draw(seed % 4 == 0 ? 400 : 40);
  call.channels = round.draw(seed % 4 == 1 ? 600 : 50);
  call.sources = static_cast<int>(round.draw(3));
  const std::int64_t batch = call.batch, positions = call.positions, channels = call.channels;
  std::vector<double> wanted(batch * positions * channels);
  std::vector<Tensor> operands;
  for (int s = 0; s < call.sources; ++s) {
    const std::int64_t depth = round.draw(seed % 4 == 2 ? 300 : 40);
    operands.push_back(round.tensor(batch, positions, depth));
    const nlk::Operand features = operands.back().operand;
    const auto numbers = operands.back().numbers();
    operands.push_back(round.tensor(1, channels, depth));
    const nlk::Operand weight = operands.back().operand;
    const auto factors = operands.back().numbers();
    call.source[s] = {features, weight.data, weight.row, weight.channel, depth};
    for (std::int64_t n = 0; n < batch * positions; ++n) {
      for (std::int64_t p = 0; p < channels; ++p) {
        double sum = 0;
        const double *a = &numbers[n * depth], *b = &factors[p * depth];
        for (std::int64_t c = 0; c < depth; ++c) sum += a[c] * b[c];
        wanted[n * channels + p] += sum;
      }
    }
  }
  Tensor base = round.tensor(batch, positions, channels);
  Strided shift = sums_of(round.dtype, channels);
  round.fine ? shift.fill_finely(round.random) : shift.fill(round.random);
  const bool has_base = round.toss(), has_shift = round.toss();
  if (has_base) call.base = base.operand;
  if (has_shift) call.shift = shift.data();
  for (std::int64_t i = 0; i < base.count(); ++i) {
    wanted[i] += (has_base ? base.number(i) : 0) + (has_shift ? shift.number(i % channels) : 0);
  }
  int wrong = 0;
  std::unique_ptr<Tensor> first;
  const bool has_moments = round.toss();
  Strided moments = sums_of(round.dtype, 2 * channels);
  const int layout = static_cast<int>(round.random() % 3);
  for (call.threads = 1; call.threads <= kMostThreads; ++call.threads) {
    auto out = std::make_unique<Tensor>(round.dtype, batch, positions, channels, layout);
    call.out = out->operand;
    if (has_moments) call.moments = moments.data();
    const auto memory = nlk::workspace(nlk::pointwise_workspace(isa, call));
    call.workspace = memory.get();
    wrong += !nlk::pointwise(isa, call) || !out->is_clean_between();
    if (call.threads > 1) wrong += !first->is_bitwise(*out);
    if (call.threads == 1) first = std::move(out);
  }
  wrong += !nlk::is_close("out", first->numbers(), wanted, round.limit(round.dtype), 0.01);
  if (has_moments) wrong += !are_moments(moments, first->numbers(), channels);
  if (wrong > 0) print(round, batch, positions, channels, call.source[0].depth);
  return wrong;
}

// How many results of sums are wrong.
int check_outer(nlk::Isa isa, unsigned seed) {
  Round round(seed);
  nlk::OuterArguments call{};
  call.dtype = round.dtype;
  // Some have several chunks of an item's positions.
  const bool wide = seed % 16 == 3, toss = round.toss();
  call.batch = round.draw(3);
  call.positions = round.draw(seed % 4 == 0 ? 300 : 40) + (wide ? 260 : 0);
  call.left_channels = wide && toss ? 2100 : round.draw(seed % 4 == 1 ? 130 : 40);
  call.right_channels = wide && !toss ? 2100 : round.draw(seed % 4 == 2 ? 130 : 40);
  if (wide) call.batch = 1, (toss ? call.right_channels : call.left_channels) = round.draw(6);
  const std::int64_t rows = call.left_channels, columns = call.right_channels;
  Tensor left = round.tensor(call.batch, call.positions, rows);
  Tensor right = round.tensor(call.batch, call.positions, columns);
  call.left = left.operand, call.right = right.operand;
  const auto a = left.numbers(), b = right.numbers();
  std::vector<double> true_outer(rows * columns), true_sums(rows);
  for (std::int64_t n = 0; n < call.batch * call.positions; ++n) {
    for (std::int64_t p = 0; p < rows; ++p) {
      const double factor = a[n * rows + p];
      true_sums[p] += factor;
      for (std::int64_t q = 0; q < columns; ++q) {
        true_outer[p * columns + q] += factor * b[n * columns + q];
      }
    }
  }
  int wrong = 0;
  std::unique_ptr<Strided> first_outer, first_sums;
  for (call.threads = 1; call.threads <= kMostThreads; ++call.threads) {
    auto outer = std::make_unique<Strided>(sums_of(round.dtype, rows * columns));
    auto sums = std::make_unique<Strided>(sums_of(round.dtype, rows));
    call.outer = outer->data(), call.sums = sums->data();
    const auto memory = nlk::workspace(nlk::outer_workspace(isa, call));
    call.workspace = memory.get();
    wrong += !nlk::outer(isa, call);
    if (call.threads == 1) {
      first_outer = std::move(outer), first_sums = std::move(sums);
    } else {
      wrong += !first_outer->is_bitwise(*outer) || !first_sums->is_bitwise(*sums);
    }
  }
  const double limit = round.limit(round.dtype == Dtype::kFloat64 ? round.dtype : Dtype::kFloat32);
  wrong += !nlk::is_close("outer", first_outer->numbers(), true_outer, limit, 0.01);
  wrong += !nlk::is_close("sums", first_sums->numbers(), true_sums, limit, 0.01);
  if (wrong > 0) print(round, call.batch, call.positions, rows, columns);
  return wrong;
}

}  // namespace

int main() {
  return nlk::on_every_isa([](nlk::Isa isa) {
    int wrong = 0;
    for (unsigned seed = 0; seed < kRounds; ++seed) {
      wrong += check_product(isa, seed) + check_outer(isa, seed);
    }
    return wrong;
  });
}
