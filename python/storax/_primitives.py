"""The primitives behind get_state and set_state, and what they do under each transformation.

    get_state         [row,] *like        -> *state   slot, structure, levels, mesh, rows
    set_state         [row,] *state       ->          slot, structure, levels, mesh, rows
    set_state_masked  mask, [row,] *state ->          slot, structure, levels, mesh, rows, mask_axes
    frozen_state      *held, *like        -> *held    structure, levels, held_levels, name

`slot` and `structure` are numbers: objects in equations would be kept alive by JAX's caches.
`levels` grows by one entry per vmap, innermost first: `(axis or None per leaf, moved)`; see
`storax::BatchLevel`. With `rows`, the state has a leading axis of that many rows, as stacked layers
have, and the operation is on one of them. `mask_axes` says where each of these levels is in the mask.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _core, _jax, _refused, _store, _unknown_jax
from ._slot import structure_at

__all__ = ["OPERATIONS", "frozen_p", "get_p", "leaf_mask", "set_masked_p", "set_p"]


class _StatePrimitive(_jax.Primitive):
    def bind(self, *args, **params):
        _refused.check_flags()
        if self is not get_p and _jax.in_parted_rule() == "custom_vmap":
            _refuse_in_parted_rule("custom_vmap")
        # Staged is not yet differentiated or batched: what is refused below shows then.
        staged = _jax.stage(self, args, params)
        return super().bind(*args, **params) if staged is None else staged

    def bind_with_trace(self, trace, *args):
        # JAX asks no rule of ours about an operation whose operands are not differentiated.
        if _jax.is_differentiation(trace):
            _unknown_jax.require("grad")
        if self is not get_p and (of := _jax.in_parted_rule()):
            _refuse_in_parted_rule(of)
        return super().bind_with_trace(trace, *args)


def _refuse_in_parted_rule(of):
    under, instead = (
        "`grad` of `vmap`",
        (
            "Use `vmap` of `grad`, or get the state in the function itself too, which shows it before it is "
            "differentiated."
        ),
    )
    if of == "custom_vmap":
        under, instead = (
            "`vmap`",
            "Set the state outside of the rule, or use no `custom_vmap` there.",
        )
    raise NotImplementedError(
        f"storax.set_state in a rule of `{of}`, under {under} of a `cond`, `switch` or `while_loop` whose "
        f"predicate is batched: which lanes the rule is for is no longer known. {instead}"
    )


get_p = _StatePrimitive("get_state")
set_p = _StatePrimitive("set_state")
set_masked_p = _StatePrimitive("set_state_masked")
OPERATIONS = (get_p, set_p, set_masked_p)
frozen_p = _jax.Primitive("frozen_state")
for _p in (get_p, set_p, set_masked_p, frozen_p):
    _p.multiple_results = True


def split_row(args: Sequence[Any], rows: int | None) -> tuple[list[Any], list[Any]]:
    return ([], list(args)) if rows is None else (list(args[:1]), list(args[1:]))


def whole_type(avals: Sequence[Any], levels: tuple, rows: int | None) -> tuple[tuple, tuple]:
    """Shapes and levels of the whole state, if these are one row's."""
    shapes = shapes_of(avals)
    if rows is None:
        return shapes, levels
    below = tuple(
        (tuple(None if a is None else a + 1 for a in axes), moved) for axes, moved in levels
    )
    return tuple((rows, *shape) for shape in shapes), below


def operation_type(
    avals: Sequence[Any], *, structure: int, levels: tuple, mesh: tuple, rows: int | None, **_: Any
) -> int:
    """The type of the state that an operation with these parameters is on; `avals` are its leaves'."""
    shapes, levels = whole_type(avals, levels, rows)
    return structure_at(structure).type_id(shapes, levels, mesh)


# --- Abstract evaluation --------------------------------------------------------------------------


def _effects(*, mesh, **_):
    return {_jax.MESH_STATE if mesh else _jax.STATE}


@get_p.def_effectful_abstract_eval
def _(*args, rows, **params):
    _, like = split_row(args, rows)
    return [_jax.vary_over_mesh(_jax.strong(a)) for a in like], _effects(**params)


@set_p.def_effectful_abstract_eval
def _(*state, **params):
    return [], _effects(**params)


@set_masked_p.def_effectful_abstract_eval
def _(mask, *state, **params):
    return [], _effects(**params)


@frozen_p.def_abstract_eval
def _(*held_and_like, **params):
    return [_jax.strong(a) for a in held_and_like[len(held_and_like) // 2 :]]


# --- Masks ----------------------------------------------------------------------------------------


def _final_positions(axes: Sequence[int | None]) -> list[int | None]:
    """Where each level's axis stands in the end: outer levels' axes push inner ones back."""
    positions: list[int | None] = []
    for axis in axes:
        if axis is not None:
            positions = [p if p is None or p < axis else p + 1 for p in positions]
        positions.append(axis)
    return positions


def leaf_mask(
    mask: Any,
    mask_axes: Sequence[int | None],
    leaf_axes: Sequence[int | None],
    shape: Sequence[int],
) -> Any:
    """Spreads a mask over lanes to a leaf's shape.

    Along a level that the leaf is not batched at, it is written if any lane is active.
    """
    in_mask, in_leaf = _final_positions(mask_axes), _final_positions(leaf_axes)
    pairs = [(m, leaf) for m, leaf in zip(in_mask, in_leaf, strict=True) if m is not None]
    reduced = [m for m, leaf in pairs if leaf is None]
    kept = sorted((leaf, m - sum(r < m for r in reduced)) for m, leaf in pairs if leaf is not None)
    if reduced:
        mask = lax.reduce_or(mask, tuple(reduced))
    mask = lax.transpose(mask, [m for _, m in kept])
    return lax.broadcast_in_dim(mask, tuple(shape), [leaf for leaf, _ in kept])


def leaf_masks(
    mask: Any, mask_axes: Sequence[int | None], levels: Sequence, shapes: Sequence
) -> list[Any]:
    return [
        leaf_mask(mask, mask_axes, [axes[k] for axes, _ in levels], shape)
        for k, shape in enumerate(shapes)
    ]


def masked_update(
    mask: Any,
    new: Sequence[Any],
    old: Sequence[Any],
    structure: int,
    levels: Sequence,
    mask_axes: Sequence[int | None],
) -> list[Any]:
    """The state after a masked set, as values."""
    kinds = structure_at(structure).kinds
    masks = leaf_masks(
        mask, mask_axes, levels, [k.dims(x.shape) for k, x in zip(kinds, new, strict=True)]
    )
    return [
        lax.select(lax.broadcast_in_dim(m, x.shape, range(m.ndim)), x, o)
        for m, x, o in zip(masks, new, old, strict=True)
    ]


# --- Eager ----------------------------------------------------------------------------------------


def shapes_of(leaves: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in leaves)


def arrays(args: Sequence[Any]) -> list[Any]:
    """Literals of a jaxpr that JAX evaluates eagerly, as under `checkpoint`, are Python scalars."""
    return [x if hasattr(x, "shape") else np.asarray(x, jax.typeof(x).dtype) for x in args]


def check_rows(core: Any, row: Any, rows: int) -> None:
    if np.any((row < 0) | (row >= rows)):
        raise RuntimeError(
            f"storax: {core.name} is of row {row} of a stack of {rows}: there is no such row. Leave the "
            "layers' rows as `storax.stack` made them, but for their order: they are integers, which "
            "`equinox.is_inexact_array` tells from parameters."
        )


@get_p.def_impl
def _(*args, slot, structure, levels, mesh, rows):
    core, made = _core.share_slot(slot), structure_at(structure)
    row, like = split_row(arrays(args), rows)
    if not row:
        return _store.get(core, made, like, levels, mesh)
    check_rows(core, np.asarray(row[0]), rows)
    shapes, levels = whole_type(like, levels, rows)
    whole = [_jax.shaped(s, x.dtype) for s, x in zip(shapes, like, strict=True)]
    return [x[row[0]] for x in _store.get(core, made, whole, levels, mesh)]


def _set_now(args, masks, *, slot, structure, levels, mesh, rows):
    _refused.note_set()
    core, made = _core.share_slot(slot), structure_at(structure)
    row, state = split_row(arrays(args), rows)
    if row:
        check_rows(core, np.asarray(row[0]), rows)
        shapes, levels = whole_type(state, levels, rows)
        whole = [_jax.shaped(s, x.dtype) for s, x in zip(shapes, state, strict=True)]
        old = _store.get(core, made, whole, levels, mesh)
        state = [o.at[row[0]].set(x) for o, x in zip(old, state, strict=True)]
        if masks is not None:
            kept = [jnp.zeros(k.dims(o.shape), bool) for k, o in zip(made.kinds, old, strict=True)]
            masks = [z.at[row[0]].set(m) for z, m in zip(kept, masks, strict=True)]
    _store.set(core, made, state, levels, mesh, masks)
    return []


@set_p.def_impl
def _(*args, **params):
    return _set_now(args, None, **params)


@set_masked_p.def_impl
def _(mask, *args, mask_axes, **params):
    mask, *given = arrays([mask, *args])
    _, state = split_row(given, params["rows"])
    kinds = structure_at(params["structure"]).kinds
    dims = [k.dims(x.shape) for k, x in zip(kinds, state, strict=True)]
    return _set_now(given, leaf_masks(mask, mask_axes, params["levels"], dims), **params)


def check_frozen(held, like, structure, levels, held_levels, name):
    agree = [a for a, _ in levels] == [a for a, _ in held_levels] and shapes_of(held) == shapes_of(
        like
    )
    if not agree:
        made = structure_at(structure)
        raise frozen_mismatch(
            name,
            made.type_id(shapes_of(held), held_levels, ()),
            made.type_id(shapes_of(like), levels, ()),
        )


def frozen_mismatch(name: str, held: int, asked: int) -> RuntimeError:
    """What to raise where a frozen state and `like` are of these types."""
    return RuntimeError(
        f"storax.get_state of {name}, frozen by `inference=True`: it holds {_core.type_text(held)}, but "
        f"`like` is {_core.type_text(asked)}. Get and set must agree in dtype, shape, PyTree structure and "
        "batch axes. If a PyTree operation is to change the arrays of a model, as to cast them, let `like` "
        "be made of its parameters, or do it before the model is frozen."
    )


@frozen_p.def_impl
def _(*held_and_like, **params):
    n = len(held_and_like) // 2
    held, like = arrays(held_and_like[:n]), arrays(held_and_like[n:])
    check_frozen(held, like, **params)
    return held


# --- vmap -----------------------------------------------------------------------------------------


# The axis that `storax.stack` maps over, and the slots whose states differ along it.
STACK = "storax.stack"
differ_in_stack: set[int] = set()


def _recorded(
    levels: tuple, axis_data: Any, dims: Sequence[int | None], slot: int | None = None
) -> tuple:
    """A level is part of the type only if some leaf of this call is batched at it."""
    if all(d is None for d in dims):
        return levels
    if axis_data.name == STACK and slot is not None:
        differ_in_stack.add(slot)
    return (*levels, (tuple(dims), _jax.is_moved(axis_data)))


def _batch_get(axis_data, args, dims, *, levels, rows, **params):
    _unknown_jax.require("vmap")
    row, like = split_row(args, rows)
    row_dim, like_dims = split_row(dims, rows)
    if row_dim and row_dim[0] is not None:
        return _get_rows(axis_data, row[0], like, like_dims, levels=levels, rows=rows, **params)
    levels = _recorded(levels, axis_data, like_dims)
    return get_p.bind(*args, levels=levels, rows=rows, **params), like_dims


def _batch_set(axis_data, args, dims, *, levels, rows, **params):
    _unknown_jax.require("vmap")
    row, state = split_row(args, rows)
    row_dim, state_dims = split_row(dims, rows)
    if row_dim and row_dim[0] is not None:
        _set_rows(axis_data, None, row[0], state, state_dims, levels=levels, rows=rows, **params)
    else:
        levels = _recorded(levels, axis_data, state_dims, params["slot"])
        set_p.bind(*args, levels=levels, rows=rows, **params)
    return [], []


def _batch_set_masked(axis_data, args, dims, *, levels, mask_axes, rows, **params):
    (mask, *args), (mask_dim, *dims) = args, dims
    row, state = split_row(args, rows)
    row_dim, state_dims = split_row(dims, rows)
    if row_dim and row_dim[0] is not None:
        _refuse_rows(levels, params["slot"])
        lanes = _jax.move_to_front(axis_data, mask, mask_dim)
        _set_rows(axis_data, lanes, row[0], state, state_dims, levels=levels, rows=rows, **params)
        return [], []
    if all(d is None for d in state_dims):
        # No leaf has this level: the state is written if any of its lanes is active.
        if mask_dim is not None:
            mask = lax.reduce_or(mask, (mask_dim,))
    else:
        levels = _recorded(levels, axis_data, state_dims, params["slot"])
        mask_axes = (*mask_axes, mask_dim)
    set_masked_p.bind(mask, *args, levels=levels, mask_axes=mask_axes, rows=rows, **params)
    return [], []


# A vmap over stacked layers: each lane has a row of its own, and together they have the whole state.


def _refuse_rows(levels, slot):
    if levels:
        raise NotImplementedError(
            f"storax: {_core.share_slot(slot).name} belongs to stacked layers, and a `vmap` over "
            "them contains a `vmap` whose lanes have states of their own. Scan over the layers instead."
        )


def _get_rows(axis_data, row, like, like_dims, *, levels, rows, **params):
    _refuse_rows(levels, params["slot"])
    avals = [
        _jax.lane_aval(jax.typeof(x), axis_data.size, d)
        for x, d in zip(like, like_dims, strict=True)
    ]
    whole = [jnp.zeros((rows, *a.shape), a.dtype) for a in avals]
    state = get_p.bind(*whole, levels=(), rows=None, **params)
    return [jnp.take(x, row, axis=0) for x in state], [0] * len(like)


def _set_rows(axis_data, lanes, row, state, dims, *, levels, rows, **params):
    _refuse_rows(levels, params["slot"])
    new = [_jax.move_to_front(axis_data, x, d) for x, d in zip(state, dims, strict=True)]
    old = get_p.bind(
        *[jnp.zeros((rows, *x.shape[1:]), x.dtype) for x in new], levels=(), rows=None, **params
    )
    if lanes is not None:
        row = jnp.where(lanes, row, rows)  # out of bounds: dropped
    whole = [o.at[row].set(x, mode="drop") for o, x in zip(old, new, strict=True)]
    set_p.bind(*whole, levels=(), rows=None, **params)


def _batch_frozen(axis_data, args, dims, *, levels, held_levels, **params):
    n = len(args) // 2
    held_dims, like_dims = dims[:n], dims[n:]
    if all(d is None for d in held_dims):
        levels = _recorded(levels, axis_data, like_dims)
        out = frozen_p.bind(*args, levels=levels, held_levels=held_levels, **params)
        return out, list(like_dims)
    # The state itself is mapped over, as one of several models is: each lane has its own part.
    like = [
        x if dl is None and dh is None else _jax.move_axis(axis_data, x, dl, dh)
        for x, dl, dh in zip(args[n:], like_dims, held_dims, strict=True)
    ]
    out = frozen_p.bind(*args[:n], *like, levels=levels, held_levels=held_levels[1:], **params)
    return out, list(held_dims)


def install_batching() -> None:
    _jax.define_batching(get_p, _batch_get)
    _jax.define_batching(set_p, _batch_set)
    _jax.define_batching(set_masked_p, _batch_set_masked)
    _jax.define_batching(frozen_p, _batch_frozen)


# --- Differentiation: state is a constant ----------------------------------------------------------


def _jvp_of_get(primitive):
    def rule(primals, tangents, **params):
        out = primitive.bind(*primals, **params)
        return out, [_jax.zero_tangent(x) for x in out]

    return rule


def _jvp_of_set(primitive):
    def rule(primals, tangents, *, slot, **params):
        if any(type(t) is not _jax.Zero for t in tangents):
            name = _core.share_slot(slot).name
            raise NotImplementedError(
                f"storax.set_state of {name}: the new state depends on what is being differentiated, "
                "and state has no derivative. If it is a record, such as a running statistic, set "
                "`jax.lax.stop_gradient(state)`; if gradients must flow through it, pass it along "
                "as a value instead."
            )
        return primitive.bind(*primals, slot=slot, **params), []

    return rule


def install_differentiation() -> None:
    _jax.define_jvp(get_p, _jvp_of_get(get_p))
    _jax.define_jvp(frozen_p, _jvp_of_get(frozen_p))
    _jax.define_jvp(set_p, _jvp_of_set(set_p))
    _jax.define_jvp(set_masked_p, _jvp_of_set(set_masked_p))
