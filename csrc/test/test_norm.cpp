// A norm by given statistics, its residual and its gradients in every instruction set of the build
// that this machine runs, against naive loops: random sizes, strides, dtypes and threads.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "nlk/norm.h"
#include "test/check.h"
#include "test/tensor.h"

namespace {

using nlk::Dtype;
using nlk::Strided;
using nlk::Tensor;

constexpr unsigned kRounds = 40;
constexpr int kMostThreads = 3;
constexpr double kEps = 1e-3;

double limit_of(Dtype dtype) {
  if (dtype == Dtype::kBfloat16) return 1.0 / 256;
  if (dtype == Dtype::kFloat16) return 1.0 / 2048;
  return dtype == Dtype::kFloat64 ? 1e-13 : 3e-6;
}

// Dense numbers of the type that sums have, between 1/2 and 3/2.
Strided drawn(Dtype dtype, std::int64_t count, std::mt19937& random) {
  Strided numbers(dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32, {count}, {1});
  std::uniform_real_distribution<double> uniform(0.5, 1.5);
  for (std::int64_t i = 0; i < count; ++i) numbers.put(i, uniform(random));
  return numbers;
}

// Whether a backward without means is one with the means of the sums, which it gives, too.
bool is_whole(nlk::Isa isa, nlk::NormArguments call, const Strided& sums, int layout) {
  const Dtype wide = call.dtype == Dtype::kFloat64 ? call.dtype : Dtype::kFloat32;
  const std::int64_t count = 2 * call.channels;
  Strided means(wide, {count}, {1}), again(wide, {count}, {1});
  for (std::int64_t i = 0; i < count; ++i) {
    means.put(i, sums.number(i) / static_cast<double>(call.batch * call.positions));
  }
  Tensor apart(call.dtype, call.batch, call.positions, call.channels, layout);
  Tensor whole(call.dtype, call.batch, call.positions, call.channels, layout);
  call.means = means.data(), call.out = apart.operand;
  const bool finished = nlk::norm_backward(isa, call);
  call.means = nullptr, call.out = whole.operand, call.sums = again.data();
  return finished && nlk::norm_backward(isa, call) && again.is_bitwise(sums) &&
         nlk::is_close("whole", whole.numbers(), apart.numbers(), limit_of(call.dtype), 0.01);
}

// How many results are wrong.
int check(nlk::Isa isa, unsigned seed) {
  std::mt19937 random(seed);
  auto draw = [&](unsigned most) { return static_cast<std::int64_t>(random() % most) + 1; };
  nlk::NormArguments call{};
  const Dtype dtype = call.dtype = static_cast<Dtype>(random() % 4);
  const Dtype wide = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  // Some channels' numbers are several sums; positions are several parts; channels are not added at
  // once.
  call.batch = draw(3);
  call.positions = draw(seed % 4 == 0 ? 1200 : 40);
  call.channels = draw(seed % 4 == 1 ? 600 : 40);
  call.eps = kEps;
  const std::int64_t channels = call.channels, rows = call.batch * call.positions;
  auto tensor = [&] {
    Tensor numbers(dtype, call.batch, call.positions, channels, static_cast<int>(random() % 3));
    numbers.fill_finely(random);
    return numbers;
  };
  Tensor z = tensor(), base = tensor(), grad = tensor();
  Strided moments = drawn(dtype, 2 * channels, random), means = drawn(dtype, 2 * channels, random);
  Strided gamma = drawn(dtype, channels, random), beta = drawn(dtype, channels, random);
  const bool has_base = random() % 2 == 0;
  call.z = z.operand, call.grad = grad.operand;
  if (has_base) call.base = base.operand;
  call.moments = moments.data(), call.means = means.data();
  call.gamma = gamma.data(), call.beta = beta.data();

  std::vector<double> out(rows * channels), d_z(rows * channels), sums(2 * channels);
  for (std::int64_t i = 0; i < rows * channels; ++i) {
    const std::int64_t c = i % channels;
    const double inverse = 1 / std::sqrt(moments.number(channels + c) + kEps);
    const double standard = (z.number(i) - moments.number(c)) * inverse, g = grad.number(i);
    out[i] = standard * gamma.number(c) + beta.number(c) + (has_base ? base.number(i) : 0);
    sums[c] += g * standard, sums[channels + c] += g;
    d_z[i] = gamma.number(c) * inverse *
             (g - means.number(channels + c) - standard * means.number(c));
  }

  int wrong = 0;
  std::unique_ptr<Tensor> first_out, first_d_z;
  std::unique_ptr<Strided> first_sums;
  const int layout = static_cast<int>(random() % 3);
  for (call.threads = 1; call.threads <= kMostThreads; ++call.threads) {
    auto result = [&] {
      return std::make_unique<Tensor>(dtype, call.batch, call.positions, channels, layout);
    };
    auto got_out = result(), got_d_z = result();
    auto got_sums = std::make_unique<Strided>(wide, std::vector<std::int64_t>{2 * channels},
                                              std::vector<std::int64_t>{1});
    const auto memory = nlk::workspace(nlk::norm_workspace(isa, call));
    call.workspace = memory.get(), call.sums = got_sums->data();
    call.out = got_out->operand;
    wrong += !nlk::norm_forward(isa, call);
    call.out = got_d_z->operand;
    wrong += !nlk::norm_sums(isa, call) || !nlk::norm_backward(isa, call);
    wrong += !is_whole(isa, call, *got_sums, layout);
    wrong += !got_out->is_clean_between() || !got_d_z->is_clean_between();
    if (call.threads == 1) {
      first_out = std::move(got_out), first_d_z = std::move(got_d_z);
      first_sums = std::move(got_sums);
      continue;
    }
    wrong += !first_out->is_bitwise(*got_out) || !first_d_z->is_bitwise(*got_d_z) ||
             !first_sums->is_bitwise(*got_sums);
  }
  wrong += !nlk::is_close("out", first_out->numbers(), out, limit_of(dtype), 0.01);
  wrong += !nlk::is_close("d_z", first_d_z->numbers(), d_z, limit_of(dtype), 0.01);
  wrong += !nlk::is_close("sums", first_sums->numbers(), sums, limit_of(wide), 0.01);
  if (wrong > 0) {
    std::printf("  seed %u: dtype %d, B=%d N=%d C=%d\n", seed, static_cast<int>(dtype),
                static_cast<int>(call.batch), static_cast<int>(call.positions),
                static_cast<int>(channels));
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
