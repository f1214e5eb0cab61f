// Slots' names, lifetimes and records: SlotRef, find_slot, watch.
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "allocations.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(slot, NothingLeaks)

TypeId one_float() { return make_type(std::vector{f32({1})}); }

std::int64_t entry_of(SlotId id) { return id & 0xffffffff; }

BOOST_AUTO_TEST_CASE(ids_are_distinct_and_never_negative) {
  std::vector<SlotRef> slots;
  std::set<SlotId> ids;
  for (int i = 0; i < 3000; ++i) slots.push_back(SlotRef::create(std::to_string(i)));
  for (std::size_t i = 0; i < slots.size(); ++i) {
    BOOST_TEST(slots[i].id() >= 0);
    BOOST_TEST(find_slot(slots[i].id()) == &*slots[i]);
    BOOST_TEST(slots[i]->name() == std::to_string(i));
    ids.insert(slots[i].id());
  }
  BOOST_TEST(ids.size() == slots.size());
  BOOST_TEST(usage().slots == 3000);
}

BOOST_AUTO_TEST_CASE(any_share_keeps_the_slot) {
  const TypeId type = one_float();
  SlotRef first = SlotRef::create("s");
  const SlotId id = first.id();
  BOOST_TEST(set(first, type, state_of<float>(type, {7})) == Status::kOk);
  SlotRef second = SlotRef::share(id), third = SlotRef::share(id);
  BOOST_TEST(second.id() == id);
  BOOST_TEST(&*second == &*first);
  first = SlotRef();
  second = SlotRef();
  BOOST_TEST(!first);
  BOOST_TEST(held(third, type) == state_of<float>(type, {7}));
  BOOST_TEST(usage().slots == 1);
  third = SlotRef();
  BOOST_TEST(usage().slots == 0);
}

void check_dead(SlotId id) {
  const TypeId type = one_float();
  BOOST_TEST(!SlotRef::share(id));
  Slot* entry = find_slot(id);
  BOOST_REQUIRE(entry != nullptr);
  State state = State::random(type, 1);
  BOOST_TEST(entry->get(id, 0, type, state.out()) == Status::kDropped);
  BOOST_TEST(state == State::random(type, 1));
  BOOST_TEST(entry->set(id, 0, type, state.in()) == Status::kDropped);
  const Masks masks(type, true);
  BOOST_TEST(entry->set_masked(id, 0, type, masks.pointers(), state.in()) == Status::kDropped);
}

BOOST_AUTO_TEST_CASE(a_dropped_id_is_dead_for_ever) {
  const TypeId type = one_float();
  std::vector<SlotId> dead;
  for (int i = 0; i < 5; ++i) {
    SlotRef slot = SlotRef::create("s");
    dead.push_back(slot.id());
    if (i % 2 == 0) BOOST_TEST(set(slot, type, State(type)) == Status::kOk);
    slot = SlotRef();
    for (const SlotId id : dead) check_dead(id);
  }
  // The one entry served them all, and a live user of it doesn't wake the dead.
  const SlotRef live = SlotRef::create("live");
  for (const SlotId id : dead) {
    BOOST_TEST(entry_of(id) == entry_of(live.id()));
    BOOST_TEST(id != live.id());
    check_dead(id);
  }
  BOOST_TEST(live->num_sets() == 0);
  BOOST_TEST(live->type() == kNoType);
}

BOOST_AUTO_TEST_CASE(a_partial_masked_set_of_a_dead_slot) {
  const TypeId type = make_type(std::vector{f32({2})});
  SlotRef slot = SlotRef::create("s");
  const SlotId id = slot.id();
  slot = SlotRef();
  const Masks masks(type, {true, false});
  const State state(type);
  BOOST_TEST(find_slot(id)->set_masked(id, 0, type, masks.pointers(), state.in()) ==
             Status::kDropped);
}

BOOST_AUTO_TEST_CASE(a_reused_entry_starts_afresh) {
  const TypeId type = one_float();
  const TypeId other =
      make_type(std::vector{i8({3})}, std::vector<BatchLevel>{}, std::vector<MeshAxis>{{"x", 2}});
  SlotRef slot = SlotRef::create("old");
  const SlotId old = slot.id();
  slot->watch(10);
  slot->add_program(3);
  for (const Device d : {4, 5}) BOOST_TEST(set(slot, other, State(other), d) == Status::kOk);
  held(slot, other, 4);
  slot = SlotRef();
  slot = SlotRef::create("new");
  BOOST_REQUIRE(entry_of(slot.id()) == entry_of(old));
  BOOST_TEST(slot->name() == "new");
  BOOST_TEST(slot->type() == kNoType);
  BOOST_TEST(slot->device() == kNoDevice);
  BOOST_TEST(slot->devices().empty());
  BOOST_TEST(slot->version() == 0);
  BOOST_TEST(slot->num_gets() == 0);
  BOOST_TEST(slot->num_sets() == 0);
  BOOST_TEST(slot->num_programs() == 0);
  BOOST_TEST(set(slot, type, State(type)) == Status::kOk);
  BOOST_TEST(slot->device() == 0);
  BOOST_TEST(slot->events().empty());
}

BOOST_AUTO_TEST_CASE(ids_that_no_slot_ever_had) {
  for (const SlotId id : {SlotId{0x7fffffff}, (SlotId{5} << 32) | 0x7fffffff, SlotId{-1}}) {
    BOOST_TEST(find_slot(id) == nullptr);
    BOOST_TEST(!SlotRef::share(id));
  }
  // A generation that has not come yet.
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(!SlotRef::share(slot.id() + (SlotId{1} << 32)));
}

BOOST_AUTO_TEST_CASE(shares_can_be_moved) {
  SlotRef a = SlotRef::create("a"), b = SlotRef::create("b");
  const SlotId id_a = a.id(), id_b = b.id();
  SlotRef c = std::move(a);
  BOOST_TEST(!a);
  BOOST_TEST(c.id() == id_a);
  BOOST_TEST(usage().slots == 2);
  c = std::move(b);
  BOOST_TEST(c.id() == id_b);
  BOOST_TEST(c->name() == "b");
  SlotRef& same = c;
  c = std::move(same);
  BOOST_TEST(c.id() == id_b);
  BOOST_TEST(c->name() == "b");
  std::vector<SlotRef> many;
  for (int i = 0; i < 100; ++i) many.push_back(SlotRef::share(id_b));
  c = SlotRef();
  many.erase(many.begin(), many.begin() + 99);
  BOOST_TEST(many[0]->name() == "b");
  BOOST_TEST(bool(SlotRef::share(id_b)));
}

BOOST_AUTO_TEST_CASE(a_dropped_slot_gives_its_memory_back) {
  const TypeId type = make_type(std::vector{f32({100})}, std::vector<BatchLevel>{},
                                std::vector<MeshAxis>{{"x", 8}});
  // An entry of the table that no slot had before, and so no memory was left in.
  std::vector<SlotRef> slots;
  do {
    slots.push_back(SlotRef::create(std::string(1000, 'n')));
  } while (slots.back().id() >> 32 != 0);
  const SlotRef& slot = slots.back();
  const std::int64_t before = live_allocations();
  slot->watch(1000);
  for (Device d = 0; d < 8; ++d) BOOST_TEST(set(slot, type, State(type), d) == Status::kOk);
  BOOST_TEST(live_allocations() > before);
  slots.pop_back();
  BOOST_TEST(live_allocations() == before - 1);  // that one was the name
}

BOOST_AUTO_TEST_CASE(watching_keeps_the_next_events) {
  const TypeId type = one_float();
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, type, state_of<float>(type, {1})) == Status::kOk);
  BOOST_TEST(slot->events().empty());
  slot->watch(3);
  held(slot, type);
  BOOST_TEST(set(slot, type, state_of<float>(type, {2})) == Status::kOk);
  State wrong(make_type(std::vector{i8({1})}));
  BOOST_TEST(get(slot, make_type(std::vector{i8({1})}), &wrong) == Status::kTypeMismatch);
  held(slot, type);
  held(slot, type);
  const std::vector<Event> events = slot->events();
  BOOST_REQUIRE(events.size() == 3u);
  using Kind = Event::Kind;
  BOOST_TEST((events[0].kind == Kind::kGet && events[1].kind == Kind::kSet &&
              events[2].kind == Kind::kGet));
  BOOST_TEST(events[0].version == 1);
  BOOST_TEST(events[1].version == 2);
  BOOST_TEST(events[2].version == 2);
  BOOST_TEST((events[0].first_leaf == state_of<float>(type, {1}).leaves[0]));
  BOOST_TEST((events[1].first_leaf == state_of<float>(type, {2}).leaves[0]));
  BOOST_TEST((events[2].first_leaf == state_of<float>(type, {2}).leaves[0]));

  slot->watch(1);
  BOOST_TEST(slot->events().empty());
  held(slot, type);
  BOOST_TEST(slot->events().size() == 1u);
  slot->watch(0);
  held(slot, type);
  BOOST_TEST(slot->events().empty());
}

BOOST_AUTO_TEST_CASE(events_show_the_start_of_the_first_leaf) {
  const TypeId large = make_type(std::vector{i8({100}), f32({})});
  const TypeId none = make_type(std::vector<Leaf>{});
  const SlotRef a = SlotRef::create("a"), b = SlotRef::create("b");
  a->watch(4);
  b->watch(4);
  const State state = State::random(large, 1);
  BOOST_TEST(set(a, large, state) == Status::kOk);
  const Masks masks(large, false);
  masks.leaf(0)[3] = true;
  BOOST_TEST(set_masked(a, large, masks, State(large)) == Status::kOk);
  std::vector<std::byte> expected(state.leaves[0].begin(), state.leaves[0].begin() + 16);
  BOOST_TEST((a->events().at(0).first_leaf == expected));
  expected[3] = std::byte{0};
  BOOST_TEST((a->events().at(1).first_leaf == expected));
  BOOST_TEST(set(b, none, State(none)) == Status::kOk);
  BOOST_TEST(b->events().at(0).first_leaf.empty());
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
