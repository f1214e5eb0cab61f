// The call path of storax.jit.
#pragma once

#include <nanobind/nanobind.h>

namespace storax::python {

void bind_jit(nanobind::module_& m);

}  // namespace storax::python
