"""One training step with BatchNorm, compiled in four ways, timed side by side.

The network is a small MLP on the digits. `storax.jit` and plain jit run the same function; with
`equinox.nn.State` and by hand the state is an argument and a result.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import digits
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import storax

WIDTH, BATCH, RATE = 32, 64, 0.05
STORAX_JIT, PLAIN_JIT, EQUINOX = "storax.jit", "eqx.filter_jit", "eqx.nn.State, eqx.filter_jit"


class MLP(eqx.Module):
    linears: list[eqx.nn.Linear]
    norms: list[Any]

    def __init__(self, norm: Callable[[], Any], key: jax.Array):
        keys = jax.random.split(key, 5)
        sizes = [64, WIDTH, WIDTH, WIDTH, WIDTH, 10]
        self.linears = [
            eqx.nn.Linear(*size, key=k)
            for size, k in zip(itertools.pairwise(sizes), keys, strict=True)
        ]
        self.norms = [norm() for _ in range(4)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x = jax.nn.relu(norm(linear(x)))
        return self.linears[-1](x)

    def with_state(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x, state = norm(linear(x), state)
            x = jax.nn.relu(x)
        return self.linears[-1](x), state


def descend(model: MLP, grads: MLP) -> MLP:
    return eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, grads))


def loss_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step_with_storax(model: MLP, images: jax.Array, labels: jax.Array) -> tuple[MLP, jax.Array]:
    @eqx.filter_value_and_grad
    def loss(model):
        return loss_of(jax.vmap(model, axis_name="batch")(images), labels)

    value, grads = loss(model)
    return descend(model, grads), value


@eqx.filter_jit
def step_with_equinox(model, state, images, labels):
    def loss(model):
        call = jax.vmap(model.with_state, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        logits, new = call(images, state)
        return loss_of(logits, labels), new

    (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return descend(model, grads), state, value


class Training:
    """A model that learns: a step for each batch, and how long it took."""

    def __init__(self, step: Callable[..., tuple[Any, ...]], *kept: Any):
        self.step, self.kept = step, kept
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def __call__(self, images: jax.Array, labels: jax.Array) -> None:
        start = time.perf_counter()
        *kept, loss = self.step(*self.kept, images, labels)
        loss.block_until_ready()
        self.seconds.append(time.perf_counter() - start)
        self.kept = tuple(kept)
        self.losses.append(float(loss))


def race(data: digits.Data, steps: int) -> dict[str, Training]:
    """Trains the same network in each way, a step of each in turn."""
    key = jax.random.key(0)

    def with_storax():
        norm = lambda: storax.BatchNorm(WIDTH, axis_name="batch", mode="batch")
        return MLP(norm, key)

    norm = lambda: eqx.nn.BatchNorm(WIDTH, axis_name="batch", mode="batch")
    runs = {
        STORAX_JIT: Training(storax.jit(step_with_storax), with_storax()),
        PLAIN_JIT: Training(eqx.filter_jit(step_with_storax), with_storax()),
        EQUINOX: Training(step_with_equinox, *eqx.nn.make_with_state(MLP)(norm, key)),
    }
    images, labels = jnp.asarray(data.images).reshape(-1, 64), jnp.asarray(data.labels)
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, 1280, BATCH)]
    for k in range(steps):
        for run in runs.values():
            run(*batches[k % len(batches)])
    return runs


def typical(run: Training) -> float:
    """Seconds a step, but for the first ones; when the machine had nothing else to do."""
    return statistics.quantiles(run.seconds[10:], n=4)[0]
