// Boost.Test's checks are for one thread: threads count what went wrong, and the test checks that.
#pragma once

#include <atomic>
#include <latch>
#include <thread>
#include <vector>

namespace storax::testing {

inline constexpr int kThreads = 8;

// Runs body(t) for t = 0 ... n-1, each in a thread, all at once, and waits for them.
template <class Body>
void run_threads(Body body, int n = kThreads) {
  std::latch start(n);
  std::vector<std::jthread> threads;
  for (int t = 0; t < n; ++t) {
    threads.emplace_back([&, t] {
      start.arrive_and_wait();
      body(t);
    });
  }
}

// How many times something happened, in any thread.
class Count {
 public:
  void add_if(bool happened) noexcept { count_.fetch_add(happened, std::memory_order_relaxed); }
  int value() const noexcept { return count_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int> count_{0};
};

}  // namespace storax::testing
