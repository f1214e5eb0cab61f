// What all threads share: the tables of slots and types, the record of failures, the lock.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "storax/append_table.h"
#include "storax/spin_lock.h"
#include "testing.h"
#include "threads.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(threads_tables, NothingLeaks)

// Each slot's state is its own id. Threads use ids that others may drop, and whose table entries
// others may take over, at any moment: they find that id, or that the slot is gone.
BOOST_AUTO_TEST_CASE(slots_are_created_shared_and_dropped) {
  constexpr int kRounds = 2000;
  const TypeId type = make_type(std::vector<Leaf>{{"s64", 8, {}}});
  std::array<std::atomic<SlotId>, 16> published{};
  const SlotRef kept = SlotRef::create("published at first");
  for (auto& cell : published) cell = kept.id();
  BOOST_REQUIRE(set(kept, type, state_of(type, std::vector{kept.id()})) == Status::kOk);

  Count failed, strangers, lost, shared, dropped;
  run_threads([&](int t) {
    std::mt19937 bits(static_cast<unsigned>(t));
    std::vector<SlotRef> mine;
    const auto read = [&](Slot* slot, SlotId id, bool is_held) {
      SlotId value = -1;
      std::byte* const out[] = {reinterpret_cast<std::byte*>(&value)};
      const Status status = slot->get(id, 0, type, out);
      strangers.add_if(status == Status::kOk && value != id);
      lost.add_if(is_held && status != Status::kOk);
      failed.add_if(status != Status::kOk && status != Status::kDropped);
      dropped.add_if(status == Status::kDropped);
    };
    for (int i = 0; i < kRounds; ++i) {
      std::atomic<SlotId>& cell = published[bits() % published.size()];
      switch (bits() % 4) {
        case 0: {
          mine.push_back(SlotRef::create(std::to_string(i)));
          const SlotId id = mine.back().id();
          const std::byte* const in[] = {reinterpret_cast<const std::byte*>(&id)};
          failed.add_if(mine.back()->set(id, 0, type, in) != Status::kOk);
          cell = id;
          break;
        }
        case 1: {
          const SlotId id = cell;
          if (SlotRef ref = SlotRef::share(id)) {
            shared.add_if(true);
            read(&*ref, id, true);
            mine.push_back(std::move(ref));
          }
          break;
        }
        case 2: {
          const SlotId id = cell;
          read(find_slot(id), id, false);
          const std::string text =
              find_slot(id)->explain(id, Status::kNeverSet, "get_state", 0, type);
          failed.add_if(!text.starts_with("storax.get_state of "));
          break;
        }
        default:
          if (!mine.empty()) {
            std::swap(mine[bits() % mine.size()], mine.back());
            mine.pop_back();
          }
      }
      while (mine.size() > 8) mine.erase(mine.begin());
    }
  });
  BOOST_TEST(failed.value() == 0);
  BOOST_TEST(strangers.value() == 0);
  BOOST_TEST(lost.value() == 0);
  BOOST_TEST(shared.value() > 0);
  BOOST_TEST(dropped.value() > 0);
  BOOST_TEST(usage().slots == 1);
}

BOOST_AUTO_TEST_CASE(the_last_of_many_shares_frees_the_slot) {
  const TypeId type = make_type(std::vector{f32({100})});
  for (int round = 0; round < 30; ++round) {
    SlotRef first = SlotRef::create("s");
    const SlotId id = first.id();
    BOOST_REQUIRE(set(first, type, State(type)) == Status::kOk);
    std::vector<SlotRef> shares;
    for (int t = 0; t < kThreads; ++t) shares.push_back(SlotRef::share(id));
    first = SlotRef();
    run_threads([&](int t) { shares[static_cast<std::size_t>(t)] = SlotRef(); });
    BOOST_TEST(usage().slots == 0);
    BOOST_TEST(usage().bytes == 0);
    BOOST_TEST(!SlotRef::share(id));
  }
}

// One thread lets go of the last share just as the others ask for one: they get all or nothing.
BOOST_AUTO_TEST_CASE(a_slot_on_its_way_out_cannot_be_shared) {
  constexpr int kRounds = 1000;
  const TypeId type = make_type(std::vector<Leaf>{{"s64", 8, {}}});
  std::vector<SlotRef> first(kRounds);
  std::vector<SlotId> ids(kRounds);
  for (std::size_t i = 0; i < kRounds; ++i) {
    first[i] = SlotRef::create("s");
    ids[i] = first[i].id();
    BOOST_REQUIRE(set(first[i], type, state_of(type, std::vector{ids[i]})) == Status::kOk);
  }
  Count lost;
  std::atomic<std::size_t> round{0};
  run_threads([&](int t) {
    for (std::size_t i = 0; i < kRounds; ++i) {
      if (t == 0) {
        round = i;
        first[i] = SlotRef();
        continue;
      }
      while (round < i && round + 1 < kRounds) std::this_thread::yield();
      const SlotRef ref = SlotRef::share(ids[i]);
      SlotId value = -1;
      std::byte* const out[] = {reinterpret_cast<std::byte*>(&value)};
      if (ref) lost.add_if(ref->get(ids[i], 0, type, out) != Status::kOk || value != ids[i]);
    }
  });
  BOOST_TEST(lost.value() == 0);
  BOOST_TEST(usage().slots == 0);
}

BOOST_AUTO_TEST_CASE(all_threads_intern_the_same_types) {
  constexpr std::size_t kTypes = 1500;
  const auto describe_one = [](std::size_t i) {
    return describe({{"interned by threads", 4, {static_cast<std::int64_t>(i), 2}}},
                    {{{static_cast<int>(i % 2)}, i % 3 == 0}}, {{"x", 1}});
  };
  std::vector<std::vector<TypeId>> ids(kThreads, std::vector<TypeId>(kTypes));
  Count wrong;
  run_threads([&](int t) {
    std::vector<std::size_t> order(kTypes);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(t)));
    for (const std::size_t i : order) {
      const TypeDesc desc = describe_one(i);
      const TypeId id = intern_type(desc);
      const Type* type = find_type(id);
      wrong.add_if(type == nullptr || type->id() != id || type->desc() != desc);
      ids[static_cast<std::size_t>(t)][i] = id;
    }
  });
  BOOST_TEST(wrong.value() == 0);
  for (const auto& seen : ids) BOOST_TEST((seen == ids[0]));
  std::vector<TypeId> sorted = ids[0];
  std::sort(sorted.begin(), sorted.end());
  BOOST_TEST((std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()));
}

std::size_t number_told(const std::vector<std::string>& messages) {
  std::size_t told = 0;
  for (const std::string& m : messages) told += m.starts_with("and ") ? std::stoul(m.substr(4)) : 1;
  return told;
}

BOOST_AUTO_TEST_CASE(no_failure_is_lost_between_threads) {
  constexpr int kRecorded = 400;
  constexpr std::size_t kAll = std::size_t{kThreads - 2} * kRecorded;
  std::size_t told = 0;
  run_threads([&](int t) {
    // Two threads do nothing but this: see test_threads.cc.
    for (int i = 0; i < kRecorded; ++i) {
      if (t == 0) {
        told += number_told(failures::take());
      } else if (t == 1) {
        failures::acknowledge("an exception that has nothing to do with it");
      } else {
        failures::record(t, "failure " + std::to_string(i) + " of " + std::to_string(t));
      }
    }
  });
  BOOST_TEST(told + failures::pending() == kAll);
  BOOST_TEST(told + number_told(failures::take()) == kAll);
}

BOOST_AUTO_TEST_CASE(threads_acknowledge_their_own_failures) {
  Count unnoticed;
  run_threads([&](int t) {
    const std::string message = "thread " + std::to_string(t) + " failed";
    for (int i = 0; i < 200; ++i) {
      failures::record(t, message);
      unnoticed.add_if(failures::pending() == 0);
      failures::acknowledge("INTERNAL: " + message + " [while running]");
    }
  });
  BOOST_TEST(unnoticed.value() == 0);
  BOOST_TEST(failures::pending() == 0u);
}

BOOST_AUTO_TEST_CASE(readers_follow_a_growing_table) {
  constexpr std::uint32_t kEntries = 10000;
  AppendTable<std::uint64_t> table;
  Count wrong;
  run_threads([&](int t) {
    if (t == 0) {
      for (std::uint32_t i = 0; i < kEntries; ++i) {
        table.append([&](std::uint64_t& entry) { entry = std::uint64_t{i} * 7 + 1; });
      }
      return;
    }
    std::mt19937 bits(static_cast<unsigned>(t));
    for (std::uint32_t size = 0; size < kEntries;) {
      size = table.size();
      if (size == 0) continue;
      for (const std::uint64_t i : {std::uint64_t{bits() % size}, std::uint64_t{size} - 1}) {
        const std::uint64_t* entry = table.find(i);
        wrong.add_if(entry == nullptr || *entry != i * 7 + 1);
      }
    }
  });
  BOOST_TEST(wrong.value() == 0);
}

BOOST_AUTO_TEST_CASE(a_spin_lock_keeps_others_out) {
  constexpr int kRounds = 5000;
  SpinLock lock;
  std::int64_t first = 0, second = 0;
  Count inconsistent;
  run_threads([&](int) {
    for (int i = 0; i < kRounds; ++i) {
      const SpinGuard guard(lock);
      inconsistent.add_if(first != second);
      ++first;
      if (i % 100 == 0) std::this_thread::yield();  // as if preempted half way
      ++second;
    }
  });
  BOOST_TEST(inconsistent.value() == 0);
  BOOST_TEST(first == std::int64_t{kThreads} * kRounds);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
