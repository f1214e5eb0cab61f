#include "allocations.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace storax::testing {
namespace {

constexpr std::int64_t kNever = -1;
constinit thread_local std::int64_t countdown = kNever;
constinit std::atomic<std::int64_t> live{0};

void* allocate(std::size_t bytes, std::size_t alignment) noexcept {
  if (countdown != kNever && countdown-- == 0) return nullptr;
  // aligned_alloc wants a multiple of the alignment, and new a pointer even for no bytes.
  const std::size_t padded = (std::max<std::size_t>(bytes, 1) + alignment - 1) & ~(alignment - 1);
  void* data = padded < bytes ? nullptr : std::aligned_alloc(alignment, padded);
  if (data != nullptr) live.fetch_add(1, std::memory_order_relaxed);
  return data;
}

void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* data = allocate(bytes, alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void deallocate(void* data) noexcept {
  if (data != nullptr) live.fetch_sub(1, std::memory_order_relaxed);
  std::free(data);
}

constexpr std::size_t kDefault = __STDCPP_DEFAULT_NEW_ALIGNMENT__;
std::size_t number(std::align_val_t alignment) { return static_cast<std::size_t>(alignment); }

}  // namespace

FailAllocation::FailAllocation(std::int64_t n) noexcept { countdown = n; }
FailAllocation::~FailAllocation() { countdown = kNever; }
// The one that fails leaves the countdown just past zero, which is kNever.
bool FailAllocation::happened() const noexcept { return countdown == kNever; }

std::int64_t live_allocations() noexcept { return live.load(std::memory_order_relaxed); }

}  // namespace storax::testing

namespace st = storax::testing;
using std::align_val_t;
using std::nothrow_t;
using std::size_t;

// All of them: a sanitizer brings its own for each that is missing, and reports mixed pairs.
void* operator new(size_t n) { return st::allocate_or_throw(n, st::kDefault); }
void* operator new[](size_t n) { return st::allocate_or_throw(n, st::kDefault); }
void* operator new(size_t n, align_val_t a) { return st::allocate_or_throw(n, st::number(a)); }
void* operator new[](size_t n, align_val_t a) { return st::allocate_or_throw(n, st::number(a)); }
void* operator new(size_t n, const nothrow_t&) noexcept { return st::allocate(n, st::kDefault); }
void* operator new[](size_t n, const nothrow_t&) noexcept { return st::allocate(n, st::kDefault); }
void* operator new(size_t n, align_val_t a, const nothrow_t&) noexcept {
  return st::allocate(n, st::number(a));
}
void* operator new[](size_t n, align_val_t a, const nothrow_t&) noexcept {
  return st::allocate(n, st::number(a));
}
void operator delete(void* p) noexcept { st::deallocate(p); }
void operator delete[](void* p) noexcept { st::deallocate(p); }
void operator delete(void* p, size_t) noexcept { st::deallocate(p); }
void operator delete[](void* p, size_t) noexcept { st::deallocate(p); }
void operator delete(void* p, align_val_t) noexcept { st::deallocate(p); }
void operator delete[](void* p, align_val_t) noexcept { st::deallocate(p); }
void operator delete(void* p, size_t, align_val_t) noexcept { st::deallocate(p); }
void operator delete[](void* p, size_t, align_val_t) noexcept { st::deallocate(p); }
void operator delete(void* p, const nothrow_t&) noexcept { st::deallocate(p); }
void operator delete[](void* p, const nothrow_t&) noexcept { st::deallocate(p); }
void operator delete(void* p, align_val_t, const nothrow_t&) noexcept { st::deallocate(p); }
void operator delete[](void* p, align_val_t, const nothrow_t&) noexcept { st::deallocate(p); }
