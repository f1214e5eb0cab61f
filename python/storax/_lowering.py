"""Lowering under plain `jax.jit`: an FFI call per operation, ordered by a token inside the module."""

import numpy as np

from . import _core, _jax, _loans, _packed, _store, _unknown_jax
from ._primitives import (
    check_frozen,
    frozen_p,
    get_p,
    leaf_masks,
    operation_type,
    set_masked_p,
    set_p,
    split_row,
)
from ._slot import structure_at

__all__ = ["install", "needs_hoisting"]


def _needs_hoisting(text: str) -> NotImplementedError:
    error = NotImplementedError(text)
    error.needs_hoisting = True  # type: ignore[attr-defined]
    return error


def needs_hoisting(error: NotImplementedError) -> bool:
    """Whether an error of plain `jax.jit` means that only `storax.jit` can run the program."""
    return getattr(error, "needs_hoisting", False)


def _refuse(ctx, slot, op):
    """Where an FFI call could not keep its promise, XLA would abort, or be silently wrong."""
    devices, auto_axes = _jax.module_devices(ctx)
    name = slot.name
    if _jax.is_export(ctx):
        raise NotImplementedError(
            f"storax.{op} of {name} in a program for `jax.export`: the process that runs it has no "
            "such state. Freeze the model with `equinox.nn.inference_mode`, so that its state is "
            "exported as a constant or an argument, or pass the state in and out yourself."
        )
    if devices not in (None, 1):
        raise _needs_hoisting(
            f"storax.{op} of {name} in a program that JAX spreads over {devices} devices: under "
            "plain `jax.jit` a state lives on one device. Use `storax.jit`, which keeps it as one "
            "sharded array, around all else, as in `storax.jit(jax.grad(f))`; or `jax.shard_map` over "
            "every mesh axis, for one state per device; or keep the program's arguments on one device."
        )
    if auto_axes:
        raise NotImplementedError(
            f"storax.{op} of {name} inside a `jax.shard_map` that leaves the mesh axes "
            f"{list(auto_axes)} to the partitioner, which can't split a custom call. Make every axis "
            "manual (`axis_names`); or get and set the state outside of the `shard_map`, under "
            "`storax.jit`, and pass it through as a value."
        )


def _state_attribute(slot, type_id, order=()):
    number = _store.mesh_order_number(order) if order else 0
    return np.array([slot.id, number << 32 | type_id, _core.process_nonce()], np.int64)


def _lower(ctx, op, target, slot_id, type_id, mesh, operands, avals_in):
    slot = _core.share_slot(slot_id)
    effect = _jax.MESH_STATE if mesh else _jax.STATE
    _jax.token(ctx, effect)  # first of all: there is none if the operation is hidden from JAX
    _unknown_jax.require("jit")
    _refuse(ctx, slot, op)
    _store.register_handlers()
    _store.note_program([slot], bool(mesh))
    _jax.keep_alive(ctx, _store.Operation(slot, type_id, bool(mesh)))
    _loans.recall([slot], op)
    order = _jax.mesh_ordinals(ctx) if mesh and op == "set_state" else ()
    return _jax.ordered_ffi_call(
        ctx,
        effect,
        target,
        operands,
        avals_in,
        ctx.avals_out,
        state=_state_attribute(slot, type_id, order),
    )


def _lower_get(ctx, *args, slot, structure, levels, mesh, rows):
    type_id = operation_type(
        ctx.avals_out, structure=structure, levels=levels, mesh=mesh, rows=rows
    )
    row, _ = split_row(args, rows)
    row_aval, _ = split_row(ctx.avals_in, rows)
    target = _store.GET_ROW if row else _store.GET
    return _lower(ctx, "get_state", target, slot, type_id, mesh, row, row_aval)


def _lower_set(ctx, *args, slot, structure, levels, mesh, rows):
    row, avals = split_row(ctx.avals_in, rows)
    type_id = operation_type(avals, structure=structure, levels=levels, mesh=mesh, rows=rows)
    target = _store.SET_ROW if row else _store.SET
    return _lower(ctx, "set_state", target, slot, type_id, mesh, args, ctx.avals_in)


def _lower_set_masked(ctx, mask, *args, slot, structure, levels, mesh, rows, mask_axes):
    row, state = split_row(args, rows)
    row_aval, avals = split_row(ctx.avals_in[1:], rows)
    dims = [k.dims(a.shape) for k, a in zip(structure_at(structure).kinds, avals, strict=True)]
    mask_avals = [_jax.shaped(d, bool) for d in dims]

    def spread(mask):
        return leaf_masks(mask, mask_axes, levels, dims)

    masks = _jax.lower_inline(ctx, spread, ctx.avals_in[:1], mask_avals, mask)
    type_id = operation_type(avals, structure=structure, levels=levels, mesh=mesh, rows=rows)
    target = _store.SET_ROW_MASKED if row else _store.SET_MASKED
    operands, avals_in = [*row, *masks, *state], [*row_aval, *mask_avals, *avals]
    return _lower(ctx, "set_state", target, slot, type_id, mesh, operands, avals_in)


def _lower_frozen(ctx, *held_and_like, **params):
    n = len(held_and_like) // 2
    check_frozen(ctx.avals_in[:n], ctx.avals_in[n:], **params)
    return list(held_and_like[:n])


def _refuse_platform(op):
    def rule(ctx, *args, slot, **params):
        platforms = ", ".join(_jax.platforms(ctx))
        raise _needs_hoisting(
            f"storax.{op} of {_core.share_slot(slot).name}: under plain `jax.jit`, state has no "
            f"handler on {platforms} yet. Use `storax.jit`, which needs none; or run the program on "
            "the CPU, for example under `jax.default_device`."
        )

    return rule


def install() -> None:
    for primitive, op, rule in (
        (get_p, "get_state", _lower_get),
        (set_p, "set_state", _lower_set),
        (set_masked_p, "set_state", _lower_set_masked),
    ):
        _jax.define_lowering(primitive, _refuse_platform(op))
        _jax.define_lowering(primitive, rule, platform="cpu")
    _jax.define_lowering(frozen_p, _lower_frozen)
    _packed.install()
