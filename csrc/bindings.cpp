// The module nlkernels._C. Python passes addresses as integers and strides as tuples, counted in
// elements; the checks are in Python. Every kernel runs without the GIL and can be interrupted.
#include <chrono>
#include <thread>
#include <vector>

#include "bindings/common.h"
#include "bindings/maps.h"
#include "nlk/concat.h"
#include "nlk/dispatch.h"
#include "nlk/gate.h"
#include "nlk/parallel.h"
#include "nlk/peak.h"
#include "nlk/region.h"

namespace {

// ---- instruction sets and threads --------------------------------------------------------------

// Level of each instruction set of this build by its name, lowest first.
py::dict built_isas() {
  py::dict levels;
  for (int level = 0; level <= static_cast<int>(Isa::kAvx512Bf16); ++level) {
    const auto isa = static_cast<Isa>(level);
    if (nlk::is_built(isa)) levels[nlk::isa_name(isa)] = level;
  }
  return levels;
}

// Which thread ran each of so many tasks that do nothing but wait, -1 for one that was not run.
std::vector<int> wait_in_parallel(int threads, int tasks, int wait_ms) {
  struct Context {
    std::vector<int> ran_on;
    std::chrono::milliseconds wait;
  } context{std::vector<int>(tasks, -1), std::chrono::milliseconds(wait_ms)};
  run([&] {
    return nlk::parallel_for(
        threads, tasks,
        [](void* shared, std::int64_t task, int thread) {
          auto& own = *static_cast<Context*>(shared);
          std::this_thread::sleep_for(own.wait);
          own.ran_on[task] = thread;
        },
        &context);
  });
  return context.ran_on;
}

void bind_machine(py::module_& module) {
  module.attr("sources") = NLK_SOURCES;
#ifdef NLK_STD_THREADS
  module.attr("threads") = "std::thread";
#else
  module.attr("threads") = "OpenMP";
#endif
  module.attr("isas") = built_isas();
  module.def("detected_isa", [] { return nlk::isa_name(nlk::detect_isa()); },
             "Name of the highest instruction set of this machine.");
  module.def("best_isa", [] { return static_cast<int>(nlk::best_isa()); },
             "Level of the highest instruction set that is built and runs here.");
  module.def("run_serially", &nlk::run_serially, "For the rest of the process.");
  module.def("_wait", &wait_in_parallel, py::arg("threads"), py::arg("tasks"), py::arg("wait_ms"));
}

// ---- attention ---------------------------------------------------------------------------------

using nlk::AttentionProblem;

AttentionProblem attention_problem(int affinity, int dtype, double scale,
                                   std::array<std::int64_t, 5> sizes, std::int64_t workspace_limit,
                                   int threads) {
  return {static_cast<nlk::Affinity>(affinity), static_cast<nlk::Dtype>(dtype), scale,
          sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], workspace_limit, threads};
}

void bind_attention(py::module_& module) {
  py::class_<AttentionProblem>(module, "AttentionProblem", py::module_local())
      .def(py::init(&attention_problem), py::arg("affinity"), py::arg("dtype"), py::arg("scale"),
           py::arg("sizes"), py::arg("workspace_limit"), py::arg("threads"));
  module.def("attention_forward_workspace", [](int isa, const AttentionProblem& problem) {
    return nlk::attention_forward_workspace(static_cast<Isa>(isa), problem);
  });
  module.def("attention_backward_workspace", [](int isa, const AttentionProblem& problem) {
    return nlk::attention_backward_workspace(static_cast<Isa>(isa), problem);
  });
  module.def("attention_forward",
             [](int isa, const AttentionProblem& problem, const PyOperand& query,
                const PyOperand& key, const PyOperand& value, const PyOperand& out,
                std::uintptr_t stats, std::uintptr_t state, std::uintptr_t workspace) {
               const nlk::AttentionForward call{problem,
                                                operand(query),
                                                operand(key),
                                                operand(value),
                                                operand(out),
                                                address<void>(stats),
                                                problem.batch * problem.queries,
                                                address<void>(state),
                                                address<void>(workspace)};
               run([&] { return nlk::attention_forward(static_cast<Isa>(isa), call); });
             });
  module.def("attention_backward",
             [](int isa, const AttentionProblem& problem, const PyOperand& grad,
                const PyOperand& query, const PyOperand& key, const PyOperand& value,
                const PyOperand& d_query, const PyOperand& d_key, const PyOperand& d_value,
                std::uintptr_t state, std::uintptr_t workspace) {
               const nlk::AttentionBackward call{problem,
                                                 operand(grad),
                                                 operand(query),
                                                 operand(key),
                                                 operand(value),
                                                 operand(d_query),
                                                 operand(d_key),
                                                 operand(d_value),
                                                 address<const void>(state),
                                                 address<void>(workspace)};
               run([&] { return nlk::attention_backward(static_cast<Isa>(isa), call); });
             });
}

// ---- region ------------------------------------------------------------------------------------

// Address, 0 for none, and strides of (B,C,T,H,W).
using PyFeatures = std::tuple<std::uintptr_t, Strides<5>>;

template <typename T>
void set_features(const PyFeatures& from, T*& data, std::int64_t* strides) {
  data = address<T>(std::get<0>(from));
  for (std::size_t axis = 0; axis < 5; ++axis) strides[axis] = std::get<1>(from)[axis];
}

nlk::RegionArguments region_arguments(int dtype, int threads, const Strides<5>& sizes,
                                      const Strides<3>& kernel, const PyFeatures& x,
                                      std::uintptr_t weight, const Strides<4>& weight_strides,
                                      const PyFeatures& grad, const PyFeatures& out,
                                      std::uintptr_t d_weight) {
  nlk::RegionArguments call{};
  call.dtype = static_cast<nlk::Dtype>(dtype);
  call.threads = threads;
  for (std::size_t axis = 0; axis < 5; ++axis) call.sizes[axis] = sizes[axis];
  for (std::size_t axis = 0; axis < 3; ++axis) call.kernel[axis] = kernel[axis];
  set_features(x, call.x, call.x_strides);
  set_features(grad, call.grad, call.grad_strides);
  set_features(out, call.out, call.out_strides);
  call.weight = address<const void>(weight);
  for (std::size_t axis = 0; axis < 4; ++axis) call.weight_strides[axis] = weight_strides[axis];
  call.d_weight = address<void>(d_weight);
  return call;
}

void bind_region(py::module_& module) {
  py::class_<nlk::RegionArguments>(module, "RegionArguments", py::module_local())
      .def(py::init(&region_arguments), py::arg("dtype"), py::arg("threads"), py::arg("sizes"),
           py::arg("kernel"), py::arg("x"), py::arg("weight"), py::arg("weight_strides"),
           py::arg("grad"), py::arg("out"), py::arg("d_weight"));
  module.def("region_workspace", [](int isa, const nlk::RegionArguments& call) {
    return nlk::region_workspace(static_cast<Isa>(isa), call);
  });
  module.def("region_forward", [](int isa, nlk::RegionArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::region_forward(static_cast<Isa>(isa), call); });
  });
  module.def("region_backward", [](int isa, nlk::RegionArguments call, std::uintptr_t workspace) {
    call.workspace = address<void>(workspace);
    run([&] { return nlk::region_backward(static_cast<Isa>(isa), call); });
  });
}

// ---- concatenation -----------------------------------------------------------------------------

nlk::ConcatArguments concat_sizes(int dtype, std::int64_t batch, std::int64_t queries,
                                  std::int64_t keys, std::int64_t channels) {
  nlk::ConcatArguments arguments{};
  arguments.dtype = static_cast<nlk::Dtype>(dtype);
  arguments.batch = batch;
  arguments.queries = queries;
  arguments.keys = keys;
  arguments.channels = channels;
  return arguments;
}

void bind_concat(py::module_& module) {
  module.def("concat_workspace",
             [](int dtype, std::array<std::int64_t, 4> sizes, bool backward) {
               const auto [batch, queries, keys, channels] = sizes;
               return nlk::concat_workspace(concat_sizes(dtype, batch, queries, keys, channels),
                                            backward);
             });
  module.def("concat_forward",
             [](int isa, int threads, int dtype, std::array<std::int64_t, 4> sizes,
                std::uintptr_t query_score, Strides<2> query_score_strides,
                std::uintptr_t key_score, Strides<2> key_score_strides, std::uintptr_t value,
                Strides<3> value_strides, std::uintptr_t out, std::uintptr_t workspace) {
               const auto [batch, queries, keys, channels] = sizes;
               auto arguments = concat_sizes(dtype, batch, queries, keys, channels);
               arguments.threads = threads;
               arguments.query_score = address<const void>(query_score);
               std::copy_n(query_score_strides.begin(), 2, arguments.query_score_strides);
               arguments.key_score = address<const void>(key_score);
               std::copy_n(key_score_strides.begin(), 2, arguments.key_score_strides);
               arguments.value = address<const void>(value);
               std::copy_n(value_strides.begin(), 3, arguments.value_strides);
               arguments.out = address<void>(out);
               arguments.workspace = address<void>(workspace);
               run([&] { return nlk::concat_forward(static_cast<Isa>(isa), arguments); });
             });
  module.def("concat_backward",
             [](int isa, int threads, int dtype, std::array<std::int64_t, 4> sizes,
                std::uintptr_t grad, Strides<3> grad_strides, std::uintptr_t query_score,
                Strides<2> query_score_strides, std::uintptr_t key_score,
                Strides<2> key_score_strides, std::uintptr_t value, Strides<3> value_strides,
                std::uintptr_t d_query_score, std::uintptr_t d_key_score, std::uintptr_t d_value,
                std::uintptr_t workspace) {
               const auto [batch, queries, keys, channels] = sizes;
               auto arguments = concat_sizes(dtype, batch, queries, keys, channels);
               arguments.threads = threads;
               arguments.grad = address<const void>(grad);
               std::copy_n(grad_strides.begin(), 3, arguments.grad_strides);
               arguments.query_score = address<const void>(query_score);
               std::copy_n(query_score_strides.begin(), 2, arguments.query_score_strides);
               arguments.key_score = address<const void>(key_score);
               std::copy_n(key_score_strides.begin(), 2, arguments.key_score_strides);
               arguments.value = address<const void>(value);
               std::copy_n(value_strides.begin(), 3, arguments.value_strides);
               arguments.d_query_score = address<void>(d_query_score);
               arguments.d_key_score = address<void>(d_key_score);
               arguments.d_value = address<void>(d_value);
               arguments.workspace = address<void>(workspace);
               run([&] { return nlk::concat_backward(static_cast<Isa>(isa), arguments); });
             });
}

// ---- channel gate ------------------------------------------------------------------------------

nlk::GateArguments gate_features(int dtype, int threads, std::array<std::int64_t, 5> sizes,
                                 std::uintptr_t x, Strides<5> x_strides) {
  nlk::GateArguments arguments{};
  arguments.dtype = static_cast<nlk::Dtype>(dtype);
  arguments.threads = threads;
  arguments.batch = sizes[0];
  arguments.channels = sizes[1];
  std::copy_n(sizes.begin() + 2, 3, arguments.positions);
  arguments.x = address<const void>(x);
  std::copy_n(x_strides.begin(), 5, arguments.x_strides);
  return arguments;
}

void bind_gate(py::module_& module) {
  module.def("gate_workspace", [](int dtype, int threads, std::array<std::int64_t, 5> sizes,
                                  Strides<5> x_strides, bool backward) {
    return nlk::gate_workspace(gate_features(dtype, threads, sizes, 0, x_strides), backward);
  });
  module.def("gate_forward", [](int isa, int threads, int dtype, std::array<std::int64_t, 5> sizes,
                                std::uintptr_t x, Strides<5> x_strides, std::uintptr_t weight,
                                std::int64_t weight_stride, std::uintptr_t out,
                                std::uintptr_t workspace) {
    auto arguments = gate_features(dtype, threads, sizes, x, x_strides);
    arguments.weight = address<const void>(weight);
    arguments.weight_stride = weight_stride;
    arguments.out = address<void>(out);
    arguments.workspace = address<void>(workspace);
    run([&] { return nlk::gate_forward(static_cast<Isa>(isa), arguments); });
  });
  module.def("gate_backward", [](int isa, int threads, int dtype, std::array<std::int64_t, 5> sizes,
                                 std::uintptr_t x, Strides<5> x_strides, std::uintptr_t weight,
                                 std::int64_t weight_stride, std::uintptr_t grad,
                                 Strides<2> grad_strides, std::uintptr_t context,
                                 Strides<2> context_strides, std::uintptr_t d_x,
                                 Strides<5> d_x_strides, std::uintptr_t d_weight,
                                 std::uintptr_t workspace) {
    auto arguments = gate_features(dtype, threads, sizes, x, x_strides);
    arguments.weight = address<const void>(weight);
    arguments.weight_stride = weight_stride;
    arguments.grad = address<const void>(grad);
    std::copy_n(grad_strides.begin(), 2, arguments.grad_strides);
    arguments.context = address<const void>(context);
    std::copy_n(context_strides.begin(), 2, arguments.context_strides);
    arguments.d_x = address<void>(d_x);
    std::copy_n(d_x_strides.begin(), 5, arguments.d_x_strides);
    arguments.d_weight = address<void>(d_weight);
    arguments.workspace = address<void>(workspace);
    run([&] { return nlk::gate_backward(static_cast<Isa>(isa), arguments); });
  });
}

// ---- peak --------------------------------------------------------------------------------------

// Multiplies and adds in registers; returns the floating-point operations that it was.
std::int64_t run_peak(int isa, int dtype, std::int64_t tasks, std::int64_t rounds, int threads) {
  const nlk::PeakArguments call{static_cast<nlk::Dtype>(dtype), tasks, rounds, threads, 0.5};
  run([&] { return nlk::peak_run(static_cast<Isa>(isa), call); });
  return nlk::peak_operations(static_cast<Isa>(isa), call);
}

void bind_peak(py::module_& module) {
  module.def("_peak_run", &run_peak, py::arg("isa"), py::arg("dtype"), py::arg("tasks"),
             py::arg("rounds"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of nlkernels for CPUs. Internal: use the functions of nlkernels.";
  nlk::set_interrupt(&signal_raised);
  bind_machine(module);
  bind_attention(module);
  bind_region(module);
  bind_concat(module);
  bind_gate(module);
  bind_pointwise(module);
  bind_norm(module);
  bind_pool(module);
  bind_peak(module);
}
