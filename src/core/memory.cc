#include "memory.h"

#include <algorithm>
#include <atomic>
#include <new>

namespace storax {
namespace {

constexpr std::align_val_t kAlignment{64};

std::atomic<std::int64_t> live_bytes{0};

// A state of no bytes still gets memory: a null pointer means that nothing was set.
std::size_t bytes_for(const Type& type) { return std::max<std::size_t>(type.total_bytes(), 1); }

}  // namespace

std::byte* allocate_state(const Type& type) noexcept {
  const std::size_t bytes = bytes_for(type);
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data != nullptr) live_bytes.fetch_add(static_cast<std::int64_t>(bytes));
  return static_cast<std::byte*>(data);
}

void free_state(std::byte* data, const Type& type) noexcept {
  if (data == nullptr) return;
  live_bytes.fetch_sub(static_cast<std::int64_t>(bytes_for(type)));
  ::operator delete(data, kAlignment);
}

std::int64_t state_bytes() noexcept { return live_bytes.load(); }

}  // namespace storax
