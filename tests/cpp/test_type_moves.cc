// Type::agrees_up_to_moves: which types differ only in where JAX put their batch axes.
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "layouts.h"
#include "testing.h"

namespace storax::testing {
namespace {

BOOST_AUTO_TEST_SUITE(type_moves)

bool agree(const TypeDesc& a, const TypeDesc& b, Permutations* out = nullptr) {
  return Type(a, 1).agrees_up_to_moves(Type(b, 2), out);
}

TypeDesc batched(Dims dims, int axis, bool moved) {
  return describe({f32(std::move(dims))}, {{{axis}, moved}});
}

BOOST_AUTO_TEST_CASE(positions_matter_unless_jax_may_have_moved_them) {
  BOOST_TEST(agree(batched({5, 3}, 0, false), batched({5, 3}, 0, false)));
  BOOST_TEST(!agree(batched({5, 3}, 0, false), batched({3, 5}, 1, false)));
  BOOST_TEST(agree(batched({5, 3}, 0, true), batched({3, 5}, 1, false)));
  BOOST_TEST(agree(batched({5, 3}, 0, false), batched({3, 5}, 1, true)));
  BOOST_TEST(agree(batched({5, 3}, 0, true), batched({3, 5}, 1, true)));
}

BOOST_AUTO_TEST_CASE(only_moved_levels_may_differ) {
  const auto two_levels = [](int inner, int outer, bool inner_moved, bool outer_moved) {
    return describe({f32({2, 2, 2})}, {{{inner}, inner_moved}, {{outer}, outer_moved}});
  };
  BOOST_TEST(agree(two_levels(0, 0, true, false), two_levels(1, 0, false, false)));
  BOOST_TEST(!agree(two_levels(0, 0, true, false), two_levels(0, 1, false, false)));
  BOOST_TEST(agree(two_levels(0, 0, false, true), two_levels(0, 1, false, false)));
  BOOST_TEST(!agree(two_levels(0, 0, false, true), two_levels(1, 1, false, false)));
  BOOST_TEST(agree(two_levels(0, 0, true, false), two_levels(1, 1, false, true)));
}

BOOST_AUTO_TEST_CASE(all_else_must_be_equal) {
  const TypeDesc base = describe({f32({5, 3}), i8({5})},
                                 {{{0, 0}, true}, {{kNotBatched, kNotBatched}, true}}, {{"x", 2}});
  BOOST_REQUIRE(agree(base, base));
  const std::vector<std::function<void(TypeDesc&)>> changes = {
      [](TypeDesc& d) { d.structure = 7; },
      [](TypeDesc& d) { d.leaves[0].dtype = "i32"; },
      [](TypeDesc& d) { d.leaves[0].item_bytes = 8; },
      [](TypeDesc& d) { d.leaves[0].dims = {5, 3, 1}; },
      [](TypeDesc& d) { d.leaves[0].dims = {5, 4}; },  // the leaf's own axis
      [](TypeDesc& d) { d.leaves[0].dims = {6, 3}; },  // the lanes
      [](TypeDesc& d) { d.leaves[0].dims = {3, 5}; },
      [](TypeDesc& d) { d.levels[0].axes = {0, kNotBatched}; },
      [](TypeDesc& d) { d.levels[1].axes = {0, kNotBatched}; },
      [](TypeDesc& d) { std::swap(d.levels[0], d.levels[1]); },
      [](TypeDesc& d) { d.levels.pop_back(); },
      [](TypeDesc& d) { d.mesh[0].size = 3; },
      [](TypeDesc& d) { d.mesh.clear(); },
  };
  for (std::size_t i = 0; i < changes.size(); ++i) {
    TypeDesc other = base;
    changes[i](other);
    BOOST_TEST(!agree(base, other), "change " << i);
    BOOST_TEST(!agree(other, base), "change " << i << ", the other way round");
  }
  TypeDesc fewer = base;
  fewer.leaves.pop_back();
  for (BatchLevel& level : fewer.levels) level.axes.pop_back();
  BOOST_TEST(!agree(base, fewer));
  BOOST_TEST(!agree(fewer, base));
}

BOOST_AUTO_TEST_CASE(the_identity_is_an_empty_permutation) {
  Permutations moves;
  BOOST_TEST(agree(batched({5, 3}, 0, true), batched({5, 3}, 0, false), &moves));
  BOOST_TEST(moves.size() == 1u);
  BOOST_TEST(moves.at(0).empty());
}

BOOST_AUTO_TEST_CASE(equal_shapes_can_still_be_transposed) {
  Permutations moves;
  BOOST_TEST(agree(batched({3, 3}, 0, true), batched({3, 3}, 1, false), &moves));
  BOOST_TEST(moves.at(0) == (std::vector{1, 0}), boost::test_tools::per_element());
}

// A cycle of three axes is where a permutation and its inverse differ.
BOOST_AUTO_TEST_CASE(permutations_say_where_to_read) {
  const TypeDesc front = batched({5, 3, 4}, 0, true), back = batched({3, 4, 5}, 2, false);
  Permutations moves;
  BOOST_TEST(agree(front, back, &moves));
  BOOST_TEST(moves.at(0) == (std::vector{2, 0, 1}), boost::test_tools::per_element());
  moves.clear();
  BOOST_TEST(agree(back, front, &moves));
  BOOST_TEST(moves.at(0) == (std::vector{1, 2, 0}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(permutations_match_brute_force) {
  std::mt19937 bits(3);
  int not_identities = 0;
  for (int i = 0; i < 1000; ++i) {
    const TwoLayouts one = random_layouts(&bits);
    Permutations moves;
    BOOST_REQUIRE(agree(describe_layouts({one.a}, true), describe_layouts({one.b}, false), &moves));
    std::vector<int> expected;
    for (int name : one.a.names) expected.push_back(one.b.axis(name));
    if (one.a.names == one.b.names) {
      expected.clear();
    } else {
      ++not_identities;
    }
    BOOST_TEST(moves.at(0) == expected, boost::test_tools::per_element());
  }
  BOOST_TEST(not_identities > 300);
}

BOOST_AUTO_TEST_CASE(each_leaf_has_its_own_permutation) {
  const Layout a({2, 3}, {4}, {0}), b({2, 3}, {4}, {2}), c({2}, {4}, {kNotBatched});
  Permutations moves;
  BOOST_TEST(agree(describe_layouts({a, a, c}, true), describe_layouts({b, a, c}, false), &moves));
  BOOST_TEST(moves.size() == 3u);
  BOOST_TEST(moves.at(0) == (std::vector{2, 0, 1}), boost::test_tools::per_element());
  BOOST_TEST(moves.at(1).empty());
  BOOST_TEST(moves.at(2).empty());
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
