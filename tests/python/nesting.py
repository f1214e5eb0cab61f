"""Nestings of transformations around a read-modify-write of one slot, in JAX and in NumPy.

Where a nesting has a vmap in it, each lane may have a state of its own, or all may share one. Lanes part
company in cond, switch and while, as these go by the value.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import storax
from random_programs.runner import CALLS

START, X = 2.0, 0.7
# cond and switch take the branch with state above this, and while goes on.
THRESHOLD = 0.5
# What vmap's lanes multiply their argument by.
LANES = np.array([1.0, 0.6], np.float32)


# --- In JAX ---------------------------------------------------------------------------------------


def count(index, x):
    """state += 1; returns x times the old state."""
    s = storax.get_state(index, 0 * x)
    storax.set_state(index, s + 1)
    return x * s


def count_with_data(index, x):
    """The same, with a set that depends on what is differentiated, through stop_gradient."""
    s = storax.get_state(index, 0 * x)
    storax.set_state(index, s + lax.stop_gradient(jnp.sin(x)) * 0 + 1)
    return x * s


def count_shared(index, x):
    """The same, with one state for all lanes; what is got depends on nothing, and could leave a loop."""
    s = storax.get_state(index, jnp.float32(0))
    storax.set_state(index, s + 1)
    return x * s


BASES = {"count": count, "data": count_with_data, "shared": count_shared}


def _while(f):
    goes_on = lambda c: (c[0] == 0) | ((c[0] < 2) & (c[1] > THRESHOLD))
    return lambda x: lax.while_loop(goes_on, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]


def _cond(f):
    return lambda x: lax.cond(x > THRESHOLD, f, lambda x: x, x)


def _switch(f):
    return lambda x: lax.switch((x > THRESHOLD) * 1, [lambda x: x, f], x)


WRAPPERS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint_policy": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "cond": _cond,
    "switch": _switch,
    "fori": lambda f: lambda x: lax.fori_loop(0, 2, lambda i, c: f(c), x),
    "while": _while,
    "vmap": lambda f: lambda x: jax.vmap(f)(x * LANES).sum(),
    "custom_jvp": CALLS["custom_jvp"],
    "custom_vjp": CALLS["custom_vjp"],
}


def nestings(depth, without=()):
    names = [n for n in WRAPPERS if n not in without]
    return list(itertools.product(names, repeat=depth))


def build(names, base, index):
    """The nesting as a function, the first name outermost."""
    f = lambda x: base(index, jnp.sin(x))
    for name in reversed(names):
        f = WRAPPERS[name](f)
    return f


def over_lanes(names, base, f):
    """`f` of a state, for all the lanes that have one of their own."""
    for _ in range(levels(names, base)):
        f = jax.vmap(f)
    return f


def levels(names, base):
    return 0 if base == "shared" else names.count("vmap")


def can_reverse(names):
    return "while" not in names


def can_forward(names):
    return "custom_vjp" not in names


# --- In NumPy -------------------------------------------------------------------------------------


class Loop:
    """What a nesting does, as plain loops in which all lanes go in step."""

    def __init__(self, names, base):
        self.names, self.shared = names, base == "shared"
        shape = (len(LANES),) * levels(names, base)
        self.state = START + np.arange(np.prod(shape, dtype=int)).reshape(shape)
        self.first = self.state
        self.runs = 0

    def __call__(self, x):
        """The value and the derivative."""
        return self._nest(self.names, np.array([x, 1.0]), np.array(True))

    def _nest(self, names, x, active):
        """`x` is values and derivatives, with an axis for each vmap; `active` says which lanes count."""
        if not names:
            return self._base(x, active)
        name, rest = names[0], names[1:]
        if name == "vmap":
            inner = self._nest(rest, x[..., None] * LANES, active[..., None] & (LANES > 0))
            return inner.sum(-1)
        if name in ("cond", "switch"):
            return self._where(x[0] > THRESHOLD, rest, x, active)
        if name == "while":
            x = self._nest(rest, x, active)
            return self._where(x[0] > THRESHOLD, rest, x, active)
        for _ in range(2 if name in ("scan", "fori") else 1):
            x = self._nest(rest, x, active)
        return x

    def _where(self, lanes, rest, x, active):
        if not (lanes & active).any():
            return x
        return np.where(lanes, self._nest(rest, x, lanes & active), x)

    def _base(self, x, active):
        self.runs += 1
        y = np.stack([np.sin(x[0]), np.cos(x[0]) * x[1]]) * self.state
        self.state = self.state + (active.any() if self.shared else active)
        return y
