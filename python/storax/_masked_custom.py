"""custom_jvp and custom_vjp under a lane mask: the functions and their rules, each masked."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _jax

__all__ = ["mask_custom_jvp", "mask_custom_vjp"]

# _masked.masked: (closed jaxpr, mask, args) -> results
Masked = Callable[[Any, Any, Sequence[Any]], list[Any]]


def _run_masked(
    masked: Masked, f: Callable[..., list[Any]], mask: Any, args: Sequence[Any]
) -> list[Any]:
    """Runs a rule, which knows of no mask: traces it, and evaluates the trace under the mask."""
    closed = jax.make_jaxpr(f)(*args)
    return masked(closed, mask, args)


def mask_custom_jvp(masked: Masked, params: dict[str, Any], ins: list[Any], mask: Any) -> list[Any]:
    rule = _jax.custom_jvp_rule(params)
    call = jax.custom_jvp(lambda mask, *args: masked(params["call_jaxpr"], mask, args))

    def jvp(primals, tangents):
        (mask, *primals), (_, *tangents) = primals, tangents
        given = [t for t in tangents if not _jax.is_zero(t)]
        zeros: list[bool] = []

        def flat(*args):
            rest = iter(args[len(primals) :])
            filled = [t if _jax.is_zero(t) else next(rest) for t in tangents]
            out = rule(*args[: len(primals)], *filled)
            zeros[:] = [_jax.is_zero(x) for x in out]
            return [x for x in out if not _jax.is_zero(x)]

        made = iter(_run_masked(masked, flat, mask, [*primals, *given]))
        half = len(zeros) // 2
        outs = [next(made) for _ in range(half)]
        return outs, [
            _zero_tangent(x) if z else next(made) for x, z in zip(outs, zeros[half:], strict=True)
        ]

    call.defjvp(jvp, symbolic_zeros=params["symbolic_zeros"])
    return call(mask, *ins)


def _zero_tangent(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.full_like(x, 0)
    return np.zeros(x.shape, jax.dtypes.float0)


def mask_custom_vjp(masked: Masked, params: dict[str, Any], ins: list[Any], mask: Any) -> list[Any]:
    forward, backward = _jax.custom_vjp_rules(params)
    call = jax.custom_vjp(lambda mask, *args: masked(params["call_jaxpr"], mask, args))
    axes = _jax.axes_here()  # which JAX has left when it runs the backward pass

    def fwd(mask, *args):
        num_res = 0

        def flat(*args):
            nonlocal num_res
            res, outs = forward(*args)
            num_res = len(res)
            return [*res, *outs]

        out = _run_masked(masked, flat, mask, args)
        return out[num_res:], (mask, out[:num_res])

    def bwd(saved, cts):
        mask, res = saved
        zeros: list[bool] = []

        def flat(*args):
            out = backward(args[: len(res)], args[len(res) :])
            zeros[:] = [ct is None for ct in out]
            return [ct for ct in out if ct is not None]

        with _jax.with_axes(axes):
            made = iter(_run_masked(masked, flat, mask, [*res, *cts]))
        return (None, *[None if z else next(made) for z in zeros])

    call.defvjp(fwd, bwd)
    return call(mask, *ins)
