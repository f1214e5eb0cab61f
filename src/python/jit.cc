// The call path of storax.jit: finds the compiled program for a call's arguments, hands it the
// states that are lent to it, and takes them back. Nothing of it is Python; whatever it does not
// know is left to the Python method `_call_cold`.
#include "jit.h"

#include <nanobind/stl/vector.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flatten.h"
#include "loan.h"
#include "storax/storax.h"

namespace storax::python {
namespace {

namespace nb = ::nanobind;
using namespace nb::literals;

// --- What JAX tells us at import, see `_jax.call_path` ---

struct Jax {
  nb::object flatten;                // tree -> (leaves, treedef)
  nb::object array;                  // the type of arrays on a device
  nb::object arrays;                 // a tuple: all types of what a program takes as an array
  std::vector<nb::object> ordinary;  // a configuration, its ordinary value; and so on
};

Jax& jax() {
  static Jax* const instance = new Jax;  // leaked: the interpreter may be gone before us
  return *instance;
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

std::atomic<bool> forked{false};

// Whether something is being traced, or the like. (With `jax.disable_jit` a program says so
// itself.)
bool is_extraordinary() {
  if (forked.load(std::memory_order_relaxed)) return true;
  static PyObject* const value = interned("value");
  const std::vector<nb::object>& ordinary = jax().ordinary;
  for (std::size_t i = 0; i + 1 < ordinary.size(); i += 2) {
    const nb::object now = nb::steal(PyObject_GetAttr(ordinary[i].ptr(), value));
    if (!now.is_valid()) nb::raise_python_error();
    if (!now.is(ordinary[i + 1])) return true;
  }
  return false;
}

// A result with leaves that are not arrays. A compiled program returns `{template: arrays}` for it.
class Template {
 public:
  // `leaves` has None in the place of each array.
  Template(nb::object treedef, nb::list leaves)
      : treedef_(std::move(treedef)), leaves_(std::move(leaves)) {}

  nb::object fill(nb::handle arrays) const {
    nb::list leaves;
    std::size_t next = 0;
    for (nb::handle leaf : leaves_) leaves.append(leaf.is_none() ? arrays[next++] : leaf);
    return treedef_.attr("unflatten")(leaves);
  }

 private:
  nb::object treedef_;
  nb::list leaves_;
};

// What the user's function returned, of what the program did.
nb::object restore(nb::object result) {
  PyObject *key = nullptr, *arrays = nullptr;
  Py_ssize_t at = 0;
  if (!PyDict_CheckExact(result.ptr()) || PyDict_GET_SIZE(result.ptr()) != 1) return result;
  PyDict_Next(result.ptr(), &at, &key, &arrays);
  if (!nb::isinstance<Template>(key)) return result;
  return nb::inst_ptr<Template>(key)->fill(arrays);
}

// --- Programs ---

// A compiled program as a function of the arrays among a call's arguments. It takes the states lent
// to it first, `(donated, (*kept, *read), *arrays)`, if there are any. It returns
// `((*donated, *kept), result)` if it changes any of them; else the result alone.
class Program {
 public:
  Program(nb::object call, const std::vector<nb::object>& donated,
          const std::vector<nb::object>& kept, const std::vector<nb::object>& read)
      : call_(std::move(call)),
        num_donated_(donated.size()),
        num_changed_(donated.size() + kept.size()) {
    share(donated);
    share(kept);
    share(read);
  }

  // The states are where the program expects them, as long as layout_epoch() is this.
  void set_ready(std::int64_t epoch) { epoch_.store(epoch, std::memory_order_release); }
  bool is_ready() const { return epoch_.load(std::memory_order_acquire) == layout_epoch(); }

  // Null, without an error, if the program was not ready after all.
  PyObject* run(PyObject* const* arrays, std::size_t size) {
    if (slots_.empty()) {
      return restored(PyObject_Vectorcall(call_.ptr(), arrays, size, nullptr));
    }
    const LoanLock lock(slots_);
    if (!is_ready()) return nullptr;
    std::vector<PyObject*> args(size + 2);
    const std::span<Slot* const> slots = slots_, changed = slots.first(num_changed_);
    const nb::object donated = leaves_of(slots.first(num_donated_));
    const nb::object others = leaves_of(slots.subspan(num_donated_));
    args[0] = donated.ptr();
    args[1] = others.ptr();
    std::copy(arrays, arrays + size, args.begin() + 2);
    PyObject* result = nullptr;
    {
      const Work work(changed);
      result = PyObject_Vectorcall(call_.ptr(), args.data(), args.size(), nullptr);
    }
    return restored(changed.empty() ? result : take_result(nb::steal(result), changed));
  }

  int traverse(visitproc visit, void* arg) {
    Py_VISIT(call_.ptr());
    return 0;
  }
  void clear() { call_.reset(); }

 private:
  void share(const std::vector<nb::object>& slots) {
    for (const nb::object& s : slots) {
      SlotRef ref = SlotRef::share(nb::cast<SlotRef&>(s).id());
      if (!ref) throw std::runtime_error("storax: a StateIndex is gone");
      slots_.push_back(&*ref);
      refs_.push_back(std::move(ref));
    }
  }

  static nb::object leaves_of(std::span<Slot* const> slots) {
    nb::object states = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(slots.size())));
    if (!states.is_valid()) nb::raise_python_error();
    for (std::size_t i = 0; i < slots.size(); ++i) {
      PyObject* leaves = loan_of(*slots[i])->leaves().inc_ref().ptr();
      PyTuple_SET_ITEM(states.ptr(), static_cast<Py_ssize_t>(i), leaves);
    }
    return states;
  }

  static PyObject* restored(PyObject* result) {
    return result == nullptr ? nullptr : restore(nb::steal(result)).release().ptr();
  }

  static PyObject* take_result(nb::object result, std::span<Slot* const> changed) {
    if (!result.is_valid()) return nullptr;
    PyObject* states = PyTuple_GET_ITEM(result.ptr(), 0);
    for (std::size_t i = 0; i < changed.size(); ++i) {
      loan_of(*changed[i])
          ->replace(nb::borrow(PyTuple_GET_ITEM(states, static_cast<Py_ssize_t>(i))));
      changed[i]->count_lent_set();
    }
    return Py_NewRef(PyTuple_GET_ITEM(result.ptr(), 1));
  }

  nb::object call_;
  std::vector<SlotRef> refs_;
  std::vector<Slot*> slots_;  // of the same: donated, kept and read
  std::size_t num_donated_, num_changed_;
  std::atomic<std::int64_t> epoch_{-1};
};

// --- Dispatch ---

// What storax.jit returns is of a Python class derived from this one.
class Dispatcher {
 public:
  Dispatcher(nb::object retry, std::vector<Py_ssize_t> static_argnums, nb::object static_argnames)
      : retry_(std::move(retry)),
        static_argnums_(std::move(static_argnums)),
        static_argnames_(std::move(static_argnames)),
        has_static_(!static_argnums_.empty() || nb::len(static_argnames_) > 0) {}

  PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
    if (is_extraordinary()) return cold(self, args, kwargs);
    const auto n = static_cast<std::size_t>(PyTuple_GET_SIZE(args));
    const bool no_kwargs = kwargs == nullptr || PyDict_GET_SIZE(kwargs) == 0;
    const bool only_arrays = no_kwargs && !has_static_ && all_arrays(args);
    if (only_arrays && n < by_count_.size() && by_count_[n].is_valid()) {
      const nb::object program = by_count_[n];  // held, whatever happens to the list meanwhile
      return run(self, nb::cast<Program&>(program), &PyTuple_GET_ITEM(args, 0), n, args, kwargs);
    }
    Call found = split(args, kwargs);
    const nb::object program =
        nb::borrow(PyDict_GetItemWithError(programs_.ptr(), found.key.ptr()));
    if (!program.is_valid()) {
      PyErr_Clear();  // a leaf that can't be hashed, as will be said there
      return cold(self, args, kwargs);
    }
    if (only_arrays) {
      if (by_count_.size() <= n) by_count_.resize(n + 1);
      by_count_[n] = program;
    }
    return run(self, nb::cast<Program&>(program), found.arrays.data(), found.arrays.size(), args,
               kwargs);
  }

  // (key, arrays, statics, treedef, whole): what a call is known by; the arrays among the leaves of
  // its arguments; the other leaves, with None for each array; the structure of `(args, kwargs)`;
  // and the arguments that are static as a whole, as pairs of a position or name and a value.
  nb::tuple analyse(nb::tuple args, nb::dict kwargs) {
    Call found = split(args.ptr(), kwargs.ptr());
    nb::list arrays;
    for (PyObject* x : found.arrays) arrays.append(nb::handle(x));
    return nb::make_tuple(found.key, arrays, found.statics, found.treedef, found.whole);
  }

  void add(nb::object key, nb::object program) {
    by_count_.clear();
    programs_[key] = program;
  }
  void clear() {
    by_count_.clear();
    programs_.clear();
  }

  int traverse(visitproc visit, void* arg) {
    Py_VISIT(retry_.ptr());
    Py_VISIT(programs_.ptr());
    Py_VISIT(static_argnames_.ptr());
    for (const nb::object& program : by_count_) Py_VISIT(program.ptr());
    return 0;
  }

 private:
  struct Call {
    nb::object key, statics, treedef, whole;
    nb::object leaves;  // keeps `arrays` alive
    std::vector<PyObject*> arrays;
  };

  static PyObject* cold(PyObject* self, PyObject* args, PyObject* kwargs) {
    static PyObject* const name = interned("_call_cold");
    const nb::object given =
        kwargs == nullptr ? nb::object(nb::dict()) : nb::borrow<nb::object>(kwargs);
    return PyObject_CallMethodObjArgs(self, name, args, given.ptr(), nullptr);
  }

  PyObject* run(PyObject* self, Program& program, PyObject* const* arrays, std::size_t size,
                PyObject* args, PyObject* kwargs) {
    if (!program.is_ready()) return cold(self, args, kwargs);
    PyObject* result = program.run(arrays, size);
    if (result != nullptr) [[likely]]
      return result;
    if (!PyErr_Occurred()) return cold(self, args, kwargs);
    if (PyErr_ExceptionMatches(retry_.ptr())) {
      PyErr_Clear();
      return cold(self, args, kwargs);
    }
    return failed(self);
  }

  // Lets `_call_failed(error)` say what became of the states.
  static PyObject* failed(PyObject* self) {
    static PyObject* const name = interned("_call_failed");
    nb::python_error error;
    const nb::object value = nb::borrow(error.value());
    return PyObject_CallMethodObjArgs(self, name, value.ptr(), nullptr);
  }

  static bool all_arrays(PyObject* args) {
    const auto* type = reinterpret_cast<PyTypeObject*>(jax().array.ptr());
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
      if (Py_TYPE(PyTuple_GET_ITEM(args, i)) != type) return false;
    }
    return true;
  }

  static bool is_array(PyObject* x) {
    if (Py_TYPE(x) == reinterpret_cast<PyTypeObject*>(jax().array.ptr())) return true;
    const int is = PyObject_IsInstance(x, jax().arrays.ptr());
    if (is < 0) nb::raise_python_error();
    return is > 0;
  }

  Call split(PyObject* args, PyObject* kwargs) {
    nb::list statics;
    nb::list whole;  // arguments that are static as a whole
    nb::object positional = nb::borrow(args);
    nb::object named = kwargs == nullptr ? nb::object(nb::dict()) : nb::borrow<nb::object>(kwargs);
    if (has_static_) take_static(&positional, &named, &whole);
    const nb::object tree = nb::make_tuple(positional, named);
    nb::object flat;
    {
      const FlattensForJit here;
      flat = jax().flatten(tree);
    }
    Call found;
    found.leaves = nb::borrow(PyTuple_GET_ITEM(flat.ptr(), 0));
    found.treedef = nb::borrow(PyTuple_GET_ITEM(flat.ptr(), 1));
    const nb::list leaves = nb::borrow<nb::list>(found.leaves);
    bool any_static = nb::len(whole) > 0;
    for (nb::handle leaf : leaves) {
      if (is_array(leaf.ptr())) {
        found.arrays.push_back(leaf.ptr());
        statics.append(nb::none());
      } else {
        any_static = true;
        statics.append(leaf);
      }
    }
    found.statics = statics;
    found.whole = whole;
    if (!any_static) {
      found.key = found.treedef;
      return found;
    }
    nb::list key;
    key.append(found.treedef);
    for (nb::handle value : statics) append_to_key(&key, value);
    for (nb::handle pair : whole) {
      key.append(pair[0]);
      append_to_key(&key, pair[1]);
    }
    found.key = nb::tuple(key);
    return found;
  }

  // With its type, as True is not 1; and floats by their bits, as -0.0 is not 0.0, and NaN is
  // itself.
  static void append_to_key(nb::list* key, nb::handle value) {
    if (PyFloat_CheckExact(value.ptr())) {
      key->append(std::bit_cast<std::int64_t>(PyFloat_AS_DOUBLE(value.ptr())));
    } else if (PyComplex_CheckExact(value.ptr())) {
      const Py_complex parts = PyComplex_AsCComplex(value.ptr());
      key->append(std::bit_cast<std::int64_t>(parts.real));
      key->append(std::bit_cast<std::int64_t>(parts.imag));
    } else {
      key->append(value);
    }
    key->append(value.type());
  }

  // Moves static arguments to `whole`, and leaves None in their place.
  void take_static(nb::object* positional, nb::object* named, nb::list* whole) {
    nb::list args(*positional);
    const auto n = static_cast<Py_ssize_t>(nb::len(args));
    for (Py_ssize_t i : static_argnums_) {
      const Py_ssize_t at = i < 0 ? i + n : i;
      if (at < 0 || at >= n) continue;
      whole->append(nb::make_tuple(at, args[at]));
      args[at] = nb::none();
    }
    *positional = nb::tuple(args);
    nb::dict kwargs;
    for (auto [name, value] : nb::borrow<nb::dict>(*named)) {
      const int is_static = PySequence_Contains(static_argnames_.ptr(), name.ptr());
      if (is_static < 0) nb::raise_python_error();
      if (is_static > 0) whole->append(nb::make_tuple(name, value));
      kwargs[name] = is_static > 0 ? nb::object(nb::none()) : nb::borrow<nb::object>(value);
    }
    *named = kwargs;
  }

  nb::object retry_;  // the types of errors by which a program says that it cannot run as it is
  std::vector<Py_ssize_t> static_argnums_;
  nb::object static_argnames_;
  bool has_static_;
  nb::dict programs_;                 // key -> Program
  std::vector<nb::object> by_count_;  // programs that take so many arrays and nothing else
};

// --- Types ---

template <class T>
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  return nb::inst_ptr<T>(self)->traverse(visit, arg);
}

template <class T>
int clear(PyObject* self) {
  if (nb::inst_ready(self)) nb::inst_ptr<T>(self)->clear();
  return 0;
}

PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
  try {
    return nb::inst_ptr<Dispatcher>(self)->call(self, args, kwargs);
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* bind_method(PyObject* self, PyObject* instance, PyObject*) {
  return instance == nullptr || instance == Py_None ? Py_NewRef(self)
                                                    : PyMethod_New(self, instance);
}

PyType_Slot dispatcher_slots[] = {
    {Py_tp_call, reinterpret_cast<void*>(call)},
    {Py_tp_descr_get, reinterpret_cast<void*>(bind_method)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse<Dispatcher>)},
    {Py_tp_clear, reinterpret_cast<void*>(clear<Dispatcher>)},
    {0, nullptr},
};

PyType_Slot program_slots[] = {
    {Py_tp_traverse, reinterpret_cast<void*>(traverse<Program>)},
    {Py_tp_clear, reinterpret_cast<void*>(clear<Program>)},
    {0, nullptr},
};

}  // namespace

void bind_jit(nb::module_& m) {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  nb::class_<Program>(m, "Program", nb::type_slots(program_slots),
                      "A compiled program, and the states that are lent to it.")
      .def(nb::init<nb::object, const std::vector<nb::object>&, const std::vector<nb::object>&,
                    const std::vector<nb::object>&>(),
           "call"_a, "donated"_a, "kept"_a, "read"_a)
      .def("set_ready", &Program::set_ready, "epoch"_a,
           "Says that, at this layout_epoch(), the states are where the program expects them.");

  nb::class_<Dispatcher>(m, "Dispatcher", nb::type_slots(dispatcher_slots),
                         "The call path of storax.jit.")
      .def(nb::init<nb::object, std::vector<Py_ssize_t>, nb::object>(), "retry"_a,
           "static_argnums"_a, "static_argnames"_a)
      .def("_analyse", &Dispatcher::analyse, "args"_a, "kwargs"_a)
      .def("_add", &Dispatcher::add, "key"_a, "program"_a)
      .def("_clear", &Dispatcher::clear);

  m.def("layout_epoch", &layout_epoch);
  m.def(
      "set_jax",
      [](nb::object flatten, nb::object array, nb::object arrays,
         std::vector<nb::object> ordinary) {
        jax() = {std::move(flatten), std::move(array), std::move(arrays), std::move(ordinary)};
      },
      "flatten"_a, "array"_a, "arrays"_a, "ordinary"_a);
  nb::class_<Template>(m, "Template", "A result with leaves that are not arrays.")
      .def(nb::init<nb::object, nb::list>(), "treedef"_a, "leaves"_a);
  m.def(
      "restore", &restore, "result"_a.none(),
      "What the user's function returned, if a program returned `result`: an array in the place of "
      "each None of the template, if it is `{template: arrays}`.");
}

}  // namespace storax::python
