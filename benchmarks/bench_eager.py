"""get_state and set_state outside of any program, beside the cheapest thing one can do eagerly."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Findings
from timing import AGAIN, Clock, repeated

import storax
from storax import _core

ADD = "add"
LABELS = {ADD: "jnp.add(x, x)", "get": "get_state", "set": "set_state"}
SHAPES = ((), (128,), (2**18,))


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "eager",
        "Eager get and set",
        "Outside of `jax.jit`, on one array. An operation on state waits for the programs that the "
        "thread has dispatched, if any live program has state at all.",
    )
    clock = Clock(rounds=20 if quick else 300, seconds=0.001)
    _measure(found, clock, "no program with state exists")
    program = _program_with_state()
    _measure(found, clock, "programs with state exist")
    del program
    return found


def _measure(found: Findings, clock: Clock, when: str) -> None:
    if bool(_core.num_programs()) != (when == "programs with state exist"):
        raise AssertionError(f"{_core.num_programs()} operations in programs, though {when}")
    for shape in SHAPES:
        x = jnp.full(shape, 7.0)
        index = storax.StateIndex()
        storax.set_state(index, x)
        np.testing.assert_array_equal(storax.get_state(index, like=x), x)
        runs = {
            ADD: repeated(functools.partial(jnp.add, x, x)),
            AGAIN: repeated(functools.partial(jnp.add, x, x)),
            "get": repeated(functools.partial(storax.get_state, index, x)),
            "set": repeated(functools.partial(storax.set_state, index, x)),
        }
        samples = clock.measure(runs)
        storax.set_state(index, x + 1)
        np.testing.assert_array_equal(storax.get_state(index, like=x), x + 1)

        what = f"f32[{','.join(map(str, shape))}]"
        found.add_table(f"{what}, {when}", samples, LABELS, ADD)
        for op in ("get", "set"):
            found.add_goal(f"eager {op} of {what} to jnp.add, {when}", 1.5, samples, op, ADD)


def _program_with_state() -> Any:
    index = storax.StateIndex()
    storax.set_state(index, jnp.array(0))

    @jax.jit
    def count():
        storax.set_state(index, storax.get_state(index, like=jnp.array(0)) + 1)

    count()
    if int(storax.get_state(index, like=jnp.array(0))) != 1:
        raise AssertionError("the program did not count")
    return count
