"""Nestings of transformations around a read-modify-write of one slot, and a Python loop's answer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import storax


def count_and_multiply(index, x):
    """state += 1; returns x times the old state."""
    s = storax.get_state(index, jnp.float32(0))
    storax.set_state(index, s + 1)
    return x * s


def count_with_data(index, x):
    """The same, with a set that depends on what is differentiated, through stop_gradient."""
    s = storax.get_state(index, jnp.float32(0))
    storax.set_state(index, s + lax.stop_gradient(jnp.sin(x)) * 0 + 1)
    return x * s


def _custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def _custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: jax.vjp(f, x), lambda pullback, ct: pullback(ct))
    return g


def _while(f):
    def run(x):
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]

    return run


# name: (wrapper, how often it runs the function, whether reverse mode can go through it)
WRAPPERS = {
    "jit": (jax.jit, 1, True),
    "checkpoint": (jax.checkpoint, 1, True),
    "checkpoint_policy": (
        lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
        1,
        True,
    ),
    "scan": (
        lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
        2,
        True,
    ),
    "cond": (lambda f: lambda x: lax.cond(x > -10, f, lambda x: x, x), 1, True),
    "switch": (lambda f: lambda x: lax.switch((x > -10) * 1, [lambda x: x, f], x), 1, True),
    "fori": (lambda f: lambda x: lax.fori_loop(0, 2, lambda i, c: f(c), x), 2, True),
    "while": (_while, 2, False),
    "vmap": (lambda f: lambda x: jax.vmap(f)(x[None])[0], 1, True),
    "custom_jvp": (_custom_jvp, 1, True),
    "custom_vjp": (_custom_vjp, 1, True),
}
# vmap gives the state a batch axis, so what is inside it gets a batched `like`.
BASES = {"count": count_and_multiply, "data": count_with_data}


def nestings(depth, without=()):
    names = [n for n in WRAPPERS if n not in without]
    return list(itertools.product(names, repeat=depth))


def build(names, base, index):
    f = lambda x: base(index, jnp.sin(x))
    for name in reversed(names):
        f = WRAPPERS[name][0](f)
    return f


def runs(names):
    return int(np.prod([WRAPPERS[n][1] for n in names]))


def expected(n, start, x):
    """Value and gradient of n rounds, each x -> sin(x) * state, state += 1."""
    value, grad = np.float64(x), 1.0
    for k in range(n):
        value, grad = np.sin(value) * (start + k), np.cos(value) * (start + k) * grad
    return value, grad
