#include "storax/failures.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <utility>

namespace storax::failures {
namespace {

constexpr std::size_t kMostKept = 256;

struct Failure {
  int device;
  std::string message;
  bool told = false;
};

struct Record {
  std::mutex mutex;
  std::deque<Failure> failures;
  std::size_t dropped = 0;
  std::atomic<std::size_t> pending{0};
};

Record& records() {
  static Record* const instance = new Record;  // leaked: handlers may outlive static destructors
  return *instance;
}

}  // namespace

void record(int device, std::string_view message) noexcept {
  Record& r = records();
  const std::lock_guard lock(r.mutex);
  bool kept = false;
  if (r.failures.size() < kMostKept) {
    try {
      r.failures.push_back({device, std::string(message)});
      kept = true;
    } catch (...) {
    }
  }
  if (!kept) ++r.dropped;
  r.pending.store(r.failures.size() + r.dropped, std::memory_order_release);
}

void acknowledge(std::string_view message) noexcept {
  Record& r = records();
  if (r.pending.load(std::memory_order_acquire) == 0) return;
  const std::lock_guard lock(r.mutex);
  for (auto f = r.failures.begin(); f != r.failures.end(); ++f) {
    if (message.find(f->message) == std::string_view::npos) continue;
    f->told = std::none_of(r.failures.begin(), f, [&](const Failure& older) {
      return older.told && older.device == f->device;
    });
  }
  std::erase_if(r.failures, [](const Failure& f) { return f.told; });
  r.pending.store(r.failures.size() + r.dropped, std::memory_order_release);
}

std::size_t pending() noexcept { return records().pending.load(std::memory_order_acquire); }

std::vector<std::string> take() {
  Record& r = records();
  const std::lock_guard lock(r.mutex);
  std::vector<std::string> messages;
  for (Failure& f : r.failures) messages.push_back(std::move(f.message));
  if (r.dropped > 0) messages.push_back("and " + std::to_string(r.dropped) + " failures more");
  r.failures.clear();
  r.dropped = 0;
  r.pending.store(0, std::memory_order_release);
  return messages;
}

}  // namespace storax::failures
