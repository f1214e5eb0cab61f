#include "loan.h"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace storax::python {
namespace {

namespace nb = ::nanobind;
using namespace nb::literals;

// How long a callback waits for what may be another thread's program; and how long a thread does
// that holds states itself, as it runs a program or compiles one.
constexpr std::chrono::seconds kPatience{3}, kLongPatience{20};

[[noreturn]] void refuse_callback(Slot& slot) {
  throw std::runtime_error(
      "storax: a callback, or what runs while a function is traced, can't get or set " +
      slot.name() +
      " while a program of `storax.jit` is working on this state in place. Pass the value to the "
      "callback, or take it from its result; or use plain `jax.jit`.");
}

// Whether XLA made this thread, to run callbacks on, and not Python. The caller has the GIL.
bool is_of_xla() {
  const nb::module_ threading = nb::module_::import_("threading");
  return nb::isinstance(threading.attr("current_thread")(), threading.attr("_DummyThread"));
}

// How many LoanLocks this thread holds. XLA may run a program, callbacks and all, on the thread
// that dispatches it.
thread_local int locks_held = 0;

bool take(Slot& slot) {
  if (slot.loan_mutex().try_lock()) return true;
  const bool is_callback = is_of_xla();
  const nb::gil_scoped_release released;
  if (is_callback) return slot.loan_mutex().try_lock_for(kPatience);
  if (locks_held > 0) return slot.loan_mutex().try_lock_for(kLongPatience);
  slot.loan_mutex().lock();
  return true;
}

// A LoanLock as a context manager.
class LoanLockContext {
 public:
  explicit LoanLockContext(const std::vector<nb::object>& slots) : objects_(slots) {}
  LoanLockContext(const LoanLockContext&) = delete;
  LoanLockContext& operator=(const LoanLockContext&) = delete;

  void enter() {
    std::vector<Slot*> slots;
    for (const nb::object& s : objects_) slots.push_back(&*nb::cast<SlotRef&>(s));
    held_.push_back(std::make_unique<LoanLock>(std::move(slots)));
  }
  void exit() { held_.pop_back(); }

 private:
  std::vector<nb::object> objects_;  // keep the slots alive
  std::vector<std::unique_ptr<LoanLock>> held_;
};

}  // namespace

LoanLock::LoanLock(std::vector<Slot*> slots) : slots_(std::move(slots)) {
  std::sort(slots_.begin(), slots_.end());
  slots_.erase(std::unique(slots_.begin(), slots_.end()), slots_.end());
  for (; held_ < slots_.size(); ++held_) {
    Slot& slot = *slots_[held_];
    if (!take(slot)) {
      release();
      refuse_callback(slot);
    }
    if (slot.is_worked_on()) {
      ++held_;
      release();
      refuse_callback(slot);
    }
  }
  ++locks_held;
}

LoanLock::~LoanLock() {
  --locks_held;
  release();
}

void LoanLock::release() noexcept {
  while (held_ > 0) slots_[--held_]->loan_mutex().unlock();
}

void bind_loans(nb::module_& m) {
  m.def(
      "work", [](const SlotRef& slot, std::int64_t n) { slot->work(n); }, "slot"_a, "n"_a,
      "Says that `n` more programs work on the lent state in place.");
  nb::class_<LoanLockContext>(m, "LoanLock", "Holds the loan mutexes of slots.")
      .def(nb::init<const std::vector<nb::object>&>(), "slots"_a)
      .def("__enter__", &LoanLockContext::enter)
      .def(
          "__exit__", [](LoanLockContext& lock, const nb::args&) { lock.exit(); },
          nb::sig("def __exit__(self, *args: object) -> None"));

  m.def(
      "lend",
      [](const SlotRef& slot, Device device, TypeId type, nb::tuple leaves, std::int64_t version) {
        auto loan = std::make_unique<ArrayLoan>(std::move(leaves));
        const Status status = slot->lend(slot.id(), device, type, std::move(loan), version);
        if (status != Status::kOk && status != Status::kChanged) {
          throw std::runtime_error(slot->explain(slot.id(), status, "set_state", device, type));
        }
        return status == Status::kOk;
      },
      "slot"_a, "device"_a, "type"_a, "leaves"_a, "version"_a,
      "Makes these arrays the state; its memory is freed. False if its version is another, and "
      "`version` is not -1. The caller holds the LoanLock.");
  m.def("count_lent_get", [](const SlotRef& slot) { slot->count_lent_get(); }, "slot"_a);
  m.def(
      "loan",
      [](const SlotRef& slot) -> nb::object {
        ArrayLoan* loan = loan_of(*slot);
        return loan == nullptr ? nb::object(nb::none()) : nb::borrow<nb::object>(loan->leaves());
      },
      "slot"_a, nb::sig("def loan(slot: Slot) -> tuple | None"),
      "The arrays that are the state; None if it is not lent out.");
  m.def(
      "replace_loan",
      [](const SlotRef& slot, nb::tuple leaves) {
        ArrayLoan* loan = loan_of(*slot);
        if (loan == nullptr) throw std::runtime_error("storax: nothing is lent");
        loan->replace(std::move(leaves));
        slot->count_lent_set();
      },
      "slot"_a, "leaves"_a, "Makes these arrays the lent state instead.");
}

}  // namespace storax::python
