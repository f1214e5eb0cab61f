// Programs whose batch axes JAX moved: get, set and masked set transpose.
#include <map>
#include <random>
#include <string>
#include <vector>

#include "layouts.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(store_moves, NothingLeaks)

// What `vmap(in_axes=1)` around a scan does: set outside records 1, get inside 0.
BOOST_AUTO_TEST_CASE(set_outside_a_scan_get_inside) {
  const TypeId outside = make_type(std::vector{f32({2, 3})}, std::vector<BatchLevel>{{{1}, false}});
  const TypeId inside = make_type(std::vector{f32({3, 2})}, std::vector<BatchLevel>{{{0}, true}});
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, outside, state_of<float>(outside, {1, 2, 3, 4, 5, 6})) == Status::kOk);
  BOOST_TEST(held(slot, inside) == state_of<float>(inside, {1, 4, 2, 5, 3, 6}));

  BOOST_TEST(set(slot, inside, state_of<float>(inside, {10, 20, 30, 40, 50, 60})) == Status::kOk);
  BOOST_TEST(held(slot, outside) == state_of<float>(outside, {10, 30, 50, 20, 40, 60}));
  BOOST_TEST(slot->type() == outside);

  const Masks masks(inside, {false, true, false, false, true, true});
  BOOST_TEST(set_masked(slot, inside, masks, state_of<float>(inside, {0, -1, 0, 0, -2, -3})) ==
             Status::kOk);
  BOOST_TEST(held(slot, inside) == state_of<float>(inside, {10, -1, 30, 40, -2, -3}));
  BOOST_TEST(held(slot, outside) == state_of<float>(outside, {10, 30, -2, -1, 40, -3}));
}

BOOST_AUTO_TEST_CASE(positions_that_nothing_moved_must_agree) {
  const TypeId first = make_type(std::vector{f32({2, 2})}, std::vector<BatchLevel>{{{1}, false}});
  const TypeId other = make_type(std::vector{f32({2, 2})}, std::vector<BatchLevel>{{{0}, false}});
  const SlotRef slot = SlotRef::create("s");
  const State state = state_of<float>(first, {1, 2, 3, 4});
  BOOST_TEST(set(slot, first, state) == Status::kOk);
  State out = State::random(other, 1);
  BOOST_TEST(get(slot, other, &out) == Status::kTypeMismatch);
  BOOST_TEST(out == State::random(other, 1));
  BOOST_TEST(set(slot, other, State(other)) == Status::kTypeMismatch);
  BOOST_TEST(held(slot, first) == state);
}

BOOST_AUTO_TEST_CASE(get_and_set_match_brute_force) {
  std::mt19937 bits(6);
  for (int i = 0; i < 500; ++i) {
    const TwoLayouts two = random_layouts(&bits);
    const bool slot_moved = i % 2 == 0;
    const TypeId mine = intern_type(describe_layouts({two.a}, slot_moved));
    const TypeId theirs = intern_type(describe_layouts({two.b}, !slot_moved));
    const State in_mine = state_of(mine, two.a.elements());
    const State in_theirs = state_of(theirs, two.b.elements());
    const SlotRef slot = SlotRef::create("s");
    BOOST_REQUIRE(set(slot, mine, in_mine) == Status::kOk);
    BOOST_TEST(held(slot, mine) == in_mine);
    BOOST_TEST(held(slot, theirs) == in_theirs);
    BOOST_REQUIRE(set(slot, mine, State(mine)) == Status::kOk);
    BOOST_REQUIRE(set(slot, theirs, in_theirs) == Status::kOk);
    BOOST_TEST(held(slot, mine) == in_mine);
    BOOST_TEST(held(slot, theirs) == in_theirs);
    BOOST_TEST(slot->type() == mine);
  }
}

BOOST_AUTO_TEST_CASE(masked_set_matches_brute_force) {
  std::mt19937 bits(7);
  for (int i = 0; i < 500; ++i) {
    const TwoLayouts two = random_layouts(&bits);
    const TypeId mine = intern_type(describe_layouts({two.a}, false));
    const TypeId theirs = intern_type(describe_layouts({two.b}, true));
    const std::vector<std::uint64_t> in_mine = two.a.elements(), in_theirs = two.b.elements();

    // What an element is replaced by, or not, is drawn per element, whichever way it is laid out.
    std::map<std::uint64_t, bool> drawn;
    for (const std::uint64_t e : in_mine) drawn[e] = bits() % 2 == 0;
    const Masks masks(theirs, false);
    std::vector<std::uint64_t> next, expected;
    for (std::size_t e = 0; e < in_theirs.size(); ++e) {
      masks.leaf(0)[e] = drawn.at(in_theirs[e]);
      next.push_back(~in_theirs[e]);
    }
    for (const std::uint64_t e : in_mine) expected.push_back(drawn[e] ? ~e : e);

    const SlotRef slot = SlotRef::create("s");
    BOOST_REQUIRE(set(slot, mine, state_of(mine, in_mine)) == Status::kOk);
    BOOST_REQUIRE(set_masked(slot, theirs, masks, state_of(theirs, next)) == Status::kOk);
    BOOST_TEST(held(slot, mine) == state_of(mine, expected));
  }
}

BOOST_AUTO_TEST_CASE(elements_of_every_width_are_moved_whole) {
  const Layout a({2, 3}, {4}, {2}), b({2, 3}, {4}, {0});
  for (const std::size_t item : {1u, 2u, 4u, 8u, 16u}) {
    const TypeId mine = intern_type(describe_layouts({a}, false, {}, "x", item));
    const TypeId theirs = intern_type(describe_layouts({b}, true, {}, "x", item));
    const State state = State::random(mine, 1);
    State expected(theirs);
    const std::vector<std::uint64_t> from = a.elements(), to = b.elements();
    for (std::size_t i = 0; i < to.size(); ++i) {
      const auto j =
          static_cast<std::size_t>(std::find(from.begin(), from.end(), to[i]) - from.begin());
      std::copy_n(&state.leaves[0][j * item], item, &expected.leaves[0][i * item]);
    }
    const SlotRef slot = SlotRef::create("s");
    BOOST_TEST(set(slot, mine, state) == Status::kOk);
    BOOST_TEST(held(slot, theirs) == expected);
    BOOST_TEST(set(slot, mine, State(mine)) == Status::kOk);
    BOOST_TEST(set(slot, theirs, expected) == Status::kOk);
    BOOST_TEST(held(slot, mine) == state);
  }
}

BOOST_AUTO_TEST_CASE(each_leaf_is_moved_its_own_way) {
  // One moved, one in place, one not batched, one empty.
  const std::vector<Layout> a = {Layout({2, 3}, {4}, {2}), Layout({2}, {4}, {0}),
                                 Layout({2, 2}, {4}, {kNotBatched}), Layout({0, 2}, {4}, {1})};
  const std::vector<Layout> b = {Layout({2, 3}, {4}, {0}), Layout({2}, {4}, {0}),
                                 Layout({2, 2}, {4}, {kNotBatched}), Layout({0, 2}, {4}, {0})};
  const TypeId mine = intern_type(describe_layouts(a, false));
  const TypeId theirs = intern_type(describe_layouts(b, true));
  State in_mine(mine), in_theirs(theirs);
  for (std::size_t k = 0; k < a.size(); ++k) {
    const auto fill = [&](State& state, const Layout& layout) {
      const std::vector<std::uint64_t> elements = layout.elements();
      if (!elements.empty()) {
        std::memcpy(state.leaves[k].data(), elements.data(), state.leaves[k].size());
      }
    };
    fill(in_mine, a[k]);
    fill(in_theirs, b[k]);
  }
  const SlotRef slot = SlotRef::create("s");
  BOOST_TEST(set(slot, mine, in_mine) == Status::kOk);
  BOOST_TEST(held(slot, theirs) == in_theirs);
  BOOST_TEST(set(slot, theirs, in_theirs) == Status::kOk);
  BOOST_TEST(held(slot, mine) == in_mine);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
