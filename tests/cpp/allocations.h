// The test program's own operator new: it counts, and fails on demand.
#pragma once

#include <cstdint>

namespace storax::testing {

// While it lives, this thread's `n`-th allocation from its making on fails; 0 is the next.
class FailAllocation {
 public:
  explicit FailAllocation(std::int64_t n) noexcept;
  ~FailAllocation();
  FailAllocation(const FailAllocation&) = delete;
  FailAllocation& operator=(const FailAllocation&) = delete;

  bool happened() const noexcept;
};

// Allocations, of all threads, that were not freed yet.
std::int64_t live_allocations() noexcept;

}  // namespace storax::testing
