"""Saving and loading trees with state in them, by Equinox's own functions.

`equinox.tree_serialise_leaves` and `equinox.tree_deserialise_leaves` see a tree's leaves, and of an
index that is a flag. So an index that one of them flattens has, in place of the flag, an array of
bytes as its leaf: its *record*, which holds flag and state. Whoever unflattens makes an index of what
was loaded. docs/serialisation.md has the format of a record.
"""

import copy
import functools
import io
import json
import pathlib
import secrets
import types
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from equinox import _serialisation as _equinox

from . import _core, _jax, _snapshot, _store
from ._slot import Slot, from_stored, leaf_kind, to_stored, type_parts

__all__ = ["EQUINOX", "flatten", "tree_deserialise_leaves", "tree_serialise_leaves"]

EQUINOX = vars(_equinox)  # the globals of a frame that is saving or loading a tree

_MAGIC = b"storax\x00\x01"  # the last byte is the format's version
_SIZE = 8  # bytes that say how long the header is


class Record(np.ndarray):
    """A record as a leaf. Of the tree that is loaded into, an empty one: a place for what is loaded."""

    index: Any = None


# --- Where Equinox is -----------------------------------------------------------------------------


class _Saving:
    """One call of `equinox.tree_serialise_leaves`."""

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(8)  # tells this call's slots from those of others in one file
        self.taken: dict[int, tuple[Slot, _snapshot.Snapshot | None]] = {}

    def record(self, index: Any) -> Record:
        slot = index._slot
        if slot.id not in self.taken:
            self.taken[slot.id] = slot, _snapshot.take(slot)
        token = f"{self.nonce}:{list(self.taken).index(slot.id)}"
        return encode(index, token, self.taken[slot.id][1])


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
    if at is None or made is None or (names and "_ordered_tree_map" not in names):
        raise RuntimeError(
            f"storax: Equinox {eqx.__version__} goes through a tree in a way that storax does not know, "
            "and would drop the state in it. Use the Equinox that storax was tested with."
        )
    call = _calls.get(made)
    if call is None:
        call = _calls[made] = _Saving() if at.f_code.co_name == _SAVES else _Loading()
    if not names:
        return "check", call
    return ("leaf" if made.__name__ in names else "spec"), call


# --- An index as a node ---------------------------------------------------------------------------


def _flag_of(leaf: Any) -> bool | None:
    """The flag, if that is what the leaf is, if need be as an array or as the shape of one."""
    if isinstance(leaf, (bool, np.bool_)):
        return bool(leaf)
    if isinstance(leaf, _jax.Tracer):
        return None
    if isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) and leaf.shape == ():
        if leaf.dtype != np.bool_:
            return None
        return False if isinstance(leaf, jax.ShapeDtypeStruct) else bool(leaf)
    return None


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
        if isinstance(first, Record):
            return made  # the filter spec left it as it is
        if made._rows is not None:
            made._row = rest.pop(0)
        if isinstance(first, (np.ndarray, jax.Array)) and _flag_of(self.index.inference) is not None:
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
    if what == "spec" or _flag_of(flag) is None:
        return (flag, *row, *index._leaves), node
    if what == "check":
        return row, node
    if isinstance(call, _Saving):
        return (call.record(index), *row), node
    place = np.empty(0, np.uint8).view(Record)
    place.index = index
    return (place, *row), node


# --- Records --------------------------------------------------------------------------------------


def encode(index: Any, token: str, state: _snapshot.Snapshot | None) -> Record:
    """The record of an index, whose slot is in this state."""
    header: dict[str, Any] = {
        "name": index._slot.core.name,
        "inference": _flag_of(index.inference),
        "slot": token,
        "state": None,
        "carried": None,
    }
    data = []
    if state is not None:
        treedef = type_parts(state.type_id).structure.treedef
        header["state"] = _snapshot.describe(state)
        header["state"]["structure"] = _snapshot.describe_structure(treedef)
        data += [x for leaves in state.data.values() for x in leaves]
        carried = index._carried()
        if carried is not None and all(isinstance(x, jax.Array) for x in carried):
            kinds = [leaf_kind(x.dtype) for x in carried]
            header["carried"] = [
                _snapshot.describe_leaf(k, x.shape) for k, x in zip(kinds, carried, strict=True)
            ]
            for x, kind in zip(carried, kinds, strict=True):
                stored = np.ascontiguousarray(to_stored(x, kind))
                data.append(stored.reshape(-1).view(np.uint8))
    text = json.dumps(header).encode()
    parts = [np.frombuffer(_MAGIC + len(text).to_bytes(_SIZE, "little") + text, np.uint8), *data]
    return np.concatenate(parts).view(Record)


def decode(record: np.ndarray, call: _Loading, index: Any) -> None:
    """Gives an index, a copy of the one in `like`, the flag and the state of a record."""
    like = index._slot
    name = like.core.name
    header, data = _split(record, name)
    try:
        token, inference = header["slot"], bool(header["inference"])
        state = header["state"]
        snapshot = None
        if state is not None:
            treedef = _snapshot.understand_structure(state["structure"], like)
            snapshot = _snapshot.understand(state, treedef, data)
        carried = header["carried"] and [_array(*_snapshot.understand_leaf(d), data) for d in header["carried"]]
        data.finish()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise RuntimeError(
            f"storax: the state of {name} cannot be loaded from this file, where it was saved as "
            f"{header.get('name')}: {e}."
        ) from e
    if snapshot is not None and like.core.type and not like.core.accepts(snapshot.type_id):
        raise RuntimeError(
            f"storax: {name} cannot be loaded from this file. In `like` it holds "
            f"{_core.type_text(like.core.type)}, but the file, where it was saved as "
            f"{header.get('name')}, has {_core.type_text(snapshot.type_id)}. Load into a model made "
            "with the arguments that the saved one was made with."
        )
    index._slot = call.slot(token, like, snapshot)
    array = isinstance(index.inference, (jax.Array, np.ndarray))
    index.inference = jnp.asarray(inference) if array else inference
    index._freeze(inference, carried)


class _Data:
    """The bytes after the header, handed out leaf by leaf."""

    def __init__(self, data: np.ndarray):
        self.data = data

    def take(self, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
        size = _snapshot.num_bytes(kind, shape)
        if size > self.data.size:
            raise ValueError("it ends too early")
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def finish(self) -> None:
        if self.data.size:
            raise ValueError(f"{self.data.size} bytes too many")


def _split(record: np.ndarray, name: str) -> tuple[dict[str, Any], _Data]:
    if record.shape == () and record.dtype == np.bool_:
        raise RuntimeError(
            f"storax: the file has no state for {name}: only its `inference` flag was saved, by "
            "something that saw no more of it. Save the model anew, with `storax` imported and "
            "`equinox.tree_serialise_leaves` called on the model itself."
        )
    head = len(_MAGIC) + _SIZE
    start = record[:head].tobytes() if record.ndim == 1 and record.dtype == np.uint8 else b""
    if not start.startswith(_MAGIC[:-1]) or len(start) < head:
        raise RuntimeError(
            f"storax: the file has no state for {name}, but an array {record.dtype}"
            f"{list(record.shape)} in its place. It was saved from another model."
        )
    version = start[len(_MAGIC) - 1]
    if version != _MAGIC[-1]:
        raise RuntimeError(
            f"storax: the state of {name} was saved in version {version} of the format, and this "
            f"storax knows version {_MAGIC[-1]}. Load it with the storax it was saved with."
        )
    size = int.from_bytes(start[len(_MAGIC) :], "little")
    try:
        header = json.loads(record[head : head + size].tobytes())
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as e:
        raise RuntimeError(f"storax: the state of {name} in this file is damaged: {e}.") from e
    return header, _Data(record[head + size :])


def _array(kind: Any, shape: tuple[int, ...], data: _Data) -> jax.Array:
    host = data.take(kind, shape).view(kind.stored).reshape((*shape, *kind.trailing))
    ordinal = _snapshot.home()
    device = _jax.local_device(ordinal)
    with _jax.eval_now():
        sharding = jax.sharding.SingleDeviceSharding(device)
        aval = _jax.shaped(host.shape, host.dtype)
        copied = np.array(host)  # aligned, and nobody else's
        return from_stored(_jax.array_from_host(copied, aval, sharding, device, False), kind)
