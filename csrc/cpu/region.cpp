#include "nlk/region.h"

#include "cpu/region_correlate.h"
#include "cpu/region_gradient.h"
#include "nlk/parallel.h"

namespace nlk {
namespace NLK_ISA {
namespace {

bool is_empty(const RegionArguments& arguments) {
  for (const std::int64_t size : arguments.sizes) {
    if (size == 0) return true;
  }
  return false;
}

std::int64_t bytes_of_parts(const Plan& plan) {
  return aligned(plan.splits * plan.channels * plan.taps() * sizeof(double));
}

template <typename E>
std::int64_t workspace(const RegionArguments& arguments) {
  typedef Computed<E> T;
  const Plan plan = plan_of<E>(arguments);
  std::int64_t bytes = 0;
  if (arguments.out) bytes = arguments.threads * Scratch<T>::bytes(plan, false);
  if (arguments.d_weight) {
    bytes = at_least(
        bytes, arguments.threads * Scratch<T>::bytes(plan, true) + bytes_of_parts(plan));
  }
  return bytes;
}

// Lines have zeros around their rows, which packing leaves as they are.
struct Zeros {
  char* workspace;
  std::int64_t bytes;
};

void run_zeros(void* context, std::int64_t task, int) {
  const Zeros& zeros = *static_cast<const Zeros*>(context);
  std::memset(zeros.workspace + task * zeros.bytes, 0, zeros.bytes);
}

bool clear(const RegionArguments& arguments, const Plan& plan, std::int64_t bytes) {
  if (plan.by_channels) return true;
  Zeros zeros{static_cast<char*>(arguments.workspace), bytes};
  return parallel_for(arguments.threads, arguments.threads, &run_zeros, &zeros);
}

template <typename E>
bool correlate(const RegionArguments& arguments, const void* input, const std::int64_t* strides,
               bool flip) {
  typedef Computed<E> T;
  const Plan plan = plan_of<E>(arguments);
  CorrelateJob<E> job{arguments, plan, static_cast<const E*>(input), strides, flip};
  return clear(arguments, plan, Scratch<T>::bytes(plan, false)) &&
         parallel_for(arguments.threads, plan.tasks(), &run_correlate<E>, &job);
}

template <typename E>
bool weight_gradient(const RegionArguments& arguments) {
  typedef Computed<E> T;
  const Plan plan = plan_of<E>(arguments);
  const std::int64_t scratch = Scratch<T>::bytes(plan, true);
  char* parts = static_cast<char*>(arguments.workspace) + arguments.threads * scratch;
  GradientJob<E> job{arguments, plan, reinterpret_cast<double*>(parts)};
  return clear(arguments, plan, scratch) &&
         parallel_for(arguments.threads, plan.groups * plan.splits, &run_gradient<E>, &job) &&
         parallel_for(arguments.threads, plan.channels, &run_total<E>, &job);
}

template <typename E>
bool forward(const RegionArguments& arguments) {
  return correlate<E>(arguments, arguments.x, arguments.x_strides, false);
}

template <typename E>
bool backward(const RegionArguments& arguments) {
  return (!arguments.out || correlate<E>(arguments, arguments.grad, arguments.grad_strides, true)) &&
         (!arguments.d_weight || weight_gradient<E>(arguments));
}

std::int64_t bytes_of_weight(const RegionArguments& arguments) {
  const std::int64_t* kernel = arguments.kernel;
  const std::int64_t bytes =
      with_dtype(arguments.dtype, [](auto number) { return sizeof(number); });
  return arguments.sizes[1] * kernel[0] * kernel[1] * kernel[2] * bytes;
}

}  // namespace

std::int64_t region_workspace(const RegionArguments& arguments) {
  if (is_empty(arguments)) return 0;
  return with_dtype(arguments.dtype,
                    [&](auto number) { return workspace<decltype(number)>(arguments); });
}

bool region_forward(const RegionArguments& arguments) {
  if (is_empty(arguments)) return true;
  return with_dtype(arguments.dtype,
                    [&](auto number) { return forward<decltype(number)>(arguments); });
}

bool region_backward(const RegionArguments& arguments) {
  if (is_empty(arguments)) {
    if (arguments.d_weight) std::memset(arguments.d_weight, 0, bytes_of_weight(arguments));
    return true;
  }
  return with_dtype(arguments.dtype,
                    [&](auto number) { return backward<decltype(number)>(arguments); });
}

}  // namespace NLK_ISA
}  // namespace nlk
