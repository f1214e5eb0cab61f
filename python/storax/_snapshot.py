"""A slot's whole state outside of the store: copied, described, and put into another slot.

This is what `copy.deepcopy`, pickle and the saving of trees share. A snapshot is a type and bytes; no
array of JAX's is made on the way, so that dtypes JAX would canonicalise (64 bits, without
`jax_enable_x64`) come back as they were.
"""

import contextlib
import dataclasses
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from . import _jax, _loans, _slot, _store
from ._slot import LeafKind, Slot, Structure, leaf_kind, type_parts

__all__ = ["Snapshot", "copy_slot", "put", "reduce_slot", "restore_slot", "take"]


EVERY_DEVICE = -2  # storax::kEveryDevice


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A state: its type, and by device each leaf's bytes as the store keeps them."""

    type_id: int
    data: dict[int, list[np.ndarray]]
    order: tuple[int, ...] | None = None  # how the devices stand in their mesh, if it is known


def take(slot: Slot) -> Snapshot | None:
    """The state now, after this thread's programs; nothing if it was never set."""
    core = slot.core
    _store.barrier()
    type_id = core.type
    if not type_id:
        return None
    if not _jax.no_trace():
        raise RuntimeError(
            f"storax: {core.name} would be copied or saved while `jax.jit` (or `jax.vmap`, "
            "`jax.grad`, ...) traces a function: with the state as it is now, and not as it will be "
            "when the program gets there. Do it outside of that function."
        )
    data = {}
    if type_parts(type_id).mesh:
        with contextlib.suppress(RuntimeError):  # there need not be one
            data[EVERY_DEVICE] = _bytes(core, type_id, EVERY_DEVICE)
    for device in core.devices:
        data[device] = _bytes(core, type_id, device)
    if not data:
        lent = _loans.read(core, type_id)
        if lent is None:
            raise RuntimeError(core.explain_get(type_id, core.device))
        # What is spread over several devices, or not on a CPU, comes back on one.
        device = core.device if core.device >= 0 else home()
        data[device] = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in lent]
    return Snapshot(type_id, data, _store.mesh_order(core))


def _bytes(core: Any, type_id: int, device: int) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in core.get(type_id, device)]


def put(snapshot: Snapshot | None, slot: Slot) -> None:
    """Makes this the state of a slot that was never set."""
    if snapshot is None:
        return
    for device, leaves in snapshot.data.items():
        type_id = snapshot.type_id
        if device == EVERY_DEVICE:
            # It was set outside of any mapped program, and so it is again.
            parts = type_parts(type_id)
            type_id = parts.structure.type_id(parts.shapes, parts.levels, ())
            device = home()
        slot.core.set(type_id, device, [x.ctypes.data for x in leaves])
    if snapshot.order is not None:
        slot.core.mesh_order = _store.mesh_order_number(tuple(snapshot.order))


def copy_slot(slot: Slot) -> Slot:
    """Another slot with the same state, on the same devices."""
    snapshot = take(slot)
    made = Slot(slot.core.name)
    put(snapshot, made)
    return made


# --- Pickle ---------------------------------------------------------------------------------------


def reduce_slot(slot: Slot) -> tuple[Any, tuple[Any, ...]]:
    """What `__reduce__` returns: a slot as data, of which no part depends on this process."""
    snapshot = take(slot)
    if snapshot is None:
        return restore_slot, (slot.core.name, None)
    treedef = type_parts(snapshot.type_id).structure.treedef
    # A structure can't be pickled if there are nodes of the user's in it; a tree of it can.
    tree = jtu.tree_unflatten(treedef, range(treedef.num_leaves))
    return restore_slot, (slot.core.name, (describe(snapshot), tree, list(snapshot.data.values())))


def restore_slot(name: str, state: tuple[dict, Any, list[list[np.ndarray]]] | None) -> Slot:
    """The inverse; pickles name it, so that it must stay where it is."""
    _store.check_process()
    slot = Slot(name)
    if state is not None:
        description, tree, data = state
        each = iter([x for leaves in data for x in leaves])
        put(understand(description, jtu.tree_structure(tree), lambda *_: next(each)), slot)
    return slot


# --- Types as data --------------------------------------------------------------------------------


def describe_leaf(kind: LeafKind, shape: tuple[int, ...]) -> dict[str, Any]:
    name = f"key:{_jax.key_impl(kind.dtype)}" if kind.trailing else np.dtype(kind.dtype).name
    return {"dtype": name, "shape": list(shape)}


def understand_leaf(description: dict[str, Any]) -> tuple[LeafKind, tuple[int, ...]]:
    name, shape = description["dtype"], tuple(description["shape"])
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{shape} is not a shape")
    try:
        if name.startswith("key:"):
            make = lambda: jax.random.key(0, impl=name[len("key:") :])
            return leaf_kind(jax.eval_shape(make).dtype), shape
        dtype = np.dtype(name)
        if not (dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)):
            raise TypeError
        return leaf_kind(dtype), shape
    except (TypeError, ValueError):
        raise ValueError(f"JAX {jax.__version__} has no arrays of dtype {name!r}") from None


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """The type and the devices in terms of JSON, but for the structure."""
    parts = type_parts(snapshot.type_id)
    kinds = parts.structure.kinds
    return {
        "leaves": [describe_leaf(k, k.dims(s)) for k, s in zip(kinds, parts.shapes, strict=True)],
        "levels": describe_levels(parts.levels),
        "mesh": [list(axis) for axis in parts.mesh],
        "devices": list(snapshot.data),
        "order": snapshot.order and list(snapshot.order),
    }


def describe_levels(levels: tuple) -> list[Any]:
    return [[list(axes), moved] for axes, moved in levels]


def understand(
    description: dict[str, Any],
    treedef: Any,
    read: Callable[[LeafKind, tuple[int, ...]], np.ndarray],
) -> Snapshot:
    """The inverse of `describe`; `read` returns the next leaf's bytes, device by device.

    Raises `ValueError` if that isn't a state, or can't be one in this process.
    """
    leaves = [understand_leaf(d) for d in description["leaves"]]
    if len(leaves) != treedef.num_leaves:
        raise ValueError(f"{len(leaves)} leaves do not make up {treedef}")
    levels = understand_levels(description["levels"], leaves)
    mesh = tuple((str(name), int(size)) for name, size in description["mesh"])
    structure = _slot.structure_from(treedef, tuple(kind.dtype for kind, _ in leaves))
    shapes = tuple((*shape, *kind.trailing) for kind, shape in leaves)
    type_id = structure.type_id(shapes, levels, mesh)
    devices, order = list(description["devices"]), description["order"]
    if not mesh and len(devices) != 1:
        raise ValueError(f"a state without mesh axes cannot be on {len(devices)} devices")
    found = {
        device: [_checked(read(kind, shape), kind, shape) for kind, shape in leaves]
        for device in (devices if mesh else [home()])
    }
    if mesh and (one := _as_one_if_not_here(found, mesh)) is not None:
        return Snapshot(structure.type_id(shapes, levels, ()), {home(): one}, None)
    return Snapshot(type_id, found, order and tuple(order))


def understand_levels(description: list[Any], leaves: list[tuple[LeafKind, tuple]]) -> tuple:
    levels = tuple((tuple(axes), bool(moved)) for axes, moved in description)
    for k, (axes, _) in enumerate(levels):
        # At this level, an array has lost the axes of the levels outside of it.
        for axis, (_, shape), *outer in zip(
            axes, leaves, *[a for a, _ in levels[k + 1 :]], strict=True
        ):
            rank = len(shape) - sum(a is not None for a in outer)
            if axis is not None and not (type(axis) is int and 0 <= axis < rank):
                raise ValueError(f"{axis!r} is not a batch axis of an array of {rank} dimensions")
    return levels


def home() -> int:
    """The device that a state is put on that may be on any: the one that JAX puts arrays on."""
    device = _jax._default_device()
    return _jax.device_ordinal(device) if device.platform == "cpu" else 0


def _as_one_if_not_here(found: dict[int, list[np.ndarray]], mesh: tuple) -> list[np.ndarray] | None:
    """A state per device as one, as it is read too, if some of its devices are not there; else None."""
    here = {_jax.device_ordinal(d) for d in jax.local_devices(backend="cpu")}
    own = sorted(found.keys() - {EVERY_DEVICE})
    if here.issuperset(own):
        return None
    first, *others = (found[device] for device in own)
    rest = [x for leaves in others for x in leaves]
    if len(own) != math.prod(n for _, n in mesh) or not all(
        map(np.array_equal, first * len(others), rest)
    ):
        raise ValueError(
            f"it has a state for each of the devices {own}, not all the same, and this process has the "
            f"devices {sorted(here)}. Load it where there are these devices; or choose one of the "
            "states there, from what `storax.get_state` gives with the mesh axes in front, set a new "
            "index to it, and save that"
        )
    return first


def _checked(x: np.ndarray, kind: LeafKind, shape: tuple[int, ...]) -> np.ndarray:
    # The store reads as many bytes as the type says.
    if x.dtype != np.uint8 or not x.flags.c_contiguous or x.size != num_bytes(kind, shape):
        raise ValueError(f"{x.size} bytes are not an array {kind.label}{list(shape)}")
    return x


def num_bytes(kind: LeafKind, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * kind.item_bytes


# --- PyTree structures as data --------------------------------------------------------------------


def describe_structure(treedef: Any) -> Any:
    """A structure in terms of JSON. Nodes of the user's are named, but not described in full."""
    node = treedef.node_data()
    if node is None:
        return "*"
    kind, static = node
    children = [describe_structure(c) for c in treedef.children()]
    if kind is type(None):
        return None
    if kind in (tuple, list):
        return [kind.__name__, children]
    if kind in (dict, OrderedDict) and all(type(k) in (str, int) for k in static):
        return [kind.__name__, list(static), children]
    # Addresses differ from process to process.
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(static))
    return ["node", f"{kind.__module__}:{kind.__qualname__}", text, children]


def understand_structure(description: Any, like: Slot) -> Any:
    """The inverse. Nodes of the user's are found in `like`'s state, or in any other in this process."""
    try:
        return jtu.tree_structure(_example(description))
    except _UserNodeError as e:
        unknown = str(e)
    if like.core.type:
        structure = type_parts(like.core.type).structure
        if description_of(structure) == description:
            return structure.treedef
    for structure in reversed(_slot.all_structures()):
        if description_of(structure) == description:
            return structure.treedef
    try:
        return jtu.tree_structure(_example(description, namedtuples=True))
    except _UserNodeError:
        raise ValueError(
            f"the state has PyTree nodes of the type {unknown}, of which a file cannot hold all that "
            "makes one, and nothing like it was used in this process yet. Set the state of `like` "
            "once, to anything of that structure; the file's values take its place"
        ) from None


_descriptions: dict[int, Any] = {}


def description_of(structure: Structure) -> Any:
    found = _descriptions.get(structure.number)
    if found is None:
        found = _descriptions[structure.number] = describe_structure(structure.treedef)
    return found


class _UserNodeError(Exception):
    """A node that its name alone does not make."""


def _example(description: Any, namedtuples: bool = False) -> Any:
    if description == "*":
        return 0
    if description is None:
        return None
    kind, *rest = description
    children = [_example(c, namedtuples) for c in rest[-1]]
    if kind in ("tuple", "list"):
        return tuple(children) if kind == "tuple" else children
    if kind in ("dict", "OrderedDict"):
        pairs = zip(rest[0], children, strict=True)
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    if kind != "node":
        raise ValueError(f"{kind!r} is no kind of node")
    if namedtuples:
        module, _, path = rest[0].partition(":")
        found: Any = sys.modules.get(module)  # loading a file imports nothing
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, type) and issubclass(found, tuple):
            fields = getattr(found, "_fields", ())
            if len(fields) == len(children):
                return tuple.__new__(found, children)
    raise _UserNodeError(rest[0])
