"""Equinox's loops, by names that Equinox does not export: what storax must change in them.

`equinox.internal.while_loop`, on which diffrax and others stand, hides from JAX which lanes of a `vmap`
still run: its predicate is whether any does. And of `kind="checkpointed"`, diffrax's default, it runs its
steps again in the backward pass. (Equinox 0.13.)
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox.internal import _noinline as noinline_module
from equinox.internal._loop import bounded, checkpointed, common, loop
from jax import lax

from . import _jax
from ._primitives import get_p

__all__ = ["install"]

_noinline: Any = noinline_module

# Steps in a scan of a bounded loop, as in Equinox: more take more memory, and less time to compile.
_BASE = 16


def install() -> None:
    try:
        rewrite, run = common.common_rewrite, checkpointed._checkpointed_while_loop
        _ = bounded._while_loop, common._select_if_vmap, _noinline._get_callback
    except AttributeError as error:
        warnings.warn(
            f"storax does not know the loops of Equinox {eqx.__version__} ({error}). Don't get or set "
            "state in `equinox.internal.while_loop`, nor in a diffrax solve, under `vmap` or `grad`.",
            stacklevel=4,
        )
        return
    _refuse_in_noinline()
    modules: tuple[Any, ...] = (loop, bounded)
    masked = _with_masked_body(rewrite)
    for module in modules:
        module.common_rewrite = masked
    checkpointed._checkpointed_while_loop = _with_masked_body_and_gradient(run)


def _refuse_in_noinline() -> None:
    """It runs its function in a callback, and shows JAX but the shapes of its results."""
    shapes, get_callback = _noinline.filter_eval_shape, _noinline._get_callback

    def filter_eval_shape(*args, **kwargs):
        with _jax.evaluating(_noinline.noinline_p):
            return shapes(*args, **kwargs)

    def get_callback_and_look(*key):
        found = get_callback(*key)

        def callback(*args):
            with _jax.evaluating(_noinline.noinline_p):
                return found(*args)

        return callback

    _noinline.filter_eval_shape = filter_eval_shape
    _noinline._get_callback = get_callback_and_look


# --- Lanes ----------------------------------------------------------------------------------------


class _Masked(eqx.Module):
    """The body of a loop, but on the state of those lanes only that still run."""

    body: Callable[[Any], Any]
    makes_false_steps: bool = eqx.field(static=True)  # whether it is called when nothing runs

    def __call__(self, carry: Any) -> Any:
        step, running, before, carry = carry

        def run(running, carry):
            _, running, _, carry = self.body((step, running, before, carry))
            return running, carry

        # If it makes none, just True unless it is batched: XLA needs no branch for that.
        mask = common._select_if_vmap(running, True, False, self.makes_false_steps)
        still, carry = lax.cond(mask, run, lambda *same: same, running, carry)
        return step + 1, still, running, carry


def _with_masked_body(original: Callable[..., Any]) -> Callable[..., Any]:
    def common_rewrite(cond_fun, body_fun, init_val, max_steps, buffers, makes_false_steps):
        test, body, start, buffers = original(
            cond_fun, body_fun, init_val, max_steps, buffers, makes_false_steps
        )
        closed = _masked(eqx.filter_closure_convert(body, start), makes_false_steps)
        return test, lambda carry: closed(carry), start, buffers  # a function, which has a hash

    return common_rewrite


def _masked(body: Any, makes_false_steps: bool) -> Any:
    return _Masked(body, makes_false_steps) if _has_state(body) else body


# --- Gradients ------------------------------------------------------------------------------------


def _with_masked_body_and_gradient(original: Any) -> Any:
    @eqx.filter_custom_vjp
    def run_loop(vjp_arg, cond_fun, checkpoints, buffers, max_steps):
        return original(vjp_arg, cond_fun, checkpoints, buffers, max_steps)

    @run_loop.def_fwd
    def forward(perturbed, vjp_arg, cond_fun, checkpoints, buffers, max_steps):
        """As a bounded loop: scans of scans under `jax.checkpoint`, in which each operation runs once."""
        if max_steps is None:
            raise NotImplementedError(
                "storax: the gradient of a checkpointed loop of Equinox, with state in its steps, that "
                "may take any number of them: the steps would run again in the backward pass. Give it "
                "`max_steps`, as in `diffrax.diffeqsolve(..., max_steps=4096)`."
            )
        if any(map(_sets_state, _jaxprs(cond_fun))):
            raise NotImplementedError(
                "storax: the gradient of a checkpointed loop of Equinox with a set in its condition. "
                "Set the state in the loop's body."
            )
        differentiated, rest = eqx.partition(vjp_arg, perturbed)
        # A Python number is no array to Equinox, which would hold it constant.
        differentiated = jax.tree.map(jnp.asarray, differentiated)

        def run(differentiated):
            start, body_fun = eqx.combine(differentiated, rest)
            steps = _BASE ** max(1, math.ceil(math.log(max_steps, _BASE)))
            return bounded._while_loop(cond_fun, body_fun, start, steps, _BASE)

        end, pullback = eqx.filter_vjp(run, differentiated)
        return end, (pullback, eqx.filter(end, eqx.is_inexact_array))

    @run_loop.def_bwd
    def backward(residuals, cotangents, *_):
        pullback, end = residuals
        zeros = lambda x, ct: jnp.zeros_like(x) if ct is None else ct
        return pullback(jax.tree.map(zeros, end, cotangents))[0]

    def checkpointed_while_loop(vjp_arg, *args):
        start, body = vjp_arg
        if not _has_state(body):
            return original(vjp_arg, *args)
        return run_loop((start, _masked(body, makes_false_steps=False)), *args)

    return checkpointed_while_loop


# --- What is in a function that Equinox has made a closure of -------------------------------------


def _jaxprs(function: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(function) if hasattr(x, "eqns")]


def _has_state(function: Any) -> bool:
    return _jax.has_state(*_jaxprs(function))


def _sets_state(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if _jax.has_state(eqn) and eqn.primitive is not get_p:
            inner = _jax.inner_jaxprs(eqn)
            if not inner or any(map(_sets_state, inner)):
                return True
    return False
