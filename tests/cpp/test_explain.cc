// Slot::explain: which index, what it holds, what was asked, how to mend it.
#include <string>
#include <string_view>
#include <vector>

#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(explain, NothingLeaks)

using Levels = std::vector<BatchLevel>;

std::string explain(const SlotRef& slot, Status status, std::string_view op, TypeId asked,
                    Device device = 0) {
  return slot->explain(slot.id(), status, op, device, asked);
}

void check_has(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    BOOST_TEST((text.find(part) != std::string::npos), "no \"" << part << "\" in: " << text);
  }
}

// Fails a get and a set of `asked` on a slot that holds `held_type`, and returns both messages.
std::vector<std::string> mismatch(TypeId held_type, TypeId asked) {
  const SlotRef slot = SlotRef::create("Net.norm");
  BOOST_REQUIRE(set(slot, held_type, State(held_type)) == Status::kOk);
  State state(asked);
  BOOST_REQUIRE(get(slot, asked, &state) == Status::kTypeMismatch);
  BOOST_REQUIRE(set(slot, asked, state) == Status::kTypeMismatch);
  std::vector<std::string> texts;
  for (const char* op : {"get_state", "set_state"}) {
    texts.push_back(explain(slot, Status::kTypeMismatch, op, asked));
    check_has(texts.back(), {std::string("storax.") + op + " of Net.norm: it holds " +
                             find_type(held_type)->str() + ", but "});
  }
  check_has(texts[0], {"`like` is " + find_type(asked)->str() + "."});
  check_has(texts[1], {"the new state is " + find_type(asked)->str() + "."});
  return texts;
}

BOOST_AUTO_TEST_CASE(of_many_leaves_those_around_the_difference_are_shown) {
  std::vector<Leaf> held, asked;
  for (int k = 0; k < 300; ++k) held.push_back(f32({3, k}));
  asked = held;
  asked[200] = f32({4, 200});
  const SlotRef slot = SlotRef::create("Net.norm");
  const TypeId type = make_type(held), other = make_type(asked);
  BOOST_REQUIRE(set(slot, type, State(type)) == Status::kOk);
  const std::string text = explain(slot, Status::kTypeMismatch, "set_state", other);
  check_has(text,
            {"it holds ...", "f32[3,199], f32[3,200], f32[3,201]", "..., but the new state is ...",
             "f32[3,199], f32[4,200], f32[3,201]", "Make the new state match"});
  BOOST_TEST(text.size() < 1000);
  // One of which nothing is the other's.
  const std::string none =
      explain(slot, Status::kTypeMismatch, "set_state", make_type(std::vector{f32({})}));
  check_has(none, {"it holds (f32[3,0], f32[3,1]", "..., but the new state is f32[]."});
  BOOST_TEST(none.size() < 1000);
}

BOOST_AUTO_TEST_CASE(nothing_was_set) {
  const TypeId type = make_type(std::vector{f32({3}), i8({})});
  const SlotRef slot = SlotRef::create("Net.norm");
  const std::string text = explain(slot, Status::kNeverSet, "get_state", type);
  check_has(text, {"storax.get_state of Net.norm: nothing has been set", "(f32[3], i8[])",
                   "Call `storax.set_state` first"});
  BOOST_TEST(text.find("device") == std::string::npos);
}

BOOST_AUTO_TEST_CASE(nothing_was_set_on_this_device) {
  const TypeId type = make_type(std::vector{f32({3})}, Levels{}, std::vector<MeshAxis>{{"x", 2}});
  const SlotRef slot = SlotRef::create("Net.norm");
  BOOST_TEST(set(slot, type, State(type), 0) == Status::kOk);
  check_has(explain(slot, Status::kNeverSet, "get_state", type, 1),
            {"nothing has been set on device 1", "f32[3] mapped over mesh axes 'x' of size 2"});
}

BOOST_AUTO_TEST_CASE(another_shape_or_dtype_or_structure) {
  const TypeId type = make_type(std::vector{f32({3})});
  TypeDesc in_a_dict = find_type(type)->desc();
  in_a_dict.structure = 50;
  in_a_dict.structure_text = "{'a': *}";
  for (const TypeId asked : {make_type(std::vector{f32({4})}), make_type(std::vector{i8({3})}),
                             make_type(std::vector<Leaf>{}), intern_type(in_a_dict)}) {
    const std::vector<std::string> texts = mismatch(type, asked);
    check_has(texts[0], {"must agree in dtype, shape, PyTree structure and batch axes",
                         "Make `like` match, or use a new StateIndex"});
    check_has(texts[1], {"Make the new state match"});
  }
  check_has(mismatch(type, intern_type(in_a_dict))[0], {"{'a': f32[3]}"});
}

BOOST_AUTO_TEST_CASE(the_state_is_batched_and_like_is_not) {
  const TypeId batched = make_type(std::vector{f32({5, 3})}, Levels{{{0}, false}});
  const TypeId plain = make_type(std::vector{f32({3})});
  const std::vector<std::string> texts = mismatch(batched, plain);
  check_has(texts[0], {"f32[5,3] with batch axes 0", "`like` is not", "`jnp.zeros_like(x)`",
                       "`0 * x`", "`vmap`"});
  check_has(texts[1], {"the new state is not"});
}

BOOST_AUTO_TEST_CASE(like_is_batched_and_the_state_is_not) {
  const TypeId batched = make_type(std::vector{f32({5, 3})}, Levels{{{0}, false}});
  // A level is recorded where any leaf is batched; here, none of those that the slot holds.
  for (const TypeId plain : {make_type(std::vector{f32({3})}),
                             make_type(std::vector{f32({3})}, Levels{{{kNotBatched}, false}})}) {
    const std::vector<std::string> texts = mismatch(plain, batched);
    check_has(texts[0], {"The state is not batched and `like` is", "under the same `vmap`"});
    check_has(texts[1], {"The state is not batched and the new state is", "`storax.stack`"});
  }
}

BOOST_AUTO_TEST_CASE(only_the_positions_differ) {
  const TypeId front = make_type(std::vector{f32({5, 3})}, Levels{{{0}, false}});
  const TypeId back = make_type(std::vector{f32({3, 5})}, Levels{{{1}, false}});
  for (const std::string& text : mismatch(front, back)) {
    check_has(text, {"Only the positions of the batch axes differ", "same `in_axes`, best 0"});
  }
  // Other lanes, or another shape, is more than that.
  for (const TypeId other : {make_type(std::vector{f32({3, 6})}, Levels{{{1}, false}}),
                             make_type(std::vector{f32({4, 5})}, Levels{{{1}, false}})}) {
    for (const std::string& text : mismatch(front, other)) {
      check_has(text, {"must agree in dtype, shape"});
      BOOST_TEST(text.find("Only the positions") == std::string::npos);
    }
  }
}

BOOST_AUTO_TEST_CASE(another_mesh) {
  const TypeId x = make_type(std::vector{f32({3})}, Levels{}, std::vector<MeshAxis>{{"x", 2}});
  const TypeId y = make_type(std::vector{f32({3})}, Levels{}, std::vector<MeshAxis>{{"y", 2}});
  for (const auto& texts : {mismatch(x, y), mismatch(y, x)}) {
    for (const std::string& text : texts)
      check_has(text, {"`shard_map` or `pmap`", "'x' of size 2"});
  }
}

BOOST_AUTO_TEST_CASE(an_unknown_type) {
  const TypeId type = make_type(std::vector{f32({3})});
  const SlotRef slot = SlotRef::create("Net.norm");
  check_has(explain(slot, Status::kTypeMismatch, "set_state", kNoType),
            {"it holds nothing", "the new state is an unknown type"});
  BOOST_TEST(set(slot, type, State(type)) == Status::kOk);
  check_has(explain(slot, Status::kTypeMismatch, "get_state", 0xffffffff),
            {"it holds f32[3]", "`like` is an unknown type"});
}

BOOST_AUTO_TEST_CASE(another_device) {
  const TypeId type = make_type(std::vector{f32({3})});
  const SlotRef slot = SlotRef::create("Net.norm");
  BOOST_TEST(set(slot, type, State(type), 2) == Status::kOk);
  check_has(explain(slot, Status::kWrongDevice, "set_state", type, 1),
            {"storax.set_state of Net.norm", "f32[3] on device 2", "runs on device 1",
             "one StateIndex per device"});
}

BOOST_AUTO_TEST_CASE(a_partial_first_set) {
  const TypeId type = make_type(std::vector{f32({5})}, Levels{{{0}, false}});
  const SlotRef slot = SlotRef::create("Net.norm");
  check_has(explain(slot, Status::kPartialFirstSet, "set_state", type),
            {"storax.set_state of Net.norm", "first set", "only some lanes",
             "f32[5] with batch axes 0", "before the `vmap`"});
}

BOOST_AUTO_TEST_CASE(a_row_outside_of_the_state) {
  const TypeId type = make_type(std::vector{f32({5})});
  const SlotRef slot = SlotRef::create("Net.norm");
  BOOST_TEST(set(slot, type, State(type)) == Status::kOk);
  check_has(explain(slot, Status::kNoSuchRow, "get_state", type),
            {"storax.get_state of Net.norm: it holds f32[5], which has no such row"});
}

BOOST_AUTO_TEST_CASE(no_memory) {
  const SlotRef slot = SlotRef::create("Net.norm");
  check_has(explain(slot, Status::kOutOfMemory, "set_state", make_type(std::vector{f32({5})})),
            {"storax.set_state of Net.norm: no memory for f32[5]"});
}

BOOST_AUTO_TEST_CASE(success) {
  const SlotRef slot = SlotRef::create("Net.norm");
  BOOST_TEST(explain(slot, Status::kOk, "get_state", make_type(std::vector{f32({})})) ==
             "storax.get_state of Net.norm: done.");
}

// Whatever went wrong, a slot that is gone is the reason, and its entry's next user isn't named.
BOOST_AUTO_TEST_CASE(a_dropped_index) {
  const TypeId type = make_type(std::vector{f32({5})});
  SlotRef slot = SlotRef::create("Old.norm");
  const SlotId dead = slot.id();
  slot = SlotRef();
  slot = SlotRef::create("New.norm");
  for (const Status status : {Status::kDropped, Status::kNeverSet, Status::kTypeMismatch}) {
    const std::string text = slot->explain(dead, status, "get_state", 0, type);
    check_has(text, {"storax.get_state of a StateIndex that no longer exists",
                     "its last StateIndex and every program that uses it are gone"});
    BOOST_TEST(text.find("norm") == std::string::npos);
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
