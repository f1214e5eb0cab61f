// Which slots there are, and how long each lives.
#include "storax/store.h"

#include <mutex>
#include <utility>

#include "memory.h"
#include "storax/append_table.h"

namespace storax {
namespace {

std::atomic<std::int64_t> live_slots{0};
std::atomic<std::int64_t> live_programs{0};

struct Table {
  std::mutex mutex;
  AppendTable<Slot> slots;
  std::vector<std::uint32_t> free;  // guarded by mutex; has room for every slot
};

Table& table() {
  static Table* const instance = new Table;  // leaked: programs may outlive static destructors
  return *instance;
}

std::uint32_t index_of(SlotId id) { return static_cast<std::uint32_t>(id & 0xffffffff); }

}  // namespace

void Slot::add_program(std::int64_t n) noexcept {
  programs_.fetch_add(n, std::memory_order_acq_rel);
  live_programs.fetch_add(n, std::memory_order_acq_rel);
}

void Slot::drop() noexcept {
  std::unique_ptr<Loan> loan;  // ends without the lock
  {
    const SpinGuard guard(lock_);
    loan = std::move(loan_);
    if (type_ != nullptr) {
      free_state(home_.data, *type_);
      for (const Cell& cell : others_) free_state(cell.data, *type_);
    }
    type_id_ = kNoType;
    type_ = nullptr;
    home_ = {};
    // Swaps, since assigning something empty keeps the memory.
    std::vector<Cell>().swap(others_);
    std::vector<Event>().swap(events_);
    std::string().swap(name_);
    gets_ = sets_ = 0;
    generation_ = (generation_ + 1) & 0x7fffffff;
    is_watched_ = false;
    version_.store(0, std::memory_order_release);
    live_programs.fetch_sub(programs_.exchange(0, std::memory_order_acq_rel));
    pins_.store(0, std::memory_order_release);
    set_mesh_order(0);
  }
  live_slots.fetch_sub(1);
  Table& t = table();
  const std::lock_guard lock(t.mutex);
  t.free.push_back(index_);
}

Slot* find_slot(SlotId id) noexcept { return table().slots.find(index_of(id)); }

SlotId create_slot_id(std::string name) {
  Table& t = table();
  const std::lock_guard lock(t.mutex);
  std::uint32_t index = 0;
  if (t.free.empty()) {
    const std::uint32_t next = t.slots.size();
    // Room for every slot, so that dropping one never allocates.
    if (t.free.capacity() <= next) t.free.reserve(2 * std::size_t{next} + 64);
    index = t.slots.append([&](Slot& slot) { slot.index_ = next; });
  } else {
    index = t.free.back();
    t.free.pop_back();
  }
  Slot& slot = *t.slots.find(index);
  const SpinGuard guard(slot.lock_);
  slot.name_ = std::move(name);
  slot.refs_.store(1, std::memory_order_release);
  live_slots.fetch_add(1);
  return static_cast<SlotId>((static_cast<std::uint64_t>(slot.generation_) << 32) | index);
}

SlotRef SlotRef::create(std::string name) {
  const SlotId id = create_slot_id(std::move(name));
  return SlotRef(find_slot(id), id);
}

SlotRef SlotRef::share(SlotId id) noexcept {
  Slot* slot = find_slot(id);
  if (slot == nullptr) return {};
  const SpinGuard guard(slot->lock_);
  if (!slot->is_live(id)) return {};
  // refs_ cannot reach zero between the check and here: whoever releases the last share does so
  // under the lock.
  slot->refs_.fetch_add(1, std::memory_order_relaxed);
  return SlotRef(slot, id);
}

SlotRef::SlotRef(SlotRef&& other) noexcept
    : slot_(std::exchange(other.slot_, nullptr)), id_(other.id_) {}

SlotRef& SlotRef::operator=(SlotRef&& other) noexcept {
  std::swap(slot_, other.slot_);
  std::swap(id_, other.id_);
  return *this;
}

SlotRef::~SlotRef() {
  if (slot_ == nullptr) return;
  bool last = false;
  {
    const SpinGuard guard(slot_->lock_);
    last = slot_->refs_.fetch_sub(1, std::memory_order_acq_rel) == 1;
  }
  if (last) slot_->drop();
}

Usage usage() noexcept { return {live_slots.load(), state_bytes(), live_programs.load()}; }

}  // namespace storax
