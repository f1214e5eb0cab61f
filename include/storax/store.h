// Slots: where state lives. A slot is named by a SlotId, an integer that fits a program's
// attribute, and holds one state, or one per device if its type is mapped over a mesh.
//
// Lifetime: a SlotRef keeps its slot alive. Python's index objects and compiled programs hold one
// each. When the last goes, the state's memory is freed and the id is dead for ever: the table
// entry is reused under a new generation, and an operation that names the old one gets kDropped.
//
// A state can be lent out: it then lies in memory of somebody else's, who works on it in place, and
// operations report kLent. A slot that compiled programs run operations on must not be lent out.
// Whoever lends a state, or calls it back, holds the slot's loan mutex.
//
// Threads: everything here may be called from any thread. An operation on a slot is atomic: readers
// see the whole of one set, never parts of two.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "storax/annotations.h"
#include "storax/spin_lock.h"
#include "storax/status.h"
#include "storax/type.h"

namespace storax {

class Walk;

using SlotId = std::int64_t;  // generation * 2^32 + table index; never negative
using Device = int;           // XLA's device ordinal within the process
inline constexpr Device kNoDevice = -1;
inline constexpr Device kEveryDevice = -2;  // of a state that devices have until they set their own

// An operation's arrays: one pointer per leaf, in C order. Zero-size leaves may be null.
using ConstLeaves = std::span<const std::byte* const>;
using Leaves = std::span<std::byte* const>;

// What happened to a slot, for those who look inside.
struct Event {
  enum class Kind : std::uint8_t { kGet, kSet } kind;
  std::int64_t version;               // of the state that was read or written
  std::vector<std::byte> first_leaf;  // at most its first 16 bytes
};

// A state that is lent out, in whatever form its keeper has it. It may end on any thread.
class Loan {
 public:
  Loan() = default;
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
  virtual ~Loan() = default;
};

// Differs from what it was if any state has been lent out, or called back, or needs to be in place.
std::int64_t layout_epoch() noexcept;

// Is written under a lock, and may be looked at without it.
template <class T>
class Shown {
 public:
  Shown(T value = T{}) noexcept : value_(value) {}
  Shown(const Shown& other) noexcept : value_(T{other}) {}
  Shown& operator=(const Shown& other) noexcept {
    value_.store(T{other}, std::memory_order_relaxed);
    return *this;
  }
  operator T() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<T> value_;
};

class alignas(64) Slot {
 public:
  // Copies the state into `out`, laid out as `want` says.
  Status get(SlotId id, Device device, TypeId want, Leaves out) noexcept;

  // Makes `in` the state. The first set fixes the slot's type and, unless the type is mapped over a
  // mesh, its device. A state that was set before the mapped program is every device's at first;
  // the first set there makes the type a mapped one. A mapped state that is the same on every
  // device can be read as one.
  Status set(SlotId id, Device device, TypeId type, ConstLeaves in) noexcept;

  // Like set, but writes only the elements whose mask is true; masks[k] has one bool per element of
  // leaf k. Masks that are false everywhere do nothing and report kOk, whatever the slot holds:
  // that branch was not taken. With nothing set before, others must be true everywhere.
  Status set_masked(SlotId id, Device device, TypeId type, std::span<const bool* const> masks,
                    ConstLeaves in) noexcept;

  // The same for one row of a state whose leaves all have a leading axis of rows, as stacked layers
  // have. `want` and `type` are types of the whole state; `out`, `in` and the masks are one row's.
  // `masks` may be empty. A first set of one row is kPartialFirstSet.
  Status get_row(SlotId id, Device device, TypeId want, std::int64_t row, Leaves out) noexcept;
  Status set_row(SlotId id, Device device, TypeId type, std::int64_t row,
                 std::span<const bool* const> masks, ConstLeaves in) noexcept;

  // What a set would report; kOk if it would be the first one.
  Status can_set(SlotId id, Device device, TypeId type) noexcept;
  // Whether a set needs but to copy. For those whose share keeps the slot alive; it takes no lock,
  // and as after can_set, another thread may change what it found.
  bool looks_settled(Device device, TypeId type) const noexcept STORAX_NO_ANALYSIS {
    return type_id_ == type && home_.device == device;
  }

  // A message for a failed operation: which index, what it holds, what was asked, how to mend it.
  // `op` is "get_state" or "set_state".
  std::string explain(SlotId id, Status status, std::string_view op, Device device, TypeId asked);

  std::string name();
  TypeId type() noexcept;         // kNoType until the first set
  Device device() noexcept;       // kNoDevice until the first set, or if it is on several
  std::vector<Device> devices();  // those with a state, in the order of their first sets
  // Grows with every set; equal versions mean equal states. One atomic load.
  std::int64_t version() const noexcept { return version_.load(std::memory_order_acquire); }
  // How many times get and set have succeeded.
  std::int64_t num_gets() noexcept;
  std::int64_t num_sets() noexcept;
  // Whether an operation of this type would find a state that it agrees with.
  bool accepts(SlotId id, TypeId type) noexcept;
  // Whether a get of this type, outside of any mapped program, would succeed.
  bool reads_as(SlotId id, TypeId type) noexcept;
  // How many operations in compiled programs name this slot.
  std::int64_t num_programs() const noexcept { return programs_.load(std::memory_order_acquire); }
  void add_program(std::int64_t n) noexcept;

  // Taken for as long as it takes to dispatch a program; never wait for it holding the GIL.
  std::recursive_timed_mutex& loan_mutex() noexcept { return loan_mutex_; }
  // Whether the thread that has the mutex is in a program that works on the lent state in place:
  // the program's own callbacks may run there, and find the mutex theirs but the state gone.
  bool is_worked_on() const noexcept { return workers_.load(std::memory_order_acquire) > 0; }
  void work(std::int64_t n) noexcept { workers_.fetch_add(n, std::memory_order_acq_rel); }

  // Frees the state's memory: it is `loan` from here on. Fixes type and device as a set does; the
  // device is kNoDevice if the state is spread over several. kChanged, and nothing done, if
  // `version` is neither the state's nor -1.
  Status lend(SlotId id, Device device, TypeId type, std::unique_ptr<Loan> loan,
              std::int64_t version = -1) noexcept;
  // Ends the loan: `in` is the state, in the slot's own memory on the device it was lent from.
  Status reclaim(SlotId id, ConstLeaves in) noexcept;
  // Ends the loan, and the state is lost: until the next set, operations report kLost.
  void lose() noexcept;
  // The loan, or nullptr; valid while the mutex is held.
  Loan* loan() noexcept;
  // Says that the lent state has been read, or has changed.
  void count_lent_get() noexcept;
  void count_lent_set() noexcept;
  bool has_memory() noexcept;  // neither unset, nor lent out, nor lost

  // In which order the devices of a mapped state stand in their mesh, as a number of the caller's:
  // that of the last program to have set it. 0 if none has.
  std::int32_t mesh_order() const noexcept { return mesh_order_.load(std::memory_order_acquire); }
  void set_mesh_order(std::int32_t order) noexcept {
    mesh_order_.store(order, std::memory_order_release);
  }

  // Pins keep a state in place, as programs do: for those that are still to come.
  bool is_pinned() const noexcept {
    return pins_.load(std::memory_order_acquire) > 0 || num_programs() > 0;
  }
  void pin(std::int64_t n) noexcept;

  // Starts to keep the next `capacity` events, forgetting earlier ones; 0 stops.
  void watch(std::size_t capacity);
  std::vector<Event> events();

 private:
  friend class SlotRef;
  friend SlotId create_slot_id(std::string name);

  struct Cell {
    Shown<Device> device = kNoDevice;
    std::byte* data = nullptr;
  };

  bool is_live(SlotId id) const noexcept STORAX_REQUIRES(lock_);
  Cell* find_cell(Device device) noexcept STORAX_REQUIRES(lock_);
  const Cell& cell_to_read(Device device, TypeId asked) noexcept STORAX_REQUIRES(lock_);
  bool inherits(const Type& asked) noexcept STORAX_REQUIRES(lock_);
  bool same_everywhere() noexcept STORAX_REQUIRES(lock_);
  Status check(SlotId id, Device device, Event::Kind op, TypeId asked,
               std::vector<Walk>* walks) noexcept STORAX_REQUIRES(lock_);
  Status prepare_set(SlotId id, Device device, TypeId type, std::vector<Walk>* walks,
                     Cell** cell) noexcept STORAX_REQUIRES(lock_);
  Status inherit(SlotId id, Device device, TypeId type) noexcept STORAX_REQUIRES(lock_);
  Status check_row(SlotId id, Device device, Event::Kind op, TypeId asked,
                   std::int64_t row) noexcept STORAX_REQUIRES(lock_);
  void count_get(const Cell& cell) noexcept STORAX_REQUIRES(lock_);
  void count_set(const Cell& cell) noexcept STORAX_REQUIRES(lock_);
  void note(Event::Kind kind, const Cell& cell) noexcept STORAX_REQUIRES(lock_);
  void drop() noexcept;

  // What every operation touches, in one cache line: XLA runs a program on whichever of its threads
  // is free, so that what is written here moves from core to core.
  SpinLock lock_;
  bool is_watched_ STORAX_GUARDED_BY(lock_) = false;
  std::uint32_t generation_ STORAX_GUARDED_BY(lock_) = 0;
  Shown<TypeId> type_id_ STORAX_GUARDED_BY(lock_) = kNoType;
  std::atomic<std::int32_t> refs_{0};
  const Type* type_ STORAX_GUARDED_BY(lock_) = nullptr;
  Cell home_ STORAX_GUARDED_BY(lock_);
  std::int64_t gets_ STORAX_GUARDED_BY(lock_) = 0;
  std::int64_t sets_ STORAX_GUARDED_BY(lock_) = 0;
  std::atomic<std::int64_t> version_{0};  // written under lock_ only

  std::vector<Cell> others_ STORAX_GUARDED_BY(lock_);  // further devices of a mapped type
  std::uint32_t index_ = 0;
  std::size_t watch_capacity_ STORAX_GUARDED_BY(lock_) = 0;
  std::vector<Event> events_ STORAX_GUARDED_BY(lock_);
  std::string name_ STORAX_GUARDED_BY(lock_);
  std::atomic<std::int64_t> programs_{0};

  std::recursive_timed_mutex loan_mutex_;
  std::atomic<std::int64_t> workers_{0};
  std::unique_ptr<Loan> loan_ STORAX_GUARDED_BY(lock_);
  Device loan_device_ STORAX_GUARDED_BY(lock_) = kNoDevice;
  std::atomic<std::int64_t> pins_{0};
  std::atomic<std::int32_t> mesh_order_{0};
};

// The slot that `id` names, or a later user of its table entry; nullptr if no slot ever had it. The
// pointer is valid for ever: operations check the id's generation themselves.
Slot* find_slot(SlotId id) noexcept;

// A share in a slot's life.
class SlotRef {
 public:
  // Makes a new slot; `name` is for messages. Throws std::bad_alloc.
  static SlotRef create(std::string name);
  // Another share in a live slot; empty if the id is dead.
  static SlotRef share(SlotId id) noexcept;

  SlotRef() = default;
  SlotRef(SlotRef&& other) noexcept;
  SlotRef& operator=(SlotRef&& other) noexcept;
  SlotRef(const SlotRef&) = delete;
  SlotRef& operator=(const SlotRef&) = delete;
  ~SlotRef();

  explicit operator bool() const noexcept { return slot_ != nullptr; }
  SlotId id() const noexcept { return id_; }
  Slot& operator*() const noexcept { return *slot_; }
  Slot* operator->() const noexcept { return slot_; }

 private:
  SlotRef(Slot* slot, SlotId id) noexcept : slot_(slot), id_(id) {}

  Slot* slot_ = nullptr;
  SlotId id_ = 0;
};

// Live slots, the bytes their states take, and who may run operations on them.
struct Usage {
  std::int64_t slots;
  std::int64_t bytes;
  std::int64_t programs;  // operations in compiled programs
};
Usage usage() noexcept;

}  // namespace storax
