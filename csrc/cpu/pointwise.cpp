#include "nlk/pointwise.h"

#include "cpu/pointwise_outer.h"
#include "cpu/pointwise_product.h"

namespace nlk {
namespace NLK_ISA {

std::int64_t pointwise_workspace(const PointwiseArguments& call) {
  return with_dtype(call.dtype, [&](auto number) {
    return PointwiseProduct<decltype(number)>(call).lay_out(nullptr);
  });
}

bool pointwise(const PointwiseArguments& call) {
  return with_dtype(call.dtype,
                    [&](auto number) { return PointwiseProduct<decltype(number)>(call).run(); });
}

std::int64_t outer_workspace(const OuterArguments& call) {
  return with_dtype(call.dtype,
                    [&](auto number) { return Outer<decltype(number)>(call).lay_out(nullptr); });
}

bool outer(const OuterArguments& call) {
  return with_dtype(call.dtype, [&](auto number) { return Outer<decltype(number)>(call).run(); });
}

}  // namespace NLK_ISA
}  // namespace nlk
