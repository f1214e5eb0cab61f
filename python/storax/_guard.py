"""Keeping derivatives from lanes that don't take a branch, for operands that must stay as they are.

Differentiation must not see what a branch computes in other lanes (jax#1052): JAX selects between an
operand and the same with its gradient stopped. But that gives the operand the mask's batch axes too,
and what a get or set depends on must keep its own, as they are part of the state's type.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from . import _jax

__all__ = ["guard"]

guard_p = _jax.Primitive("guard")


def guard(jaxpr: Any, operands: list[Any], dims: list[int | None], lanes: Any) -> list[Any]:
    """A branch's operands, batched at `dims`, of which derivatives see only these lanes."""
    return [
        x
        if d is None or not jnp.issubdtype(x.dtype, jnp.inexact)
        else _bind(lanes, d, x, into_state)
        for x, d, into_state in zip(operands, dims, _reaching_state(jaxpr), strict=True)
    ]


def _bind(lanes, axis, x, into_state):
    mask = lax.broadcast_in_dim(lanes, x.shape, [axis])
    return guard_p.bind(mask, x) if into_state else lax.select(mask, x, lax.stop_gradient(x))


def _reaching_state(jaxpr):
    """Which inputs of a closed jaxpr an operation on state depends on."""
    jaxpr = _jax.open_jaxpr(jaxpr)
    found: set[Any] = set()
    for eqn in reversed(jaxpr.eqns):
        if _jax.has_state(eqn) or any(v in found for v in eqn.outvars):
            found.update(v for v in eqn.invars if not isinstance(v, _jax.Literal))
    return [v in found for v in jaxpr.invars]


guard_p.def_impl(lambda mask, x: x)
guard_p.def_abstract_eval(lambda mask, x: x)


def _batch(axis_data, args, dims):
    (mask, x), (mask_dim, x_dim) = args, dims
    if x_dim is None:
        # Lanes of this level share the operand: some of them may take the branch.
        mask = mask if mask_dim is None else lax.reduce_or(mask, (mask_dim,))
    else:
        mask = _jax.move_axis(axis_data, mask, mask_dim, x_dim)
    return guard_p.bind(mask, x), x_dim


def _jvp(primals, tangents):
    (mask, x), (_, t) = primals, tangents
    if type(t) is not _jax.Zero:
        t = lax.select(mask, t, lax.full_like(t, 0))
    return guard_p.bind(mask, x), t


def install() -> None:
    _jax.define_batching(guard_p, _batch)
    _jax.define_jvp(guard_p, _jvp)
    _jax.define_lowering(guard_p, lambda ctx, mask, x: [x])
