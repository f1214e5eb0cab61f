// Getting and setting whole states on one device.
#include <cstdint>
#include <random>
#include <vector>

#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(store, NothingLeaks)

BOOST_AUTO_TEST_CASE(a_new_slot_holds_nothing) {
  const SlotRef slot = SlotRef::create("counter");
  BOOST_TEST(slot->name() == "counter");
  BOOST_TEST(slot->type() == kNoType);
  BOOST_TEST(slot->device() == kNoDevice);
  BOOST_TEST(slot->devices().empty());
  BOOST_TEST(slot->version() == 0);
  BOOST_TEST(slot->num_gets() == 0);
  BOOST_TEST(slot->num_sets() == 0);
  BOOST_TEST(slot->num_programs() == 0);
  State out(make_type(std::vector{f32({})}));
  BOOST_TEST(get(slot, make_type(std::vector{f32({})}), &out) == Status::kNeverSet);
}

BOOST_AUTO_TEST_CASE(states_of_all_sorts_make_the_round_trip) {
  const std::vector<TypeId> types = {
      make_type(std::vector{f32({})}),
      make_type(std::vector{f32({1000})}),
      make_type(std::vector{i8({})}),
      make_type(std::vector<Leaf>{{"c128", 16, {3, 5}}}),
      make_type(std::vector<Leaf>{i8({63}), i8({64}), i8({65}), {"bf16", 2, {7, 3}}, f32({})}),
      make_type(std::vector{f32({4}), i8({0}), i8({3})}),
      make_type(std::vector{i8({0, 5})}),
      make_type(std::vector{i8({0}), f32({2, 0})}),
      make_type(std::vector<Leaf>{}),
      make_type(std::vector<Leaf>(40, f32({2}))),
  };
  for (const TypeId type : types) {
    BOOST_TEST_CONTEXT(find_type(type)->str()) {
      const SlotRef slot = SlotRef::create("s");
      for (std::uint32_t seed = 0; seed < 3; ++seed) {
        const State state = State::random(type, seed);
        BOOST_TEST(set(slot, type, state) == Status::kOk);
        BOOST_TEST(held(slot, type) == state);
        BOOST_TEST(held(slot, type) == state);
      }
      BOOST_TEST(slot->type() == type);
      BOOST_TEST(slot->num_sets() == 3);
      BOOST_TEST(slot->num_gets() == 6);
    }
  }
}

BOOST_AUTO_TEST_CASE(null_pointers_stand_for_empty_leaves) {
  const TypeId type = make_type(std::vector{i8({0}), f32({1}), f32({3, 0})});
  const SlotRef slot = SlotRef::create("s");
  float in = 1.5F, out = 0;
  const std::byte* const ins[] = {nullptr, reinterpret_cast<const std::byte*>(&in), nullptr};
  std::byte* const outs[] = {nullptr, reinterpret_cast<std::byte*>(&out), nullptr};
  BOOST_TEST(slot->set(slot.id(), 0, type, ins) == Status::kOk);
  BOOST_TEST(slot->get(slot.id(), 0, type, outs) == Status::kOk);
  BOOST_TEST(out == 1.5F);
}

BOOST_AUTO_TEST_CASE(the_slot_keeps_a_copy) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef slot = SlotRef::create("s");
  State mine = state_of<float>(type, {1, 2});
  BOOST_TEST(set(slot, type, mine) == Status::kOk);
  mine = state_of<float>(type, {3, 4});
  State got = held(slot, type);
  BOOST_TEST(got == state_of<float>(type, {1, 2}));
  got = state_of<float>(type, {5, 6});
  BOOST_TEST(held(slot, type) == state_of<float>(type, {1, 2}));
}

BOOST_AUTO_TEST_CASE(slots_are_independent) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef a = SlotRef::create("a"), b = SlotRef::create("b");
  BOOST_TEST(set(a, type, state_of<float>(type, {1, 2})) == Status::kOk);
  State out(type);
  BOOST_TEST(get(b, type, &out) == Status::kNeverSet);
  BOOST_TEST(set(b, type, state_of<float>(type, {3, 4})) == Status::kOk);
  BOOST_TEST(held(a, type) == state_of<float>(type, {1, 2}));
}

// Fails each operation that can fail so, and checks that it left no trace.
void check_refused(const SlotRef& slot, TypeId type, const std::vector<std::byte>& leaf,
                   Device device, Status expected) {
  const TypeId type_before = slot->type();
  const std::int64_t version = slot->version(), gets = slot->num_gets(), sets = slot->num_sets();
  const std::vector<Device> devices = slot->devices();
  const Usage used = usage();

  std::vector<std::byte> target = leaf;
  std::byte* const out[] = {target.data()};
  const std::byte* const in[] = {leaf.data()};
  BOOST_TEST(slot->get(slot.id(), device, type, out) == expected);
  BOOST_TEST((target == leaf));
  BOOST_TEST(slot->set(slot.id(), device, type, in) == expected);
  if (const Type* known = find_type(type); known != nullptr) {
    Masks some(type, true);
    some.leaf(0)[0] = false;
    BOOST_REQUIRE(some.size(0) > 1);
    BOOST_TEST(slot->set_masked(slot.id(), device, type, some.pointers(), in) == expected);
    const Masks all(type, true);
    BOOST_TEST(slot->set_masked(slot.id(), device, type, all.pointers(), in) == expected);
  }

  BOOST_TEST(slot->type() == type_before);
  BOOST_TEST(slot->version() == version);
  BOOST_TEST(slot->num_gets() == gets);
  BOOST_TEST(slot->num_sets() == sets);
  BOOST_TEST(slot->devices() == devices, boost::test_tools::per_element());
  BOOST_TEST(usage().bytes == used.bytes);
}

BOOST_AUTO_TEST_CASE(the_first_set_fixes_the_type) {
  const TypeId type = make_type(std::vector{f32({2, 3})}, std::vector<BatchLevel>{{{0}, false}});
  const SlotRef slot = SlotRef::create("s");
  const State state = State::random(type, 1);
  BOOST_REQUIRE(set(slot, type, state) == Status::kOk);
  const std::vector<std::byte> scratch(64, std::byte{0xa5});
  const std::vector<TypeDesc> others = {
      describe({f32({2, 3})}),
      describe({f32({2, 3})}, {{{1}, false}}),
      describe({f32({2, 3})}, {{{0}, false}, {{0}, false}}),
      describe({f32({3, 2})}, {{{0}, false}}),
      describe({f32({6})}, {{{0}, false}}),
      describe({{"i32", 4, {2, 3}}}, {{{0}, false}}),
      describe({i8({2, 3})}, {{{0}, false}}),
      describe({i8({2, 3})}, {{{0}, false}}, {{"x", 1}}),
  };
  for (const TypeDesc& other : others) {
    BOOST_TEST_CONTEXT(Type(other, 1).str()) {
      check_refused(slot, intern_type(other), scratch, 0, Status::kTypeMismatch);
    }
  }
  TypeDesc other_structure = find_type(type)->desc();
  other_structure.structure = 99;
  check_refused(slot, intern_type(other_structure), scratch, 0, Status::kTypeMismatch);
  BOOST_TEST(held(slot, type) == state);
}

BOOST_AUTO_TEST_CASE(ids_of_no_type_are_refused) {
  const TypeId type = make_type(std::vector<Leaf>{});
  const SlotRef slot = SlotRef::create("s");
  const std::vector<std::byte> scratch(8);
  for (const TypeId unknown : {kNoType, TypeId{0xfffffff0}}) {
    std::byte* const out[] = {nullptr};
    const std::byte* const in[] = {scratch.data()};
    BOOST_TEST(slot->get(slot.id(), 0, unknown, out) == Status::kNeverSet);
    BOOST_TEST(slot->set(slot.id(), 0, unknown, in) == Status::kTypeMismatch);
    BOOST_TEST(slot->set_masked(slot.id(), 0, unknown, {}, {}) == Status::kTypeMismatch);
    BOOST_TEST(slot->type() == kNoType);
    BOOST_TEST(slot->devices().empty());
    BOOST_TEST(usage().bytes == 0);
  }
  // Also where the slot holds a state as void as kNoType's would be.
  BOOST_TEST(set(slot, type, State(type)) == Status::kOk);
  for (const TypeId unknown : {kNoType, TypeId{0xfffffff0}}) {
    BOOST_TEST(slot->get(slot.id(), 0, unknown, {}) == Status::kTypeMismatch);
    BOOST_TEST(slot->set(slot.id(), 0, unknown, {}) == Status::kTypeMismatch);
  }
  BOOST_TEST(slot->num_sets() == 1);
}

BOOST_AUTO_TEST_CASE(a_state_lives_on_the_device_of_its_first_set) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef slot = SlotRef::create("s");
  const State state = State::random(type, 1);
  BOOST_TEST(set(slot, type, state, 3) == Status::kOk);
  BOOST_TEST(slot->device() == 3);
  BOOST_TEST(slot->devices() == (std::vector{3}), boost::test_tools::per_element());
  check_refused(slot, type, std::vector<std::byte>(8, std::byte{1}), 0, Status::kWrongDevice);
  BOOST_TEST(held(slot, type, 3) == state);
  BOOST_TEST(set(slot, type, State::random(type, 2), 3) == Status::kOk);
}

BOOST_AUTO_TEST_CASE(versions_grow_with_sets_only) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef slot = SlotRef::create("s");
  std::int64_t last = slot->version();
  for (int i = 1; i <= 5; ++i) {
    BOOST_TEST(set(slot, type, State(type)) == Status::kOk);
    BOOST_TEST(slot->version() > last);
    last = slot->version();
    held(slot, type);
    BOOST_TEST(slot->version() == last);
    BOOST_TEST(slot->num_sets() == i);
    BOOST_TEST(slot->num_gets() == i);
  }
}

BOOST_AUTO_TEST_CASE(programs_are_counted) {
  const SlotRef slot = SlotRef::create("s");
  const SlotRef other = SlotRef::create("other");
  slot->add_program(1);
  slot->add_program(2);
  other->add_program(4);
  BOOST_TEST(slot->num_programs() == 3);
  BOOST_TEST(usage().programs == 7);
  slot->add_program(-3);
  BOOST_TEST(slot->num_programs() == 0);
  other->add_program(-4);
  BOOST_TEST(usage().programs == 0);
}

BOOST_AUTO_TEST_CASE(a_slot_accepts_the_types_that_its_operations_would) {
  const std::vector<TypeId> types = {
      make_type(std::vector{f32({2, 3})}),
      make_type(std::vector{f32({2, 3})}, std::vector<BatchLevel>{{{0}, false}}),
      make_type(std::vector{f32({2, 3})}, std::vector<BatchLevel>{{{1}, false}}),
      make_type(std::vector{f32({3, 2})}, std::vector<BatchLevel>{{{1}, true}}),
      make_type(std::vector{i8({2, 3})}),
  };
  for (const TypeId mine : types) {
    SlotRef slot = SlotRef::create("s");
    for (const TypeId type : types) BOOST_TEST(!slot->accepts(slot.id(), type));
    BOOST_TEST(set(slot, mine, State(mine)) == Status::kOk);
    for (const TypeId type : types) {
      State out(type);
      BOOST_TEST(slot->accepts(slot.id(), type) == (get(slot, type, &out) == Status::kOk));
    }
    BOOST_TEST(slot->accepts(slot.id(), mine));
    BOOST_TEST(!slot->accepts(slot.id(), kNoType));
    BOOST_TEST(!slot->accepts(slot.id(), 0xffffffff));
    BOOST_TEST(!slot->accepts(slot.id() + (SlotId{1} << 32), mine));
  }
}

BOOST_AUTO_TEST_CASE(usage_counts_slots_and_their_states) {
  const TypeId large = make_type(std::vector{f32({1000})});
  const TypeId empty = make_type(std::vector<Leaf>{});
  {
    const SlotRef a = SlotRef::create("a"), b = SlotRef::create("b");
    BOOST_TEST(usage().slots == 2);
    BOOST_TEST(usage().bytes == 0);
    BOOST_TEST(set(a, large, State(large)) == Status::kOk);
    const std::int64_t bytes = usage().bytes;
    BOOST_TEST(bytes >= 4000);
    BOOST_TEST(bytes < 4100);
    BOOST_TEST(set(a, large, State(large)) == Status::kOk);
    BOOST_TEST(usage().bytes == bytes);
    BOOST_TEST(set(b, empty, State(empty)) == Status::kOk);
    BOOST_TEST(usage().bytes < bytes + 64);
  }
  BOOST_TEST(usage().slots == 0);
  BOOST_TEST(usage().bytes == 0);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
