"""Saving and loading trees with state in them, by Equinox's own functions.

`equinox.tree_serialise_leaves` and `equinox.tree_deserialise_leaves` see a tree's leaves, and of an
index that is a flag. So an index that one of them flattens has, in place of the flag, an array of
bytes as its leaf: its *record*, which holds flag and state. Whoever unflattens makes an index of what
was loaded. _record.py says what that looks like.
"""

import copy
import functools
import io
import secrets
import types
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from equinox import _serialisation as _equinox

from . import _jax, _slot, _snapshot
from ._record import Record, decode, encode, flag_of
from ._slot import Slot

__all__ = ["EQUINOX", "flatten", "tree_deserialise_leaves", "tree_serialise_leaves"]

EQUINOX = vars(_equinox)  # the globals of a frame that is saving or loading a tree

# --- Where Equinox is -----------------------------------------------------------------------------


class _Saving:
    """One call of `equinox.tree_serialise_leaves`."""

    def __init__(self) -> None:
        # A file may have been written in several calls: slots of different calls are different.
        self.nonce = secrets.token_hex(8)
        self.taken: dict[int, tuple[str, Slot, _snapshot.Snapshot | None]] = {}

    def record(self, index: Any) -> Record:
        slot = index._slot
        taken = self.taken.get(slot.id)
        if taken is None:
            token = f"{self.nonce}:{len(self.taken)}"
            taken = self.taken[slot.id] = token, slot, _snapshot.take(slot)
        token, _, state = taken
        return encode(index, token, state)


class _Loading:
    """One call of `equinox.tree_deserialise_leaves`."""

    def __init__(self) -> None:
        self.by_token: dict[str, Slot] = {}
        # Of the slots of `like`: which slot took the place of each, and the indices that wait for it.
        self.replaced: dict[int, Slot] = {}
        self.waiting: dict[int, list[Any]] = {}

    def follow(self, index: Any) -> None:
        """Gives an index without a record, such as one in an optimiser's state, its model's slot."""
        old = index._slot.id
        if old in self.replaced:
            index._slot = self.replaced[old]
        self.waiting.setdefault(old, []).append(index)

    def slot(self, token: str, like: Slot, state: _snapshot.Snapshot | None) -> Slot:
        slot = self.by_token.get(token)
        if slot is None:
            slot = self.by_token[token] = Slot(like.core.name)
            _snapshot.put(state, slot)
        if like.id not in self.replaced:
            self.replaced[like.id] = slot
            for index in self.waiting.pop(like.id, ()):
                index._slot = slot
        return slot


# By the function that Equinox makes in each call.
_calls: weakref.WeakKeyDictionary[Any, _Saving | _Loading] = weakref.WeakKeyDictionary()
_SAVES, _LOADS = "tree_serialise_leaves", "tree_deserialise_leaves"
_MAPPED = {_SAVES: "_serialise", _LOADS: "_deserialise"}


def _whereabouts(frame: types.FrameType) -> tuple[str, _Saving | _Loading]:
    """What Equinox is at, and in which call.

    - "leaf": it maps over leaves, to save or load each.
    - "spec": it goes over a PyTree of filter specs and the tree in step.
    - "check": it compares the leaves of what was loaded with those of `like`.
    """
    names = []
    at: types.FrameType | None = frame
    while at is not None and at.f_globals is EQUINOX and at.f_code.co_name not in _MAPPED:
        names.append(at.f_code.co_name)
        at = at.f_back
    made = None
    if at is not None and at.f_globals is EQUINOX:
        made = at.f_locals.get(_MAPPED[at.f_code.co_name])
    saves = at is not None and at.f_code.co_name == _SAVES
    if made is None or (saves if not names else "_ordered_tree_map" not in names):
        raise RuntimeError(
            f"storax: Equinox {eqx.__version__} goes through a tree in a way that storax does not know, "
            "and would drop the state in it. Use the Equinox that storax was tested with."
        )
    call = _calls.get(made)
    if call is None:
        call = _calls[made] = _Saving() if saves else _Loading()
    if not names:
        return "check", call
    return ("leaf" if made.__name__ in names else "spec"), call


# --- An index as a node ---------------------------------------------------------------------------


class _Node:
    """The static part of an index while it is saved or loaded."""

    __slots__ = ("call", "index", "what")

    def __init__(self, what: str, call: _Saving | _Loading, index: Any):
        self.what = what
        self.call = call
        self.index = index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Node)  # `like` and what was loaded have slots of their own

    def __hash__(self) -> int:
        return hash(_Node)

    def unflatten(self, children: tuple[Any, ...]) -> Any:
        first, *rest = children
        if isinstance(self.call, _Saving):
            return self.index  # nobody looks at it
        if isinstance(first, type(self.index)):
            return first  # of a tree of filter specs: made one level further in
        made = copy.copy(self.index)
        if made._rows is not None:
            made._row = rest.pop(0)
        if isinstance(first, Record):
            return made  # the filter spec left it as it is
        if isinstance(first, (np.ndarray, jax.Array)) and flag_of(self.index.inference) is not None:
            decode(np.asarray(first), self.call, made)
            return made
        made.inference, made._leaves = first, tuple(rest)
        self.call.follow(made)
        return made


def flatten(index: Any, frame: types.FrameType) -> tuple[tuple[Any, ...], Any]:
    """The children and the static part of an index, for a function in Equinox's module."""
    what, call = _whereabouts(frame)
    node = _Node(what, call, index)
    flag = index.inference
    row = () if index._rows is None else (index._row,)
    if what == "spec" and flag is not None:
        # Here the tree meets a tree of specs, made by a `jax.tree.map` over it. What is to be saved
        # or loaded is the index as a whole, whatever its leaves.
        return (flag if callable(flag) else index,), node
    if what == "spec" or flag_of(flag) is None:
        return (flag, *row, *index._leaves), node
    if what == "check":
        return (True, *row), node  # the record was checked when it was read
    if isinstance(call, _Saving):
        return (call.record(index), *row), node
    return (np.empty(0, np.uint8).view(Record), *row), node


# --- The same functions, with messages of ours -------------------------------------------------------


@functools.cache
def _check_equinox() -> None:
    """Makes sure that this Equinox is one that state gets through."""
    from ._index import StateIndex

    index, file = StateIndex(name="self-check"), io.BytesIO()
    with _jax.eval_now():
        state = np.arange(3, dtype=np.uint8)
        structure = _slot.structure_of(jtu.tree_structure(0), [state])
        type_id = structure.type_id(((3,),), (), ())
        _snapshot.put(_snapshot.Snapshot(type_id, {_snapshot.home(): [state]}), index._slot)
        eqx.tree_serialise_leaves(file, [index])
        file.seek(0)
        (loaded,) = eqx.tree_deserialise_leaves(file, [StateIndex(name="self-check")])
    if not loaded._slot.core.accepts(type_id):
        raise RuntimeError(
            f"storax: Equinox {eqx.__version__} drops the state in a tree. Use the Equinox that "
            "storax was tested with."
        )


def tree_serialise_leaves(
    path_or_file: Any,
    pytree: Any,
    filter_spec: Any = eqx.default_serialise_filter_spec,
    is_leaf: Callable[[Any], bool] | None = None,
) -> None:
    """Saves the leaves of a PyTree, and the state in it, to a file.

    This is `equinox.tree_serialise_leaves`, which saves state just as well once `storax` is imported.
    Only its error messages differ.

    **Arguments:**

    - `path_or_file`: where to save to, a path or a binary file-like object.
    - `pytree`: the PyTree to save. An index in it is saved with its `inference` flag and its state,
      after the programs that this thread has dispatched.
    - `filter_spec`: how to save each leaf. Of an index it sees a NumPy array of bytes.
    - `is_leaf`: as in `jax.tree.map`. An index that is made a leaf, or is inside of one, is not saved.

    **Returns:** `None`.

    **Raises:** `RuntimeError` if a leaf cannot be saved, or an earlier program has failed.
    """
    _check_equinox()
    try:
        eqx.tree_serialise_leaves(path_or_file, pytree, filter_spec, is_leaf)
    except _equinox.TreePathError as e:
        raise RuntimeError(_explain(e, "cannot be saved")) from e


def tree_deserialise_leaves(
    path_or_file: Any,
    like: Any,
    filter_spec: Any = eqx.default_deserialise_filter_spec,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Loads the leaves of a PyTree, and the state in it, from a file.

    This is `equinox.tree_deserialise_leaves`, which loads state just as well once `storax` is
    imported. Only its error messages differ.

    **Arguments:**

    - `path_or_file`: where to load from, a path or a binary file-like object.
    - `like`: a PyTree of the same structure as the one that was saved. Its indices may hold a state of
      the same type, or none: `equinox.filter_eval_shape(Model, ...)` will do.
    - `filter_spec`: how to load each leaf. Of an index it sees an empty NumPy array of bytes.
    - `is_leaf`: as in `jax.tree.map`.

    **Returns:** the PyTree that was loaded. Its indices have the state of those that were saved, and
    share it as those did. Nothing in `like` changes.

    **Raises:** `RuntimeError` if the file is damaged, is that of another model, or has no state for an
    index, and if a state is of another type than the one that `like` holds.
    """
    _check_equinox()
    try:
        return eqx.tree_deserialise_leaves(path_or_file, like, filter_spec, is_leaf)
    except _equinox.TreePathError as e:
        why = "cannot be loaded: the file ends too early, is damaged, or is that of another model"
        raise RuntimeError(_explain(e, why)) from e


def _explain(error: Any, otherwise: str) -> str:
    cause: BaseException = error
    while isinstance(cause, _equinox.TreePathError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, RuntimeError):
        return str(cause)
    where = jtu.keystr(error.path) or "the leaf"
    return f"storax: {where} {otherwise} ({type(cause).__name__}: {cause})."
