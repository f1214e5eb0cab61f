"""States that count."""

import jax.numpy as jnp
import numpy as np
from jax import lax

import storax


def counter(value=0, size=None):
    """A state of a scalar, or of many elements, which are lent."""
    index = storax.StateIndex(name="counter")
    like = jnp.float32(0) if size is None else jnp.zeros(size)
    storax.set_state(index, like + value)

    def count(by=1):
        now = storax.get_state(index, like) + by
        storax.set_state(index, now)
        return now

    return index, count, lambda: np.asarray(storax.get_state(index, like)).ravel()[-1]


def counting_lanes(index):
    """A program of one lane: it counts in a loop, and in a branch that only some lanes take."""

    def add(x):
        storax.set_state(index, storax.get_state(index, 0 * x) + 1)
        return x + 1

    def program(x):
        x = lax.while_loop(lambda x: x < 2, add, x)
        return lax.cond(x > 3, add, lambda x: x, x)

    return program
