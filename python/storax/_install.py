"""Teaching JAX about state: once, with the first index."""

from collections.abc import Callable

from . import (
    _control_flow,
    _equinox,
    _jax,
    _lowering,
    _other_lanes,
    _primitives,
    _refused,
    _unknown_jax,
)

__all__ = ["install"]

_installed = False


def install() -> None:
    """Registers our rules and wraps JAX's.

    Programs without state go on taking JAX's own code throughout. On a JAX that storax was not
    tested on, what does not fit is refused later, where it is used.
    """
    global _installed
    if _installed:
        return
    _installed = True  # at once: the checks of an unknown JAX make indices too
    _jax.hide_frames()
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        *_jax.PATCHES,
        ("vmap", _primitives.install_batching),
        ("grad", _primitives.install_differentiation),
        ("jit", _lowering.install),
        ("vmap", _other_lanes.install),
        ("vmap", _control_flow.install),
        ("reductions", _refused.install_reductions),
        ("disable_jit", _refused.install_while_loop),
        ("grad", _equinox.install),
    )
    failed = {}
    for feature, step in steps:
        try:
            step()
        except Exception as e:
            if _jax.VERSION in _jax.TESTED:
                raise
            failed[feature] = f"{type(e).__name__}: {e}"
    if _jax.VERSION not in _jax.TESTED:
        _unknown_jax.check(failed)
