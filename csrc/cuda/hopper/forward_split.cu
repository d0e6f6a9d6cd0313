// Kernels of forward_split.cuh.
#include "cuda/hopper/forward_split.cuh"

#include "cuda/hopper/forward_host.cuh"

namespace nlk::cuda::hopper {

namespace {

template <class Form>
bool try_split(const HopperForward& a, const Launch& where, Error& error) {
  if (!serves<Form>(a)) return false;
  error = run_forward<Form>(attend_split<Form>, a, where);
  return true;
}

template <class Number>
bool try_split_of(const HopperForward& a, const Launch& where, Error& error) {
  return try_split<Form<Number, 64, 1, false, false>>(a, where, error) ||
         try_split<Form<Number, 64, 2, false, false>>(a, where, error) ||
         try_split<Form<Number, 64, 1, false, true>>(a, where, error) ||
         try_split<Form<Number, 64, 2, false, true>>(a, where, error) ||
         try_split<Form<Number, 64, 1, true, false>>(a, where, error) ||
         try_split<Form<Number, 64, 1, true, true>>(a, where, error);
}

}  // namespace

Error forward_split(const HopperForward& a, const Launch& where) {
  Error error = cudaErrorInvalidValue;
  if (a.value_depth <= 2 * kValues) {
    try_split_of<Bfloat16>(a, where, error) || try_split_of<Float16>(a, where, error);
  }
  return error;
}

}  // namespace nlk::cuda::hopper
