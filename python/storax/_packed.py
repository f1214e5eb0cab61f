"""Loading and storing the states of many slots by one call each, for hoisted programs.

    load_states                             -> ticket, *leaves   slots
    store_states  *others, *[flag] *leaves  ->                   slots, after

`slots` are pairs of a slot's and a type's number. `ticket` is an s32 scalar: what store is given
besides the states orders it after the load, and after whatever may fail; `after` are the ordered effects
of the program, which it comes after too. A type's number is negative where the slot may not have been
set: whether it was, a flag before its leaves says.
"""

import itertools
from typing import Any

import jax
import numpy as np

from . import _core, _jax, _loans, _store
from ._hoist import flag_of
from ._slot import type_parts

__all__ = ["NeedsPureError", "load_p", "store_p"]

load_p = _jax.Primitive("load_states")
store_p = _jax.Primitive("store_states")
load_p.multiple_results = store_p.multiple_results = True


class NeedsPureError(Exception):
    """The program is spread over several devices, or runs where storax has no handlers."""


@load_p.def_abstract_eval
def _(*, slots):
    avals = [_jax.shaped((), np.int32)]
    for _, type_id in slots:
        parts = type_parts(type_id)
        avals += [
            _jax.shaped(shape, kind.stored)
            for shape, kind in zip(parts.shapes, parts.structure.kinds, strict=True)
        ]
    return avals


@store_p.def_effectful_abstract_eval
def _(*others_and_leaves, slots, after):
    return [], {_jax.STORE, *after}  # an effect, so that JAX does not drop it


def _lower(ctx: Any, target: str, op: str, operands: Any, avals_in: Any, slots: Any) -> list[Any]:
    devices, auto_axes = _jax.module_devices(ctx)
    if _jax.is_export(ctx):
        raise NotImplementedError(
            "storax.jit: a program for `jax.export` has to be in the pure form, as the process that runs "
            "it has no such states: `storax.jit(f, pack=False)`. It takes and returns them."
        )
    if devices not in (None, 1) or auto_axes or _jax.platforms(ctx) != ("cpu",):
        raise NeedsPureError
    _store.register_handlers()
    shared = [_core.share_slot(slot_id) for slot_id, _ in slots]
    _store.note_program(shared, False)
    for slot in shared:
        _jax.keep_alive(ctx, _core.Pin(slot))
    _loans.recall(shared, op)
    numbers = [_core.process_nonce(), *itertools.chain(*slots)]
    return _jax.ffi_call(
        ctx, target, operands, avals_in, ctx.avals_out, states=np.array(numbers, np.int64)
    )


def _lower_load(ctx, *, slots):
    return _lower(ctx, _store.LOAD, "get_state", [], [], slots)


def _lower_store(ctx, *operands, slots, after):
    tokens = [ctx.tokens_in.get(e) for e in after]
    avals = [*[_jax.abstract_token] * len(tokens), *ctx.avals_in]
    out = _lower(ctx, _store.STORE, "set_state", [*tokens, *operands], avals, slots)
    ctx.set_tokens_out(ctx.tokens_in)
    return out


def install() -> None:
    _jax.define_lowering(load_p, _lower_load)
    _jax.define_lowering(store_p, _lower_store)


def load(slots: tuple[tuple[int, int], ...]) -> tuple[Any, dict[int, list[Any]]]:
    """The ticket, and each slot's leaves."""
    ticket, *leaves = load_p.bind(slots=slots)
    states, at = {}, 0
    for slot_id, type_id in slots:
        n = len(type_parts(type_id).shapes)
        states[slot_id] = leaves[at : at + n]
        at += n
    return ticket, states


def store(slots: tuple, others: list[jax.Array], states: Any, effects: tuple) -> None:
    """Stores the states of these slots, or as many of them as were set, by their flags."""
    targets, operands = [], list(others)
    for slot_id, type_id in slots:
        was_set = states.get(flag_of(slot_id), [])
        targets.append((slot_id, -type_id if was_set else type_id))
        operands += [*was_set, *states[slot_id]]
    store_p.bind(*operands, slots=tuple(targets), after=effects)
