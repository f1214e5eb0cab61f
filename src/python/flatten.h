// StateIndex as a PyTree node: the ordinary case, which models are flattened by at every call.
#pragma once

#include <nanobind/nanobind.h>

namespace storax::python {

void bind_flatten(nanobind::module_& m);

// While one lives, indices are flattened on this thread for storax.jit.
class FlattensForJit {
 public:
  FlattensForJit() noexcept;
  FlattensForJit(const FlattensForJit&) = delete;
  FlattensForJit& operator=(const FlattensForJit&) = delete;
  ~FlattensForJit();
};

}  // namespace storax::python
