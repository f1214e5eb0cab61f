// Handlers that load and store the states of many slots in one call, for hoisted programs.
#include <algorithm>
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

// What a call of a program loads or stores, found once: what the attribute `states` names. Lives as
// long as the executable does, as `Share` of a single slot.
class Plan {
 public:
  static xf::TypeId id;

  struct Step {
    SlotRef slot;
    TypeId type;
    std::uint32_t leaves;
    bool has_flag;  // a pred[] before the leaves says whether the slot has been set
  };

  explicit Plan(std::vector<Step> steps) noexcept : steps_(std::move(steps)) {
    for (const Step& step : steps_) {
      step.slot->add_program(1);
      buffers_ += step.leaves + step.has_flag;
    }
  }
  Plan(Plan&&) = delete;
  ~Plan() {
    for (const Step& step : steps_) step.slot->add_program(-1);
  }

  std::span<const Step> steps() const noexcept { return steps_; }
  std::size_t num_buffers() const noexcept { return buffers_; }  // leaves and flags

 private:
  std::vector<Step> steps_;
  std::size_t buffers_ = 0;
};
xf::TypeId Plan::id = XLA_FFI_UNKNOWN_TYPE_ID;
xf::TypeInfo plan_info = xf::MakeTypeInfo<Plan>();

xf::ErrorOr<std::unique_ptr<Plan>> instantiate(xf::Span<const std::int64_t> states) {
  if (states[0] != process_nonce()) return xf::Unexpected(made_in_another_process());
  std::vector<Plan::Step> steps;
  for (std::size_t i = 1; i + 1 < states.size(); i += 2) {
    SlotRef slot = SlotRef::share(states[i]);
    const bool has_flag = states[i + 1] < 0;
    const Type* type = find_type(static_cast<TypeId>(has_flag ? -states[i + 1] : states[i + 1]));
    if (!slot || type == nullptr) return xf::Unexpected(slot_is_gone());
    const auto leaves = static_cast<std::uint32_t>(type->num_leaves());
    steps.push_back({std::move(slot), type->id(), leaves, has_flag});
  }
  return std::make_unique<Plan>(std::move(steps));
}

// How many slots ahead to fetch from other cores' caches, where the last program may have run.
constexpr std::size_t kAhead = 4;

// Runs `operation` on each slot that was set with pointers to its leaves; `buffer(i)` is where the
// i-th of all flags and leaves lies. Comes back with the first failure, and whose it was.
template <class T, class Buffer, class Operation>
Status for_each(const Plan& plan, Buffer&& buffer, std::size_t* failed,
                Operation&& operation) noexcept {
  std::array<T*, 16> few;
  std::vector<T*> many;
  const std::span<const Plan::Step> steps = plan.steps();
  std::size_t first = 0;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    *failed = i;
    if (i + kAhead < steps.size()) __builtin_prefetch(&*steps[i + kAhead].slot, 1);
    const auto& [slot, type, leaves, has_flag] = steps[i];
    if (has_flag) {
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
    const Status status = operation(steps[i], std::span<T* const>(pointers, leaves));
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

template <class Buffer>
Status load(const Plan& plan, Device device, Buffer&& result, std::size_t* failed) noexcept {
  return for_each<std::byte>(plan, result, failed,
                             [&](const Plan::Step& step, Leaves out) noexcept {
                               return step.slot->get(step.slot.id(), device, step.type, out);
                             });
}

// All or nothing: what could make a set fail is looked at before the first one.
template <class Buffer>
Status store(const Plan& plan, Device device, Buffer&& operand, std::size_t* failed) noexcept {
  const bool settled = std::ranges::all_of(plan.steps(), [&](const Plan::Step& step) {
    return step.slot->looks_settled(device, step.type);
  });
  if (!settled) {
    const Status status = for_each<const std::byte>(
        plan, operand, failed, [&](const Plan::Step& step, ConstLeaves) noexcept {
          return step.slot->can_set(step.slot.id(), device, step.type);
        });
    if (status != Status::kOk) return status;
  }
  return for_each<const std::byte>(plan, operand, failed,
                                   [&](const Plan::Step& step, ConstLeaves in) noexcept {
                                     return step.slot->set(step.slot.id(), device, step.type, in);
                                   });
}

xf::Error report(const Plan& plan, std::size_t failed, Status status, const char* op,
                 Device device) {
  if (status == Status::kOk) return xf::Error::Success();
  const Plan::Step& step = plan.steps()[failed];
  return failure(step.slot.id(), step.type, status, op, device);
}

xf::Error typed_load(std::int32_t device, const Plan* plan, xf::Span<const std::int64_t>,
                     xf::RemainingArgs, xf::RemainingRets results) {
  std::size_t failed = 0;
  *static_cast<std::int32_t*>((*results.get<xf::AnyBuffer>(0))->untyped_data()) = 0;
  const auto result = [&](std::size_t i) {
    return static_cast<std::byte*>((*results.get<xf::AnyBuffer>(i + 1))->untyped_data());
  };
  const Status status = load(*plan, device, result, &failed);
  return report(*plan, failed, status, "get_state", device);
}

xf::Error typed_store(std::int32_t device, const Plan* plan, xf::Span<const std::int64_t>,
                      xf::RemainingArgs args, xf::RemainingRets) {
  std::size_t failed = 0;
  const std::size_t others = args.size() - plan->num_buffers();
  const auto operand = [&](std::size_t i) {
    return static_cast<const std::byte*>(args.get<xf::AnyBuffer>(others + i)->untyped_data());
  };
  const Status status = store(*plan, device, operand, &failed);
  return report(*plan, failed, status, "set_state", device);
}

auto bind_states() {
  return xf::Ffi::Bind()
      .Ctx<xf::DeviceOrdinal>()
      .Ctx<xf::State<Plan>>()
      .Attr<xf::Span<const std::int64_t>>("states")
      .RemainingArgs()
      .RemainingRets();
}
XLA_FFI_DEFINE_HANDLER(kTypedLoad, typed_load, bind_states());
XLA_FFI_DEFINE_HANDLER(kTypedStore, typed_store, bind_states());

// The short way, as in cpu_handlers.cc: what does not succeed is left to the typed handlers.

void* data_of(void* buffer) noexcept { return static_cast<const XLA_FFI_Buffer*>(buffer)->data; }

bool load_quickly(const XLA_FFI_CallFrame& frame) noexcept {
  Device device = kNoDevice;
  const Plan* plan = find_instance<Plan>(frame);
  if (plan == nullptr || !find_device(frame, &device)) return false;
  if (static_cast<std::size_t>(frame.rets.size) != plan->num_buffers() + 1) return false;
  *static_cast<std::int32_t*>(data_of(frame.rets.rets[0])) = 0;
  const auto result = [&](std::size_t i) {
    return static_cast<std::byte*>(data_of(frame.rets.rets[i + 1]));
  };
  std::size_t failed = 0;
  return load(*plan, device, result, &failed) == Status::kOk;
}

bool store_quickly(const XLA_FFI_CallFrame& frame) noexcept {
  Device device = kNoDevice;
  const Plan* plan = find_instance<Plan>(frame);
  if (plan == nullptr || !find_device(frame, &device)) return false;
  const std::size_t buffers = plan->num_buffers(), args = static_cast<std::size_t>(frame.args.size);
  if (args < buffers) return false;
  const auto operand = [&, others = args - buffers](std::size_t i) {
    return static_cast<const std::byte*>(data_of(frame.args.args[others + i]));
  };
  std::size_t failed = 0;
  return store(*plan, device, operand, &failed) == Status::kOk;
}

XLA_FFI_Error* quick_load(XLA_FFI_CallFrame* frame) noexcept {
  return is_execution(*frame) && load_quickly(*frame) ? nullptr : kTypedLoad(frame);
}

XLA_FFI_Error* quick_store(XLA_FFI_CallFrame* frame) noexcept {
  return is_execution(*frame) && store_quickly(*frame) ? nullptr : kTypedStore(frame);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, instantiate,
                       xf::Ffi::BindInstantiate().Attr<xf::Span<const std::int64_t>>("states"));

}  // namespace

const PackedHandlers& cpu_packed_handlers() noexcept {
  static const PackedHandlers handlers{kInstantiate, quick_load, quick_store, &Plan::id,
                                       &plan_info};
  return handlers;
}

}  // namespace storax::ffi
