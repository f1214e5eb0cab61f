// The Python extension storax._core: slots, types and failures for the Python layer, and the FFI
// handlers as capsules for JAX to register.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../ffi/handlers.h"
#include "flatten.h"
#include "jit.h"
#include "loan.h"
#include "storax/storax.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace storax {
namespace {

constexpr std::size_t kReleaseGilBytes = 1 << 16;
constexpr std::align_val_t kAlignment{64};

using LeafTuple = std::tuple<std::string, std::size_t, std::vector<std::int64_t>>;
using LevelTuple = std::tuple<std::vector<int>, bool>;
using MeshTuple = std::tuple<std::string, std::int64_t>;

[[noreturn]] void raise(const SlotRef& slot, Status status, const char* op, Device device,
                        TypeId asked) {
  throw std::runtime_error(slot->explain(slot.id(), status, op, device, asked));
}

const Type& type_at(TypeId id) {
  const Type* type = id == kNoType ? nullptr : find_type(id);
  if (type == nullptr) throw std::invalid_argument("no such type");
  return *type;
}

TypeId make_type(const std::vector<LeafTuple>& leaves, std::uint64_t structure,
                 const std::string& structure_text, const std::vector<LevelTuple>& levels,
                 const std::vector<MeshTuple>& mesh) {
  TypeDesc desc;
  for (const auto& [dtype, item_bytes, dims] : leaves)
    desc.leaves.push_back({dtype, item_bytes, dims});
  desc.structure = structure;
  desc.structure_text = structure_text;
  for (const auto& [axes, moved] : levels) desc.levels.push_back({axes, moved});
  for (const auto& [name, size] : mesh) desc.mesh.push_back({name, size});
  return intern_type(std::move(desc));
}

// The last memory of some size that was given back, for the next get of that size: what comes from
// the system is cleared page by page, which takes ten times as long as to copy a state. Under the
// GIL.
struct Spare {
  void* data = nullptr;
  std::size_t size = 0;
};
Spare spare;
constexpr std::size_t kSpareFrom = 1 << 17, kSpareTo = 1 << 24;

// Fresh memory, aligned so that XLA can use it without a copy. Python reads it as a buffer, which
// is made in a fraction of the time that an array of NumPy's takes.
class Bytes {
 public:
  explicit Bytes(std::size_t size) : size_(size) {
    if (spare.size == size) std::swap(data_, spare.data);
    if (data_ == nullptr) data_ = ::operator new(std::max<std::size_t>(size, 1), kAlignment);
  }
  Bytes(Bytes&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  ~Bytes() {
    if (size_ >= kSpareFrom && size_ <= kSpareTo && data_ != nullptr) {
      std::swap(data_, spare.data);
      spare.size = size_;
    }
    ::operator delete(data_, kAlignment);
  }

  std::byte* data() noexcept { return static_cast<std::byte*>(data_); }
  std::size_t size() const noexcept { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_;
};

int get_buffer(PyObject* self, Py_buffer* view, int flags) noexcept {
  auto* bytes = nb::inst_ptr<Bytes>(self);
  return PyBuffer_FillInfo(view, self, bytes->data(), static_cast<Py_ssize_t>(bytes->size()), 0,
                           flags);
}

PyType_Slot kBytesSlots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};

// Runs `operation`, without the GIL if it copies enough for that to pay.
template <class Operation>
Status without_gil(const Type& type, Operation&& operation) {
  std::optional<nb::gil_scoped_release> released;
  if (type.total_bytes() >= kReleaseGilBytes) released.emplace();
  return operation();
}

// None if the state is lent out.
nb::object slot_get(const SlotRef& slot, TypeId type_id, Device device) {
  const Type& type = type_at(type_id);
  nb::list leaves;
  std::vector<std::byte*> out;
  for (std::size_t k = 0; k < type.num_leaves(); ++k) {
    Bytes leaf(type.leaf_bytes(k));
    out.push_back(leaf.data());
    leaves.append(nb::cast(std::move(leaf)));
  }
  const Status status =
      without_gil(type, [&] { return slot->get(slot.id(), device, type_id, out); });
  if (status == Status::kLent) return nb::none();
  if (status != Status::kOk) raise(slot, status, "get_state", device, type_id);
  return std::move(leaves);
}

void check_count(const Type& type, std::size_t given) {
  if (given != type.num_leaves()) throw std::invalid_argument("one address per leaf");
}

// False if the state is lent out.
bool slot_set(const SlotRef& slot, TypeId type_id, Device device,
              const std::vector<std::uintptr_t>& addresses) {
  const Type& type = type_at(type_id);
  check_count(type, addresses.size());
  std::vector<const std::byte*> in;
  for (std::uintptr_t a : addresses) in.push_back(reinterpret_cast<const std::byte*>(a));
  const Status status =
      without_gil(type, [&] { return slot->set(slot.id(), device, type_id, in); });
  if (status != Status::kOk && status != Status::kLent) {
    raise(slot, status, "set_state", device, type_id);
  }
  return status == Status::kOk;
}

bool slot_set_masked(const SlotRef& slot, TypeId type_id, Device device,
                     const std::vector<std::uintptr_t>& mask_addresses,
                     const std::vector<std::uintptr_t>& addresses) {
  const Type& type = type_at(type_id);
  check_count(type, addresses.size());
  check_count(type, mask_addresses.size());
  std::vector<const bool*> masks;
  std::vector<const std::byte*> in;
  for (std::uintptr_t a : mask_addresses) masks.push_back(reinterpret_cast<const bool*>(a));
  for (std::uintptr_t a : addresses) in.push_back(reinterpret_cast<const std::byte*>(a));
  const Status status =
      without_gil(type, [&] { return slot->set_masked(slot.id(), device, type_id, masks, in); });
  if (status != Status::kOk && status != Status::kLent) {
    raise(slot, status, "set_state", device, type_id);
  }
  return status == Status::kOk;
}

bool slot_copy_out(const SlotRef& slot, TypeId type_id, Device device,
                   const std::vector<std::uintptr_t>& addresses) {
  const Type& type = type_at(type_id);
  check_count(type, addresses.size());
  std::vector<std::byte*> out;
  for (std::uintptr_t a : addresses) out.push_back(reinterpret_cast<std::byte*>(a));
  const Status status =
      without_gil(type, [&] { return slot->get(slot.id(), device, type_id, out); });
  if (status != Status::kOk && status != Status::kLent) {
    raise(slot, status, "get_state", device, type_id);
  }
  return status == Status::kOk;
}

bool slot_reclaim(const SlotRef& slot, const std::vector<std::uintptr_t>& addresses) {
  const Type& type = type_at(slot->type());
  check_count(type, addresses.size());
  std::vector<const std::byte*> in;
  for (std::uintptr_t a : addresses) in.push_back(reinterpret_cast<const std::byte*>(a));
  const Status status = without_gil(type, [&] { return slot->reclaim(slot.id(), in); });
  if (status == Status::kOutOfMemory) throw std::bad_alloc();
  return status == Status::kOk;
}

// Why an operation that finds no state in memory fails: there never was any, the types disagree, or
// the state is lost.
std::string complaint(const SlotRef& slot, const char* op, TypeId asked, Device device) {
  Status status = slot->device() == device ? Status::kLost : Status::kWrongDevice;
  if (!slot->accepts(slot.id(), asked)) status = Status::kTypeMismatch;
  if (slot->type() == kNoType) status = Status::kNeverSet;
  return slot->explain(slot.id(), status, op, device, asked);
}

// Keeps a state in place for as long as it lives.
class Pin {
 public:
  explicit Pin(const SlotRef& slot) : ref_(SlotRef::share(slot.id())) {
    if (ref_) ref_->pin(1);
  }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;
  ~Pin() {
    if (ref_) ref_->pin(-1);
  }

 private:
  SlotRef ref_;
};

nb::object type_moves(TypeId to, TypeId from) {
  Permutations moves;
  if (to != from && !type_at(to).agrees_up_to_moves(type_at(from), &moves)) return nb::none();
  return nb::cast(moves);
}

nb::list slot_events(const SlotRef& slot) {
  nb::list events;
  for (const Event& e : slot->events()) {
    events.append(nb::make_tuple(e.kind == Event::Kind::kGet ? "get" : "set", e.version,
                                 nb::bytes(e.first_leaf.data(), e.first_leaf.size())));
  }
  return events;
}

nb::capsule handler_capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

nb::dict handler_capsules() {
  const ffi::CpuHandlers& h = ffi::cpu_handlers();
  nb::dict capsules;
  capsules["instantiate"] = handler_capsule(h.instantiate);
  capsules["get"] = handler_capsule(h.get);
  capsules["set"] = handler_capsule(h.set);
  capsules["set_masked"] = handler_capsule(h.set_masked);
  capsules["get_row"] = handler_capsule(h.get_row);
  capsules["set_row"] = handler_capsule(h.set_row);
  capsules["set_row_masked"] = handler_capsule(h.set_row_masked);
  capsules["fence"] = handler_capsule(h.fence);
  capsules["copy"] = handler_capsule(h.copy);
  capsules["nothing"] = handler_capsule(h.nothing);
  const ffi::PackedHandlers& packed = ffi::cpu_packed_handlers();
  capsules["instantiate_packed"] = handler_capsule(packed.instantiate);
  capsules["load"] = handler_capsule(packed.load);
  capsules["store"] = handler_capsule(packed.store);
  return capsules;
}

nb::dict type_registration(XLA_FFI_TypeId* id, XLA_FFI_TypeInfo* info) {
  nb::dict registration;
  registration["type_id"] = nb::capsule(static_cast<void*>(id));
  registration["type_info"] = nb::capsule(static_cast<void*>(info));
  return registration;
}

// What XLA has to know of the types of what compiled programs hold, by name.
nb::dict type_registrations() {
  const ffi::CpuHandlers& h = ffi::cpu_handlers();
  const ffi::PackedHandlers& packed = ffi::cpu_packed_handlers();
  nb::dict types;
  types["storax.Share"] = type_registration(h.share_type_id, h.share_type_info);
  types["storax.Shares"] = type_registration(packed.shares_type_id, packed.shares_type_info);
  return types;
}

}  // namespace
}  // namespace storax

NB_MODULE(_core, m) {
  using namespace storax;
  // JAX's caches live until the interpreter is gone, and with them some handles: not our leak.
  nb::set_leak_warnings(false);
  m.doc() = "storax's engine: slots, their types, and XLA FFI handlers. Not for direct use.";

  nb::class_<Bytes>(m, "Bytes", "Memory, as a buffer.", nb::type_slots(kBytesSlots));
  nb::class_<SlotRef>(m, "Slot", "A share in the life of one slot.", nb::is_weak_referenceable())
      .def_prop_ro(
          "id", [](const SlotRef& s) { return s.id(); }, "What programs name the slot by.")
      .def_prop_ro("name", [](const SlotRef& s) { return s->name(); })
      .def_prop_ro(
          "type", [](const SlotRef& s) { return s->type(); },
          "The type's id; 0 until the first set.")
      .def_prop_ro(
          "device", [](const SlotRef& s) { return s->device(); },
          "The device's ordinal; -1 until the first set, or if mapped over a mesh.")
      .def_prop_ro("devices", [](const SlotRef& s) { return s->devices(); })
      .def_prop_ro(
          "version", [](const SlotRef& s) { return s->version(); }, "Grows with every set.")
      .def_prop_rw(
          "mesh_order", [](const SlotRef& s) { return s->mesh_order(); },
          [](const SlotRef& s, std::int32_t order) { s->set_mesh_order(order); },
          "In which order its devices stand in their mesh: a number of the caller's, 0 if unknown.")
      .def_prop_ro("num_gets", [](const SlotRef& s) { return s->num_gets(); })
      .def_prop_ro("num_sets", [](const SlotRef& s) { return s->num_sets(); })
      .def_prop_ro(
          "num_programs", [](const SlotRef& s) { return s->num_programs(); },
          "How many operations in compiled programs name the slot.")
      .def(
          "rests_at",
          [](const SlotRef& s, std::int64_t version) {
            // Programs first: those that are gone have set what they set.
            return s->num_programs() == 0 && failures::pending() == 0 && s->version() == version;
          },
          "version"_a,
          "Whether the state is of this version, no compiled program names the slot, and no "
          "failure is "
          "to be raised.")
      .def(
          "accepts", [](const SlotRef& s, TypeId type) { return s->accepts(s.id(), type); },
          "type"_a, "Whether an operation of this type would agree with the state.")
      .def(
          "reads_as", [](const SlotRef& s, TypeId type) { return s->reads_as(s.id(), type); },
          "type"_a, "Whether a get of this type, outside of any mapped program, would succeed.")
      .def("get", &slot_get, "type"_a, "device"_a,
           "Each leaf's bytes in fresh memory; None if the state is lent out. RuntimeError if the "
           "slot "
           "holds another type.")
      .def("set", &slot_set, "type"_a, "device"_a, "addresses"_a,
           "Copies the leaves at these addresses in; False if the state is lent out. RuntimeError "
           "if "
           "the slot holds another type.")
      .def("set_masked", &slot_set_masked, "type"_a, "device"_a, "mask_addresses"_a, "addresses"_a,
           "Like set, where the masks are true.")
      .def_prop_ro(
          "has_memory", [](const SlotRef& s) { return s->has_memory(); },
          "Whether there is a state, and it is not lent out.")
      .def_prop_ro(
          "is_pinned", [](const SlotRef& s) { return s->is_pinned(); },
          "Whether the state must stay in place, as programs may run operations on it.")
      .def("copy_out", &slot_copy_out, "type"_a, "device"_a, "addresses"_a,
           "Copies the leaves to these addresses; False if the state is lent out.")
      .def(
          "explain_get",
          [](const SlotRef& s, TypeId asked, Device device) {
            return complaint(s, "get_state", asked, device);
          },
          "asked"_a, "device"_a, "Why a get of this type fails.")
      .def(
          "explain_set",
          [](const SlotRef& s, TypeId asked, Device device) {
            return complaint(s, "set_state", asked, device);
          },
          "asked"_a, "device"_a, "Why a set of this type fails.")
      .def("reclaim", &slot_reclaim, "addresses"_a,
           "Ends a loan: copies the leaves at these addresses in. False if nothing is lent, or the "
           "state is spread over several devices. The caller holds the LoanLock.")
      .def(
          "lose", [](const SlotRef& s) { s->lose(); },
          "Ends a loan whose state is lost. The caller holds the LoanLock.")
      .def(
          "watch", [](const SlotRef& s, std::size_t n) { s->watch(n); }, "capacity"_a,
          "Keeps the next `capacity` events.")
      .def("events", &slot_events, "(kind, version, first bytes of the first leaf) per event.");

  m.def("create_slot", [](std::string name) { return SlotRef::create(std::move(name)); }, "name"_a);
  m.def(
      "share_slot",
      [](SlotId id) {
        SlotRef slot = SlotRef::share(id);
        if (!slot) {
          throw std::runtime_error(
              "storax: a StateIndex that a program uses is gone. If it was made inside of a "
              "function that JAX traced, it lived no longer than that: make it outside, and "
              "pass it in or close over it. If its name now stands for another, JAX remembers "
              "what it traced with the first: call `jax.clear_caches()`, or define the "
              "functions that use it again.");
        }
        return slot;
      },
      "id"_a, "The live slot of that id. RuntimeError if it is gone.");
  m.def("intern_type", &make_type, "leaves"_a, "structure"_a, "structure_text"_a, "levels"_a,
        "mesh"_a,
        "The id of a type. leaves: (dtype, bytes per element, dims); levels: (axis per leaf or -1, "
        "moved); mesh: (axis name, size).");
  nb::class_<Pin>(m, "Pin",
                  "Keeps a slot's state in place, never lent out, for as long as it lives.")
      .def(nb::init<const SlotRef&>(), "slot"_a);
  m.def(
      "type_moves", &type_moves, "to"_a, "source"_a,
      nb::sig("def type_moves(to: int, source: int) -> list[list[int]] | None"),
      "How to transpose each leaf of a state of type `source` into one of type `to`: its axes, or "
      "an empty list if they stay as they are. None if the types do not agree; an empty list if "
      "they are the same.");
  m.def("type_bytes", [](TypeId id) { return type_at(id).total_bytes(); }, "type"_a);
  m.def("type_text", [](TypeId id) { return type_at(id).str(); }, "type"_a);
  m.def("record_failure", [](const std::string& text) { failures::record(0, text); }, "text"_a);
  m.def(
      "acknowledge_failure", [](const std::string& text) { failures::acknowledge(text); }, "text"_a,
      "Forgets the recorded failure whose message is part of `text`.");
  m.def("pending_failures", &failures::pending);
  m.def("take_failures", &failures::take);
  m.def(
      "usage", [] { return std::make_tuple(usage().slots, usage().bytes, usage().programs); },
      "(live slots, bytes of their states, operations on them in compiled programs)");
  m.def("num_programs", [] { return usage().programs; });
  m.def(
      "passes_fence",
      [](const nb::callable& dispatch) {
        const std::uint64_t before = ffi::fences_on_this_thread();
        dispatch();
        return ffi::fences_on_this_thread() != before;
      },
      "dispatch"_a,
      "Whether a fence has run, on this thread, by the time that `dispatch()` has returned.");
  m.def("process_nonce", &ffi::process_nonce);
  m.def("handlers", &handler_capsules);
  m.def("handler_types", &type_registrations);
  python::bind_flatten(m);
  python::bind_loans(m);
  python::bind_jit(m);
}
