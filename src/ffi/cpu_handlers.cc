#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "call_frame.h"
#include "errors.h"
#include "handlers.h"
#include "storax/storax.h"
#include "xla/ffi/api/ffi.h"

namespace storax::ffi {
namespace {

namespace xf = ::xla::ffi;

// A decoded `state` attribute.
struct Target {
  SlotId slot;
  TypeId type;
  std::int32_t mesh_order;
  std::int64_t nonce;

  explicit Target(xf::Span<const std::int64_t> state) noexcept
      : slot(state[0]),
        type(static_cast<TypeId>(state[1] & 0xffffffff)),
        mesh_order(static_cast<std::int32_t>(state[1] >> 32)),
        nonce(state[2]) {}
};

// One pointer per leaf, without an allocation for states of a few leaves.
template <class T>
class Pointers {
 public:
  explicit Pointers(std::size_t size) : size_(size) {
    if (size > few_.size()) many_.resize(size);
  }
  T* data() noexcept { return many_.empty() ? few_.data() : many_.data(); }
  T& operator[](std::size_t i) noexcept { return data()[i]; }
  std::span<const T> span() noexcept { return {data(), size_}; }

 private:
  std::size_t size_;
  std::array<T, 16> few_{};
  std::vector<T> many_;
};

template <class Body>
xf::Error guarded(const Target& target, std::string_view op, Device device, Body&& body) noexcept {
  Status status = Status::kDropped;
  try {
    if (Slot* slot = find_slot(target.slot); slot != nullptr) status = body(*slot);
  } catch (...) {
    status = Status::kOutOfMemory;
  }
  if (status == Status::kOk) [[likely]]
    return xf::Error::Success();
  return failure(target.slot, target.type, status, op, device);
}

// Runs a set, and notes the order of its mesh's devices if something was set.
template <class Set>
Status noting_order(Slot& slot, const Target& target, Set&& set) noexcept {
  if (target.mesh_order == 0) return set();
  const std::int64_t before = slot.num_sets();
  const Status status = set();
  if (slot.num_sets() != before) slot.set_mesh_order(target.mesh_order);
  return status;
}

xf::Error get(std::int32_t device, xf::Span<const std::int64_t> state, xf::RemainingArgs,
              xf::RemainingRets results) {
  const Target target(state);
  return guarded(target, "get_state", device, [&](Slot& slot) {
    const std::size_t leaves = results.size() - 1;
    Pointers<std::byte*> out(leaves);
    for (std::size_t k = 0; k < leaves; ++k) {
      out[k] = static_cast<std::byte*>((*results.get<xf::AnyBuffer>(k + 1))->untyped_data());
    }
    return slot.get(target.slot, device, target.type, out.span());
  });
}

const std::byte* bytes_of(const xf::RemainingArgs& args, std::size_t i) {
  return static_cast<const std::byte*>(args.get<xf::AnyBuffer>(i)->untyped_data());
}

xf::Error set(std::int32_t device, xf::Span<const std::int64_t> state, xf::RemainingArgs args,
              xf::RemainingRets) {
  const Target target(state);
  return guarded(target, "set_state", device, [&](Slot& slot) {
    const std::size_t leaves = args.size() - 1;
    Pointers<const std::byte*> in(leaves);
    for (std::size_t k = 0; k < leaves; ++k) in[k] = bytes_of(args, k + 1);
    return noting_order(slot, target,
                        [&] { return slot.set(target.slot, device, target.type, in.span()); });
  });
}

xf::Error set_masked(std::int32_t device, xf::Span<const std::int64_t> state,
                     xf::RemainingArgs args, xf::RemainingRets) {
  const Target target(state);
  return guarded(target, "set_state", device, [&](Slot& slot) {
    const std::size_t leaves = (args.size() - 1) / 2;
    Pointers<const bool*> masks(leaves);
    Pointers<const std::byte*> in(leaves);
    for (std::size_t k = 0; k < leaves; ++k) {
      masks[k] = reinterpret_cast<const bool*>(bytes_of(args, k + 1));
      in[k] = bytes_of(args, leaves + k + 1);
    }
    return noting_order(slot, target, [&] {
      return slot.set_masked(target.slot, device, target.type, masks.span(), in.span());
    });
  });
}

std::int64_t row_of(const xf::RemainingArgs& args) {
  return *reinterpret_cast<const std::int32_t*>(bytes_of(args, 1));
}

xf::Error get_row(std::int32_t device, xf::Span<const std::int64_t> state, xf::RemainingArgs args,
                  xf::RemainingRets results) {
  const Target target(state);
  return guarded(target, "get_state", device, [&](Slot& slot) {
    const std::size_t leaves = results.size() - 1;
    Pointers<std::byte*> out(leaves);
    for (std::size_t k = 0; k < leaves; ++k) {
      out[k] = static_cast<std::byte*>((*results.get<xf::AnyBuffer>(k + 1))->untyped_data());
    }
    return slot.get_row(target.slot, device, target.type, row_of(args), out.span());
  });
}

xf::Error set_row(std::int32_t device, xf::Span<const std::int64_t> state, xf::RemainingArgs args,
                  xf::RemainingRets) {
  const Target target(state);
  return guarded(target, "set_state", device, [&](Slot& slot) {
    const std::size_t leaves = args.size() - 2;
    Pointers<const std::byte*> in(leaves);
    for (std::size_t k = 0; k < leaves; ++k) in[k] = bytes_of(args, k + 2);
    return slot.set_row(target.slot, device, target.type, row_of(args), {}, in.span());
  });
}

xf::Error set_row_masked(std::int32_t device, xf::Span<const std::int64_t> state,
                         xf::RemainingArgs args, xf::RemainingRets) {
  const Target target(state);
  return guarded(target, "set_state", device, [&](Slot& slot) {
    const std::size_t leaves = (args.size() - 2) / 2;
    Pointers<const bool*> masks(leaves);
    Pointers<const std::byte*> in(leaves);
    for (std::size_t k = 0; k < leaves; ++k) {
      masks[k] = reinterpret_cast<const bool*>(bytes_of(args, k + 2));
      in[k] = bytes_of(args, leaves + k + 2);
    }
    return slot.set_row(target.slot, device, target.type, row_of(args), masks.span(), in.span());
  });
}

// Lives as long as the executable does, and so through every run of it: a program that outlives the
// Python objects it came from still finds its slot.
class Share {
 public:
  static xf::TypeId id;

  explicit Share(SlotRef ref) noexcept : ref_(std::move(ref)) { ref_->add_program(1); }
  Share(Share&&) = delete;
  ~Share() { ref_->add_program(-1); }

 private:
  SlotRef ref_;
};
xf::TypeId Share::id = XLA_FFI_UNKNOWN_TYPE_ID;
xf::TypeInfo share_info = xf::MakeTypeInfo<Share>();

xf::ErrorOr<std::unique_ptr<Share>> instantiate(xf::Span<const std::int64_t> state) {
  const Target target(state);
  if (target.nonce != process_nonce()) {
    return xf::Unexpected(made_in_another_process());
  }
  SlotRef ref = SlotRef::share(target.slot);
  if (!ref) {
    return xf::Unexpected(slot_is_gone());
  }
  return std::make_unique<Share>(std::move(ref));
}

thread_local std::uint64_t fences = 0;

xf::Error fence() {
  ++fences;
  return xf::Error::Success();
}

xf::Error copy(xf::AnyBuffer from, xf::Result<xf::AnyBuffer> to) {
  if (from.size_bytes() > 0) {
    std::memcpy(to->untyped_data(), from.untyped_data(), from.size_bytes());
  }
  return xf::Error::Success();
}

xf::Error nothing(xf::RemainingArgs, xf::RemainingRets) { return xf::Error::Success(); }

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       xf::Ffi::BindInstantiate().Attr<xf::Span<const std::int64_t>>("state"));

auto bind_state() {
  return xf::Ffi::Bind()
      .Ctx<xf::DeviceOrdinal>()
      .Attr<xf::Span<const std::int64_t>>("state")
      .RemainingArgs()
      .RemainingRets();
}
XLA_FFI_DEFINE_HANDLER(kTypedGet, get, bind_state());
XLA_FFI_DEFINE_HANDLER(kTypedSet, set, bind_state());
XLA_FFI_DEFINE_HANDLER(kSetMasked, set_masked, bind_state());
XLA_FFI_DEFINE_HANDLER(kGetRow, get_row, bind_state());
XLA_FFI_DEFINE_HANDLER(kSetRow, set_row, bind_state());
XLA_FFI_DEFINE_HANDLER(kSetRowMasked, set_row_masked, bind_state());
XLA_FFI_DEFINE_HANDLER(kFence, fence, xf::Ffi::Bind());
XLA_FFI_DEFINE_HANDLER(kCopy, copy, xf::Ffi::Bind().Arg<xf::AnyBuffer>().Ret<xf::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(kNothing, nothing, xf::Ffi::Bind().RemainingArgs().RemainingRets());

// The short way, for operations that succeed. Whatever else comes is left to the typed handlers: a
// failed operation has done nothing, so that they can try again, and say why it fails.
template <class Operation>
bool succeeds(const XLA_FFI_CallFrame& frame, Operation&& operation) noexcept {
  const std::int64_t* state = find_state(frame);
  Device device = kNoDevice;
  if (state == nullptr || !find_device(frame, &device)) return false;
  const Target target(xf::Span<const std::int64_t>(state, kStateSize));
  Slot* slot = find_slot(target.slot);
  return slot != nullptr && operation(*slot, target, device) == Status::kOk;
}

bool get_quickly(const XLA_FFI_CallFrame& frame) noexcept {
  const XLA_FFI_Rets& rets = frame.rets;
  const LeafBuffers<std::byte> out(rets.size, rets.types, rets.rets, XLA_FFI_RetType_BUFFER);
  return out.valid() && succeeds(frame, [&](Slot& slot, const Target& target, Device device) {
           return slot.get(target.slot, device, target.type, out.span());
         });
}

bool set_quickly(const XLA_FFI_CallFrame& frame) noexcept {
  const XLA_FFI_Args& args = frame.args;
  const LeafBuffers<const std::byte> in(args.size, args.types, args.args, XLA_FFI_ArgType_BUFFER);
  return in.valid() && succeeds(frame, [&](Slot& slot, const Target& target, Device device) {
           return noting_order(
               slot, target, [&] { return slot.set(target.slot, device, target.type, in.span()); });
         });
}

XLA_FFI_Error* quick_get(XLA_FFI_CallFrame* frame) noexcept {
  return is_execution(*frame) && get_quickly(*frame) ? nullptr : kTypedGet(frame);
}

XLA_FFI_Error* quick_set(XLA_FFI_CallFrame* frame) noexcept {
  return is_execution(*frame) && set_quickly(*frame) ? nullptr : kTypedSet(frame);
}

}  // namespace

std::int64_t process_nonce() noexcept {
  static const std::int64_t nonce = [] {
    std::random_device device;
    const std::uint64_t bits = (std::uint64_t{device()} << 32) ^ device();
    return static_cast<std::int64_t>(bits >> 1);
  }();
  return nonce;
}

std::uint64_t fences_on_this_thread() noexcept { return fences; }

const CpuHandlers& cpu_handlers() noexcept {
  static const CpuHandlers handlers{kInstantiate, quick_get, quick_set,     kSetMasked,
                                    kGetRow,      kSetRow,   kSetRowMasked, kFence,
                                    kCopy,        kNothing,  &Share::id,    &share_info};
  return handlers;
}

}  // namespace storax::ffi
