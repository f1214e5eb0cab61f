"""Slots as Python sees them, and the types of what they hold."""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _core, _jax

__all__ = ["Slot", "Structure", "structure_of"]


class Slot:
    """One slot of the store, as shared by all copies of an index."""

    __slots__ = ("__weakref__", "core", "id", "plan", "published", "quick_get", "quick_set")

    def __init__(self, name: str):
        self.core = _core.create_slot(name)
        self.id: int = self.core.id
        self.published: Published | None = None
        self.plan: tuple[Any, Any] | None = None  # how the last eager get was done
        # What the last eager get and set were done with, if they were of one array each.
        self.quick_get: tuple[Any, Any] | None = None  # abstract value, plan
        self.quick_set: tuple[Any, Any, int, int] | None = None  # and sharding, type, device

    def __deepcopy__(self, memo: dict) -> "Slot":
        from ._snapshot import copy_slot

        return copy_slot(self)

    def __reduce__(self) -> Any:
        from ._snapshot import reduce_slot

        return reduce_slot(self)


@dataclasses.dataclass(frozen=True)
class Published:
    """A state as arrays, for frozen indices: valid as long as the slot's version is this one."""

    version: int
    leaves: tuple[jax.Array, ...]
    type: int


@dataclasses.dataclass(frozen=True)
class LeafKind:
    """How one leaf is kept in the store."""

    dtype: Any  # the user's dtype
    label: str  # JAX's short name of it
    stored: np.dtype  # what programs pass to the store
    trailing: tuple[int, ...]  # axes that one element takes there: a PRNG key is several words

    @property
    def item_bytes(self) -> int:
        return self.stored.itemsize * int(np.prod(self.trailing, dtype=np.int64))

    def dims(self, stored_shape: tuple[int, ...]) -> tuple[int, ...]:
        return stored_shape[: len(stored_shape) - len(self.trailing)]


@functools.cache
def leaf_kind(dtype: Any) -> LeafKind:
    if dtype == jax.dtypes.float0:
        raise TypeError(
            "storax: there is an array of dtype float0 in a state. It has no values: it is what JAX gives "
            "for the derivative of an integer. Leave it out."
        )
    label = _jax.short_dtype_name(dtype)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return LeafKind(dtype, label, np.dtype(data.dtype), data.shape)
    bits = _bits(dtype)
    # XLA packs elements of less than a byte, in some places: keep them in whole bytes.
    stored = np.dtype(dtype) if bits >= 8 else _widened(dtype)
    return LeafKind(dtype, label, stored, ())


def _bits(dtype: Any) -> int:
    if dtype == np.bool_:
        return 8
    kind = jnp.issubdtype(dtype, jnp.integer)
    if kind:
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(dtype).itemsize * 8
    return jnp.finfo(dtype).bits


def _widened(dtype: Any) -> np.dtype:
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return np.dtype(np.int8)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return np.dtype(np.uint8)
    return np.dtype(jnp.bfloat16)  # holds every value of a 4-bit float exactly


def to_stored(x: Any, kind: LeafKind) -> Any:
    if kind.trailing:
        return jax.random.key_data(x)
    return x if x.dtype == kind.stored else jax.lax.convert_element_type(x, kind.stored)


def from_stored(x: Any, kind: LeafKind) -> Any:
    if kind.trailing:
        return jax.random.wrap_key_data(x, impl=_jax.key_impl(kind.dtype))
    return x if x.dtype == kind.dtype else jax.lax.convert_element_type(x, kind.dtype)


class Structure:
    """A PyTree structure with its leaves' dtypes, interned: programs name it by its number."""

    __slots__ = ("kinds", "number", "text", "treedef", "widened")

    def __init__(self, number: int, treedef: Any, kinds: tuple[LeafKind, ...]):
        self.number = number
        self.treedef = treedef
        self.kinds = kinds
        self.text = _text(treedef)
        self.widened = any(k.trailing or k.stored != k.dtype for k in kinds)

    def type_id(self, shapes: tuple[tuple[int, ...], ...], levels: tuple, mesh: tuple) -> int:
        """The number of the type of a state of this structure. `shapes` are as stored."""
        return _type_id(self, shapes, levels, mesh)


def _text(treedef: Any) -> str:
    text = str(treedef)
    if text.startswith("PyTreeDef(") and text.endswith(")"):
        text = text[len("PyTreeDef(") : -1]
    return text


@functools.cache
def _type_id(structure: Structure, shapes: tuple, levels: tuple, mesh: tuple) -> int:
    leaves = [
        (kind.label, kind.item_bytes, list(kind.dims(shape)))
        for kind, shape in zip(structure.kinds, shapes, strict=True)
    ]
    level_list = [
        ([-1 if axis is None else axis for axis in axes], moved) for axes, moved in levels
    ]
    number = _core.intern_type(leaves, structure.number, structure.text, level_list, list(mesh))
    _parts[number] = TypeParts(structure, shapes, levels, mesh)
    return number


@dataclasses.dataclass(frozen=True)
class TypeParts:
    """What a type's number stands for."""

    structure: Structure
    shapes: tuple[tuple[int, ...], ...]  # as stored
    levels: tuple
    mesh: tuple[tuple[str, int], ...]


_parts: dict[int, TypeParts] = {}


def type_parts(number: int) -> TypeParts:
    if number not in _parts:
        _note_inherited()
    return _parts[number]


def _note_inherited() -> None:
    """Notes the types that the store makes: of states set before a program over a mesh used them."""
    known = list(_parts.values())
    meshes = {(p.structure, p.mesh) for p in known if p.mesh}
    for parts in known:
        for structure, mesh in meshes:
            if structure is parts.structure and not parts.mesh:
                structure.type_id(parts.shapes, parts.levels, mesh)


def laid_out_as(to: int, source: int, leaves: Sequence[Any]) -> list[Any] | None:
    """A state of type `source` as one of type `to`, which may differ in where batch axes stand.

    None if the types do not agree.
    """
    moves = _core.type_moves(to, source)
    if not moves:
        return None if moves is None else list(leaves)
    return [
        jax.lax.transpose(x, (*perm, *range(len(perm), x.ndim))) if perm else x
        for x, perm in zip(leaves, moves, strict=True)
    ]


_structures: list[Structure] = []
_interned: dict[tuple[Any, tuple], Structure] = {}
_interning = threading.Lock()


@functools.cache
def structure_from(treedef: Any, dtypes: tuple) -> Structure:
    kinds = tuple(leaf_kind(d) for d in dtypes)
    with _interning:  # functools.cache lets two threads in
        made = _interned.get((treedef, dtypes))
        if made is None:
            made = _interned[treedef, dtypes] = Structure(len(_structures), treedef, kinds)
            _structures.append(made)
    return made


def structure_of(treedef: Any, leaves: list[Any]) -> Structure:
    return structure_from(treedef, tuple(x.dtype for x in leaves))


def all_structures() -> list[Structure]:
    """Those of this process, oldest first."""
    return list(_structures)


def structure_at(number: int) -> Structure:
    return _structures[number]
