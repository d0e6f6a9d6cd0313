// What the bindings of all kernels share: how one is called, and what Python's integers become.
#ifndef NLK_BINDINGS_COMMON_H_
#define NLK_BINDINGS_COMMON_H_

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>

#include "nlk/attention.h"
#include "nlk/isa.h"

namespace py = pybind11;

namespace {

using nlk::Isa;

// Whether Python has a signal whose handler raised, as Ctrl-C does. Only Python's main thread
// handles signals; in another one the answer is always no.
bool signal_raised() {
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Runs a kernel, which returns false when it was interrupted, without the GIL. Every binding of a
// kernel is:
//   module.def("name", [](int isa, int threads, std::uintptr_t query, Strides<3> query_strides) {
//     nlk::NameArguments arguments{};
//     arguments.query = address<const void>(query);
//     ...
//     run([&] { return nlk::name(static_cast<Isa>(isa), arguments); });
//   });
// Classes are py::module_local(): modules of several instruction sets may be in one process.
template <typename Kernel>
void run(Kernel kernel) {
  bool finished = false;
  {
    py::gil_scoped_release release;
    finished = kernel();
  }
  if (!finished) throw py::error_already_set();
}

template <std::size_t kRank>
using Strides = std::array<std::int64_t, kRank>;

template <typename T>
T* address(std::uintptr_t integer) {
  return reinterpret_cast<T*>(integer);
}

// Address, and strides of batch items, rows and channels.
using PyOperand = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

inline nlk::Operand operand(const PyOperand& from) {
  const auto [data, item, row, channel] = from;
  return {address<void>(data), item, row, channel};
}

}  // namespace

#endif  // NLK_BINDINGS_COMMON_H_
