// What the handlers tell XLA when something is wrong.
#pragma once

#include <string_view>

#include "storax/storax.h"
#include "xla/ffi/api/ffi.h"

namespace storax::ffi {

// Why an operation failed; it is also recorded, in case nobody blocks on the program.
::xla::ffi::Error failure(SlotId slot, TypeId asked, Status status, std::string_view op,
                          Device device) noexcept;

// Why a program cannot be loaded.
::xla::ffi::Error made_in_another_process();
::xla::ffi::Error slot_is_gone();

}  // namespace storax::ffi
