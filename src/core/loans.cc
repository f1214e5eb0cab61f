// States that are lent out.
#include <cstring>
#include <utility>

#include "memory.h"
#include "storax/store.h"

namespace storax {
namespace {

std::atomic<std::int64_t> epoch{0};

void change_layout() noexcept { epoch.fetch_add(1, std::memory_order_acq_rel); }

}  // namespace

std::int64_t layout_epoch() noexcept { return epoch.load(std::memory_order_acquire); }

Status Slot::lend(SlotId id, Device device, TypeId type, std::unique_ptr<Loan> loan,
                  std::int64_t version) noexcept {
  const Type* made = find_type(type);
  if (made == nullptr || made->is_mapped()) return Status::kTypeMismatch;
  std::byte* memory = nullptr;
  {
    const SpinGuard guard(lock_);
    if (!is_live(id)) return Status::kDropped;
    if (type_id_ != kNoType && type_id_ != type) return Status::kTypeMismatch;
    if (version >= 0 && version_.load(std::memory_order_relaxed) != version) {
      return Status::kChanged;
    }
    memory = std::exchange(home_, Cell{}).data;
    type_ = made;
    type_id_ = type;
    loan_device_ = device;
    loan_.swap(loan);
    version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  change_layout();
  free_state(memory, *made);
  return Status::kOk;
}

Status Slot::reclaim(SlotId id, ConstLeaves in) noexcept {
  std::unique_ptr<Loan> ended;
  const SpinGuard guard(lock_);
  if (!is_live(id)) return Status::kDropped;
  if (loan_ == nullptr) return Status::kLost;
  if (loan_device_ == kNoDevice) return Status::kWrongDevice;
  std::byte* memory = allocate_state(*type_);
  if (memory == nullptr) return Status::kOutOfMemory;
  for (std::size_t k = 0; k < in.size(); ++k) {
    const std::size_t bytes = type_->leaf_bytes(k);
    if (bytes > 0) std::memcpy(memory + type_->leaf_offset(k), in[k], bytes);
  }
  home_ = {loan_device_, memory};
  ended = std::move(loan_);
  change_layout();
  return Status::kOk;
}

void Slot::lose() noexcept {
  std::unique_ptr<Loan> ended;
  {
    const SpinGuard guard(lock_);
    ended = std::move(loan_);
    version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  change_layout();
}

Loan* Slot::loan() noexcept {
  const SpinGuard guard(lock_);
  return loan_.get();
}

void Slot::count_lent_get() noexcept {
  const SpinGuard guard(lock_);
  ++gets_;
}

void Slot::count_lent_set() noexcept {
  const SpinGuard guard(lock_);
  ++sets_;
  version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
}

bool Slot::has_memory() noexcept {
  const SpinGuard guard(lock_);
  return home_.data != nullptr;
}

void Slot::pin(std::int64_t n) noexcept {
  pins_.fetch_add(n, std::memory_order_acq_rel);
  change_layout();
}

}  // namespace storax
