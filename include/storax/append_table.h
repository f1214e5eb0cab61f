// A table that only grows. Entries never move and are never freed, so readers need no lock: an
// index that was handed out stays valid for the life of the process.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace storax {

template <class T>
class AppendTable {
 public:
  static constexpr std::uint32_t kChunkSize = 1024;
  static constexpr std::uint32_t kMaxChunks = 16384;

  AppendTable() : chunks_(new std::atomic<T*>[kMaxChunks] {}) {}
  ~AppendTable() {
    for (std::uint32_t c = 0; c < kMaxChunks; ++c) delete[] chunks_[c].load();
  }
  AppendTable(const AppendTable&) = delete;
  AppendTable& operator=(const AppendTable&) = delete;

  // The entry at `index`, or nullptr if no append() has returned that index. Any thread.
  T* find(std::uint64_t index) const noexcept {
    if (index >= size_.load(std::memory_order_acquire)) return nullptr;
    return &chunks_[index / kChunkSize].load(std::memory_order_acquire)[index % kChunkSize];
  }

  // Makes room for one more entry, calls `init(entry)`, and publishes it. Returns its index. The
  // caller serialises calls. Throws std::bad_alloc when memory, or the table, is exhausted.
  template <class Init>
  std::uint32_t append(Init&& init) {
    const std::uint32_t index = size_.load(std::memory_order_relaxed);
    if (index >= kChunkSize * kMaxChunks) throw std::bad_alloc();
    std::atomic<T*>& chunk = chunks_[index / kChunkSize];
    if (chunk.load(std::memory_order_relaxed) == nullptr) {
      chunk.store(new T[kChunkSize], std::memory_order_release);
    }
    init(chunk.load(std::memory_order_relaxed)[index % kChunkSize]);
    size_.store(index + 1, std::memory_order_release);
    return index;
  }

  std::uint32_t size() const noexcept { return size_.load(std::memory_order_acquire); }

 private:
  std::unique_ptr<std::atomic<T*>[]> chunks_;
  std::atomic<std::uint32_t> size_{0};
};

}  // namespace storax
