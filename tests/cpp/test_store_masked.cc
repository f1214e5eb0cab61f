// Slot::set_masked: only the elements whose mask is true are written.
#include <cstring>
#include <random>
#include <vector>

#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(store_masked, NothingLeaks)

TypeId three_floats() { return make_type(std::vector{f32({3})}); }

BOOST_AUTO_TEST_CASE(only_elements_under_the_mask_are_written) {
  const TypeId type = three_floats();
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, type, state_of<float>(type, {1, 2, 3})) == Status::kOk);
  const State next = state_of<float>(type, {10, 20, 30});
  BOOST_TEST(set_masked(slot, type, Masks(type, {false, true, false}), next) == Status::kOk);
  BOOST_TEST(held(slot, type) == state_of<float>(type, {1, 20, 3}));
  BOOST_TEST(set_masked(slot, type, Masks(type, {true, false, true}), next) == Status::kOk);
  BOOST_TEST(held(slot, type) == next);
  BOOST_TEST(slot->num_sets() == 3);
  BOOST_TEST(slot->version() == 3);
}

BOOST_AUTO_TEST_CASE(a_full_mask_is_a_set) {
  const TypeId type = three_floats();
  const SlotRef slot = SlotRef::create("s");
  for (const auto& values : {std::vector<float>{1, 2, 3}, std::vector<float>{4, 5, 6}}) {
    const State state = state_of(type, values);
    BOOST_TEST(set_masked(slot, type, Masks(type, true), state) == Status::kOk);
    BOOST_TEST(held(slot, type) == state);
  }
  BOOST_TEST(slot->version() == 2);
}

// A branch that no lane takes does nothing and never raises, whatever it would have done.
BOOST_AUTO_TEST_CASE(an_empty_mask_does_nothing) {
  const TypeId type = three_floats();
  const TypeId other = make_type(std::vector{i8({3})});
  const State state = state_of<float>(type, {1, 2, 3});
  SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set_masked(slot, type, Masks(type, false), state) == Status::kOk);
  BOOST_TEST(slot->type() == kNoType);
  BOOST_TEST(slot->num_sets() == 0);
  BOOST_TEST(usage().bytes == 0);

  BOOST_TEST(set(slot, type, state) == Status::kOk);
  BOOST_TEST(set_masked(slot, type, Masks(type, false), State(type)) == Status::kOk);
  BOOST_TEST(set_masked(slot, type, Masks(type, false), State(type), 1) == Status::kOk);
  BOOST_TEST(set_masked(slot, other, Masks(other, false), State(other)) == Status::kOk);
  BOOST_TEST(held(slot, type) == state);
  BOOST_TEST(slot->version() == 1);
  BOOST_TEST(slot->num_sets() == 1);
}

BOOST_AUTO_TEST_CASE(the_first_set_must_cover_every_lane) {
  const TypeId type = three_floats();
  const SlotRef slot = SlotRef::create("s");
  const State state = state_of<float>(type, {1, 2, 3});
  BOOST_TEST(set_masked(slot, type, Masks(type, {true, true, false}), state) ==
             Status::kPartialFirstSet);
  BOOST_TEST(slot->type() == kNoType);
  BOOST_TEST(slot->version() == 0);
  BOOST_TEST(usage().bytes == 0);
  State out(type);
  BOOST_TEST(get(slot, type, &out) == Status::kNeverSet);
  // One leaf full and the other empty is partial too.
  const TypeId two = make_type(std::vector{f32({1}), i8({1})});
  const Masks masks(two, true);
  masks.leaf(1)[0] = false;
  BOOST_TEST(set_masked(slot, two, masks, State(two)) == Status::kPartialFirstSet);
  // Nothing was fixed: any type may still come first.
  BOOST_TEST(set(slot, two, State(two)) == Status::kOk);
}

BOOST_AUTO_TEST_CASE(checks_come_before_writes) {
  const TypeId type = three_floats();
  const TypeId other = make_type(std::vector{i8({3})});
  const State state = state_of<float>(type, {1, 2, 3});
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, type, state) == Status::kOk);
  for (const bool first : {false, true}) {
    const Masks masks(type, {first, true, false});
    BOOST_TEST(set_masked(slot, other, masks, State(other)) == Status::kTypeMismatch);
    BOOST_TEST(set_masked(slot, type, masks, State(type), 1) == Status::kWrongDevice);
  }
  BOOST_TEST(held(slot, type) == state);
  BOOST_TEST(slot->version() == 1);
}

BOOST_AUTO_TEST_CASE(each_leaf_has_its_own_mask) {
  const TypeId type = make_type(std::vector{f32({2}), i8({0}), i8({3})});
  const SlotRef slot = SlotRef::create("s");
  const State before = State::random(type, 1), next = State::random(type, 2);
  BOOST_TEST(set(slot, type, before) == Status::kOk);
  const Masks masks(type, false);
  BOOST_TEST(masks.leaf(1) == nullptr);
  masks.leaf(2)[1] = true;
  BOOST_TEST(set_masked(slot, type, masks, next) == Status::kOk);
  State expected = before;
  expected.leaves[2][1] = next.leaves[2][1];
  BOOST_TEST(held(slot, type) == expected);
}

BOOST_AUTO_TEST_CASE(a_state_of_no_elements_is_always_covered) {
  for (const TypeId type : {make_type(std::vector<Leaf>{}), make_type(std::vector{f32({0})})}) {
    const SlotRef slot = SlotRef::create("s");
    BOOST_TEST(set_masked(slot, type, Masks(type, true), State(type)) == Status::kOk);
    BOOST_TEST(slot->type() == type);
    BOOST_TEST(held(slot, type) == State(type));
  }
}

BOOST_AUTO_TEST_CASE(random_masks_match_a_loop) {
  std::mt19937 bits(5);
  const TypeId type =
      make_type(std::vector<Leaf>{f32({4, 3}), i8({7}), {"c128", 16, {2, 2}}, {"bf16", 2, {}}});
  const Type& t = *find_type(type);
  const SlotRef slot = SlotRef::create("s");
  State expected = State::random(type, 0);
  BOOST_REQUIRE(set(slot, type, expected) == Status::kOk);
  for (std::uint32_t i = 1; i < 200; ++i) {
    const State next = State::random(type, i);
    const Masks masks(type, false);
    for (std::size_t k = 0; k < t.num_leaves(); ++k) {
      const std::size_t item = t.desc().leaves[k].item_bytes;
      for (std::size_t e = 0; e < masks.size(k); ++e) {
        masks.leaf(k)[e] = bits() % 3 == 0;
        if (!masks.leaf(k)[e]) continue;
        std::memcpy(&expected.leaves[k][e * item], &next.leaves[k][e * item], item);
      }
    }
    BOOST_REQUIRE(set_masked(slot, type, masks, next) == Status::kOk);
    BOOST_TEST(held(slot, type) == expected);
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
