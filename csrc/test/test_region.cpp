// Region aggregation of random problems in every instruction set of the build that this machine
// runs, beside plain loops in double. Meant for sanitizers: every tensor and the workspace are
// allocations of exactly their size.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "nlk/region.h"
#include "test/check.h"

namespace {

using nlk::Isa;

constexpr double kLimit = 1e-5;  // of the largest number

struct Problem {
  std::int64_t sizes[5], kernel[3];
  bool channels_last;
};

std::int64_t count(const std::int64_t* sizes, int rank) {
  std::int64_t product = 1;
  for (int axis = 0; axis < rank; ++axis) product *= sizes[axis];
  return product;
}

void set_strides(const Problem& problem, std::int64_t* strides) {
  static constexpr int kOrders[2][5] = {{0, 1, 2, 3, 4}, {0, 2, 3, 4, 1}};
  std::int64_t stride = 1;
  for (int place = 4; place >= 0; --place) {
    const int axis = kOrders[problem.channels_last][place];
    strides[axis] = stride;
    stride *= problem.sizes[axis];
  }
}

// Calls body(index of the output, of the weight, of x) for every product of the definition.
template <typename Body>
void each_product(const Problem& problem, const std::int64_t* strides, const Body& body) {
  const std::int64_t* n = problem.sizes;
  const std::int64_t* k = problem.kernel;
  const std::int64_t taps = count(k, 3);
  for (std::int64_t at = 0; at < count(n, 5); ++at) {
    const std::int64_t w = at % n[4], h = at / n[4] % n[3], t = at / n[4] / n[3] % n[2];
    const std::int64_t channel = at / n[4] / n[3] / n[2] % n[1];
    const std::int64_t item = at / n[4] / n[3] / n[2] / n[1];
    const std::int64_t base = item * strides[0] + channel * strides[1];
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const std::int64_t x = w + tap % k[2] - k[2] / 2;
      const std::int64_t y = h + tap / k[2] % k[1] - k[1] / 2;
      const std::int64_t z = t + tap / k[2] / k[1] - k[0] / 2;
      if (x < 0 || x >= n[4] || y < 0 || y >= n[3] || z < 0 || z >= n[2]) continue;
      body(base + t * strides[2] + h * strides[3] + w * strides[4], channel * taps + tap,
           base + z * strides[2] + y * strides[3] + x * strides[4]);
    }
  }
}

bool is_wrong(Isa isa, const Problem& problem, int threads, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const auto drawn = [&](std::int64_t size) {
    std::vector<float> numbers(size);
    for (float& number : numbers) number = normal(random);
    return numbers;
  };
  const std::int64_t size = count(problem.sizes, 5);
  const std::int64_t taps = count(problem.kernel, 3);
  const auto x = drawn(size), grad = drawn(size), weight = drawn(problem.sizes[1] * taps);
  std::vector<float> out(size, NAN), d_x(size, NAN), d_weight(weight.size(), NAN);

  nlk::RegionArguments call{};
  call.dtype = nlk::Dtype::kFloat32;
  for (int axis = 0; axis < 5; ++axis) call.sizes[axis] = problem.sizes[axis];
  for (int axis = 0; axis < 3; ++axis) call.kernel[axis] = problem.kernel[axis];
  for (auto* strides : {call.x_strides, call.grad_strides, call.out_strides}) {
    set_strides(problem, strides);
  }
  std::int64_t stride = 1;
  for (int axis = 3; axis >= 0; --axis) {
    call.weight_strides[axis] = stride;
    stride *= axis > 0 ? problem.kernel[axis - 1] : 1;
  }
  call.threads = threads;
  call.x = x.data();
  call.weight = weight.data();
  call.out = out.data();
  const auto run = [&](bool (*entry)(Isa, const nlk::RegionArguments&)) {
    std::unique_ptr<char[]> workspace(new char[nlk::region_workspace(isa, call)]);
    call.workspace = workspace.get();
    return entry(isa, call);
  };
  bool wrong = !run(&nlk::region_forward);
  call.grad = grad.data();
  call.out = d_x.data();
  call.d_weight = d_weight.data();
  wrong |= !run(&nlk::region_backward);

  std::vector<double> want(size), want_x(size), want_weight(weight.size());
  each_product(problem, call.x_strides, [&](std::int64_t to, std::int64_t tap, std::int64_t from) {
    want[to] += double{weight[tap]} * x[from];
    want_x[from] += double{weight[tap]} * grad[to];
    want_weight[tap] += double{grad[to]} * x[from];
  });
  wrong |= !nlk::is_close("out", out, want, kLimit, 0);
  wrong |= !nlk::is_close("d_x", d_x, want_x, kLimit, 0);
  wrong |= !nlk::is_close("d_weight", d_weight, want_weight, kLimit, 0);
  return wrong;
}

int check(Isa isa, int problems) {
  std::mt19937 random(7);
  const auto upto = [&](int most) { return static_cast<std::int64_t>(random() % most + 1); };
  int failures = 0;
  for (int number = 0; number < problems; ++number) {
    Problem problem{{upto(2), upto(20), upto(4), upto(18), upto(18)},
                    {2 * upto(3) - 1, 2 * upto(5) - 1, 2 * upto(4) - 1},
                    number % 2 == 1};
    const int threads = static_cast<int>(upto(3));
    if (!is_wrong(isa, problem, threads, random)) continue;
    ++failures;
    const std::int64_t* n = problem.sizes;
    std::printf("  B=%d C=%d T=%d H=%d W=%d kernel %dx%dx%d%s, %d threads\n", int(n[0]), int(n[1]),
                int(n[2]), int(n[3]), int(n[4]), int(problem.kernel[0]), int(problem.kernel[1]),
                int(problem.kernel[2]), problem.channels_last ? " channels_last_3d" : "", threads);
  }
  return failures;
}

}  // namespace

int main() {
  return nlk::on_every_isa([](Isa isa) { return check(isa, 40); });
}
