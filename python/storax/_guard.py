"""Lanes that don't take a branch compute in it what one that does computes.

All lanes go through a branch that any lane takes. What the others have may be what the branch is there to
keep out: nothing times the infinite derivative of their values is NaN in the derivative by what the lanes
share (jax#1052), and a loop may never end. JAX selects, lane by lane, between an operand and the same
with its gradient stopped, also where lanes share it. But that gives each operand the mask's batch axes,
and what a get or set depends on must keep its own, as they are part of the state's type. So here the
other lanes get what a lane has that takes the branch: of operands, of states, of the lane's number.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from . import _jax

__all__ = ["FILLED", "fill", "fill_operands", "install"]

# One lane's values, as they are, under the mask of whether the lane counts.
fill_p = _jax.Primitive("fill")
fill_p.multiple_results = True
# Like `lax.select`, but of the batch axes of the second operand.
keep_p = _jax.Primitive("keep")
# Of what has been filled there are these.
FILLED = (fill_p.name, keep_p.name)


def fill(mask: Any, values: Sequence[Any]) -> list[Any]:
    """One lane's values if its `mask` is true, or else those of some lane of which it is."""
    return fill_p.bind(mask, *values, keeps_axes=(True,) * len(values))


def fill_operands(jaxpr: Any, mask: Any, operands: Sequence[Any]) -> list[Any]:
    """The operands of a branch, or of a loop's body, in one lane."""
    return fill_p.bind(mask, *operands, keeps_axes=tuple(_reaching_state(jaxpr)))


def _reaching_state(jaxpr):
    """Which inputs of a closed jaxpr an operation on state depends on."""
    jaxpr = _jax.open_jaxpr(jaxpr)
    found: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        if _jax.has_state(eqn) or any(v in found for v in eqn.outvars):
            found.update(v for v in eqn.invars if not isinstance(v, _jax.Literal))
    return [v in found for v in jaxpr.invars]


# --- One lane's values -----------------------------------------------------------------------------


def _batch_fill(axis_data, args, dims, *, keeps_axes):
    (mask, *values), (mask_dim, *value_dims) = args, dims
    if mask_dim is None:
        return fill_p.bind(mask, *values, keeps_axes=keeps_axes), value_dims
    which = lax.argmax(mask, 0, np.uint32)
    out, shared = list(values), []
    for k, (x, dim) in enumerate(zip(values, value_dims, strict=True)):
        if dim is None:
            shared.append(k)
        elif x.dtype != jax.dtypes.float0:
            one = lax.stop_gradient(_jax.take_lane(x, which, dim))
            others = _jax.broadcast_like(one, [a for a in range(x.ndim) if a != dim], x)
            lanes = _jax.broadcast_like(mask, [dim], x)
            out[k] = (keep_p.bind if keeps_axes[k] else lax.select)(lanes, x, others)
    if shared:  # by these lanes, but not by those of an outer vmap
        any_lane, keeps = lax.reduce_or(mask, (0,)), tuple(keeps_axes[k] for k in shared)
        same = fill_p.bind(any_lane, *[values[k] for k in shared], keeps_axes=keeps)
        for k, x in zip(shared, same, strict=True):
            out[k] = x
    return out, value_dims


def _jvp_of_fill(primals, tangents, **params):
    return fill_p.bind(*primals, **params), tangents[1:]


# --- The lanes' values -----------------------------------------------------------------------------


def _batch_keep(axis_data, args, dims):
    (mask, x, others), (mask_dim, x_dim, others_dim) = args, dims
    if x_dim is not None:
        mask, others = (
            _jax.move_axis(axis_data, a, d, x_dim)
            for a, d in ((mask, mask_dim), (others, others_dim))
        )
        return keep_p.bind(mask, x, others), x_dim
    # Lanes of this level share `x`: some of them may take the branch.
    if mask_dim is not None:
        every = [k for k in range(mask.ndim) if k != mask_dim]
        taking = lax.argmax(lax.reduce_or(mask, every), 0, np.uint32)
        mask = lax.reduce_or(mask, (mask_dim,))
        if others_dim is not None:
            others = _jax.take_lane(others, taking, others_dim)
    return keep_p.bind(mask, x, others), None


def _jvp_of_keep(primals, tangents):
    (mask, x, others), (_, t, _) = primals, tangents
    if type(t) is not _jax.Zero:
        t = lax.select(mask, t, lax.full_like(t, 0))
    return keep_p.bind(mask, x, others), t


def install() -> None:
    fill_p.def_impl(lambda mask, *values, keeps_axes: list(values))
    fill_p.def_abstract_eval(lambda mask, *values, keeps_axes: list(values))
    _jax.define_batching(fill_p, _batch_fill)
    _jax.define_jvp(fill_p, _jvp_of_fill)
    _jax.define_lowering(fill_p, lambda ctx, mask, *values, keeps_axes: list(values))
    keep_p.def_impl(lax.select)
    keep_p.def_abstract_eval(lambda mask, x, others: x)
    _jax.define_batching(keep_p, _batch_keep)
    _jax.define_jvp(keep_p, _jvp_of_keep)
    _jax.define_lowering(keep_p, _jax.lowering_of(lax.select))
