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
        "thread has dispatched, if any live program names that state.",
    )
    clock = Clock(rounds=20 if quick else 300, seconds=0.001)
    _measure(found, clock, "no program with state exists")
    if _core.num_programs():
        raise AssertionError("there are programs with state")
    program = _program_with_state(storax.StateIndex(), jnp.array(0))
    _measure(found, clock, "programs with state exist")
    del program
    _measure(found, clock, "a program with this state exists", of_its_own=True)
    return found


def _measure(found: Findings, clock: Clock, when: str, of_its_own: bool = False) -> None:
    for shape in SHAPES:
        x = jnp.full(shape, 7.0)
        index = storax.StateIndex()
        storax.set_state(index, x)
        np.testing.assert_array_equal(storax.get_state(index, like=x), x)
        program = _program_with_state(index, x) if of_its_own else None
        if bool(index._slot.core.num_programs) != of_its_own:
            raise AssertionError(f"{index._slot.core.num_programs} operations, though {when}")
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
        del program


def _program_with_state(index: storax.StateIndex, x: jax.Array) -> Any:
    storax.set_state(index, x)

    @jax.jit
    def count():
        storax.set_state(index, storax.get_state(index, like=x) + 1)

    count()
    np.testing.assert_array_equal(storax.get_state(index, like=x), x + 1)
    return count
