// Lending states out, calling them back, and losing them.
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "testing.h"

namespace storax::testing {
namespace {

BOOST_FIXTURE_TEST_SUITE(loans, NothingLeaks)

// A loan that says when it ends.
class Told final : public Loan {
 public:
  explicit Told(std::atomic<int>* ended) : ended_(ended) {}
  ~Told() override { ++*ended_; }

 private:
  std::atomic<int>* ended_;
};

class Lent {
 public:
  Lent() : type(make_type(std::vector{f32({3}), i8({5})})), state(State::random(type, 1)) {
    BOOST_REQUIRE(set(slot, type, state) == Status::kOk);
  }
  Status lend(std::int64_t version = -1) {
    return slot->lend(slot.id(), 0, type, std::make_unique<Told>(&ended), version);
  }

  std::atomic<int> ended = 0;
  TypeId type;
  State state;
  SlotRef slot = SlotRef::create("lent");
};

BOOST_AUTO_TEST_CASE(a_lent_state_takes_no_memory_and_no_operations) {
  Lent lent;
  const auto before = usage().bytes;
  const auto version = lent.slot->version();
  const auto epoch = layout_epoch();
  BOOST_TEST(lent.lend() == Status::kOk);
  BOOST_TEST(usage().bytes < before);
  BOOST_TEST(lent.slot->version() > version);
  BOOST_TEST(layout_epoch() > epoch);
  BOOST_TEST(lent.slot->loan() != nullptr);
  BOOST_TEST(!lent.slot->has_memory());
  BOOST_TEST(lent.slot->type() == lent.type);
  BOOST_TEST(lent.slot->device() == 0);
  BOOST_TEST(lent.slot->accepts(lent.slot.id(), lent.type));
  State out(lent.type);
  BOOST_TEST(get(lent.slot, lent.type, &out) == Status::kLent);
  BOOST_TEST(set(lent.slot, lent.type, lent.state) == Status::kLent);
  BOOST_TEST(set_masked(lent.slot, lent.type, Masks(lent.type, true), lent.state) == Status::kLent);
  BOOST_TEST(lent.slot->can_set(lent.slot.id(), 0, lent.type) == Status::kLent);
  const TypeId other = make_type(std::vector{f32({4})});
  BOOST_TEST(set(lent.slot, other, State(other)) == Status::kTypeMismatch);
  BOOST_TEST(lent.ended == 0);
}

BOOST_AUTO_TEST_CASE(a_state_that_is_called_back_is_what_came_back) {
  Lent lent;
  BOOST_REQUIRE(lent.lend() == Status::kOk);
  const State changed = State::random(lent.type, 2);
  BOOST_TEST(lent.slot->reclaim(lent.slot.id(), changed.in()) == Status::kOk);
  BOOST_TEST(lent.ended == 1);
  BOOST_TEST(held(lent.slot, lent.type) == changed);
  BOOST_TEST(lent.slot->reclaim(lent.slot.id(), changed.in()) == Status::kLost);
}

BOOST_AUTO_TEST_CASE(a_lost_state_can_be_set_again_where_it_was) {
  Lent lent;
  BOOST_REQUIRE(lent.lend() == Status::kOk);
  lent.slot->lose();
  BOOST_TEST(lent.ended == 1);
  State out(lent.type);
  BOOST_TEST(get(lent.slot, lent.type, &out) == Status::kLost);
  BOOST_TEST(lent.slot->can_set(lent.slot.id(), 0, lent.type) == Status::kOk);
  BOOST_TEST(set(lent.slot, lent.type, lent.state, 1) == Status::kWrongDevice);
  const TypeId other = make_type(std::vector{f32({4})});
  BOOST_TEST(set(lent.slot, other, State(other)) == Status::kTypeMismatch);
  BOOST_TEST(set(lent.slot, lent.type, lent.state) == Status::kOk);
  BOOST_TEST(held(lent.slot, lent.type) == lent.state);
}

BOOST_AUTO_TEST_CASE(a_state_looks_settled_where_a_set_needs_but_to_copy) {
  Lent lent;
  const TypeId other = make_type(std::vector{f32({4})});
  const auto settled = [&] { return lent.slot->looks_settled(0, lent.type); };
  BOOST_TEST(settled());
  BOOST_TEST(!lent.slot->looks_settled(1, lent.type));
  BOOST_TEST(!lent.slot->looks_settled(0, other));
  BOOST_REQUIRE(lent.lend() == Status::kOk);
  BOOST_TEST(!settled());
  BOOST_REQUIRE(lent.slot->reclaim(lent.slot.id(), lent.state.in()) == Status::kOk);
  BOOST_TEST(settled());
  BOOST_REQUIRE(lent.lend() == Status::kOk);
  lent.slot->lose();
  BOOST_TEST(!settled());

  const SlotRef unset = SlotRef::create("unset");
  BOOST_TEST(!unset->looks_settled(0, lent.type));
  BOOST_REQUIRE(set(unset, lent.type, lent.state) == Status::kOk);
  BOOST_TEST(unset->looks_settled(0, lent.type));
}

BOOST_AUTO_TEST_CASE(a_first_state_may_be_lent_at_once) {
  std::atomic<int> ended = 0;
  {
    const TypeId type = make_type(std::vector{f32({3})});
    const SlotRef slot = SlotRef::create("born");
    BOOST_TEST(slot->lend(slot.id(), kNoDevice, type, std::make_unique<Told>(&ended)) ==
               Status::kOk);
    BOOST_TEST(slot->type() == type);
    BOOST_TEST(slot->device() == kNoDevice);
    const State state(type);
    BOOST_TEST(slot->reclaim(slot.id(), state.in()) == Status::kWrongDevice);
    BOOST_TEST(ended == 0);
  }
  BOOST_TEST(ended == 1);  // with the slot
}

BOOST_AUTO_TEST_CASE(what_has_changed_meanwhile_is_not_lent) {
  Lent lent;
  const auto version = lent.slot->version();
  const State newer = State::random(lent.type, 3);
  BOOST_REQUIRE(set(lent.slot, lent.type, newer) == Status::kOk);
  BOOST_TEST(lent.lend(version) == Status::kChanged);
  BOOST_TEST(lent.ended == 1);
  BOOST_TEST(held(lent.slot, lent.type) == newer);
  BOOST_TEST(lent.lend(lent.slot->version()) == Status::kOk);
}

BOOST_AUTO_TEST_CASE(another_type_and_a_slot_that_is_gone_are_not_lent) {
  Lent lent;
  const TypeId other = make_type(std::vector{f32({4})});
  const SlotId id = lent.slot.id();
  BOOST_TEST(lent.slot->lend(id, 0, other, std::make_unique<Told>(&lent.ended)) ==
             Status::kTypeMismatch);
  Slot* const entry = &*lent.slot;
  lent.slot = SlotRef();
  BOOST_TEST(entry->lend(id, 0, lent.type, std::make_unique<Told>(&lent.ended)) ==
             Status::kDropped);
  BOOST_TEST(lent.ended == 2);
}

BOOST_AUTO_TEST_CASE(pins_are_counted) {
  Lent lent;
  BOOST_TEST(!lent.slot->is_pinned());
  lent.slot->pin(1);
  BOOST_TEST(lent.slot->is_pinned());
  lent.slot->pin(-1);
  BOOST_TEST(!lent.slot->is_pinned());
  lent.slot->add_program(1);
  BOOST_TEST(lent.slot->is_pinned());
  lent.slot->add_program(-1);
}

BOOST_AUTO_TEST_CASE(threads_that_lend_and_call_back_lose_nothing) {
  Lent lent;
  std::atomic<bool> done = false;
  std::vector<std::thread> threads;
  for (int k = 0; k < 4; ++k) {
    threads.emplace_back([&] {
      const State mine = State::random(lent.type, 7);
      for (int n = 0; n < 500; ++n) {
        const std::lock_guard lock(lent.slot->loan_mutex());
        if (lent.lend() == Status::kOk) lent.slot->reclaim(lent.slot.id(), mine.in());
      }
    });
  }
  std::thread reader([&] {
    State out(lent.type);
    while (!done) get(lent.slot, lent.type, &out);
  });
  for (std::thread& t : threads) t.join();
  done = true;
  reader.join();
  BOOST_TEST(lent.ended == 2000);
  BOOST_TEST(held(lent.slot, lent.type) == State::random(lent.type, 7));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace
}  // namespace storax::testing
