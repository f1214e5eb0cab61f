// A lock for critical sections that copy one state: short, and almost never contended.
#pragma once

#include <atomic>
#include <thread>

#include "storax/annotations.h"

namespace storax {

class STORAX_CAPABILITY("mutex") SpinLock {
 public:
  void lock() noexcept STORAX_ACQUIRE() {
    while (locked_.exchange(true, std::memory_order_acquire)) {
      // The holder may have been preempted in the middle of a large copy: give it the core.
      for (int spins = 0; locked_.load(std::memory_order_relaxed); ++spins) {
        if (spins > 64) std::this_thread::yield();
      }
    }
  }
  void unlock() noexcept STORAX_RELEASE() { locked_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> locked_{false};
};

class STORAX_SCOPED_CAPABILITY SpinGuard {
 public:
  explicit SpinGuard(SpinLock& lock) noexcept STORAX_ACQUIRE(lock) : lock_(lock) { lock_.lock(); }
  ~SpinGuard() STORAX_RELEASE() { lock_.unlock(); }
  SpinGuard(const SpinGuard&) = delete;
  SpinGuard& operator=(const SpinGuard&) = delete;

 private:
  SpinLock& lock_;
};

}  // namespace storax
