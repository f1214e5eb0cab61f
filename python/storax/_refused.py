"""Where JAX runs a function in a way that state cannot be exact under: errors with a way out."""

import functools
import threading
from typing import Any

import jax

from . import _jax, _unknown_jax

__all__ = ["check_flags", "install_reductions", "install_while_loop", "note_set"]

_ran = threading.local()


def note_set() -> None:
    """A set has run at once, under whatever transformations."""
    if jax.config.jax_disable_jit:
        _unknown_jax.require("disable_jit")
    _ran.sets = getattr(_ran, "sets", 0) + 1


def _wrap_reduction(original):
    """XLA calls the function of a reduction in what order and as often as it likes."""

    @functools.wraps(original)
    def trace(*args: Any) -> Any:
        out = original(*args)
        if _jax.has_state(out[0]):
            raise NotImplementedError(
                "storax: state inside the function of a `jax.lax.reduce`, `jax.lax.reduce_window`, "
                "`x.at[...].apply` or the like, which has no order. Use `jax.lax.scan`, whose steps "
                "run in order, or get and set the state outside of the function."
            )
        return out

    return trace


def _wrap_while_loop(original):
    """Without jit JAX tries a loop in Python, and starts again once the predicate is batched.

    In a function that is being staged it would leave there what the first condition does.
    """

    @functools.wraps(original)
    def while_loop(cond_fun: Any, body_fun: Any, init_val: Any) -> Any:
        if not jax.config.jax_disable_jit:
            return original(cond_fun, body_fun, init_val)
        before = getattr(_ran, "sets", 0)
        staged = _jax.is_staging()

        def checked(val: Any) -> Any:
            nonlocal staged
            if staged:
                staged = False
                raise _jax.NotConcreteError
            predicate = cond_fun(val)
            if getattr(_ran, "sets", 0) != before and not _jax.is_concrete(predicate):
                raise NotImplementedError(
                    "storax: a `while_loop` had set state before its predicate turned out to be "
                    "batched by `jax.vmap`. With `jax.disable_jit` JAX would start the loop again, "
                    "and set the state twice. Run it without `jax.disable_jit`."
                )
            return predicate

        return original(checked, body_fun, init_val)

    return while_loop


def check_flags() -> None:
    """JAX's next `jax.checkpoint` and `lax.scan`, still experiments, know of no effects."""
    if flags := _jax.experiments():
        raise NotImplementedError(
            f"storax: get and set under the experimental {' and '.join(flags)} of JAX "
            f"{jax.__version__}, which would run them again in the backward pass, or not at all. "
            "Leave that flag off."
        )


def install_reductions() -> None:
    _jax.wrap_reductions(_wrap_reduction)


def install_while_loop() -> None:
    _jax.wrap_while_loop(_wrap_while_loop)
