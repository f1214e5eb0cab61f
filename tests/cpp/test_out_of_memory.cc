// What happens when memory runs out, at each place in turn: nothing is written, nothing lost.
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "allocations.h"
#include "layouts.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(out_of_memory, NothingLeaks)

// Runs `op` with its n-th allocation failing, for each n, until it needs no more; returns how many
// failed. After each failure `check` must find things as they were.
int fail_each_allocation(const std::function<Status()>& op, const std::function<void()>& check) {
  for (int n = 0;; ++n) {
    Status status = Status::kOk;
    bool failed = false;
    {
      const FailAllocation fail(n);
      status = op();
      failed = fail.happened();
    }
    if (!failed) {
      BOOST_TEST(status == Status::kOk);
      return n;
    }
    BOOST_TEST_CONTEXT("allocation " << n) {
      BOOST_TEST(status == Status::kOutOfMemory);
      check();
    }
  }
}

struct Moved {
  const std::vector<MeshAxis> mesh = {{"x", 2}};
  const Layout a{{2, 3}, {4}, {2}}, b{{2, 3}, {4}, {0}};
  const TypeId home = intern_type(describe_layouts({a, a}, false, mesh));
  const TypeId moved = intern_type(describe_layouts({b, b}, true, mesh));
};

BOOST_AUTO_TEST_CASE(first_set) {
  const TypeId type = make_type(std::vector{f32({100}), i8({3})});
  const SlotRef slot = SlotRef::create("s");
  const State state = State::random(type, 1);
  const std::vector<const std::byte*> in = state.in();
  const int failures = fail_each_allocation([&] { return slot->set(slot.id(), 0, type, in); },
                                            [&] {
                                              BOOST_TEST(slot->type() == kNoType);
                                              BOOST_TEST(slot->device() == kNoDevice);
                                              BOOST_TEST(slot->version() == 0);
                                              BOOST_TEST(usage().bytes == 0);
                                            });
  BOOST_TEST(failures > 0);
  BOOST_TEST(held(slot, type) == state);
}

BOOST_AUTO_TEST_CASE(later_sets_and_gets_of_one_type_need_no_memory) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef slot = SlotRef::create("s");
  State state = State::random(type, 1);
  BOOST_REQUIRE(set(slot, type, state) == Status::kOk);
  const std::vector<const std::byte*> in = state.in();
  const std::vector<std::byte*> out = state.out();
  const Masks masks(type, {true, false});
  const auto nothing = [] {};
  BOOST_TEST(fail_each_allocation([&] { return slot->set(slot.id(), 0, type, in); }, nothing) == 0);
  BOOST_TEST(fail_each_allocation([&] { return slot->get(slot.id(), 0, type, out); }, nothing) ==
             0);
  BOOST_TEST(fail_each_allocation(
                 [&] { return slot->set_masked(slot.id(), 0, type, masks.pointers(), in); },
                 nothing) == 0);
}

BOOST_AUTO_TEST_CASE(moved_set) {
  const Moved types;
  const SlotRef slot = SlotRef::create("s");
  const State before = State::random(types.home, 1), next = State::random(types.moved, 2);
  BOOST_REQUIRE(set(slot, types.home, before) == Status::kOk);
  const std::vector<const std::byte*> in = next.in();
  const auto unchanged = [&] {
    BOOST_TEST(slot->version() == 1);
    BOOST_TEST(held(slot, types.home) == before);
  };
  const Masks masks(types.moved, true);
  masks.leaf(0)[0] = false;
  BOOST_TEST(fail_each_allocation(
                 [&] { return slot->set_masked(slot.id(), 0, types.moved, masks.pointers(), in); },
                 unchanged) > 0);
  BOOST_REQUIRE(set(slot, types.home, before) == Status::kOk);
  BOOST_TEST(fail_each_allocation([&] { return slot->set(slot.id(), 0, types.moved, in); },
                                  [&] { BOOST_TEST(held(slot, types.home) == before); }) > 0);
  BOOST_TEST(held(slot, types.moved) == next);
}

BOOST_AUTO_TEST_CASE(moved_get) {
  const Moved types;
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, types.home, State::random(types.home, 1)) == Status::kOk);
  State out(types.moved);
  const std::vector<std::byte*> pointers = out.out();
  BOOST_TEST(fail_each_allocation([&] { return slot->get(slot.id(), 0, types.moved, pointers); },
                                  [&] {
                                    BOOST_TEST(out == State(types.moved));
                                    BOOST_TEST(slot->num_gets() == 0);
                                  }) > 0);
}

BOOST_AUTO_TEST_CASE(first_set_on_a_further_device) {
  const Moved types;
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, types.home, State(types.home), 0) == Status::kOk);
  const std::int64_t bytes = usage().bytes;
  const State next = State::random(types.moved, 2);
  const std::vector<const std::byte*> in = next.in();
  BOOST_TEST(fail_each_allocation([&] { return slot->set(slot.id(), 1, types.moved, in); },
                                  [&] {
                                    State out(types.home);
                                    BOOST_TEST(get(slot, types.home, &out, 1) == Status::kNeverSet);
                                    BOOST_TEST(slot->devices().size() == 1u);
                                    BOOST_TEST(usage().bytes == bytes);
                                  }) > 0);
  BOOST_TEST(held(slot, types.moved, 1) == next);
}

// A mapped program's first set of a part of a state that was set before it.
BOOST_AUTO_TEST_CASE(first_set_of_a_part_on_a_device) {
  const Moved types;
  const TypeId plain = find_type(types.home)->base();
  const State before = State::random(plain, 1), next = State::random(types.moved, 2);
  const std::vector<const std::byte*> in = next.in();
  const Masks most(types.moved, true);
  most.leaf(0)[0] = false;
  const SlotRef masked = SlotRef::create("s"), row = SlotRef::create("s");
  const std::vector<std::function<Status()>> ways = {
      [&] { return masked->set_masked(masked.id(), 1, types.moved, most.pointers(), in); },
      [&] { return row->set_row(row.id(), 1, types.home, 0, {}, in); },
  };
  for (const SlotRef* slot : {&masked, &row}) {
    BOOST_REQUIRE(set(*slot, plain, before) == Status::kOk);
    const std::int64_t bytes = usage().bytes;
    BOOST_TEST(fail_each_allocation(ways[slot == &row ? 1 : 0], [&] {
                 BOOST_TEST((*slot)->type() == plain);
                 BOOST_TEST((*slot)->version() == 1);
                 BOOST_TEST((*slot)->devices().size() == 1u);
                 BOOST_TEST(held(*slot, plain) == before);
                 BOOST_TEST(usage().bytes == bytes);
               }) > 0);
    BOOST_TEST((*slot)->type() == types.home);
    BOOST_TEST(held(*slot, types.home, 1) != before);
  }
}

// An event that cannot be kept is no reason for the operation to fail.
BOOST_AUTO_TEST_CASE(watched_operations) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef slot = SlotRef::create("s");
  State state = State::random(type, 1);
  BOOST_REQUIRE(set(slot, type, state) == Status::kOk);
  slot->watch(4);
  const std::vector<std::byte*> out = state.out();
  Status status = Status::kDropped;
  bool failed = false;
  {
    const FailAllocation fail(0);
    status = slot->get(slot.id(), 0, type, out);
    failed = fail.happened();
  }
  BOOST_TEST(failed);
  BOOST_TEST(status == Status::kOk);
  BOOST_TEST(slot->num_gets() == 1);
  BOOST_TEST(slot->events().empty());
}

// Runs `make` with each of its allocations failing in turn: it throws std::bad_alloc each time.
int throw_at_each_allocation(const std::function<void()>& make) {
  for (int n = 0;; ++n) {
    bool threw = false, failed = false;
    {
      const FailAllocation fail(n);
      try {
        make();
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      failed = fail.happened();
    }
    BOOST_TEST(threw == failed);
    if (!failed) return n;
  }
}

BOOST_AUTO_TEST_CASE(creating_slots) {
  std::vector<SlotRef> slots;
  slots.reserve(5000);
  int thrown = 0;
  // Enough to make the table grow.
  for (int i = 0; i < 5000; ++i) {
    thrown += throw_at_each_allocation([&] { slots.push_back(SlotRef::create("s")); });
  }
  BOOST_TEST(thrown > 0);
  BOOST_TEST(slots.size() == 5000u);
  BOOST_TEST(usage().slots == 5000);
}

// A program may end, and its share with it, where nobody can be told of a failure.
BOOST_AUTO_TEST_CASE(dropping_slots_needs_no_memory) {
  const TypeId type = make_type(std::vector{f32({2})});
  std::vector<SlotRef> slots;
  // More than any other test, so that no room for them is left over.
  for (int i = 0; i < 12000; ++i) slots.push_back(SlotRef::create("s"));
  BOOST_TEST(set(slots[0], type, State(type)) == Status::kOk);
  bool failed = false;
  {
    const FailAllocation fail(0);
    slots.clear();
    failed = fail.happened();
  }
  BOOST_TEST(!failed);
  BOOST_TEST(usage().slots == 0);
}

BOOST_AUTO_TEST_CASE(interning) {
  const TypeDesc desc =
      describe({{"dtype of a name too long to be stored in place", 4, {2, 3}}}, {{{0}, false}},
               {{"an axis of a name too long to be stored in place", 2}});
  TypeId id = kNoType;
  BOOST_TEST(throw_at_each_allocation([&] { id = intern_type(desc); }) > 0);
  BOOST_TEST(intern_type(desc) == id);
  BOOST_TEST((find_type(id)->desc() == desc));
}

BOOST_AUTO_TEST_CASE(recording_a_failure_still_counts_it) {
  const std::string message(100, 'm');
  failures::record(0, "kept");
  {
    const FailAllocation fail(0);
    failures::record(0, message);
  }
  BOOST_TEST(failures::pending() == 2u);
  const std::vector<std::string> taken = failures::take();
  BOOST_REQUIRE(taken.size() == 2u);
  BOOST_TEST(taken[0] == "kept");
  BOOST_TEST(taken[1] == "and 1 failures more");
}

BOOST_AUTO_TEST_CASE(acknowledging_loses_no_other_failure) {
  const std::vector<std::string> messages = {"a failure whose text is too long to be kept in place",
                                             "another failure whose text is too long for that"};
  for (int device = 0; device < 3; ++device) {
    for (const std::string& m : messages) failures::record(device, m);
  }
  bool failed = true;
  for (int n = 0; failed; ++n) {
    const FailAllocation fail(n);
    failures::acknowledge(messages[0]);
    failed = fail.happened();
  }
  const std::vector<std::string> left = failures::take();
  BOOST_TEST(left.size() == 3u);
  for (const std::string& m : left) BOOST_TEST(m == messages[1]);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
