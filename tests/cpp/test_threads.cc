// Operations on one slot from many threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "layouts.h"
#include "testing.h"
#include "threads.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(threads, NothingLeaks)

bool is_constant(const State& state) {
  const std::byte first = state.leaves[0][0];
  return std::all_of(state.leaves.begin(), state.leaves.end(), [&](const auto& leaf) {
    return std::all_of(leaf.begin(), leaf.end(), [&](std::byte b) { return b == first; });
  });
}

// Every set fills the whole state with one byte, so that a get of two bytes has seen parts of two
// sets. Half the threads see the state transposed.
BOOST_AUTO_TEST_CASE(a_get_sees_the_whole_of_one_set) {
  constexpr int kRounds = 150;
  const Layout small({40}, {30}, {1}), small_moved({40}, {30}, {0});
  const Layout large({20, 30}, {20}, {2}), large_moved({20, 30}, {20}, {0});
  const TypeId home = intern_type(describe_layouts({small, large, small}, false));
  const TypeId moved = intern_type(describe_layouts({small_moved, large_moved, small_moved}, true));
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, home, State(home)) == Status::kOk);
  Count failed, torn, backwards, distinct;
  run_threads([&](int t) {
    const TypeId type = t % 2 == 0 ? home : moved;
    State state(type);
    const Masks all(type, true);
    if (t < kThreads / 2) {
      for (int i = 0; i < kRounds; ++i) {
        state = State(type, static_cast<std::byte>((t * kRounds + i) & 0xff));
        const Status status =
            i % 3 == 0 ? set_masked(slot, type, all, state) : set(slot, type, state);
        failed.add_if(status != Status::kOk);
      }
    } else {
      std::byte last{0};
      std::int64_t version = 0;
      for (int i = 0; i < kRounds; ++i) {
        const std::int64_t now = slot->version();
        backwards.add_if(now < version);
        version = now;
        failed.add_if(get(slot, type, &state) != Status::kOk);
        torn.add_if(!is_constant(state));
        distinct.add_if(state.leaves[0][0] != last);
        last = state.leaves[0][0];
      }
    }
  });
  BOOST_TEST(failed.value() == 0);
  BOOST_TEST(torn.value() == 0);
  BOOST_TEST(backwards.value() == 0);
  BOOST_TEST(distinct.value() > 0);  // or readers and writers never met
  BOOST_TEST(slot->num_sets() == kThreads / 2 * kRounds + 1);
  BOOST_TEST(slot->num_gets() == kThreads / 2 * kRounds);
  BOOST_TEST(slot->version() == slot->num_sets());
}

// A masked set is one atomic read-modify-write: no other thread's lane is ever put back.
BOOST_AUTO_TEST_CASE(masked_sets_of_different_lanes_lose_nothing) {
  constexpr int kRounds = 150, kPerLane = 200;
  const TypeId type = make_type(std::vector<Leaf>{{"i32", 4, {kThreads, kPerLane}}},
                                std::vector<BatchLevel>{{{0}, false}});
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, type, State(type)) == Status::kOk);
  Count failed, lost;
  run_threads([&](int t) {
    const Masks mine(type, false);
    std::fill_n(mine.leaf(0) + t * kPerLane, kPerLane, true);
    State state(type);
    for (int i = 1; i <= kRounds; ++i) {
      const std::vector<std::int32_t> values(kThreads * kPerLane, i);
      std::memcpy(state.leaves[0].data(), values.data(), state.leaves[0].size());
      failed.add_if(set_masked(slot, type, mine, state) != Status::kOk);
      failed.add_if(get(slot, type, &state) != Status::kOk);
      lost.add_if(std::memcmp(state.leaves[0].data() +
                                  std::size_t{4} * kPerLane * static_cast<std::size_t>(t),
                              values.data(), std::size_t{4} * kPerLane) != 0);
    }
  });
  BOOST_TEST(failed.value() == 0);
  BOOST_TEST(lost.value() == 0);
  BOOST_TEST(held(slot, type) ==
             state_of(type, std::vector<std::int32_t>(kThreads * kPerLane, kRounds)));
}

// So is a set of one row.
BOOST_AUTO_TEST_CASE(sets_of_different_rows_lose_nothing) {
  constexpr int kRounds = 300;
  const Dims row_dims = {1000};
  const TypeId type = make_type(std::vector{i8({kThreads, row_dims[0]}), i8({kThreads})});
  const TypeId row_type = make_type(std::vector{i8(row_dims), i8({})});
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, type, State(type)) == Status::kOk);
  Count failed, lost, torn;
  run_threads([&](int t) {
    for (int i = 1; i <= kRounds; ++i) {
      const State mine(row_type, static_cast<std::byte>(i & 0xff));
      failed.add_if(slot->set_row(slot.id(), 0, type, t, {}, mine.in()) != Status::kOk);
      State row(row_type);
      failed.add_if(slot->get_row(slot.id(), 0, type, t, row.out()) != Status::kOk);
      lost.add_if(row != mine);
      failed.add_if(slot->get_row(slot.id(), 0, type, (t + 1) % kThreads, row.out()) !=
                    Status::kOk);
      torn.add_if(!is_constant(row));
    }
  });
  BOOST_TEST(failed.value() == 0);
  BOOST_TEST(lost.value() == 0);
  BOOST_TEST(torn.value() == 0);
  BOOST_TEST(held(slot, type) == State(type, static_cast<std::byte>(kRounds & 0xff)));
}

BOOST_AUTO_TEST_CASE(one_of_many_first_sets_fixes_the_type) {
  std::vector<TypeId> types;
  for (int t = 0; t < kThreads; ++t) types.push_back(make_type(std::vector{i8({100 + t})}));
  for (int round = 0; round < 30; ++round) {
    const SlotRef slot = SlotRef::create("s");
    std::vector<Status> statuses(kThreads);
    run_threads([&](int t) {
      const auto i = static_cast<std::size_t>(t);
      statuses[i] = set(slot, types[i], State(types[i], static_cast<std::byte>(t)));
    });
    int winners = 0;
    for (std::size_t t = 0; t < kThreads; ++t) {
      if (statuses[t] == Status::kOk) {
        ++winners;
        BOOST_TEST(slot->type() == types[t]);
        BOOST_TEST(held(slot, types[t]) == State(types[t], static_cast<std::byte>(t)));
      } else {
        BOOST_TEST(statuses[t] == Status::kTypeMismatch);
      }
    }
    BOOST_TEST(winners == 1);
    BOOST_TEST(slot->num_sets() == 1);
  }
}

BOOST_AUTO_TEST_CASE(devices_of_a_mesh_do_not_disturb_each_other) {
  const TypeId type = make_type(std::vector{f32({50}), i8({7})}, std::vector<BatchLevel>{},
                                std::vector<MeshAxis>{{"x", kThreads}});
  for (int round = 0; round < 10; ++round) {
    const SlotRef slot = SlotRef::create("s");
    Count wrong;
    run_threads([&](int t) {
      State out(type);
      wrong.add_if(get(slot, type, &out, t) != Status::kNeverSet);
      for (unsigned i = 0; i < 50; ++i) {
        const State state = State::random(type, 100 * static_cast<unsigned>(t) + i);
        wrong.add_if(set(slot, type, state, t) != Status::kOk);
        wrong.add_if(get(slot, type, &out, t) != Status::kOk || out != state);
      }
    });
    BOOST_TEST(wrong.value() == 0);
    BOOST_TEST(slot->devices().size() == std::size_t{kThreads});
  }
}

// Each thread that looks calls one method only: another's lock would order its reads, and hide a
// race of theirs from the sanitizer.
BOOST_AUTO_TEST_CASE(a_slot_can_be_looked_into_while_it_is_used) {
  constexpr int kRounds = 10, kSteps = 50;
  const TypeId type = make_type(std::vector{i8({32})});
  const TypeId other = make_type(std::vector{i8({33})});
  const std::string name = "a name that does not fit into the string itself";
  for (int round = 0; round < kRounds; ++round) {
    const SlotRef slot = SlotRef::create(name);
    const std::vector<std::function<bool(int)>> ways = {
        [&](int i) { return set(slot, type, State(type, std::byte(i))) == Status::kOk; },
        [&](int) {
          State state(type);
          const Status status = get(slot, type, &state);
          return (status == Status::kOk || status == Status::kNeverSet) && is_constant(state);
        },
        [&](int) {
          const std::vector<Event> events = slot->events();
          return std::all_of(events.begin(), events.end(), [](const Event& event) {
            return event.version > 0 && event.first_leaf.size() == 16 &&
                   event.first_leaf.front() == event.first_leaf.back();
          });
        },
        [&](int) {
          slot->watch(16);
          return true;
        },
        [&](int) {
          const std::string text =
              slot->explain(slot.id(), Status::kTypeMismatch, "get_state", 0, other);
          return text.starts_with("storax.get_state of " + name + ": it holds ");
        },
        [&](int) { return slot->name() == name; },
        [&](int) { return slot->type() == kNoType || slot->type() == type; },
        [&](int) { return slot->device() == kNoDevice || slot->device() == 0; },
        [&](int) { return slot->devices().size() <= 1; },
        [&](int) { return slot->num_gets() <= kSteps; },
        [&](int) { return slot->num_sets() <= kSteps; },
        [&](int) { return slot->version() <= kSteps; },
        [&](int) { return !slot->accepts(slot.id(), other); },
    };
    Count wrong;
    run_threads(
        [&](int t) {
          for (int i = 0; i < kSteps; ++i) wrong.add_if(!ways[static_cast<std::size_t>(t)](i));
        },
        static_cast<int>(ways.size()));
    BOOST_TEST(wrong.value() == 0);
    BOOST_TEST(slot->num_sets() == kSteps);
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
