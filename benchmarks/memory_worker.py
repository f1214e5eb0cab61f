"""Makes a state of 512 MiB inside of a program, and updates it 100 times; prints the peak, in GiB."""

import resource

import jax
import jax.numpy as jnp

import storax

N = 1 << 27
index = storax.StateIndex()


@storax.jit
def make(x):
    storax.set_state(index, jnp.zeros(N) + x)


@storax.jit
def update(i):
    state = storax.get_state(index, jnp.zeros(N)).at[i].add(1.0)
    storax.set_state(index, state)
    return state[0]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
before = peak()
make(jnp.float32(1))
for i in range(100):
    out = update(jnp.int32(i))
out.block_until_ready()
print(peak() - before)
