// storax: state as a side effect of JAX programs. Umbrella header of the core, which knows neither
// XLA nor Python.
#pragma once

#include "storax/failures.h"
#include "storax/status.h"
#include "storax/store.h"
#include "storax/type.h"
