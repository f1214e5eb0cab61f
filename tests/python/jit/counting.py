"""A state that counts."""

import jax.numpy as jnp
import numpy as np

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
