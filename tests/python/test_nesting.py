"""Every nesting of transformations, to depth 3: values, derivatives, and how often each operation ran."""

import os
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax
from nesting import BASES, Loop, X, build, can_forward, can_reverse, nestings, over_lanes
from random_programs.checker import QUICK

ALL = os.environ.get("STORAX_ALL") == "1"


def quick(f):
    return jax.jit(f, compiler_options=QUICK)


def hoisted(f, **form):
    return storax.jit(f, compiler_options=QUICK, **form)


def one_in(n, names):
    """A sample that is the same every time."""
    return zlib.crc32("-".join(names).encode()) % n == 0


# How a nesting is run, whether it returns the derivative too, and whether the operations that ran are
# what the program says: `storax.jit` loads and stores when it likes.
MODES = {
    "jit": (quick, False, True),
    "reverse": (lambda f: quick(jax.value_and_grad(f)), True, True),
    "forward": (lambda f: quick(lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))), True, True),
    "eager": (lambda f: f, False, True),
    "eager reverse": (jax.value_and_grad, True, True),
    "storax.jit": (lambda f: hoisted(f), False, False),
    "storax.jit reverse": (lambda f: hoisted(jax.value_and_grad(f)), True, False),
    "storax.jit pure": (lambda f: hoisted(f, pack=False), False, False),
    "storax.jit pure reverse": (lambda f: hoisted(jax.value_and_grad(f), pack=False), True, False),
}


def modes(names, base):
    """In how many ways a nesting is run: the most usual two always, the others for a sample, or with all."""
    found = ["jit"] if base != "data" else []
    found += ["reverse"] if can_reverse(names) else ["forward"] if can_forward(names) else ["jit"]
    if ALL or one_in(4, names):
        found += ["eager", *[m for m in MODES if m.startswith("storax")]]
        found += ["forward"] if can_forward(names) else []
        found += ["eager reverse"] if one_in(16, names) else []
    possible = lambda m: can_reverse(names) or "reverse" not in m
    return [m for m in dict.fromkeys(found) if possible(m)]


def cases(depth, sample=lambda base: 1):
    """Every nesting so deep around each base, or one in so many by `sample`."""
    for names in nestings(depth):
        for base in BASES:
            possible = base != "count" or "vmap" in names
            if possible and (ALL or one_in(sample(base), names)):
                yield pytest.param(names, base, id="-".join([base, *names]))


# Whose reverse mode, or every derivative, is refused by JAX, with or without state.
JAX_REFUSES = {("vmap", "custom_jvp", name) for name in ("cond", "switch", "custom_vjp")}


def jax_refuses(names, wrap):
    """The error that JAX raises without any state."""
    if names in JAX_REFUSES:
        try:
            jax.block_until_ready(wrap(build(names, lambda _, x: x * 2, None))(jnp.float32(X)))
        except (NotImplementedError, TypeError) as error:
            return error
    return None


def check(names, base):
    index = storax.StateIndex()
    f = build(names, BASES[base], index)
    core = index._slot.core
    on_lanes = lambda f: over_lanes(names, base, f)
    for mode in modes(names, base):
        wrap, differentiates, counts = MODES[mode]
        if error := differentiates and jax_refuses(names, wrap):
            with pytest.raises(type(error), match=re.escape(str(error)[:40])):
                wrap(f)(jnp.float32(X))
            continue
        loop = Loop(names, base)
        on_lanes(lambda s: storax.set_state(index, s))(jnp.asarray(loop.first, jnp.float32))
        want = loop(X) if differentiates else loop(X)[0]
        before = core.num_gets, core.num_sets
        got = jax.block_until_ready(wrap(f)(jnp.float32(X)))
        ran = core.num_gets - before[0], core.num_sets - before[1]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6, err_msg=mode)
        assert not counts or ran == (loop.runs, loop.runs), mode
        state = on_lanes(lambda s: storax.get_state(index, s))(jnp.zeros(loop.first.shape))
        np.testing.assert_array_equal(state, loop.state, err_msg=mode)


# Without STORAX_ALL=1 this takes half a minute.
CASES = [
    *cases(1),
    *cases(2, lambda base: 3 if base == "data" else 1),
    *cases(3, lambda base: 40),
]


@pytest.mark.parametrize(("names", "base"), CASES)
def test_nesting(names, base):
    check(names, base)
