// Slot::get_row and set_row: one row of a state whose leaves are stacked.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(store_rows, NothingLeaks)

const std::vector<Leaf> kStacked = {f32({4, 3}), i8({4}), {"c128", 16, {4, 2, 2}}, f32({4, 0})};

TypeId stacked() { return make_type(kStacked); }

// The type of one row: never that of a slot here, only how its arrays look.
TypeId one_row() {
  std::vector<Leaf> leaves = kStacked;
  for (Leaf& leaf : leaves) leaf.dims.erase(leaf.dims.begin());
  return make_type(leaves);
}

Status get_row(const SlotRef& slot, TypeId type, std::int64_t row, State* out, Device device = 0) {
  return slot->get_row(slot.id(), device, type, row, out->out());
}

Status set_row(const SlotRef& slot, TypeId type, std::int64_t row, const State& in,
               Device device = 0) {
  return slot->set_row(slot.id(), device, type, row, {}, in.in());
}

Status set_row(const SlotRef& slot, TypeId type, std::int64_t row, const Masks& masks,
               const State& in, Device device = 0) {
  return slot->set_row(slot.id(), device, type, row, masks.pointers(), in.in());
}

std::byte* row_of(State& whole, std::size_t leaf, std::int64_t row) {
  return whole.leaves[leaf].data() + whole.leaves[leaf].size() / 4 * static_cast<std::size_t>(row);
}

BOOST_AUTO_TEST_CASE(rows_are_slices_of_the_whole) {
  const SlotRef slot = SlotRef::create("s");
  State whole = State::random(stacked(), 1);
  BOOST_REQUIRE(set(slot, stacked(), whole) == Status::kOk);
  for (const std::int64_t row : {3, 0, 2, 1, 2}) {
    State out(one_row());
    BOOST_TEST(get_row(slot, stacked(), row, &out) == Status::kOk);
    for (std::size_t k = 0; k < 3; ++k) {
      const std::size_t bytes = out.leaves[k].size();
      BOOST_TEST(std::memcmp(out.leaves[k].data(), row_of(whole, k, row), bytes) == 0);
    }
    const State next = State::random(one_row(), 10 + static_cast<unsigned>(row));
    BOOST_TEST(set_row(slot, stacked(), row, next) == Status::kOk);
    for (std::size_t k = 0; k < 3; ++k) {
      std::memcpy(row_of(whole, k, row), next.leaves[k].data(), next.leaves[k].size());
    }
    BOOST_TEST(held(slot, stacked()) == whole);
  }
  BOOST_TEST(slot->num_sets() == 6);
  BOOST_TEST(slot->num_gets() == 10);
  BOOST_TEST(slot->version() == 6);
}

BOOST_AUTO_TEST_CASE(masked_rows_match_a_loop) {
  std::mt19937 bits(8);
  const SlotRef slot = SlotRef::create("s");
  State whole = State::random(stacked(), 1);
  BOOST_REQUIRE(set(slot, stacked(), whole) == Status::kOk);
  for (std::uint32_t i = 0; i < 100; ++i) {
    const std::int64_t row = bits() % 4;
    const State next = State::random(one_row(), i);
    const Masks masks(one_row(), false);
    for (std::size_t k = 0; k < 3; ++k) {
      const std::size_t item = kStacked[k].item_bytes;
      for (std::size_t e = 0; e < masks.size(k); ++e) {
        masks.leaf(k)[e] = bits() % 2 == 0;
        if (!masks.leaf(k)[e]) continue;
        std::memcpy(row_of(whole, k, row) + e * item, &next.leaves[k][e * item], item);
      }
    }
    BOOST_REQUIRE(set_row(slot, stacked(), row, masks, next) == Status::kOk);
    BOOST_TEST(held(slot, stacked()) == whole);
  }
}

BOOST_AUTO_TEST_CASE(a_row_outside_of_the_state_is_refused) {
  const SlotRef slot = SlotRef::create("s");
  const State whole = State::random(stacked(), 1), untouched = State::random(one_row(), 2);
  BOOST_REQUIRE(set(slot, stacked(), whole) == Status::kOk);
  for (const std::int64_t row : {std::int64_t{-1}, std::int64_t{4}, INT64_MAX, INT64_MIN}) {
    State out = untouched;
    BOOST_TEST(get_row(slot, stacked(), row, &out) == Status::kNoSuchRow);
    BOOST_TEST(out == untouched);
    BOOST_TEST(set_row(slot, stacked(), row, out) == Status::kNoSuchRow);
    BOOST_TEST(set_row(slot, stacked(), row, Masks(one_row(), true), out) == Status::kNoSuchRow);
  }
  BOOST_TEST(held(slot, stacked()) == whole);
  BOOST_TEST(slot->version() == 1);
  BOOST_TEST(slot->num_sets() == 1);
}

BOOST_AUTO_TEST_CASE(leaves_without_rows) {
  for (const auto& leaves : {std::vector{f32({2}), f32({})}, std::vector{f32({2}), f32({0, 3})},
                             std::vector{f32({2}), f32({1})}}) {
    const TypeId type = make_type(leaves);
    const SlotRef slot = SlotRef::create("s");
    BOOST_REQUIRE(set(slot, type, State(type)) == Status::kOk);
    State out(type);
    BOOST_TEST(get_row(slot, type, 1, &out) == Status::kNoSuchRow);
    BOOST_TEST(set_row(slot, type, 1, out) == Status::kNoSuchRow);
  }
}

BOOST_AUTO_TEST_CASE(rows_need_a_whole_state_first) {
  const SlotRef slot = SlotRef::create("s");
  State row(one_row());
  BOOST_TEST(get_row(slot, stacked(), 0, &row) == Status::kNeverSet);
  BOOST_TEST(set_row(slot, stacked(), 0, row) == Status::kPartialFirstSet);
  BOOST_TEST(set_row(slot, stacked(), 0, Masks(one_row(), true), row) == Status::kPartialFirstSet);
  BOOST_TEST(slot->type() == kNoType);
  BOOST_TEST(usage().bytes == 0);
}

BOOST_AUTO_TEST_CASE(rows_are_checked_like_states) {
  const TypeId other = make_type(std::vector{f32({4, 3})});
  SlotRef slot = SlotRef::create("s");
  const SlotId id = slot.id();
  const State whole = State::random(stacked(), 1);
  State row = State::random(one_row(), 2);
  BOOST_REQUIRE(set(slot, stacked(), whole) == Status::kOk);
  for (const TypeId wrong : {other, one_row(), kNoType, TypeId{0xffffffff}}) {
    BOOST_TEST(get_row(slot, wrong, 0, &row) == Status::kTypeMismatch);
    BOOST_TEST(set_row(slot, wrong, 0, row) == Status::kTypeMismatch);
  }
  for (const TypeId unknown : {kNoType, TypeId{0xffffffff}}) {
    BOOST_TEST(set_row(slot, unknown, 0, Masks(one_row(), true), row) == Status::kTypeMismatch);
  }
  BOOST_TEST(get_row(slot, stacked(), 0, &row, 1) == Status::kWrongDevice);
  BOOST_TEST(set_row(slot, stacked(), 0, row, 1) == Status::kWrongDevice);
  BOOST_TEST(row == State::random(one_row(), 2));
  BOOST_TEST(held(slot, stacked()) == whole);
  BOOST_TEST(slot->version() == 1);
  slot = SlotRef();
  BOOST_TEST(find_slot(id)->get_row(id, 0, stacked(), 0, row.out()) == Status::kDropped);
  BOOST_TEST(find_slot(id)->set_row(id, 0, stacked(), 0, {}, row.in()) == Status::kDropped);
}

// As with whole states: a branch that no lane takes does nothing and never raises.
BOOST_AUTO_TEST_CASE(an_empty_mask_does_nothing) {
  const SlotRef slot = SlotRef::create("s");
  const State whole = State::random(stacked(), 1);
  const Masks none(one_row(), false);
  BOOST_TEST(set_row(slot, stacked(), 0, none, State(one_row())) == Status::kOk);
  BOOST_TEST(slot->type() == kNoType);
  BOOST_REQUIRE(set(slot, stacked(), whole) == Status::kOk);
  BOOST_TEST(set_row(slot, stacked(), 0, none, State(one_row())) == Status::kOk);
  BOOST_TEST(set_row(slot, stacked(), 0, none, State(one_row()), 1) == Status::kOk);
  BOOST_TEST(set_row(slot, stacked(), 4, none, State(one_row())) == Status::kOk);
  BOOST_TEST(held(slot, stacked()) == whole);
  BOOST_TEST(slot->version() == 1);
  BOOST_TEST(slot->num_sets() == 1);
}

BOOST_AUTO_TEST_CASE(rows_on_each_device_of_a_mesh) {
  const TypeId type =
      make_type(std::vector{f32({2})}, std::vector<BatchLevel>{}, std::vector<MeshAxis>{{"x", 2}});
  const TypeId row_type = make_type(std::vector{f32({})});
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, type, state_of<float>(type, {1, 2}), 0) == Status::kOk);
  State row(row_type);
  BOOST_TEST(get_row(slot, type, 0, &row, 1) == Status::kNeverSet);
  BOOST_TEST(set_row(slot, type, 0, row, 1) == Status::kPartialFirstSet);
  BOOST_REQUIRE(set(slot, type, state_of<float>(type, {3, 4}), 1) == Status::kOk);
  BOOST_TEST(set_row(slot, type, 1, state_of<float>(row_type, {9}), 1) == Status::kOk);
  BOOST_TEST(held(slot, type, 0) == state_of<float>(type, {1, 2}));
  BOOST_TEST(held(slot, type, 1) == state_of<float>(type, {3, 9}));
}

// A mapped program may work on rows of a state that was set before it, as it may on the whole.
BOOST_AUTO_TEST_CASE(rows_of_a_state_that_every_device_has_at_first) {
  const TypeId plain = make_type(std::vector{f32({2})});
  const TypeId type =
      make_type(std::vector{f32({2})}, std::vector<BatchLevel>{}, std::vector<MeshAxis>{{"x", 4}});
  const TypeId row_type = make_type(std::vector{f32({})});
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, plain, state_of<float>(plain, {1, 2})) == Status::kOk);
  State row(row_type);
  BOOST_TEST(get_row(slot, type, 1, &row, 3) == Status::kOk);
  BOOST_TEST(row == state_of<float>(row_type, {2}));
  BOOST_TEST(set_row(slot, type, 2, row, 3) == Status::kNoSuchRow);
  BOOST_TEST(slot->type() == plain);

  BOOST_TEST(set_row(slot, type, 1, state_of<float>(row_type, {9}), 3) == Status::kOk);
  BOOST_TEST(slot->type() == type);
  BOOST_TEST(held(slot, type, 3) == state_of<float>(type, {1, 9}));
  BOOST_TEST(get_row(slot, type, 1, &row, 0) == Status::kOk);
  BOOST_TEST(row == state_of<float>(row_type, {2}));
  BOOST_TEST(get_row(slot, type, 2, &row, 0) == Status::kNoSuchRow);
  BOOST_TEST(set_row(slot, type, 2, row, 0) == Status::kNoSuchRow);
  BOOST_TEST(slot->devices() == (std::vector{3}), boost::test_tools::per_element());
  const Masks all(row_type, true);
  BOOST_TEST(set_row(slot, type, 0, all, state_of<float>(row_type, {7}), 0) == Status::kOk);
  BOOST_TEST(held(slot, type, 0) == state_of<float>(type, {7, 2}));
  BOOST_TEST(held(slot, type, 1) == state_of<float>(type, {1, 2}));
}

// Control flow that JAX batched may have moved the lanes, or have left them where they were.
BOOST_AUTO_TEST_CASE(rows_whose_batch_axes_jax_may_have_moved) {
  using Levels = std::vector<BatchLevel>;
  const TypeId type = make_type(std::vector{f32({2, 3, 3})}, Levels{{{1}, false}});
  const TypeId in_place = make_type(std::vector{f32({2, 3, 3})}, Levels{{{1}, true}});
  const TypeId elsewhere = make_type(std::vector{f32({2, 3, 3})}, Levels{{{2}, true}});
  const TypeId row_type = make_type(std::vector{f32({3, 3})});
  const SlotRef slot = SlotRef::create("s");
  State whole = State::random(type, 1), row(row_type);
  BOOST_REQUIRE(set(slot, type, whole) == Status::kOk);
  BOOST_TEST(get_row(slot, in_place, 1, &row) == Status::kOk);
  BOOST_TEST(std::equal(row.leaves[0].begin(), row.leaves[0].end(), whole.leaves[0].begin() + 36));
  BOOST_TEST(set_row(slot, in_place, 0, row) == Status::kOk);
  std::copy_n(whole.leaves[0].begin() + 36, 36, whole.leaves[0].begin());
  BOOST_TEST(held(slot, type) == whole);
  BOOST_TEST(get_row(slot, elsewhere, 0, &row) == Status::kTypeMismatch);
  BOOST_TEST(set_row(slot, elsewhere, 0, row) == Status::kTypeMismatch);
  BOOST_TEST(set_row(slot, elsewhere, 0, Masks(row_type, true), row) == Status::kTypeMismatch);
  BOOST_TEST(held(slot, type) == whole);
}

BOOST_AUTO_TEST_CASE(row_operations_are_events) {
  const TypeId type = make_type(std::vector{f32({2})});
  const SlotRef slot = SlotRef::create("s");
  BOOST_REQUIRE(set(slot, type, State(type)) == Status::kOk);
  slot->watch(4);
  State row(make_type(std::vector{f32({})}));
  BOOST_TEST(get_row(slot, type, 0, &row) == Status::kOk);
  BOOST_TEST(set_row(slot, type, 0, row) == Status::kOk);
  const std::vector<Event> events = slot->events();
  BOOST_REQUIRE(events.size() == 2u);
  BOOST_TEST((events[0].kind == Event::Kind::kGet && events[1].kind == Event::Kind::kSet));
  BOOST_TEST(events[0].version == 1);
  BOOST_TEST(events[1].version == 2);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
