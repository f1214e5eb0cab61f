"""StateIndex: a place to keep state, as a PyTree."""

import contextlib
import copy
import os
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from equinox import _compile_utils as eqx_compile_utils

from . import _core, _jax, _serialise, _store
from ._install import install
from ._primitives import check_rows
from ._slot import Published, Slot, type_parts

__all__ = ["NOTHING_HELD", "StateIndex"]

# Frames of these packages say nothing about where a user made an index.
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (str(eqx.__file__), str(jax.__file__), __file__)
)


def _creation_site() -> str:
    frame: types.FrameType | None = sys._getframe(2)
    inside = ""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and owner is not None:
            inside = f" in {type(owner).__name__}"
        frame = frame.f_back
    if frame is None:
        return "StateIndex"
    file = os.path.basename(frame.f_code.co_filename)
    function = frame.f_code.co_name
    where = "" if function == "<module>" else f", {function}"
    return f"StateIndex made at {file}:{frame.f_lineno}{where}{inside}"


class _Held:
    """What a frozen index carries across a JIT boundary besides its arrays.

    The version is left out of equality, so that a new value of the state is no reason to retrace.
    """

    __slots__ = ("levels", "structure", "version")

    def __init__(self, structure: int, levels: tuple, version: int):
        self.structure = structure
        self.levels = levels
        self.version = version

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Held)
            and self.structure == other.structure
            and self.levels == other.levels
        )

    def __hash__(self) -> int:
        return hash((self.structure, self.levels))


# Frozen before anything was set.
NOTHING_HELD = _Held(-1, (), -1)


# JAX keeps the PyTree structures of a program's arguments in global caches. The ones that
# `equinox.filter_jit` makes for that must not keep the state alive with them.
_FLATTEN_FOR_JIT = getattr(eqx_compile_utils.hashable_partition, "__code__", None)


_TREE_UTIL = jtu.tree_flatten_with_path.__globals__
_HERE = globals()


def _flattener() -> FrameType | None:
    """Who flattens an index: the caller of a function in jax.tree_util, or of the registry itself."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        where = frame.f_globals
        if where is not _TREE_UTIL and where is not _HERE:
            break
        frame = frame.f_back
    return frame


_TREE_FLATTEN = jtu.tree_flatten.__code__
_WAITED = "devices that storax has waited for"


def _waited() -> set[int] | None:
    """The devices whose programs the flattening that is going on has waited for already.

    All of a tree is looked up as it is when its flattening begins. `jax.tree_util.tree_flatten` does
    that once in each call, and a call has a frame of its own, to which a name can be added.
    """
    frame = sys._getframe(2)
    if frame.f_code is not _TREE_FLATTEN:
        return None
    return frame.f_locals.setdefault(_WAITED, set())


def _flag_behind(leaf: Any) -> bool | None:
    if leaf is True or leaf is False:
        return None
    if type(leaf).__module__ == eqx.tree_at.__module__:
        value = getattr(leaf, "value", None)
        return value if isinstance(value, bool) else None
    return None


_making = threading.local()


@contextlib.contextmanager
def slots_made() -> Iterator[list[Slot]]:
    """The slots that this thread makes meanwhile."""
    before, _making.slots = getattr(_making, "slots", None), []
    try:
        yield _making.slots
    finally:
        made, _making.slots = _making.slots, before
        if before is not None:
            before.extend(made)


def any_of_slots(tree: Any, slots: list[Slot]) -> bool:
    """Whether a PyTree has an index of one of them."""
    is_index = lambda x: isinstance(x, StateIndex)
    found = [x._slot for x in jtu.tree_leaves(tree, is_leaf=is_index) if is_index(x)]
    return any(x is y for x in found for y in slots)


class StateIndex:
    """A place to keep state: save and load JAX arrays there as a side effect, even under JIT.

    An index is a PyTree: treat it like a model parameter. Make it once, outside of `jax.jit`, and
    keep it in your model or close over it. Copies made by PyTree operations (`jax.tree.map`,
    `equinox.tree_at`, passing it through a JIT boundary) share the state; `copy.deepcopy` and
    pickling make an index of its own with the same state.

    **Arguments:**

    - `inference`: if true, the state can only be read. It is looked up when the index crosses the
      JIT boundary, and is an ordinary input of the compiled program. `equinox.nn.inference_mode`
      toggles it.
    - `name`: what error messages call this index. By default, where it was made.

    Pass an index to a function under `equinox.filter_jit`, or close over it; plain `jax.jit` would
    trace its `inference` flag.

    !!! example

        ```python
        index = storax.StateIndex()
        storax.set_state(index, jnp.array(0))

        @jax.jit
        def count():
            n = storax.get_state(index, like=jnp.array(0)) + 1
            storax.set_state(index, n)
            return n
        ```
    """

    __slots__ = ("__weakref__", "_flat", "_held", "_leaves", "_row", "_rows", "_slot", "inference")

    inference: bool
    _slot: Slot
    _held: _Held | None
    _leaves: tuple[Any, ...]
    # Of stacked layers: how many there are, and which this one is, or all of them.
    _rows: int | None
    _row: Any
    # What flattening it gave the last time, with what that was made of.
    _flat: tuple[Any, ...] | None

    def __init__(self, inference: bool = False, *, name: str | None = None):
        _store.check_process()
        if not isinstance(inference, (bool, np.bool_)):
            raise TypeError(
                f"storax.StateIndex: `inference` must be a bool, not {inference!r}. An index has no "
                "initial value: use `storax.set_state`."
            )
        install()
        self.inference = bool(inference)
        self._held = NOTHING_HELD if inference else None
        self._slot = Slot(_creation_site() if name is None else f"StateIndex {name!r}")
        self._leaves = ()
        self._rows = self._row = self._flat = None
        if (made := getattr(_making, "slots", None)) is not None:
            made.append(self._slot)

    # --- PyTree ---

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        caller = _flattener()
        weak = False
        if caller is not None:
            if caller.f_globals is _serialise.EQUINOX:
                return _serialise.flatten(self, caller)
            weak = caller.f_code is _FLATTEN_FOR_JIT
        waited = None
        if self._flat is not None:
            inference, held, leaves, slot, was_weak, flat = self._flat
            if (
                self.inference is inference
                and self._held is held
                and self._leaves is leaves
                and self._slot is slot
                and weak is was_weak
            ):
                if held is None or _store.is_at_rest(slot.core, held.version):
                    return flat
                waited = _waited()
                _store.settle(slot.core, waited)
                if slot.core.version == held.version:
                    return flat
        self._look_up(waited)
        was = _flag_behind(self.inference)
        row = () if self._rows is None else (self._row,)
        aux = _core.IndexAux(self._slot, self._slot.id, self._held, self._rows, was, weak)
        flat = (self.inference, *row, *self._leaves), aux
        if self._rows is None and (self._held is None or self._is_looked_up()):
            self._flat = self.inference, self._held, self._leaves, self._slot, weak, flat
        return flat

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], Any]:
        children, aux = self.tree_flatten()
        keys = [jtu.GetAttrKey("inference")]
        if self._rows is not None:
            keys.append(jtu.GetAttrKey("row"))
        keys += [jtu.GetAttrKey(f"state[{i}]") for i in range(len(children) - len(keys))]
        return tuple(zip(keys, children, strict=True)), aux

    def _stacked(self, slot: Slot, rows: int) -> "StateIndex":
        """An index of the rows of another slot, all of them at first; see `storax.stack`."""
        copy = object.__new__(StateIndex)
        copy.inference, copy._slot, copy._leaves = self.inference, slot, ()
        copy._held = NOTHING_HELD if self.inference is True else None
        copy._rows, copy._row = rows, jnp.arange(rows, dtype=jnp.int32)
        copy._flat = None
        return copy

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any, ...]) -> "StateIndex":
        if not isinstance(aux, _core.IndexAux):
            return aux.unflatten(children)  # Equinox is saving or loading it
        self = object.__new__(cls)
        self._slot, self._held, self._rows, self._flat = aux.slot, aux.held, aux.rows, None
        self.inference, *leaves = children
        self._row = None if aux.rows is None else leaves.pop(0)
        self._leaves = tuple(leaves)
        if aux.was is not None and self.inference is (not aux.was):
            self._toggle()
        return self

    def _toggle(self) -> None:
        """The flag has just changed: from here on the index carries its state, or no longer does."""
        self._held, self._leaves = None, ()
        if self.inference and _jax.no_trace():
            self._held = NOTHING_HELD
            self._look_up()

    def _is_looked_up(self) -> bool:
        """Whether this carries arrays of its slot, and not whatever has taken their place.

        That is the inputs of a program, or what a PyTree operation has put there.
        """
        if self._held is None or self.inference is not True:
            return False
        leaves = self._leaves if self._rows is None else (self._row, *self._leaves)
        return all(isinstance(x, jax.Array) and not isinstance(x, _jax.Tracer) for x in leaves)

    def _look_up(self, waited: set[int] | None = None) -> None:
        """Brings the arrays that a frozen index carries up to date; see `_waited`."""
        held = self._held
        if held is None or not self._is_looked_up():
            return
        core = self._slot.core
        if not core.type:
            _store.settle(core)  # a program may be about to set it
        if not core.type:
            return
        published = _published(self._slot, waited)
        if held.version != published.version:
            parts = type_parts(published.type)
            self._held = _Held(parts.structure.number, parts.levels, published.version)
            self._leaves = published.leaves
            if self._rows is not None and not self._has_rows_as_made():
                rows = np.asarray(self._row)
                check_rows(self._slot.core, rows, self._rows)
                with _jax.eval_now():
                    self._leaves = tuple(x[rows] for x in published.leaves)

    def _has_rows_as_made(self) -> bool:
        """Whether this is of all rows of a stack, in their order; if that is known."""
        row = self._row
        if isinstance(row, _jax.Tracer) or np.shape(row) != (self._rows,):
            return False
        return np.array_equal(np.asarray(row), np.arange(self._rows))  # type: ignore[arg-type]

    def _carried(self) -> tuple[tuple, tuple[Any, ...]] | None:
        """Batch axes and arrays that a frozen index carries, unless they are just the slot's state."""
        self._look_up()
        if self._held is None or self._held is NOTHING_HELD:
            return None
        published = self._slot.published
        as_published = (
            self.inference is True
            and published is not None
            and self._held.version == published.version
            and all(a is b for a, b in zip(self._leaves, published.leaves, strict=True))
        )
        return None if as_published else (self._held.levels, self._leaves)

    def _freeze(self, frozen: bool, carried: tuple[tuple, Iterable[Any]] | None) -> None:
        """The inverse, for an index with another slot: carries these, or else what is looked up."""
        self._held, self._leaves = (NOTHING_HELD if frozen else None), ()
        core = self._slot.core
        if carried is not None and core.type:
            levels, leaves = carried
            self._held = _Held(type_parts(core.type).structure.number, levels, core.version)
            self._leaves = tuple(leaves)

    # --- Python ---

    def __copy__(self) -> "StateIndex":
        copy = object.__new__(type(self))
        for name in _FIELDS:
            setattr(copy, name, getattr(self, name))
        return copy

    def __deepcopy__(self, memo: dict) -> "StateIndex":
        return _restored(*copy.deepcopy(self._parts(), memo))

    def __reduce__(self) -> Any:
        return _restored, self._parts()

    def _parts(self) -> tuple[Any, ...]:
        carried = self._carried()
        frozen = self._held is not None
        return self._slot, self.inference, self._rows, self._row, frozen, carried

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, StateIndex):
            return NotImplemented
        return eqx.tree_equal(self, other)

    def __repr__(self) -> str:
        return f"StateIndex(inference={self.inference}, name={self._slot.core.name!r})"


_core.set_index(StateIndex, [_TREE_UTIL, _HERE], _serialise.EQUINOX, _FLATTEN_FOR_JIT)
jtu.register_pytree_with_keys(
    StateIndex, StateIndex.tree_flatten_with_keys, _core.unflatten_index, _core.flatten_index
)

_FIELDS = [name for name in StateIndex.__slots__ if name != "__weakref__"]


def _restored(
    slot: Slot, inference: Any, rows: int | None, row: Any, frozen: bool, carried: Any
) -> StateIndex:
    """An index made of its parts. Pickles name this function, so that it must stay where it is."""
    install()
    self = object.__new__(StateIndex)
    self._slot, self.inference, self._rows, self._row = slot, inference, rows, row
    self._flat = None
    self._freeze(frozen, carried)
    return self


def _published(slot: Slot, waited: set[int] | None) -> Published:
    core = slot.core
    _store.settle(core, waited)
    version = core.version
    published = slot.published
    if (
        published is None
        or published.version != version
        or any(x.is_deleted() for x in published.leaves)  # a program was given them for good
    ):
        type_id, leaves = _store.read_all(core)
        slot.published = published = Published(version, tuple(leaves), type_id)
    return published
