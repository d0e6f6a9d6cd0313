// Bindings of the kernels that project, normalise and pool maps.
#ifndef NLK_BINDINGS_MAPS_H_
#define NLK_BINDINGS_MAPS_H_

#include <vector>

#include "bindings/common.h"
#include "nlk/norm.h"
#include "nlk/pointwise.h"
#include "nlk/pool.h"

namespace {

// Features, the weight's address and strides of rows and channels, and the depth.
using PySource = std::tuple<PyOperand, std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

nlk::PointwiseArguments pointwise_arguments(int dtype, int threads,
                                            std::array<std::int64_t, 3> sizes,
                                            const std::vector<PySource>& sources,
                                            std::uintptr_t shift, const PyOperand& base,
                                            const PyOperand& out, std::uintptr_t moments) {
  nlk::PointwiseArguments call{};
  call.dtype = static_cast<nlk::Dtype>(dtype);
  call.threads = threads;
  call.batch = sizes[0], call.positions = sizes[1], call.channels = sizes[2];
  for (const auto& [features, weight, row, channel, depth] : sources) {
    call.source[call.sources++] = {operand(features), address<const void>(weight), row, channel,
                                   depth};
  }
  call.shift = address<const void>(shift);
  call.base = operand(base), call.out = operand(out);
  call.moments = address<void>(moments);
  return call;
}

nlk::OuterArguments outer_arguments(int dtype, int threads, std::array<std::int64_t, 4> sizes,
                                    const PyOperand& left, const PyOperand& right,
                                    std::uintptr_t outer, std::uintptr_t sums) {
  nlk::OuterArguments call{};
  call.dtype = static_cast<nlk::Dtype>(dtype);
  call.threads = threads;
  call.batch = sizes[0], call.positions = sizes[1];
  call.left_channels = sizes[2], call.right_channels = sizes[3];
  call.left = operand(left), call.right = operand(right);
  call.outer = address<void>(outer), call.sums = address<void>(sums);
  return call;
}

void bind_pointwise(py::module_& module) {
  py::class_<nlk::PointwiseArguments>(module, "PointwiseArguments", py::module_local())
      .def(py::init(&pointwise_arguments), py::arg("dtype"), py::arg("threads"), py::arg("sizes"),
           py::arg("sources"), py::arg("shift"), py::arg("base"), py::arg("out"),
           py::arg("moments"));
  module.def("pointwise_workspace", [](int isa, const nlk::PointwiseArguments& call) {
    return nlk::pointwise_workspace(static_cast<Isa>(isa), call);
  });
  module.def("pointwise", [](int isa, nlk::PointwiseArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::pointwise(static_cast<Isa>(isa), call); });
  });
  py::class_<nlk::OuterArguments>(module, "OuterArguments", py::module_local())
      .def(py::init(&outer_arguments), py::arg("dtype"), py::arg("threads"), py::arg("sizes"),
           py::arg("left"), py::arg("right"), py::arg("outer"), py::arg("sums"));
  module.def("outer_workspace", [](int isa, const nlk::OuterArguments& call) {
    return nlk::outer_workspace(static_cast<Isa>(isa), call);
  });
  module.def("outer", [](int isa, nlk::OuterArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::outer(static_cast<Isa>(isa), call); });
  });
}

// Operands and numbers that a kernel of the norm does not take have the address 0.
nlk::NormArguments norm_arguments(int dtype, int threads, std::array<std::int64_t, 3> sizes,
                                  double eps, const PyOperand& z, std::uintptr_t moments,
                                  std::uintptr_t gamma, std::uintptr_t beta,
                                  std::uintptr_t means, const PyOperand& base,
                                  const PyOperand& grad, const PyOperand& out,
                                  std::uintptr_t sums) {
  nlk::NormArguments call{};
  call.dtype = static_cast<nlk::Dtype>(dtype);
  call.threads = threads;
  call.batch = sizes[0], call.positions = sizes[1], call.channels = sizes[2];
  call.eps = eps;
  call.moments = address<const void>(moments), call.means = address<const void>(means);
  call.gamma = address<const void>(gamma), call.beta = address<const void>(beta);
  call.z = operand(z), call.base = operand(base);
  call.grad = operand(grad), call.out = operand(out);
  call.sums = address<void>(sums);
  return call;
}

void bind_norm(py::module_& module) {
  const PyOperand none{0, 0, 0, 0};
  py::class_<nlk::NormArguments>(module, "NormArguments", py::module_local())
      .def(py::init(&norm_arguments), py::arg("dtype"), py::arg("threads"), py::arg("sizes"),
           py::arg("eps"), py::arg("z"), py::arg("moments"), py::arg("gamma") = 0,
           py::arg("beta") = 0, py::arg("means") = 0, py::arg("base") = none,
           py::arg("grad") = none, py::arg("out") = none, py::arg("sums") = 0);
  module.def("norm_workspace", [](int isa, const nlk::NormArguments& call) {
    return nlk::norm_workspace(static_cast<Isa>(isa), call);
  });
  module.def("norm_forward", [](int isa, nlk::NormArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::norm_forward(static_cast<Isa>(isa), call); });
  });
  module.def("norm_sums", [](int isa, nlk::NormArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::norm_sums(static_cast<Isa>(isa), call); });
  });
  module.def("norm_backward", [](int isa, nlk::NormArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::norm_backward(static_cast<Isa>(isa), call); });
  });
}

nlk::PoolArguments pool_arguments(int dtype, int threads, bool channels_inner,
                                  const Strides<5>& sizes, const Strides<3>& window,
                                  std::uintptr_t winners) {
  nlk::PoolArguments call{};
  call.dtype = static_cast<nlk::Dtype>(dtype);
  call.threads = threads;
  call.channels_inner = channels_inner;
  std::copy_n(sizes.begin(), 5, call.sizes);
  std::copy_n(window.begin(), 3, call.window);
  call.winners = address<std::uint8_t>(winners);
  return call;
}

void bind_pool(py::module_& module) {
  module.def("pool_forward",
             [](int isa, int threads, int dtype, bool channels_inner, const Strides<5>& sizes,
                const Strides<3>& window, std::uintptr_t x, const Strides<5>& x_strides,
                std::uintptr_t out, const Strides<5>& out_strides, std::uintptr_t winners) {
               auto call = pool_arguments(dtype, threads, channels_inner, sizes, window, winners);
               call.x = address<const void>(x);
               std::copy_n(x_strides.begin(), 5, call.x_strides);
               call.out = address<void>(out);
               std::copy_n(out_strides.begin(), 5, call.out_strides);
               run([&] { return nlk::pool_forward(static_cast<Isa>(isa), call); });
             });
  module.def("pool_backward",
             [](int isa, int threads, int dtype, bool channels_inner, const Strides<5>& sizes,
                const Strides<3>& window, std::uintptr_t grad, const Strides<5>& grad_strides,
                std::uintptr_t d_x, const Strides<5>& d_x_strides, std::uintptr_t winners) {
               auto call = pool_arguments(dtype, threads, channels_inner, sizes, window, winners);
               call.grad = address<const void>(grad);
               std::copy_n(grad_strides.begin(), 5, call.grad_strides);
               call.d_x = address<void>(d_x);
               std::copy_n(d_x_strides.begin(), 5, call.d_x_strides);
               run([&] { return nlk::pool_backward(static_cast<Isa>(isa), call); });
             });
}

}  // namespace

#endif  // NLK_BINDINGS_MAPS_H_
