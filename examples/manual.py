"""The examples of the manual page of `equinox.experimental`, which storax takes over.

Only the import has changed: `import storax as eqxe` for `import equinox.experimental as eqxe`.
"""

import jax
import jax.numpy as jnp
from jax import lax

import storax as eqxe


def count_in_a_scan() -> jax.Array:
    """A scan without a carry counts to five: the count is state."""
    index = eqxe.StateIndex()
    init_state = jnp.array(0)
    eqxe.set_state(index, init_state)

    @jax.jit
    def scan_fun(_, __):
        val = eqxe.get_state(index, like=init_state)
        val = val + 1
        eqxe.set_state(index, val)
        return None, val

    _, out = lax.scan(scan_fun, None, xs=None, length=5)
    return out


def state_under_vmap() -> tuple[jax.Array, jax.Array]:
    """Under vmap, state has a batch axis if it depends on the lane, and none if it doesn't."""
    index1 = eqxe.StateIndex()
    index2 = eqxe.StateIndex()
    init_state = jnp.array(0)

    @jax.jit
    @jax.vmap
    def set_state(x):
        eqxe.set_state(index1, init_state)  # the same in all lanes
        eqxe.set_state(index2, x)  # one value for each lane

    @jax.jit
    @jax.vmap
    def get_state(y):
        val1 = eqxe.get_state(index1, like=init_state)
        val2 = eqxe.get_state(index2, like=y)  # `y` says what to expect; its values don't matter
        return val1, val2

    set_state(jnp.array([1.0, 2.0]))
    return get_state(jnp.array([3.0, 4.0]))


if __name__ == "__main__":
    print(count_in_a_scan())  # [1 2 3 4 5]
    print(state_under_vmap())  # [0 0] and [1. 2.]
