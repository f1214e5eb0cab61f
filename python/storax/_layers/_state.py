"""What the layers have in common: how their state starts, and how they know their mode."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._index import StateIndex
from .._operations import set_state

__all__ = ["in_inference", "index_holding", "like_held"]


def index_holding(state: Any, *, inference: bool) -> StateIndex:
    """Makes an index that holds `state`, frozen if `inference` is true.

    A frozen index cannot be set, so it is set first and frozen after: that is what lets a layer be
    constructed with `inference=True`.
    """
    index = StateIndex()
    set_state(index, state)
    return eqx.tree_at(lambda i: i.inference, index, inference)


def like_held(index: StateIndex, like: Any) -> Any:
    """`like`, of the dtypes that a frozen state has been cast to along with its model."""
    if index.inference is not True:
        return like
    is_float = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    held = [x for x in jax.tree.leaves(index) if is_float(x)]
    leaves, treedef = jax.tree.flatten(like)
    if len(held) != len(leaves):  # nothing is held
        return like
    cast = [x.astype(h.dtype) for x, h in zip(leaves, held, strict=True)]
    return jax.tree.unflatten(treedef, cast)


def in_inference(layer: Any, inference: bool | None) -> bool:
    """The mode of a call: its own `inference`, or else that of the layer."""
    if inference is None:
        inference = layer.inference
    if isinstance(inference, jax.Array):
        raise TypeError(
            f"{type(layer).__name__}: `inference` must be a bool, but it is a JAX array. If the "
            "layer was passed as an argument to plain `jax.jit` (or `jax.vmap`, `jax.grad`, ...), "
            "that has made one of its flag: use `equinox.filter_jit` (or `equinox.filter_vmap`, "
            "...) or `storax.jit`, or close over the layer instead of passing it."
        )
    return bool(inference)
