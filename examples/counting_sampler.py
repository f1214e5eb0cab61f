"""State under vmap: NUTS chains side by side, each counting the calls of its own log-density.

blackjax knows nothing of it. The chains run under one `vmap`, in a `while_loop` that lasts as long
as any of them needs; the state of a chain that has finished is left alone.
"""

import blackjax
import jax
import jax.numpy as jnp

import storax

NUM_DIMENSIONS = 3
calls = storax.StateIndex(name="log-density calls")


def log_density(x: jax.Array) -> jax.Array:
    zero = jnp.int32(0 * x[0])  # batched where x is: one count for each chain
    storax.set_state(calls, storax.get_state(calls, like=zero) + 1)
    return -0.5 * jnp.sum(x**2)


@jax.jit
@jax.vmap
def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Runs one chain. Returns the calls that we counted, and those that blackjax reports."""
    nuts = blackjax.nuts(log_density, step_size=0.3, inverse_mass_matrix=jnp.ones(NUM_DIMENSIONS))

    def step(chain, key):
        chain, info = nuts.step(key, chain)
        return chain, info.num_integration_steps

    key, start_key = jax.random.split(key)
    x = jax.random.normal(start_key, (NUM_DIMENSIONS,))
    zero = jnp.int32(0 * x[0])
    storax.set_state(calls, zero)
    _, num_steps = jax.lax.scan(step, nuts.init(x), jax.random.split(key, 100))
    return storax.get_state(calls, like=zero), 1 + num_steps.sum()  # one in `nuts.init`


def sample_and_count(num_chains: int) -> tuple[jax.Array, jax.Array]:
    return sample(jax.random.split(jax.random.key(0), num_chains))
