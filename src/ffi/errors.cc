#include "errors.h"

#include <string>
#include <utility>

namespace storax::ffi {
namespace {

namespace xf = ::xla::ffi;

xf::ErrorCode code_of(Status status) {
  switch (status) {
    case Status::kTypeMismatch:
      return xf::ErrorCode::kInvalidArgument;
    case Status::kOutOfMemory:
      return xf::ErrorCode::kResourceExhausted;
    default:
      return xf::ErrorCode::kFailedPrecondition;
  }
}

}  // namespace

xf::Error failure(SlotId id, TypeId asked, Status status, std::string_view op,
                  Device device) noexcept {
  try {
    Slot* slot = find_slot(id);
    std::string message = slot == nullptr ? "storax." + std::string(op) + ": no such StateIndex."
                                          : slot->explain(id, status, op, device, asked);
    failures::record(device, message);
    return xf::Error(code_of(status), std::move(message));
  } catch (...) {
    return xf::Error(xf::ErrorCode::kResourceExhausted, "storax: out of memory");
  }
}

xf::Error made_in_another_process() {
  return xf::Error(
      xf::ErrorCode::kFailedPrecondition,
      "storax: this program was compiled in another process, whose state does not exist here. "
      "Compile it again in this process.");
}

xf::Error slot_is_gone() {
  return xf::Error(xf::ErrorCode::kFailedPrecondition,
                   "storax: a StateIndex that this program uses no longer exists.");
}

}  // namespace storax::ffi
