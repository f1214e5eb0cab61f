#include "flatten.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "storax/storax.h"

namespace storax::python {
namespace {

namespace nb = ::nanobind;
using namespace nb::literals;

thread_local int flattens_for_jit = 0;

// The static part of an index. Structures are compared at every call of a compiled function.
class IndexAux {
 public:
  IndexAux(nb::object slot, std::int64_t slot_id, nb::object held, nb::object rows, nb::object was,
           bool weak)
      : slot_(std::move(slot)),
        slot_id_(slot_id),
        held_(std::move(held)),
        rows_(std::move(rows)),
        was_(std::move(was)),
        weak_(weak) {
    if (weak) slot_ = nb::steal(PyWeakref_NewRef(slot_.ptr(), nullptr));
    if (!slot_.is_valid()) nb::raise_python_error();
  }

  // None if it is gone.
  nb::object slot_or_none() const {
    return weak_ ? nb::borrow(PyWeakref_GetObject(slot_.ptr())) : slot_;
  }

  nb::object slot() const {
    nb::object slot = slot_or_none();
    if (slot.is_none()) {
      throw std::runtime_error(
          "storax: a StateIndex cannot be put together again, as no copy of it is left.");
    }
    return slot;
  }

  bool equals(const IndexAux& other) const {
    return slot_id_ == other.slot_id_ && held_.equal(other.held_) && rows_.equal(other.rows_);
  }

  Py_hash_t hash() const {
    const Py_hash_t held = PyObject_Hash(held_.ptr()), rows = PyObject_Hash(rows_.ptr());
    if (PyErr_Occurred()) nb::raise_python_error();
    return static_cast<Py_hash_t>(slot_id_) * 1000003 + held * 31 + rows;
  }

  std::string repr() const {
    const nb::object slot = slot_or_none();
    std::string text = "no longer alive";
    if (!slot.is_none()) text = nb::cast<std::string>(slot.attr("core").attr("name"));
    text += ", state " + std::to_string(slot_id_);  // a copy's may have the same name
    return held_.is_none() ? text : text + ", frozen";
  }

  bool is_ordinary() const { return held_.is_none() && rows_.is_none() && was_.is_none(); }

  nb::object slot_;
  std::int64_t slot_id_;
  nb::object held_, rows_, was_;
  bool weak_;
};

// What `_index` tells us at import.
struct Index {
  nb::object type;
  std::vector<nb::object> on_the_way;  // the globals of what only passes a flattening on
  nb::object serialise;                // the globals of what saves and loads models
  nb::object jit_code;                 // the code of equinox.filter_jit's flattening
};

Index& index() {
  static Index* const instance = new Index;  // leaked, as in jit.cc
  return *instance;
}

struct Names {
  PyObject* flat = PyUnicode_InternFromString("_flat");
  PyObject* held = PyUnicode_InternFromString("_held");
  PyObject* inference = PyUnicode_InternFromString("inference");
  PyObject* leaves = PyUnicode_InternFromString("_leaves");
  PyObject* row = PyUnicode_InternFromString("_row");
  PyObject* rows = PyUnicode_InternFromString("_rows");
  PyObject* slot = PyUnicode_InternFromString("_slot");
  PyObject* core = PyUnicode_InternFromString("core");
  PyObject* version = PyUnicode_InternFromString("version");
};

const Names& names() {
  static const Names* const instance = new Names;
  return *instance;
}

nb::object get(nb::handle object, PyObject* name) {
  nb::object value = nb::steal(PyObject_GetAttr(object.ptr(), name));
  if (!value.is_valid()) nb::raise_python_error();
  return value;
}

void set(nb::handle object, PyObject* name, nb::handle value) {
  if (PyObject_SetAttr(object.ptr(), name, value.ptr()) != 0) nb::raise_python_error();
}

enum class Caller { kOrdinary, kJit, kSerialise };

// Who flattens: the frame that called a function in jax.tree_util, or of the registry itself.
Caller find_caller() {
  if (flattens_for_jit > 0) return Caller::kJit;
  nb::object frame = nb::borrow(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (frame.is_valid()) {
    auto* f = reinterpret_cast<PyFrameObject*>(frame.ptr());
    const nb::object globals = nb::steal(PyFrame_GetGlobals(f));
    bool passes_on = false;
    for (const nb::object& g : index().on_the_way) passes_on = passes_on || globals.is(g);
    if (!passes_on) {
      if (globals.is(index().serialise)) return Caller::kSerialise;
      const nb::object code = nb::steal(reinterpret_cast<PyObject*>(PyFrame_GetCode(f)));
      return code.is(index().jit_code) ? Caller::kJit : Caller::kOrdinary;
    }
    frame = nb::steal(reinterpret_cast<PyObject*>(PyFrame_GetBack(f)));
  }
  return Caller::kOrdinary;
}

// The state of a frozen index is still the one it was flattened with.
bool is_current(nb::handle slot, nb::handle held) {
  const SlotRef& ref = nb::cast<const SlotRef&>(get(slot, names().core));
  const auto version = nb::cast<std::int64_t>(get(held, names().version));
  // Programs first: those that are gone have set what they set.
  return ref->num_programs() == 0 && failures::pending() == 0 && ref->version() == version;
}

// What flattening gave the last time, if it would give the same now; else nothing.
nb::object find_flat(nb::handle self) {
  const Caller caller = find_caller();
  if (caller == Caller::kSerialise) return {};
  const nb::object flat = get(self, names().flat);
  if (flat.is_none()) return {};
  PyObject* const* made_of =
      &PyTuple_GET_ITEM(flat.ptr(), 0);  // inference, held, leaves, slot, weak
  const nb::object held = get(self, names().held), slot = get(self, names().slot);
  const bool same = get(self, names().inference).ptr() == made_of[0] && held.ptr() == made_of[1] &&
                    get(self, names().leaves).ptr() == made_of[2] && slot.ptr() == made_of[3];
  const bool weak = made_of[4] == Py_True;
  if (!same || (weak != (caller == Caller::kJit) && flattens_for_jit == 0)) return {};
  if (!held.is_none() && !is_current(slot, held)) return {};
  return nb::borrow(made_of[5]);
}

nb::object flatten(nb::handle self) {
  nb::object flat = find_flat(self);
  return flat.is_valid() ? flat : self.attr("tree_flatten")();
}

nb::object unflatten(nb::handle aux_object, nb::handle children) {
  const IndexAux* aux = nullptr;
  if (nb::isinstance<IndexAux>(aux_object)) aux = nb::inst_ptr<IndexAux>(aux_object);
  if (aux == nullptr || !aux->is_ordinary()) {
    return index().type.attr("tree_unflatten")(aux_object, children);
  }
  auto* type = reinterpret_cast<PyTypeObject*>(index().type.ptr());
  nb::object self = nb::steal(type->tp_alloc(type, 0));
  if (!self.is_valid()) nb::raise_python_error();
  const nb::object slot = aux->slot(), inference = children[0], none = nb::none();
  const nb::tuple empty;
  set(self, names().slot, slot);
  set(self, names().inference, inference);
  for (PyObject* name : {names().held, names().row, names().rows}) set(self, name, none);
  set(self, names().leaves, empty);
  nb::object flat = none;
  if (PyBool_Check(inference.ptr())) {
    const nb::tuple again = nb::make_tuple(nb::make_tuple(inference), aux_object);
    flat = nb::make_tuple(inference, none, empty, slot, aux->weak_, again);
  }
  set(self, names().flat, flat);
  return self;
}

}  // namespace

FlattensForJit::FlattensForJit() noexcept { ++flattens_for_jit; }
FlattensForJit::~FlattensForJit() { --flattens_for_jit; }

void bind_flatten(nb::module_& m) {
  nb::class_<IndexAux>(m, "IndexAux", "The static part of a StateIndex as a PyTree node.")
      .def(nb::init<nb::object, std::int64_t, nb::object, nb::object, nb::object, bool>(), "slot"_a,
           "slot_id"_a, "held"_a.none(), "rows"_a.none(), "was"_a.none(), "weak"_a)
      .def_prop_ro("slot", &IndexAux::slot, nb::sig("def slot(self) -> typing.Any"))
      .def_ro("slot_id", &IndexAux::slot_id_)
      .def_prop_ro(
          "held", [](const IndexAux& a) { return a.held_; },
          nb::sig("def held(self) -> typing.Any"))
      .def_prop_ro(
          "rows", [](const IndexAux& a) { return a.rows_; },
          nb::sig("def rows(self) -> typing.Any"))
      .def_prop_ro(
          "was", [](const IndexAux& a) { return a.was_; }, nb::sig("def was(self) -> typing.Any"))
      .def(
          "__eq__",
          [](const IndexAux& a, nb::handle b) {
            return nb::isinstance<IndexAux>(b) && a.equals(*nb::inst_ptr<IndexAux>(b));
          },
          nb::arg().none())
      .def("__hash__", &IndexAux::hash)
      .def("__repr__", &IndexAux::repr);
  m.def(
      "set_index",
      [](nb::object type, std::vector<nb::object> on_the_way, nb::object serialise,
         nb::object jit_code) {
        index() = {std::move(type), std::move(on_the_way), std::move(serialise),
                   std::move(jit_code)};
      },
      "type"_a, "on_the_way"_a, "serialise"_a, "jit_code"_a.none());
  m.def("flatten_index", &flatten, "index"_a);
  m.def("unflatten_index", &unflatten, "aux"_a.none(), "children"_a.none());
}

}  // namespace storax::python
