// XLA's call frames, read where they lie. XLA's typed bindings check and decode each buffer of a
// call, which takes longer than to copy a small state.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "xla/ffi/api/c_api.h"

namespace storax::ffi {

inline constexpr std::int64_t kStateSize = 3;  // of the attribute `state`; see handlers.h

// Whether this asks for a plain execution. An extension asks for something else, such as the
// handler's metadata; nothing else of such a frame may be read.
inline bool is_execution(const XLA_FFI_CallFrame& frame) noexcept {
  return frame.struct_size == XLA_FFI_CallFrame_STRUCT_SIZE && frame.extension_start == nullptr &&
         frame.stage == XLA_FFI_ExecutionStage_EXECUTE;
}

// The attribute `state`; nullptr if there are other attributes.
inline const std::int64_t* find_state(const XLA_FFI_CallFrame& frame) noexcept {
  if (frame.attrs.size != 1 || frame.attrs.types[0] != XLA_FFI_AttrType_ARRAY) return nullptr;
  const auto& state = *static_cast<const XLA_FFI_Array*>(frame.attrs.attrs[0]);
  const bool as_ours = state.dtype == XLA_FFI_DataType_S64 && state.size == kStateSize;
  return as_ours ? static_cast<const std::int64_t*>(state.data) : nullptr;
}

// Whether there was no error; one that there was goes.
inline bool succeeded(const XLA_FFI_CallFrame& frame, XLA_FFI_Error* error) noexcept {
  if (error == nullptr) return true;
  XLA_FFI_Error_Destroy_Args args{};
  args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
  args.error = error;
  frame.api->XLA_FFI_Error_Destroy(&args);
  return false;
}

// Whether XLA knows on which device this runs.
inline bool find_device(const XLA_FFI_CallFrame& frame, std::int32_t* device) noexcept {
  XLA_FFI_DeviceOrdinal_Get_Args args{};
  args.struct_size = XLA_FFI_DeviceOrdinal_Get_Args_STRUCT_SIZE;
  args.ctx = frame.ctx;
  if (!succeeded(frame, frame.api->XLA_FFI_DeviceOrdinal_Get(&args))) return false;
  *device = args.device_ordinal;
  return true;
}

// What was made when the program was instantiated; nullptr if XLA doesn't have it.
template <class T>
const T* find_instance(const XLA_FFI_CallFrame& frame) noexcept {
  XLA_FFI_State_Get_Args args{};
  args.struct_size = XLA_FFI_State_Get_Args_STRUCT_SIZE;
  args.ctx = frame.ctx;
  args.stage = XLA_FFI_ExecutionStage_INSTANTIATE;
  args.type_id = &T::id;
  if (!succeeded(frame, frame.api->XLA_FFI_State_Get(&args))) return nullptr;
  return static_cast<const T*>(args.state);
}

// The leaves among the operands or results of a frame: all but the token in front.
template <class T>
class LeafBuffers {
 public:
  // `Kind` is XLA_FFI_ArgType or XLA_FFI_RetType.
  template <class Kind>
  LeafBuffers(std::int64_t size, const Kind* kinds, void* const* buffers, Kind buffer) noexcept {
    if (size < 1 || size > static_cast<std::int64_t>(few_.size()) + 1) return;
    for (std::int64_t i = 1; i < size; ++i) {
      if (kinds[i] != buffer) return;
      few_[size_++] = static_cast<T*>(static_cast<const XLA_FFI_Buffer*>(buffers[i])->data);
    }
    valid_ = true;
  }

  // False if these are more than fit, or something else than buffers.
  bool valid() const noexcept { return valid_; }
  std::span<T* const> span() const noexcept { return {few_.data(), size_}; }

 private:
  std::array<T*, 16> few_;
  std::size_t size_ = 0;
  bool valid_ = false;
};

}  // namespace storax::ffi
