// What can be done with one slot.
#include <algorithm>
#include <cstring>
#include <utility>

#include "copy.h"
#include "memory.h"
#include "storax/store.h"

namespace storax {
namespace {

constexpr std::size_t kEventBytes = 16;

std::uint32_t generation_of(SlotId id) { return static_cast<std::uint32_t>(id >> 32); }

void copy_leaf(std::byte* to, const std::byte* from, std::size_t bytes, std::size_t item_bytes,
               Walk* walk) noexcept {
  if (bytes == 0) return;
  if (walk == nullptr || walk->keeps_order()) {
    std::memcpy(to, from, bytes);
    return;
  }
  walk->for_each([&](std::size_t i, std::size_t j) {
    std::memcpy(to + i * item_bytes, from + j * item_bytes, item_bytes);
  });
}

Walk* walk_of(std::vector<Walk>& walks, std::size_t leaf) noexcept {
  return walks.empty() ? nullptr : &walks[leaf];
}

}  // namespace

bool Slot::is_live(SlotId id) const noexcept {
  return generation_of(id) == generation_ && refs_.load(std::memory_order_relaxed) > 0;
}

Slot::Cell* Slot::find_cell(Device device) noexcept {
  if (home_.device == device) return &home_;
  for (Cell& cell : others_) {
    if (cell.device == device) return &cell;
  }
  return nullptr;
}

// Whether an operation of this type is a mapped program's, on a state set outside of one.
bool Slot::inherits(const Type& asked) noexcept { return asked.is_mapped() && !type_->is_mapped(); }

bool Slot::same_everywhere() noexcept {
  const bool some_have_none =
      others_.size() + (home_.device != kEveryDevice) < type_->num_devices();
  if (some_have_none && home_.device != kEveryDevice) return false;
  const Cell& first = home_.device == kEveryDevice && !some_have_none ? others_.front() : home_;
  return std::all_of(others_.begin(), others_.end(), [&](const Cell& cell) {
    for (std::size_t k = 0; k < type_->num_leaves(); ++k) {
      const std::size_t at = type_->leaf_offset(k), bytes = type_->leaf_bytes(k);
      if (bytes > 0 && std::memcmp(cell.data + at, first.data + at, bytes) != 0) return false;
    }
    return true;
  });
}

const Slot::Cell& Slot::cell_to_read(Device device, TypeId asked) noexcept {
  if (const Cell* own = find_cell(device); own != nullptr) return *own;
  const bool as_one = type_->is_mapped() && asked == type_->base();
  return as_one && !others_.empty() ? others_.front() : home_;
}

// `walks` comes back with how to copy each leaf, out of the slot or into it; empty if the types are
// the same. It is made here, before anything is written, since making it can fail.
Status Slot::check(SlotId id, Device device, Event::Kind op, TypeId asked,
                   std::vector<Walk>* walks) noexcept {
  if (!is_live(id)) return Status::kDropped;
  if (type_id_ == kNoType) return Status::kNeverSet;
  if (type_id_ == asked && home_.device == device) return Status::kOk;  // nearly always
  if (op == Event::Kind::kGet && type_->is_mapped() && type_->base() == asked) {
    return same_everywhere() ? Status::kOk : Status::kTypeMismatch;
  }
  const Type* type = find_type(asked);
  if (type == nullptr) return Status::kTypeMismatch;
  const bool inherited = inherits(*type);
  if (inherited) type = find_type(type->base());
  if (type_id_ != type->id()) {
    const Type& to = op == Event::Kind::kGet ? *type : *type_;
    const Type& from = op == Event::Kind::kGet ? *type_ : *type;
    try {
      Permutations moves;
      if (!to.agrees_up_to_moves(from, &moves)) return Status::kTypeMismatch;
      walks->reserve(moves.size());
      for (std::size_t k = 0; k < moves.size(); ++k) {
        walks->emplace_back(to.desc().leaves[k].dims, moves[k]);
      }
    } catch (...) {
      return Status::kOutOfMemory;
    }
  }
  if (home_.data == nullptr) {
    if (loan_ != nullptr) return Status::kLent;
    return op == Event::Kind::kSet && device != loan_device_ ? Status::kWrongDevice : Status::kLost;
  }
  if (inherited) return op == Event::Kind::kGet ? Status::kOk : Status::kNeverSet;
  if (find_cell(device) != nullptr) return Status::kOk;
  if (!type_->is_mapped()) return Status::kWrongDevice;
  const bool has_one = op == Event::Kind::kGet && home_.device == kEveryDevice;
  return has_one ? Status::kOk : Status::kNeverSet;
}

void Slot::note(Event::Kind kind, const Cell& cell) noexcept {
  if (events_.size() >= watch_capacity_) return;
  try {
    const std::size_t shown =
        type_->num_leaves() == 0 ? 0 : std::min(type_->leaf_bytes(0), kEventBytes);
    events_.push_back({kind, version(), std::vector<std::byte>(cell.data, cell.data + shown)});
  } catch (...) {
  }
}

void Slot::count_get(const Cell& cell) noexcept {
  ++gets_;
  if (is_watched_) note(Event::Kind::kGet, cell);
}

void Slot::count_set(const Cell& cell) noexcept {
  ++sets_;
  // It is written under the lock only, which makes this cheaper than an atomic addition.
  version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  if (is_watched_) note(Event::Kind::kSet, cell);
}

Status Slot::get(SlotId id, Device device, TypeId want, Leaves out) noexcept {
  const SpinGuard guard(lock_);
  std::vector<Walk> walks;
  const Status status = check(id, device, Event::Kind::kGet, want, &walks);
  if (status != Status::kOk) return status;
  const Cell& cell = cell_to_read(device, want);
  for (std::size_t k = 0; k < out.size(); ++k) {
    copy_leaf(out[k], cell.data + type_->leaf_offset(k), type_->leaf_bytes(k),
              type_->desc().leaves[k].item_bytes, walk_of(walks, k));
  }
  count_get(cell);
  return Status::kOk;
}

// Finds, or makes, the cell that a set will write. On the first set the type is taken on only once
// there is memory for it, so that a failed set leaves the slot as it was.
Status Slot::prepare_set(SlotId id, Device device, TypeId type, std::vector<Walk>* walks,
                         Cell** cell) noexcept {
  const Status status = check(id, device, Event::Kind::kSet, type, walks);
  if (status == Status::kOk) *cell = find_cell(device);
  if (status != Status::kNeverSet && status != Status::kLost) return status;
  const Type* asked = find_type(type);
  const bool promoted = type_id_ != kNoType && inherits(*asked);
  const Type* made = type_id_ == kNoType ? asked : type_;
  if (promoted) {
    // The layout stays that of the state there is.
    try {
      TypeDesc mapped = type_->desc();
      mapped.mesh = asked->desc().mesh;
      made = find_type(intern_type(std::move(mapped)));
    } catch (...) {
      return Status::kOutOfMemory;
    }
  }
  if (made == nullptr) return Status::kTypeMismatch;
  if (home_.data != nullptr) {
    try {
      others_.reserve(others_.size() + 1);
    } catch (...) {
      return Status::kOutOfMemory;
    }
  }
  std::byte* data = allocate_state(*made);
  if (data == nullptr) return Status::kOutOfMemory;
  type_ = made;
  type_id_ = made->id();
  if (promoted) home_.device = kEveryDevice;
  if (home_.data == nullptr) {
    home_ = {device, data};
    *cell = &home_;
  } else {
    others_.push_back({device, data});
    *cell = &others_.back();
  }
  return Status::kOk;
}

// Before the first set of a part on a device: gives it a copy of the state that was set outside of
// the mapped program.
Status Slot::inherit(SlotId id, Device device, TypeId type) noexcept {
  const bool has_one = type_id_ != kNoType && (!type_->is_mapped() || home_.device == kEveryDevice);
  if (!has_one) return Status::kPartialFirstSet;
  std::vector<Walk> walks;
  Cell* made = nullptr;
  const Status status = prepare_set(id, device, type, &walks, &made);
  if (status == Status::kOk) std::memcpy(made->data, home_.data, type_->total_bytes());
  return status;
}

Status Slot::can_set(SlotId id, Device device, TypeId type) noexcept {
  const SpinGuard guard(lock_);
  std::vector<Walk> walks;
  const Status status = check(id, device, Event::Kind::kSet, type, &walks);
  const bool first = status == Status::kNeverSet || status == Status::kLost;
  return first ? Status::kOk : status;
}

Status Slot::set(SlotId id, Device device, TypeId type, ConstLeaves in) noexcept {
  const SpinGuard guard(lock_);
  std::vector<Walk> walks;
  Cell* cell = nullptr;
  const Status status = prepare_set(id, device, type, &walks, &cell);
  if (status != Status::kOk) return status;
  for (std::size_t k = 0; k < in.size(); ++k) {
    copy_leaf(cell->data + type_->leaf_offset(k), in[k], type_->leaf_bytes(k),
              type_->desc().leaves[k].item_bytes, walk_of(walks, k));
  }
  count_set(*cell);
  return Status::kOk;
}

Status Slot::set_masked(SlotId id, Device device, TypeId type, std::span<const bool* const> masks,
                        ConstLeaves in) noexcept {
  const Type* asked = find_type(type);
  if (asked == nullptr) return Status::kTypeMismatch;
  bool any = false, all = true;
  for (std::size_t k = 0; k < in.size(); ++k) {
    const std::size_t count = asked->leaf_bytes(k) / asked->desc().leaves[k].item_bytes;
    for (std::size_t i = 0; i < count; ++i) {
      any = any || masks[k][i];
      all = all && masks[k][i];
    }
  }
  if (all) return set(id, device, type, in);
  if (!any) return Status::kOk;  // as a branch that is not taken: it is never an error either

  const SpinGuard guard(lock_);
  std::vector<Walk> walks;
  Status status = check(id, device, Event::Kind::kSet, type, &walks);
  if (status == Status::kNeverSet) status = inherit(id, device, type);
  if (status != Status::kOk) return status;
  const Cell& cell = *find_cell(device);
  for (std::size_t k = 0; k < in.size(); ++k) {
    const Leaf& leaf = type_->desc().leaves[k];
    std::byte* to = cell.data + type_->leaf_offset(k);
    Walk in_step(leaf.dims, {});
    Walk& walk = walks.empty() ? in_step : walks[k];
    walk.for_each([&](std::size_t i, std::size_t j) {
      if (masks[k][j]) {
        std::memcpy(to + i * leaf.item_bytes, in[k] + j * leaf.item_bytes, leaf.item_bytes);
      }
    });
  }
  count_set(cell);
  return Status::kOk;
}

bool Slot::accepts(SlotId id, TypeId type) noexcept {
  const SpinGuard guard(lock_);
  if (!is_live(id) || type_id_ == kNoType) return false;
  if (type_id_ == type) return true;
  const Type* asked = find_type(type);
  try {
    if (asked != nullptr && inherits(*asked)) asked = find_type(asked->base());
    return asked != nullptr && asked->agrees_up_to_moves(*type_, nullptr);
  } catch (...) {
    return false;
  }
}

bool Slot::reads_as(SlotId id, TypeId type) noexcept {
  const SpinGuard guard(lock_);
  std::vector<Walk> walks;
  return check(id, home_.device, Event::Kind::kGet, type, &walks) == Status::kOk;
}

std::string Slot::name() {
  const SpinGuard guard(lock_);
  return name_;
}

TypeId Slot::type() noexcept {
  const SpinGuard guard(lock_);
  return type_id_;
}

Device Slot::device() noexcept {
  const SpinGuard guard(lock_);
  if (type_ == nullptr || type_->is_mapped()) return kNoDevice;
  return home_.data == nullptr ? loan_device_ : Device{home_.device};
}

std::vector<Device> Slot::devices() {
  const SpinGuard guard(lock_);
  std::vector<Device> found;
  if (home_.device >= 0) found.push_back(home_.device);
  for (const Cell& cell : others_) found.push_back(cell.device);
  return found;
}

std::int64_t Slot::num_gets() noexcept {
  const SpinGuard guard(lock_);
  return gets_;
}

std::int64_t Slot::num_sets() noexcept {
  const SpinGuard guard(lock_);
  return sets_;
}

void Slot::watch(std::size_t capacity) {
  std::vector<Event> fresh;
  fresh.reserve(capacity);
  const SpinGuard guard(lock_);
  events_.swap(fresh);
  is_watched_ = capacity > 0;
  watch_capacity_ = capacity;
}

std::vector<Event> Slot::events() {
  const SpinGuard guard(lock_);
  return events_;
}

}  // namespace storax
