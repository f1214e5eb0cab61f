"""On a JAX that storax was not tested on: what still works there is found out, the rest is refused.

The checks run small programs of which the right answer is known, once, with the first index.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax

__all__ = ["check", "require"]

# What can't be relied on, and why. Empty on every version in _jax.TESTED.
_refused: dict[str, str] = {}


def require(feature: str) -> None:
    """Raises `NotImplementedError` if state under this feature could not be verified."""
    if _refused and feature in _refused:
        raise NotImplementedError(
            f"storax: state under `{feature}` cannot be relied on with JAX {jax.__version__} "
            f"({_refused[feature]}). storax was tested on JAX {_tested()}; install one of "
            "these, or a newer storax."
        )


def _tested() -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in _jax.TESTED)


def check(failed: dict[str, str]) -> None:
    """Finds out what works; `failed` is what is known not to."""
    found = dict(failed)
    with _jax.eval_now():
        for feature, program in _CHECKS.items():
            if feature in found:
                continue
            try:
                problem = program()
            except Exception as e:
                problem = f"{type(e).__name__}: {e}"
            if problem:
                found[feature] = problem
    _refused.update(found)
    refused = ", ".join(found) if found else "nothing"
    warnings.warn(
        f"storax was tested on JAX {_tested()}, and this is JAX {jax.__version__}. Of what it checked "
        f"just now it refuses: {refused}.",
        stacklevel=4,
    )


def _counter() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    from ._index import StateIndex
    from ._operations import get_state, set_state

    index = StateIndex(name="self-check")
    zero = jnp.float32(0)
    set_state(index, zero)
    return (lambda: get_state(index, zero)), (lambda x: set_state(index, x))


def _check_jit() -> str | None:
    get, set = _counter()

    @jax.jit
    def program(m):
        seen = []
        for k in range(4):
            for _ in range(6 - k):
                m = jnp.tanh(m @ m)
            set(m[0, 0] * 0 + k)
            seen.append(get())
        return seen[::-1]

    out = [float(x) for x in program(jnp.full((64, 64), 0.01))]
    loop = jax.jit(
        lambda: lax.scan(lambda c, _: (set(get() + 1), (c, get()))[1], 0, None, length=3)
    )
    seen = [float(x) for x in loop()[1]]
    return None if (out, seen) == ([3, 2, 1, 0], [4, 5, 6]) else "operations ran out of order"


def _check_grad() -> str | None:
    def scan(f):
        return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]

    nestings = (scan, lambda f: scan(scan(f)), lambda f: scan(jax.checkpoint(scan(f))))
    for nest, runs in zip(nestings, (2, 4, 4), strict=True):
        get, set = _counter()

        def multiply(x, get=get, set=set):
            s = get() + 1
            set(s)
            return jnp.sin(x) * 0 + x * s

        value, grad = jax.jit(jax.value_and_grad(nest(multiply)))(jnp.float32(1))
        want = 2.0 if runs == 2 else 24.0
        if (float(value), float(grad), float(get())) != (want, want, runs):
            return "an operation in a scan ran too often, or too seldom"
    return None


def _check_vmap_of_control_flow() -> str | None:
    from ._index import StateIndex
    from ._operations import get_state, set_state

    index = StateIndex(name="self-check")
    xs = jnp.arange(4.0)
    jax.vmap(lambda x: set_state(index, x))(xs)

    def add(x):
        set_state(index, get_state(index, 0 * x) + 1)
        return x + 1

    def program(x):
        x = lax.while_loop(lambda x: x < 2, add, x)
        return lax.cond(x > 2, add, lambda x: x, x)

    out = jax.jit(jax.vmap(program))(xs)
    state = jax.vmap(lambda x: get_state(index, x))(xs)
    right = out.tolist() == [2, 2, 2, 4] and state.tolist() == [2, 2, 2, 4]
    return None if right else "a lane that did not take a branch was written"


_CHECKS: dict[str, Callable[[], str | None]] = {
    "jit": _check_jit,
    "grad": _check_grad,
    "vmap of control flow": _check_vmap_of_control_flow,
}
