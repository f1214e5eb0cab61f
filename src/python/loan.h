// States that are lent to programs of storax.jit, as JAX arrays.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "storax/storax.h"

namespace storax::python {

void bind_loans(nanobind::module_& m);

// A state as JAX arrays.
class ArrayLoan final : public Loan {
 public:
  explicit ArrayLoan(nanobind::object leaves) : leaves_(leaves.release().ptr()) {}

  ~ArrayLoan() override {
    if (!Py_IsInitialized()) return;  // too late to free anything
    const nanobind::gil_scoped_acquire gil;
    Py_DECREF(leaves_);
  }

  nanobind::handle leaves() const { return leaves_; }
  void replace(nanobind::object leaves) {
    nanobind::object old = nanobind::steal(std::exchange(leaves_, leaves.release().ptr()));
  }

 private:
  PyObject* leaves_;  // a tuple
};

inline ArrayLoan* loan_of(Slot& slot) { return static_cast<ArrayLoan*>(slot.loan()); }

// Holds the loan mutexes of some slots, in the order of their ids. Throws in a callback of a
// program that works on one of them: it would wait for that program, which waits for it. So it does
// in the end where two programs' callbacks wait for each other's states.
class LoanLock {
 public:
  explicit LoanLock(std::vector<Slot*> slots);
  LoanLock(const LoanLock&) = delete;
  LoanLock& operator=(const LoanLock&) = delete;
  ~LoanLock();

 private:
  void release() noexcept;

  std::vector<Slot*> slots_;
  std::size_t held_ = 0;
};

// Says that a program works on these in place. The caller holds their mutexes.
class Work {
 public:
  explicit Work(std::span<Slot* const> slots) noexcept : slots_(slots) {
    for (Slot* slot : slots_) slot->work(1);
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  ~Work() {
    for (Slot* slot : slots_) slot->work(-1);
  }

 private:
  std::span<Slot* const> slots_;
};

}  // namespace storax::python
