"""A training step of a network with BatchNorm."""

import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from contenders import on_cpu
from networks import Form, by_hand, flat, with_equinox, with_storax
from report import Findings, Goal
from timing import AGAIN, Clock, Spread, repeated, without_old_objects

import storax

HAND = "hand"
LABELS = {
    HAND: "by hand, jax.jit",
    "storax": "storax, jax.jit",
    "storax.jit": "storax, storax.jit",
    "storax.jit-module": "storax, storax.jit, of modules",
    "storax-filter": "storax, eqx.filter_jit",
    "eqx-filter": "eqx.nn.State, eqx.filter_jit",
    "eqx": "eqx.nn.State, jax.jit",
}
DEPTH = 4
# Width and batch size.
SIZES = {"small": (32, 32), "large": (256, 256)}
RATE = 0.01
CHECKED_STEPS = 5


class Training:
    """A model in training: one step a call."""

    def __init__(self, form: Form, parameters: Any, step: Callable[..., Any], batch: Any):
        self.form = form
        self.parameters = parameters
        self.state = form.state
        self.step = step
        self.batch = batch

    def __call__(self) -> jax.Array:
        self.parameters, self.state, loss = self.step(self.batch, self.parameters, self.state)
        return loss

    def statistics(self) -> tuple[jax.Array, jax.Array]:
        # Storax's are found through any copy of the model, Equinox's through any of the indices.
        return self.form.statistics(self.form.model, self.state)


def _of_arrays(form: Form, batch: Any, jit: Callable[..., Any] = jax.jit) -> Training:
    """Parameters as a list of arrays: the least that a call can be made to handle."""
    leaves, call = flat(form)

    @functools.partial(jit, donate_argnums=(1, 2))
    def step(batch, leaves, state):
        xs, targets = batch

        def loss(leaves):
            ys, new = call(leaves, state, xs)
            return jnp.mean((ys - targets) ** 2), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(leaves)
        leaves = [p - RATE * g for p, g in zip(leaves, gradients, strict=True)]
        return leaves, new, value

    return Training(form, leaves, step, batch)


_filter_jit = functools.partial(eqx.filter_jit, donate="all-except-first")
_storax_jit = functools.partial(storax.jit, donate_argnums=(1, 2))


def _of_modules(form: Form, batch: Any, jit: Callable[..., Any] = _filter_jit) -> Training:
    """Parameters as the model itself, as one writes it with Equinox."""

    @jit
    def step(batch, model, state):
        xs, targets = batch

        @functools.partial(eqx.filter_value_and_grad, has_aux=True)
        def loss(model):
            ys, new = form.call(model, state, xs)
            return jnp.mean((ys - targets) ** 2), new

        (value, new), gradients = loss(model)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, gradients))
        return model, new, value

    # Of its own, since it is donated.
    model = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, form.model)
    return Training(form, model, step, batch)


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "batch_norm",
        "A training step with BatchNorm",
        f"{DEPTH} layers, each a linear map, BatchNorm and ReLU: loss, gradient, and an SGD step. "
        "Under `jax.jit` the parameters are a list of arrays, under `eqx.filter_jit` the model "
        "itself; all are donated.",
    )
    for size, (width, batch_size) in list(SIZES.items())[: 1 if quick else None]:
        keys = jax.random.split(jax.random.key(1))
        batch = tuple(jax.random.normal(key, (batch_size, width)) for key in keys)
        trained = {
            HAND: _of_arrays(by_hand(width, DEPTH), batch),
            AGAIN: _of_arrays(by_hand(width, DEPTH), batch),
            "storax": _of_arrays(with_storax(width, DEPTH), batch),
            "storax.jit-module": _of_modules(with_storax(width, DEPTH), batch, _storax_jit),
            "storax-filter": _of_modules(with_storax(width, DEPTH), batch),
            "eqx-filter": _of_modules(with_equinox(width, DEPTH), batch),
            "eqx": _of_arrays(with_equinox(width, DEPTH), batch),
            "storax.jit": _of_arrays(with_storax(width, DEPTH), batch, storax.jit),
        }
        if not on_cpu():
            del trained["storax"], trained["storax-filter"]
        ours = [key for key in ("storax", "storax.jit") if key in trained]
        _check(trained)
        clock = Clock(rounds=20 if quick else 200, seconds=0.002)
        samples = clock.measure({key: repeated(each) for key, each in trained.items()})

        title = f"{size}: width {width}, batch of {batch_size}"
        found.add_table(title, samples, LABELS, HAND)
        for key in ours:
            text = f"{size} training step, {LABELS[key]}, to by hand"
            found.add_goal(text, 1.05, samples, key, HAND)
        if size == "small":
            for key in ours:
                text = f"{size} training step, {LABELS['eqx-filter']}, to {LABELS[key]}"
                found.add_goal(text, 3, samples, "eqx-filter", key, at_least=True, baseline=HAND)
    _measure_residual(found, quick)
    return found


def _measure_residual(found: Findings, quick: bool) -> None:
    width, depth, batch_size = 16, 50, 4
    keys = jax.random.split(jax.random.key(1))
    batch = tuple(jax.random.normal(key, (batch_size, width, 8, 8)) for key in keys)
    forms = {HAND: by_hand, AGAIN: by_hand, "storax.jit": with_storax}
    first_calls: dict[str, list[float]] = {key: [] for key in forms}
    trained = {}
    for _ in range(1 if quick else 3):
        for key, form in forms.items():
            jit = storax.jit if key == "storax.jit" else jax.jit
            trained[key] = _of_arrays(form(width, depth, residual=True), batch, jit)
            with without_old_objects():
                start = time.perf_counter()
                jax.block_until_ready(trained[key]())
                first_calls[key].append(time.perf_counter() - start)
    clock = Clock(rounds=10 if quick else 100, seconds=0.002, at_most=40)
    samples = clock.measure({key: repeated(each) for key, each in trained.items()})
    title = (
        f"residual: {depth} convolutions of width {width}, batch of {batch_size} images of 8 x 8"
    )
    found.add_table(title, samples, LABELS, HAND, first_calls)
    text = f"residual training step, {LABELS['storax.jit']}, to by hand"
    found.add_goal(text, 1.05, samples, "storax.jit", HAND)
    hand, again, ours = (np.array(first_calls[key]) for key in (HAND, AGAIN, "storax.jit"))
    text = f"residual, first call, {LABELS['storax.jit']}, to by hand"
    spread = Spread.of(ours / hand)
    found.goals.append(Goal(text, 1.5, spread, again=Spread.of(again / hand)))


def _check(trained: dict[str, Training]) -> None:
    """That all compute the same, before any of them is timed."""
    results = {}
    for key, each in trained.items():
        losses = [float(each()) for _ in range(CHECKED_STEPS)]
        results[key] = losses, *each.statistics()
    for key, result in results.items():
        for value, expected in zip(result, results[HAND], strict=True):
            np.testing.assert_allclose(
                value, expected, rtol=1e-3, atol=1e-4, err_msg=LABELS.get(key)
            )
