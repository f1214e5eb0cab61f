// The memory that states lie in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "storax/type.h"

namespace storax {

// Memory for a state of this type, not null even if it has no bytes; nullptr if there is none left.
std::byte* allocate_state(const Type& type) noexcept;
void free_state(std::byte* data, const Type& type) noexcept;

// The bytes of all states there are.
std::int64_t state_bytes() noexcept;

}  // namespace storax
