// Operations on one row of a stacked state.
#include <algorithm>
#include <cstring>

#include "copy.h"
#include "storax/store.h"

namespace storax {
namespace {

std::size_t row_bytes(const Type& type, std::size_t leaf) {
  const std::int64_t rows = type.desc().leaves[leaf].dims[0];
  return rows == 0 ? 0 : type.leaf_bytes(leaf) / static_cast<std::size_t>(rows);
}

// Whether a row's masks have elements, and are false for all of them.
bool none_taken(const Type& type, std::span<const bool* const> masks) {
  bool found = false;
  for (std::size_t k = 0; k < masks.size(); ++k) {
    const Leaf& leaf = type.desc().leaves[k];
    if (leaf.dims.empty()) return false;  // no rows, as check_row() will say
    const bool* end = masks[k] + row_bytes(type, k) / leaf.item_bytes;
    if (std::find(masks[k], end, true) != end) return false;
    found = found || masks[k] != end;
  }
  return found;
}

}  // namespace

Status Slot::check_row(SlotId id, Device device, Event::Kind op, TypeId asked,
                       std::int64_t row) noexcept {
  std::vector<Walk> walks;
  const Status status = check(id, device, op, asked, &walks);
  const bool has_state = status == Status::kOk || status == Status::kNeverSet;
  if (!has_state || type_id_ == kNoType) return status;
  // Nothing moves the axis of rows, and few states have rows: only the plain layout is served.
  for (const Walk& walk : walks) {
    if (!walk.keeps_order()) return Status::kTypeMismatch;
  }
  for (const Leaf& leaf : type_->desc().leaves) {
    if (leaf.dims.empty() || row < 0 || row >= leaf.dims[0]) return Status::kNoSuchRow;
  }
  return status;
}

Status Slot::get_row(SlotId id, Device device, TypeId want, std::int64_t row, Leaves out) noexcept {
  const SpinGuard guard(lock_);
  const Status status = check_row(id, device, Event::Kind::kGet, want, row);
  if (status != Status::kOk) return status;
  const Cell& cell = cell_to_read(device, want);
  for (std::size_t k = 0; k < out.size(); ++k) {
    const std::size_t bytes = row_bytes(*type_, k);
    if (bytes == 0) continue;
    const std::byte* from = cell.data + type_->leaf_offset(k);
    std::memcpy(out[k], from + static_cast<std::size_t>(row) * bytes, bytes);
  }
  count_get(cell);
  return Status::kOk;
}

Status Slot::set_row(SlotId id, Device device, TypeId type, std::int64_t row,
                     std::span<const bool* const> masks, ConstLeaves in) noexcept {
  const Type* asked = find_type(type);
  if (asked == nullptr) return Status::kTypeMismatch;
  if (none_taken(*asked, masks)) return Status::kOk;  // as in set_masked
  const SpinGuard guard(lock_);
  Status status = check_row(id, device, Event::Kind::kSet, type, row);
  if (status == Status::kNeverSet) status = inherit(id, device, type);
  if (status != Status::kOk) return status;
  const Cell& cell = *find_cell(device);
  for (std::size_t k = 0; k < in.size(); ++k) {
    const std::size_t bytes = row_bytes(*type_, k), item = type_->desc().leaves[k].item_bytes;
    if (bytes == 0) continue;
    std::byte* to = cell.data + type_->leaf_offset(k) + static_cast<std::size_t>(row) * bytes;
    if (masks.empty()) {
      std::memcpy(to, in[k], bytes);
    } else {
      for (std::size_t i = 0; i < bytes / item; ++i) {
        if (masks[k][i]) std::memcpy(to + i * item, in[k] + i * item, item);
      }
    }
  }
  count_set(cell);
  return Status::kOk;
}

}  // namespace storax
