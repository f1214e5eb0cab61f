"""get_state and set_state."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from . import _jax, _store
from ._index import NOTHING_HELD, StateIndex
from ._primitives import check_rows, frozen_mismatch, frozen_p, get_p, set_p, shapes_of
from ._slot import Slot, Structure, from_stored, structure_at, structure_of, to_stored, type_parts

__all__ = ["get_state", "set_state"]

T = TypeVar("T")

_TRACED_INDEX = (
    "This StateIndex was passed as an argument to plain `jax.jit` (or `jax.vmap`, `jax.grad`, "
    "`jax.device_put`, ...), which has turned its `inference` flag into an array. Use "
    "`equinox.filter_jit` (or `equinox.filter_vmap`, ...) or `storax.jit`, or close over the index "
    "instead of passing it."
)


def _check_index(index: Any, op: str) -> None:
    if _store.forked:
        _store.check_process()
    if not isinstance(index, StateIndex):
        raise TypeError(
            f"storax.{op}: the first argument must be a storax.StateIndex, not "
            f"{type(index).__module__}.{type(index).__qualname__}."
        )
    if not isinstance(index.inference, bool):
        if isinstance(index.inference, (_jax.Tracer, jax.Array)):
            raise TypeError(f"storax.{op} of {index._slot.core.name}: {_TRACED_INDEX}")
        raise TypeError(
            f"storax.{op} of {index._slot.core.name}: its `inference` flag has been replaced by "
            f"{index.inference!r}, as `equinox.partition` and the like do. Put the index together "
            "again, with `equinox.combine`, before using it."
        )


def _flatten_arrays(tree: Any, what: str, op: str, slot: Slot) -> tuple[list[Any], Any, Any]:
    """Leaves as the store keeps them, the structure, and the abstract values."""
    leaves, treedef = jtu.tree_flatten(tree)
    for k, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            if not _jax.is_literal(leaf):
                _raise_not_array(tree, what, op, slot)
            leaves[k] = jnp.asarray(leaf)
    if _jax.no_trace():
        _store.check_no_tracers(leaves, op, slot.core)
    structure = structure_of(treedef, leaves)
    if structure.widened:
        leaves = [to_stored(x, k) for x, k in zip(leaves, structure.kinds, strict=True)]
    return leaves, treedef, structure


def _raise_not_array(tree: Any, what: str, op: str, slot: Slot) -> None:
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):
            raise TypeError(
                f"storax.{op} of {slot.core.name}: `{what}` must be a PyTree of JAX arrays, but "
                f"`{what}{jtu.keystr(path)}` is {leaf!r} of type {type(leaf).__qualname__}. Wrap "
                "numbers and NumPy arrays in `jnp.asarray`, make arrays of shapes with `jnp.zeros`, and "
                "leave out what is no array, with `equinox.filter(..., equinox.is_array)`, say."
            )


def get_state(index: StateIndex, like: T) -> T:
    """Loads the state that was last saved at `index`.

    It may be called anywhere: outside or inside of `jax.jit`, of `jax.lax.scan`, of `jax.vmap`, and
    so on. Under `jax.grad` the state is a constant.

    **Arguments:**

    - `index`: where to load from.
    - `like`: a PyTree of JAX arrays with the structure, shapes, dtypes and batch axes of the state;
      their values are not used.

    **Returns:** the state, of the same structure, shapes and dtypes as `like`.

    **Raises:**

    - `TypeError`, at trace time, if `like` is not a PyTree of JAX arrays.
    - `RuntimeError`, when the operation runs, if `like` differs from the state in structure, shape,
      dtype or batch axes, or if nothing has been saved yet.
    """
    x: Any = like
    if type(x) is _jax.Array and type(index) is StateIndex and index.inference is False:
        # The same eager get of one array as last time.
        quick = index._slot.quick_get
        if quick is not None and x.aval == quick[0] and _jax.no_trace():
            return _store.run_get(index._slot.core, quick[1])[0]
    _check_index(index, "get_state")
    slot = index._slot
    leaves, treedef, structure = _flatten_arrays(like, "like", "get_state", slot)
    held = index._held if index.inference else None
    if index.inference:
        index._look_up()
        held = index._held
        if (held is None and not slot.core.type) or held is NOTHING_HELD:
            raise RuntimeError(
                f"storax.get_state of {slot.core.name}, frozen by `inference=True`: nothing has been "
                "set. Set it first, through a copy with `inference=False`."
            )
    if held is not None:
        out = _get_frozen(index, leaves, structure)
    elif _jax.no_trace() and index._rows is None:
        out = _get_now(slot, leaves, structure)
        if leaves and x is leaves[0] and type(x) is _jax.Array and slot.plan is not None:
            slot.quick_get = x.aval, slot.plan[1]
    else:
        rows = _rows_out_of_order(index, leaves, "get_state")
        asked = leaves if rows is None else _whole(leaves, index._rows)
        row, params = _parameters(index, structure, "get_state")
        out = get_p.bind(*row, *asked, **params)
        if rows is not None:
            out = [x[rows] for x in out]
    if structure.widened:
        out = [from_stored(x, k) for x, k in zip(out, structure.kinds, strict=True)]
    return jtu.tree_unflatten(treedef, out)


def _rows_out_of_order(index: StateIndex, leaves: Sequence[Any], op: str) -> Any:
    """The rows that an operation on several of a stack is on, if they may be other than all in order."""
    row, rows = index._row, index._rows
    if rows is None or not isinstance(row, jax.Array) or row.ndim != 1 or index._has_rows_as_made():
        return None
    if any(x.ndim == 0 or x.shape[0] != row.size for x in leaves):
        raise RuntimeError(
            f"storax.{op} of {index._slot.core.name}: it is of {row.size} rows of a stack, and each leaf "
            "must have these in front. Get and set one row at a time, in a `jax.vmap` or `lax.scan` of "
            "the layers, or all of them."
        )
    if not isinstance(row, _jax.Tracer):
        check_rows(index._slot.core, np.asarray(row), rows)
    return row


def _whole(leaves: Sequence[Any], rows: int | None) -> list[Any]:
    """What stands for the state of all rows, batched as these leaves of some are."""
    return [jnp.resize(x, (rows, *x.shape[1:])) for x in leaves]


def _parameters(index: StateIndex, structure: Structure, op: str) -> tuple[list[Any], dict]:
    """The row, if the operation is on one, and the parameters of a primitive."""
    mesh = _jax.manual_mesh_axes()
    params = {
        "slot": index._slot.id,
        "structure": structure.number,
        "levels": (),
        "mesh": mesh,
        "rows": None,
    }
    if index._rows is None:
        return [], params
    row, name = index._row, index._slot.core.name
    if not isinstance(row, jax.Array):
        raise TypeError(
            f"storax.{op} of {name}: the row of a stacked layer has been replaced by {row!r}. "
            "Put the layer together again, with `equinox.combine`, before using it."
        )
    if row.ndim > 0:
        return [], params  # all layers at once: their state is one ordinary state
    if mesh:
        raise NotImplementedError(
            f"storax.{op} of {name}: stacked layers inside of `shard_map` or `pmap` are not "
            "supported. Use separate layers there."
        )
    params["rows"] = index._rows
    return [row], params


def _get_now(slot: Slot, like: list[Any], structure: Structure) -> list[Any]:
    """What the primitive would do, by a shorter way."""
    if slot.id in _store.mesh_slots:
        _store.settle(slot.core)  # a program may be about to make it a state per device
    if slot.core.type and slot.core.device < 0:
        parts = type_parts(slot.core.type)
        sizes = tuple(size for _, size in parts.mesh)
        whole = [(*sizes, *shape) for shape in parts.shapes]
        if parts.mesh and structure is parts.structure and [x.shape for x in like] == whole:
            return [jnp.asarray(x) for x in _store.get_mapped(slot.core, parts)]
    plan = slot.plan
    key = (structure, *[x.shape for x in like])
    if plan is None or plan[0] != key:
        type_id = structure.type_id(key[1:], (), ())
        avals = [jax.typeof(x) for x in like]
        plan = (key, _store.plan_get(slot.core, type_id, structure.kinds, avals))
        if slot.core.accepts(type_id):  # what it holds, and where, is then settled
            slot.plan = plan
    return _store.run_get(slot.core, plan[1])


def _get_frozen(index: StateIndex, like: list[Any], structure: Any) -> list[Any]:
    held = index._held
    assert held is not None
    name = index._slot.core.name
    # The arrays' own dtypes: a PyTree operation may have cast them.
    kept = structure_of(structure_at(held.structure).treedef, list(index._leaves))
    if kept is not structure:
        stored = tuple(
            (*x.shape, *k.trailing) for x, k in zip(index._leaves, kept.kinds, strict=True)
        )
        raise frozen_mismatch(
            name, kept.type_id(stored, held.levels, ()), structure.type_id(shapes_of(like), (), ())
        )
    state = list(index._leaves)
    if structure.widened:
        state = [to_stored(x, k) for x, k in zip(state, structure.kinds, strict=True)]
    return frozen_p.bind(
        *state, *like, structure=structure.number, levels=(), held_levels=held.levels, name=name
    )


def set_state(index: StateIndex, state: Any) -> None:
    """Saves `state` at `index`.

    It may be called anywhere: outside or inside of `jax.jit`, of `jax.lax.scan`, of `jax.vmap`, and
    so on. Operations on state run in program order, each exactly once.

    **Arguments:**

    - `index`: where to save to.
    - `state`: a PyTree of JAX arrays. The first call fixes its structure, shapes, dtypes and batch
      axes.

    **Returns:** `None`.

    **Raises:**

    - `TypeError`, at trace time, if `state` is not a PyTree of JAX arrays.
    - `RuntimeError`, at trace time, if `index.inference` is true.
    - `RuntimeError`, when the operation runs, if `state` differs from what this index held before in
      structure, shape, dtype or batch axes. Nothing is saved then.
    - `NotImplementedError`, at trace time, if `state` depends on what is being differentiated. Use
      `jax.lax.stop_gradient`.
    """
    if type(state) is _jax.Array and type(index) is StateIndex and index.inference is False:
        # The same eager set of one array as last time.
        quick = index._slot.quick_set
        if quick is not None and state.aval == quick[0] and _jax.no_trace():
            _, sharding, type_id, ordinal = quick
            if state.sharding is sharding and index._rows is None:
                _store.run_set(index._slot.core, type_id, ordinal, [state])
                return
    _check_index(index, "set_state")
    slot = index._slot
    if index.inference:
        raise RuntimeError(
            f"storax.set_state of {slot.core.name}: its `inference` flag is true, so it can only be "
            "read. `equinox.nn.inference_mode(model, value=False)` makes a copy that can be set."
        )
    leaves, _, structure = _flatten_arrays(state, "state", "set_state", slot)
    if _jax.no_trace() and index._rows is None:
        type_id, ordinal = _store.set(slot.core, structure, leaves, (), ())
        if ordinal >= 0 and leaves and state is leaves[0] and type(state) is _jax.Array:
            slot.quick_set = state.aval, state.sharding, type_id, ordinal
        return
    rows = _rows_out_of_order(index, leaves, "set_state")
    row, params = _parameters(index, structure, "set_state")
    if rows is not None:
        whole = get_p.bind(*_whole(leaves, index._rows), **params)
        leaves = [old.at[rows].set(x) for old, x in zip(whole, leaves, strict=True)]
    set_p.bind(*row, *leaves, **params)
