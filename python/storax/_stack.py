"""Layers made by the dozen, with their state stacked like their parameters."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import _jax, _store
from ._index import StateIndex
from ._primitives import STACK, differ_in_stack
from ._slot import Slot, type_parts

__all__ = ["stack"]


def stack(make: Callable[..., Any]) -> Callable[..., Any]:
    """Makes many layers at once, whose arrays and states are stacked, to be scanned over.

    `storax.stack(make)(keys)` is `equinox.filter_vmap(make)(keys)`, but each `StateIndex` that
    `make` creates becomes an index with one row of state per layer. Scan over the layers' arrays;
    each step then gets and sets its own layer's row, in place.

    **Arguments:**

    - `make`: makes one layer; called under `equinox.filter_vmap`. States must be set in it.

    **Returns:** a function of the same arguments, each array with a leading axis of layers.

    !!! example

        ```python
        layers = storax.stack(lambda key: Layer(key))(jax.random.split(key, 4))
        arrays, static = eqx.partition(layers, eqx.is_array)

        def step(x, arrays):
            layer = eqx.combine(arrays, static)
            return layer(x), None

        y, _ = jax.lax.scan(step, x, arrays)
        ```

    **Raises:** (when the function it returns is called)

    - `RuntimeError` under a transformation, such as `jax.jit`.
    - `TypeError` if there is no array among the arguments.
    """

    @functools.wraps(make)
    def make_stacked(*args: Any, **kwargs: Any) -> Any:
        if not _jax.no_trace():
            raise RuntimeError(
                "storax.stack must be called outside of `jax.jit`, `jax.vmap` and the like: it "
                "looks at the states that the layers are made with."
            )
        if not any(eqx.is_array(x) for x in jax.tree.leaves((args, kwargs))):
            raise TypeError(
                "storax.stack: the function that makes a layer must be given an array, such as one of "
                "keys, `jax.random.split(key, n)`: there are as many layers as that has rows."
            )
        rows = 0

        def make_one(*args: Any, **kwargs: Any) -> Any:
            nonlocal rows
            rows = jax.lax.axis_size(STACK)
            return make(*args, **kwargs)

        layers = eqx.filter_vmap(make_one, axis_name=STACK)(*args, **kwargs)
        stacked: dict[int, Slot] = {}
        is_index = lambda x: isinstance(x, StateIndex)

        def convert(x: Any) -> Any:
            if not is_index(x):
                return x
            slot = stacked.get(x._slot.id)
            if slot is None:
                slot = stacked[x._slot.id] = _stack_slot(x._slot, rows)
            return x._stacked(slot, rows)

        return jax.tree.map(convert, layers, is_leaf=is_index)

    return make_stacked


def _stack_slot(slot: Slot, rows: int) -> Slot:
    """A new slot with a row per layer: of what is batched, a lane each; of what isn't, a copy each."""
    _store.settle(slot.core)  # a program may be about to set it
    made = Slot(slot.core.name)
    type_id = slot.core.type
    if not type_id:
        return made
    parts = type_parts(type_id)
    structure = parts.structure
    differs = slot.id in differ_in_stack
    if len(parts.levels) > differs:
        raise NotImplementedError(
            f"storax.stack: {slot.core.name} is set under a `vmap` of its own."
        )
    axes = parts.levels[0][0] if differs else (None,) * len(structure.kinds)
    _, leaves = _store.read_stored(slot.core)
    whole = []
    for x, axis in zip(leaves, axes, strict=True):
        host = np.asarray(x)
        host = (
            np.broadcast_to(host, (rows, *host.shape))
            if axis is None
            else np.moveaxis(host, axis, 0)
        )
        whole.append(jnp.asarray(host))
    _store.set(made.core, structure, whole, (), ())
    return made
