// States mapped over a mesh: one cell per device.
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

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
