// States mapped over a mesh: one cell per device.
#include <algorithm>
#include <random>
#include <vector>

#include "layouts.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(store_mapped, NothingLeaks)

const std::vector<MeshAxis> kMesh = {{"x", 8}};

TypeId mapped() {
  return make_type(std::vector{f32({3}), i8({2})}, std::vector<BatchLevel>{}, kMesh);
}

BOOST_AUTO_TEST_CASE(each_device_has_its_own_state) {
  const TypeId type = mapped();
  const SlotRef slot = SlotRef::create("s");
  const std::vector<Device> devices = {5, 0, 7, 2, 1, 6, 3, 4};
  for (const Device d : devices) {
    BOOST_TEST(set(slot, type, State::random(type, static_cast<unsigned>(d)), d) == Status::kOk);
  }
  for (Device d = 0; d < 8; ++d) {
    BOOST_TEST(held(slot, type, d) == State::random(type, static_cast<unsigned>(d)));
  }
  BOOST_TEST(slot->devices() == devices, boost::test_tools::per_element());
  BOOST_TEST(slot->device() == kNoDevice);
  BOOST_TEST(slot->num_sets() == 8);

  BOOST_TEST(set(slot, type, State(type), 2) == Status::kOk);
  BOOST_TEST(held(slot, type, 2) == State(type));
  BOOST_TEST(held(slot, type, 1) == State::random(type, 1));
  BOOST_TEST(slot->devices() == devices, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_device_without_a_state_was_never_set) {
  const TypeId type = mapped();
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, type, State(type), 0) == Status::kOk);
  State out = State::random(type, 1);
  BOOST_TEST(get(slot, type, &out, 1) == Status::kNeverSet);
  BOOST_TEST(out == State::random(type, 1));
  BOOST_TEST(slot->num_gets() == 0);
  BOOST_TEST(slot->devices().size() == 1u);
}

BOOST_AUTO_TEST_CASE(all_devices_share_one_type) {
  const TypeId type = mapped();
  const TypeId plain = make_type(std::vector{f32({3}), i8({2})});
  const TypeId other_mesh = make_type(std::vector{f32({3}), i8({2})}, std::vector<BatchLevel>{},
                                      std::vector<MeshAxis>{{"x", 4}});
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, type, State::random(type, 1), 0) == Status::kOk);
  for (const TypeId other : {plain, other_mesh}) {
    for (const Device d : {0, 1}) {
      State out(other);
      BOOST_TEST(set(slot, other, State(other), d) == Status::kTypeMismatch);
      BOOST_TEST(get(slot, other, &out, d) == Status::kTypeMismatch);
    }
  }
  BOOST_TEST(slot->devices().size() == 1u);
  BOOST_TEST(held(slot, type, 0) == State::random(type, 1));
}

BOOST_AUTO_TEST_CASE(each_device_takes_memory_until_the_slot_is_dropped) {
  const TypeId type = mapped();
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, type, State(type), 0) == Status::kOk);
  const std::int64_t one = usage().bytes;
  for (Device d = 1; d < 8; ++d) BOOST_TEST(set(slot, type, State(type), d) == Status::kOk);
  BOOST_TEST(usage().bytes == 8 * one);
}

BOOST_AUTO_TEST_CASE(the_first_masked_set_on_a_device_must_cover_it) {
  const TypeId type = make_type(std::vector{f32({2})}, std::vector<BatchLevel>{}, kMesh);
  const SlotRef slot = SlotRef::create("s");
  const State state = state_of<float>(type, {1, 2});
  BOOST_TEST(set(slot, type, state, 0) == Status::kOk);
  BOOST_TEST(set_masked(slot, type, Masks(type, {true, false}), state, 1) ==
             Status::kPartialFirstSet);
  BOOST_TEST(set_masked(slot, type, Masks(type, false), state, 1) == Status::kOk);
  BOOST_TEST(slot->devices().size() == 1u);
  BOOST_TEST(set_masked(slot, type, Masks(type, true), state, 1) == Status::kOk);
  BOOST_TEST(set_masked(slot, type, Masks(type, {true, false}), State(type), 1) == Status::kOk);
  BOOST_TEST(held(slot, type, 1) == state_of<float>(type, {0, 2}));
  BOOST_TEST(held(slot, type, 0) == state);
}

// The slot's type comes from its first device; a later device's first set may come from inside
// control flow that JAX batched, and must be laid out like the first.
BOOST_AUTO_TEST_CASE(a_first_set_on_a_further_device_is_transposed_too) {
  std::mt19937 bits(4);
  for (int i = 0; i < 200; ++i) {
    const TwoLayouts two = random_layouts(&bits);
    const TypeId home = intern_type(describe_layouts({two.a}, false, kMesh));
    const TypeId moved = intern_type(describe_layouts({two.b}, true, kMesh));
    const State in_home = state_of(home, two.a.elements());
    const State in_moved = state_of(moved, two.b.elements());
    const SlotRef slot = SlotRef::create("s");
    BOOST_REQUIRE(set(slot, home, State(home), 0) == Status::kOk);
    BOOST_REQUIRE(set(slot, moved, in_moved, 1) == Status::kOk);
    BOOST_TEST(held(slot, home, 1) == in_home);
    BOOST_TEST(held(slot, moved, 1) == in_moved);
    BOOST_REQUIRE(set_masked(slot, moved, Masks(moved, true), in_moved, 2) == Status::kOk);
    BOOST_TEST(held(slot, home, 2) == in_home);
  }
}

const std::vector<MeshAxis> kPair = {{"x", 2}};

TypeId one() { return make_type(std::vector{f32({3})}); }
TypeId two() { return make_type(std::vector{f32({3})}, std::vector<BatchLevel>{}, kPair); }

BOOST_AUTO_TEST_CASE(a_state_set_before_is_every_devices_at_first) {
  const SlotRef slot = SlotRef::create("s");
  const State before = State::random(one(), 1), own = State::random(two(), 2);
  BOOST_TEST(set(slot, one(), before) == Status::kOk);
  BOOST_TEST(slot->accepts(slot.id(), two()));
  BOOST_TEST(held(slot, two(), 1) == before);
  BOOST_TEST(slot->type() == one());  // a get changes nothing

  BOOST_TEST(set(slot, two(), own, 1) == Status::kOk);
  BOOST_TEST(slot->type() == two());
  BOOST_TEST(held(slot, two(), 1) == own);
  BOOST_TEST(held(slot, two(), 0) == before);
  BOOST_TEST(slot->device() == kNoDevice);
  BOOST_TEST(slot->devices() == std::vector<Device>{1}, boost::test_tools::per_element());
  BOOST_TEST(set(slot, one(), before) == Status::kTypeMismatch);
}

BOOST_AUTO_TEST_CASE(what_is_the_same_everywhere_is_read_as_one) {
  const SlotRef slot = SlotRef::create("s");
  const State a = State::random(one(), 1), b = State::random(one(), 2);
  State out(one());
  BOOST_TEST(set(slot, two(), a, 0) == Status::kOk);
  BOOST_TEST(get(slot, one(), &out) == Status::kTypeMismatch);  // device 1 has none
  BOOST_TEST(!slot->reads_as(slot.id(), one()));
  BOOST_TEST(set(slot, two(), b, 1) == Status::kOk);
  BOOST_TEST(get(slot, one(), &out) == Status::kTypeMismatch);  // they differ
  BOOST_TEST(set(slot, two(), a, 1) == Status::kOk);
  BOOST_TEST(slot->reads_as(slot.id(), one()));
  for (const Device d : {0, 1, 5}) BOOST_TEST(held(slot, one(), d) == a);
}

BOOST_AUTO_TEST_CASE(an_inherited_state_counts_while_some_device_has_it) {
  const SlotRef slot = SlotRef::create("s");
  const State before = State::random(one(), 1), own = State::random(one(), 2);
  BOOST_TEST(set(slot, one(), before) == Status::kOk);
  BOOST_TEST(set(slot, two(), own, 0) == Status::kOk);
  BOOST_TEST(!slot->reads_as(slot.id(), one()));
  BOOST_TEST(set(slot, two(), before, 0) == Status::kOk);
  BOOST_TEST(held(slot, one()) == before);
  BOOST_TEST(set(slot, two(), own, 0) == Status::kOk);
  BOOST_TEST(set(slot, two(), own, 1) == Status::kOk);
  BOOST_TEST(held(slot, one()) == own);  // nobody has the old one any more
}

BOOST_AUTO_TEST_CASE(a_masked_set_of_an_inherited_state_keeps_the_rest) {
  const SlotRef slot = SlotRef::create("s");
  const State before = State::random(one(), 1), own = State::random(two(), 2);
  BOOST_TEST(set(slot, one(), before) == Status::kOk);
  const bool mask[3] = {false, true, false};
  const bool* const masks[1] = {mask};
  BOOST_TEST(slot->set_masked(slot.id(), 1, two(), masks, own.in()) == Status::kOk);
  State want = before;
  std::copy_n(own.leaves[0].begin() + 4, 4, want.leaves[0].begin() + 4);
  BOOST_TEST(held(slot, two(), 1) == want);
  BOOST_TEST(held(slot, two(), 0) == before);
}

// Set outside of the mapped program and of control flow, used inside of both.
BOOST_AUTO_TEST_CASE(a_state_set_before_is_transposed_too) {
  std::mt19937 bits(9);
  for (int i = 0; i < 200; ++i) {
    const TwoLayouts two_ways = random_layouts(&bits);
    const TypeId plain = intern_type(describe_layouts({two_ways.a}, false));
    const TypeId outside = intern_type(describe_layouts({two_ways.a}, false, kPair));
    const TypeId inside = intern_type(describe_layouts({two_ways.b}, true, kPair));
    const State before = state_of(plain, two_ways.a.elements());
    const State seen = state_of(inside, two_ways.b.elements());
    const SlotRef slot = SlotRef::create("s");
    BOOST_REQUIRE(set(slot, plain, State(plain)) == Status::kOk);
    BOOST_REQUIRE(set(slot, inside, seen, 1) == Status::kOk);
    BOOST_TEST(held(slot, outside, 1) == before);
    BOOST_TEST(held(slot, outside, 0) == State(outside));

    // The first masked set takes the rest from the state there was.
    const SlotRef masked = SlotRef::create("s");
    BOOST_REQUIRE(set(masked, plain, before) == Status::kOk);
    BOOST_TEST(held(masked, inside, 1) == seen);
    const Masks masks(inside, true);
    masks.leaf(0)[bits() % masks.size(0)] = false;
    State expected = seen;
    for (std::size_t e = 0; e < masks.size(0); ++e) {
      if (masks.leaf(0)[e]) std::fill_n(&expected.leaves[0][8 * e], 8, std::byte{0});
    }
    BOOST_REQUIRE(set_masked(masked, inside, masks, State(inside), 1) == Status::kOk);
    BOOST_TEST(held(masked, inside, 1) == expected);
    BOOST_TEST(held(masked, inside, 0) == seen);
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
