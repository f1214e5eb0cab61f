"""Flattening a model with frozen state in it, as every call of a jitted function of it does."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from report import Findings
from timing import AGAIN, Clock, repeated

import storax

LAYERS = 100
ARRAYS = "arrays"
LABELS = {
    ARRAYS: "an array each",
    "modules": "a module of a flag and an array each",
    "frozen": "a frozen index each",
    "live": "an index each, not frozen",
}


class Layer(eqx.Module):
    weight: jax.Array
    state: Any


class Buffer(eqx.Module):
    inference: bool
    value: jax.Array


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "flatten",
        f"Flattening a model of {LAYERS} layers",
        "`jax.tree.flatten` of a list of small Equinox modules, each of which has a weight and, "
        "beside it, state in one form or another.",
    )
    clock = Clock(rounds=20 if quick else 200, seconds=0.002)
    _measure(found, clock, "no program with state exists")
    index = storax.StateIndex()
    program = jax.jit(lambda: storax.set_state(index, jnp.array(0)))
    program()
    _measure(found, clock, "programs with state exist")
    _measure(found, clock, "a program with all of these states exists", of_their_own=True)
    return found


def _measure(found: Findings, clock: Clock, when: str, of_their_own: bool = False) -> None:
    values = [jnp.full((8,), i, jnp.float32) for i in range(LAYERS)]
    indices = [storax.StateIndex() for _ in values]
    for index, value in zip(indices, values, strict=True):
        storax.set_state(index, value)
    program = _program_with_state(indices, values) if of_their_own else None
    live = _model(indices)
    models = {
        ARRAYS: _model(values),
        AGAIN: _model(values),
        "modules": _model([Buffer(True, value) for value in values]),
        "frozen": eqx.nn.inference_mode(live),
        "live": live,
    }
    for key, model in models.items():
        _check(model, [] if key == "live" else values)
    flatten = jax.tree.flatten
    samples = clock.measure(
        {key: repeated(functools.partial(flatten, model)) for key, model in models.items()}
    )
    # What is looked up while it is flattened is what was set last.
    storax.set_state(indices[0], values[1])
    _check(models["frozen"], [values[1], *values[1:]])

    del program
    found.add_table(f"State as ..., {when}", samples, LABELS, ARRAYS)
    found.add_goal(f"flattening 100 frozen indices to arrays, {when}", 2, samples, "frozen", ARRAYS)


def _program_with_state(indices: list[storax.StateIndex], values: list[jax.Array]) -> Any:
    @jax.jit
    def touch():
        for index, value in zip(indices, values, strict=True):
            storax.set_state(index, storax.get_state(index, like=value))

    touch()
    return touch


def _model(states: list[Any]) -> list[Layer]:
    return [Layer(jnp.zeros((16, 16)), state) for state in states]


def _check(model: list[Layer], values: list[jax.Array]) -> None:
    held = [leaf for leaf in jax.tree.leaves(model) if np.shape(leaf) == (8,)]
    for leaf, value in zip(held, values, strict=True):
        np.testing.assert_array_equal(leaf, value)
