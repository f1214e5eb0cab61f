// Handlers that load and store the states of many slots in one call, for hoisted programs.
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "call_frame.h"
#include "errors.h"
#include "handlers.h"
#include "storax/storax.h"
#include "xla/ffi/api/ffi.h"

namespace storax::ffi {
namespace {

namespace xf = ::xla::ffi;

// A decoded `states` attribute: the nonce, then each slot's number and its type's. A type's number
// is negative where the slot may not have been set: a flag, pred[], then stands before its leaves.
class Targets {
 public:
  Targets() = default;
  Targets(const std::int64_t* states, std::size_t size) noexcept
      : states_(states), size_((size - 1) / 2) {}

  std::int64_t nonce() const noexcept { return states_[0]; }
  std::size_t size() const noexcept { return size_; }
  SlotId slot(std::size_t i) const noexcept { return states_[1 + 2 * i]; }
  TypeId type(std::size_t i) const noexcept {
    const std::int64_t type = states_[2 + 2 * i];
    return static_cast<TypeId>(type < 0 ? -type : type);
  }
  bool has_flag(std::size_t i) const noexcept { return states_[2 + 2 * i] < 0; }

 private:
  const std::int64_t* states_ = nullptr;
  std::size_t size_ = 0;
};

// Finds types, of which neighbours mostly share one.
class Types {
 public:
  const Type* find(TypeId id) noexcept {
    if (id != id_) {
      type_ = find_type(id);
      id_ = id;
    }
    return type_;
  }

 private:
  TypeId id_ = kNoType;
  const Type* type_ = nullptr;
};

// How many slots ahead to fetch from other cores' caches, where the last program may have run.
constexpr std::size_t kAhead = 4;

// Runs `operation` on each slot that was set with pointers to its leaves; `buffer(i)` is where the
// i-th of all flags and leaves lies. Comes back with the first failure, and whose it was.
template <class T, class Buffer, class Operation>
Status for_each(const Targets& targets, Buffer&& buffer, std::size_t* failed,
                Operation&& operation) noexcept {
  std::array<T*, 16> few;
  std::vector<T*> many;
  std::size_t first = 0;
  Types types;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    *failed = i;
    if (i + kAhead < targets.size()) __builtin_prefetch(find_slot(targets.slot(i + kAhead)), 1);
    Slot* slot = find_slot(targets.slot(i));
    const Type* type = types.find(targets.type(i));
    if (slot == nullptr || type == nullptr) return Status::kDropped;
    const std::size_t leaves = type->num_leaves();
    if (targets.has_flag(i)) {
      const bool is_set = *reinterpret_cast<const bool*>(buffer(first++));
      if (!is_set) {
        first += leaves;
        continue;
      }
    }
    T** pointers = few.data();
    if (leaves > few.size()) {
      try {
        many.resize(leaves);
      } catch (...) {
        return Status::kOutOfMemory;
      }
      pointers = many.data();
    }
    for (std::size_t k = 0; k < leaves; ++k) pointers[k] = buffer(first + k);
    first += leaves;
    const Status status = operation(*slot, i, std::span<T* const>(pointers, leaves));
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

template <class Buffer>
Status load(const Targets& targets, Device device, Buffer&& result, std::size_t* failed) noexcept {
  return for_each<std::byte>(targets, result, failed,
                             [&](Slot& slot, std::size_t i, Leaves out) noexcept {
                               return slot.get(targets.slot(i), device, targets.type(i), out);
                             });
}

// All or nothing: what could make a set fail is looked at before the first one.
template <class Buffer>
Status store(const Targets& targets, Device device, Buffer&& operand,
             std::size_t* failed) noexcept {
  const Status status = for_each<const std::byte>(
      targets, operand, failed, [&](Slot& slot, std::size_t i, ConstLeaves) noexcept {
        return slot.can_set(targets.slot(i), device, targets.type(i));
      });
  if (status != Status::kOk) return status;
  return for_each<const std::byte>(targets, operand, failed,
                                   [&](Slot& slot, std::size_t i, ConstLeaves in) noexcept {
                                     return slot.set(targets.slot(i), device, targets.type(i), in);
                                   });
}

// And flags.
std::size_t num_leaves(const Targets& targets) noexcept {
  std::size_t leaves = 0;
  Types types;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    leaves += targets.has_flag(i);
    if (const Type* type = types.find(targets.type(i)); type != nullptr)
      leaves += type->num_leaves();
  }
  return leaves;
}

xf::Error report(const Targets& targets, std::size_t failed, Status status, const char* op,
                 Device device) {
  if (status == Status::kOk) return xf::Error::Success();
  return failure(targets.slot(failed), targets.type(failed), status, op, device);
}

xf::Error typed_load(std::int32_t device, xf::Span<const std::int64_t> states, xf::RemainingArgs,
                     xf::RemainingRets results) {
  const Targets targets(states.begin(), states.size());
  std::size_t failed = 0;
  *static_cast<std::int32_t*>((*results.get<xf::AnyBuffer>(0))->untyped_data()) = 0;
  const auto result = [&](std::size_t i) {
    return static_cast<std::byte*>((*results.get<xf::AnyBuffer>(i + 1))->untyped_data());
  };
  const Status status = load(targets, device, result, &failed);
  return report(targets, failed, status, "get_state", device);
}

xf::Error typed_store(std::int32_t device, xf::Span<const std::int64_t> states,
                      xf::RemainingArgs args, xf::RemainingRets) {
  const Targets targets(states.begin(), states.size());
  std::size_t failed = 0;
  const std::size_t others = args.size() - num_leaves(targets);
  const auto operand = [&](std::size_t i) {
    return static_cast<const std::byte*>(args.get<xf::AnyBuffer>(others + i)->untyped_data());
  };
  const Status status = store(targets, device, operand, &failed);
  return report(targets, failed, status, "set_state", device);
}

auto bind_states() {
  return xf::Ffi::Bind()
      .Ctx<xf::DeviceOrdinal>()
      .Attr<xf::Span<const std::int64_t>>("states")
      .RemainingArgs()
      .RemainingRets();
}
XLA_FFI_DEFINE_HANDLER(kTypedLoad, typed_load, bind_states());
XLA_FFI_DEFINE_HANDLER(kTypedStore, typed_store, bind_states());

// The short way, as in cpu_handlers.cc: what does not succeed is left to the typed handlers.

void* data_of(void* buffer) noexcept { return static_cast<const XLA_FFI_Buffer*>(buffer)->data; }

bool find_targets(const XLA_FFI_CallFrame& frame, Targets* targets, Device* device) noexcept {
  if (!is_execution(frame) || !find_device(frame, device)) return false;
  if (frame.attrs.size != 1 || frame.attrs.types[0] != XLA_FFI_AttrType_ARRAY) return false;
  const auto& states = *static_cast<const XLA_FFI_Array*>(frame.attrs.attrs[0]);
  if (states.dtype != XLA_FFI_DataType_S64) return false;
  *targets = Targets(static_cast<const std::int64_t*>(states.data), states.size);
  return true;
}

bool load_quickly(const XLA_FFI_CallFrame& frame) noexcept {
  Targets targets;
  Device device = kNoDevice;
  if (!find_targets(frame, &targets, &device)) return false;
  if (static_cast<std::size_t>(frame.rets.size) != num_leaves(targets) + 1) return false;
  *static_cast<std::int32_t*>(data_of(frame.rets.rets[0])) = 0;
  const auto result = [&](std::size_t i) {
    return static_cast<std::byte*>(data_of(frame.rets.rets[i + 1]));
  };
  std::size_t failed = 0;
  return load(targets, device, result, &failed) == Status::kOk;
}

bool store_quickly(const XLA_FFI_CallFrame& frame) noexcept {
  Targets targets;
  Device device = kNoDevice;
  if (!find_targets(frame, &targets, &device)) return false;
  const std::size_t leaves = num_leaves(targets), args = static_cast<std::size_t>(frame.args.size);
  if (args < leaves) return false;
  const auto operand = [&, others = args - leaves](std::size_t i) {
    return static_cast<const std::byte*>(data_of(frame.args.args[others + i]));
  };
  std::size_t failed = 0;
  return store(targets, device, operand, &failed) == Status::kOk;
}

XLA_FFI_Error* quick_load(XLA_FFI_CallFrame* frame) noexcept {
  return load_quickly(*frame) ? nullptr : kTypedLoad(frame);
}

XLA_FFI_Error* quick_store(XLA_FFI_CallFrame* frame) noexcept {
  return store_quickly(*frame) ? nullptr : kTypedStore(frame);
}

// Lives as long as the executable does, as `Share` of a single slot.
class Shares {
 public:
  static xf::TypeId id;

  explicit Shares(std::vector<SlotRef> refs) noexcept : refs_(std::move(refs)) {
    for (const SlotRef& ref : refs_) ref->add_program(1);
  }
  Shares(Shares&&) = delete;
  ~Shares() {
    for (const SlotRef& ref : refs_) ref->add_program(-1);
  }

 private:
  std::vector<SlotRef> refs_;
};
xf::TypeId Shares::id = XLA_FFI_UNKNOWN_TYPE_ID;
xf::TypeInfo shares_info = xf::MakeTypeInfo<Shares>();

xf::ErrorOr<std::unique_ptr<Shares>> instantiate(xf::Span<const std::int64_t> states) {
  const Targets targets(states.begin(), states.size());
  if (targets.nonce() != process_nonce()) return xf::Unexpected(made_in_another_process());
  std::vector<SlotRef> refs;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    SlotRef ref = SlotRef::share(targets.slot(i));
    if (!ref) return xf::Unexpected(slot_is_gone());
    refs.push_back(std::move(ref));
  }
  return std::make_unique<Shares>(std::move(refs));
}
XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       xf::Ffi::BindInstantiate().Attr<xf::Span<const std::int64_t>>("states"));

}  // namespace

const PackedHandlers& cpu_packed_handlers() noexcept {
  static const PackedHandlers handlers{kInstantiate, quick_load, quick_store, &Shares::id,
                                       &shares_info};
  return handlers;
}

}  // namespace storax::ffi
