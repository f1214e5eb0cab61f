#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>
#include <vector>

#include "copy.h"
#include "testing.h"

namespace storax::testing {
namespace {

using Visits = std::vector<std::pair<std::size_t, std::size_t>>;

Visits visits_of(Walk& walk) {
  Visits visits;
  walk.for_each([&](std::size_t i, std::size_t j) { visits.emplace_back(i, j); });
  return visits;
}

Visits visits_of(const Dims& dims, const std::vector<int>& from) {
  Walk walk(dims, from);
  return visits_of(walk);
}

BOOST_AUTO_TEST_SUITE(copy)

BOOST_AUTO_TEST_CASE(the_same_order_is_visited_in_step) {
  const Visits expected = {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}};
  BOOST_TEST((visits_of({2, 3}, {}) == expected));
  BOOST_TEST((visits_of({2, 3}, {0, 1}) == expected));
}

BOOST_AUTO_TEST_CASE(a_scalar_has_one_element_and_an_empty_array_none) {
  BOOST_TEST((visits_of({}, {}) == Visits{{0, 0}}));
  BOOST_TEST(visits_of({0}, {}).empty());
  BOOST_TEST(visits_of({3, 0, 2}, {2, 0, 1}).empty());
}

BOOST_AUTO_TEST_CASE(a_transposition) {
  // The source is 3 by 2.
  BOOST_TEST((visits_of({2, 3}, {1, 0}) == Visits{{0, 0}, {1, 2}, {2, 4}, {3, 1}, {4, 3}, {5, 5}}));
}

BOOST_AUTO_TEST_CASE(a_walk_can_be_taken_again) {
  const Dims dims = {2, 3, 4};
  const std::vector<int> from = {2, 0, 1};
  Walk walk(dims, from);
  const Visits first = visits_of(walk);
  BOOST_TEST(first.size() == 24u);
  BOOST_TEST((visits_of(walk) == first));
}

BOOST_AUTO_TEST_CASE(every_permutation_of_four_axes) {
  const Dims dims = {2, 1, 3, 4};
  std::vector<int> from = {0, 1, 2, 3};
  do {
    Dims source(4);
    for (std::size_t d = 0; d < 4; ++d) source[static_cast<std::size_t>(from[d])] = dims[d];
    Visits expected;
    std::size_t i = 0;
    for (std::int64_t a = 0; a < dims[0]; ++a) {
      for (std::int64_t b = 0; b < dims[1]; ++b) {
        for (std::int64_t c = 0; c < dims[2]; ++c) {
          for (std::int64_t d = 0; d < dims[3]; ++d) {
            const std::int64_t here[] = {a, b, c, d};
            Dims there(4);
            for (std::size_t k = 0; k < 4; ++k) there[static_cast<std::size_t>(from[k])] = here[k];
            std::int64_t j = 0;
            for (std::size_t k = 0; k < 4; ++k) j = j * source[k] + there[k];
            expected.emplace_back(i++, static_cast<std::size_t>(j));
          }
        }
      }
    }
    BOOST_TEST((visits_of(dims, from) == expected));
  } while (std::next_permutation(from.begin(), from.end()));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
