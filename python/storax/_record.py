"""Records: an index and its state as an array of bytes, which describes itself.

record  = magic  header_size  header  data
magic   = "storax" 0x00 version         ; the version is one byte, 0x01
header_size                             ; of the header in bytes, 8 bytes, little-endian
header  = JSON text, an object          ; docs/serialisation.md has its members
data    = the leaves' elements, without gaps: for each device, for each leaf; then what a frozen
          index carries of its own
"""

import json
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from . import _core, _jax, _snapshot
from ._slot import Slot, from_stored, leaf_kind, to_stored, type_parts

__all__ = ["Record", "decode", "encode", "flag_of"]

_MAGIC = b"storax\x00\x01"
_SIZE = 8


class Record(np.ndarray):
    """A record as a leaf. Of the tree that is loaded into, an empty one: a place for what is loaded."""


class Loading(Protocol):
    """What decides which indices share a slot."""

    def slot(self, token: str, like: Slot, state: _snapshot.Snapshot | None) -> Slot: ...


def flag_of(leaf: Any) -> bool | None:
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


def encode(index: Any, token: str, state: _snapshot.Snapshot | None) -> Record:
    """The record of an index, whose slot is in this state."""
    header: dict[str, Any] = {
        "name": index._slot.core.name,
        "inference": flag_of(index.inference),
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
        levels, carried = index._carried() or ((), None)
        if carried is not None and all(isinstance(x, jax.Array) for x in carried):
            kinds = [leaf_kind(x.dtype) for x in carried]
            header["carried"] = {
                "leaves": [
                    _snapshot.describe_leaf(k, x.shape) for k, x in zip(kinds, carried, strict=True)
                ],
                "levels": _snapshot.describe_levels(levels),
            }
            for x, kind in zip(carried, kinds, strict=True):
                stored = np.ascontiguousarray(to_stored(x, kind))
                data.append(stored.reshape(-1).view(np.uint8))
    text = json.dumps(header).encode()
    parts = [np.frombuffer(_MAGIC + len(text).to_bytes(_SIZE, "little") + text, np.uint8), *data]
    return np.concatenate(parts).view(Record)


def decode(record: np.ndarray, call: Loading, index: Any) -> None:
    """Gives an index, a copy of the one in `like`, the flag and the state of a record."""
    like = index._slot
    name = like.core.name
    header, data = _split(record, name)
    try:
        token, inference = str(header["slot"]), bool(header["inference"])
        state, carried, snapshot = header["state"], header["carried"], None
        if state is not None:
            treedef = _snapshot.understand_structure(state["structure"], like)
            snapshot = _snapshot.understand(state, treedef, data.read)
        if carried is not None:
            leaves = [_snapshot.understand_leaf(d) for d in carried["leaves"]]
            levels = _snapshot.understand_levels(carried["levels"], leaves)
            carried = levels, [_array(*leaf, data) for leaf in leaves]
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

    def read(self, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
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
    host = data.read(kind, shape).view(kind.stored).reshape((*shape, *kind.trailing))
    device = _jax.local_device(_snapshot.home())
    with _jax.eval_now():
        sharding = jax.sharding.SingleDeviceSharding(device)
        aval = _jax.shaped(host.shape, host.dtype)
        copied = np.array(host)  # aligned, and nobody else's
        return from_stored(_jax.array_from_host(copied, aval, sharding, device, False), kind)
