"""One network with BatchNorm in three forms: its state by hand, by storax, by Equinox."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

import storax

__all__ = ["Form", "by_hand", "flat", "with_equinox", "with_storax"]

MOMENTUM = 0.99
BATCH = "batch"

Statistics = tuple[jax.Array, jax.Array]


class HandBatchNorm(eqx.Module):
    """What `storax.BatchNorm(mode="batch")` computes in training, with its state passed along."""

    weight: jax.Array
    bias: jax.Array
    eps: float = eqx.field(static=True)

    def __init__(self, size: int):
        self.weight = jnp.ones((size,))
        self.bias = jnp.zeros((size,))
        self.eps = 1e-5

    def __call__(self, x: jax.Array, running: Statistics) -> tuple[jax.Array, Statistics]:
        axes = tuple(range(1, x.ndim))
        mean = lax.pmean(jnp.mean(x, axes), BATCH)
        centred = x - lax.expand_dims(mean, axes)
        var = lax.pmean(jnp.mean(centred * centred, axes), BATCH)
        running = tuple(
            lax.stop_gradient(MOMENTUM * r + (1 - MOMENTUM) * b)
            for r, b in zip(running, (mean, var), strict=True)
        )
        scale = lax.rsqrt(var + self.eps) * self.weight
        out = (x - lax.expand_dims(mean, axes)) * lax.expand_dims(scale, axes)
        return out + lax.expand_dims(self.bias, axes), running


class Network(eqx.Module):
    """Layers of one width, each with its norm: linear maps, or, residual, convolutions."""

    linears: list[Any]
    norms: list[Any]
    residual: bool = eqx.field(static=True)

    def __init__(self, width: int, depth: int, norm: Callable[[int], Any], residual: bool = False):
        keys = jax.random.split(jax.random.key(0), depth)
        if residual:
            conv = functools.partial(eqx.nn.Conv2d, width, width, 3, padding=1)
            self.linears = [conv(key=key) for key in keys]
        else:
            self.linears = [eqx.nn.Linear(width, width, key=key) for key in keys]
        self.norms = [norm(width) for _ in range(depth)]
        self.residual = residual

    def _activate(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + jax.nn.relu(y) if self.residual else jax.nn.relu(y)

    def __call__(self, x: jax.Array) -> jax.Array:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self._activate(x, norm(linear(x)))
        return x

    def by_hand(self, x: jax.Array, running: list[Statistics]) -> tuple[jax.Array, Any]:
        new = []
        for linear, norm, old in zip(self.linears, self.norms, running, strict=True):
            y, updated = norm(linear(x), old)
            x = self._activate(x, y)
            new.append(updated)
        return x, new

    def with_equinox(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, Any]:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            y, state = norm(linear(x), state)
            x = self._activate(x, y)
        return x, state


@dataclass(frozen=True)
class Form:
    """A network, and its state as far as that is a value.

    `call(model, state, batch)` returns the outputs and the new state; `statistics(model, state)` what
    the last norm remembers.
    """

    model: Network
    state: Any
    call: Callable[[Network, Any, jax.Array], tuple[jax.Array, Any]]
    statistics: Callable[[Network, Any], Statistics]


def by_hand(width: int, depth: int, residual: bool = False) -> Form:
    return Form(
        Network(width, depth, HandBatchNorm, residual),
        [(jnp.zeros((width,)), jnp.ones((width,))) for _ in range(depth)],
        lambda model, state, xs: _over_batch(model.by_hand)(xs, state),
        lambda model, state: state[-1],
    )


def with_storax(width: int, depth: int, residual: bool = False) -> Form:
    def norm(size):
        return storax.BatchNorm(size, BATCH, momentum=MOMENTUM, mode="batch")

    def call(model, state, xs):
        # Not `vmap(model)`: JAX would write the whole model out, for want of a name.
        return jax.vmap(model.__call__, axis_name=BATCH)(xs), None

    def statistics(model, state):
        like = jnp.zeros((width,))
        return storax.get_state(model.norms[-1].state_index, like=(like, like))

    return Form(Network(width, depth, norm, residual), None, call, statistics)


def with_equinox(width: int, depth: int) -> Form:
    def norm(size):
        return eqx.nn.BatchNorm(size, BATCH, momentum=MOMENTUM, mode="batch")

    model, state = eqx.nn.make_with_state(Network)(width, depth, norm)
    return Form(
        model,
        state,
        lambda model, state, xs: _over_batch(model.with_equinox)(xs, state),
        lambda model, state: state.get(model.norms[-1].batch_state_index),
    )


def _over_batch(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.vmap(f, in_axes=(0, None), out_axes=(0, None), axis_name=BATCH)


def flat(form: Form) -> tuple[list[jax.Array], Callable[..., tuple[jax.Array, Any]]]:
    """A model's arrays, and `call` as a function of them: plain `jax.jit` takes arrays only."""
    arrays, rest = eqx.partition(form.model, eqx.is_array)
    leaves, treedef = jax.tree.flatten(arrays)

    def call(leaves, state, xs):
        return form.call(eqx.combine(jax.tree.unflatten(treedef, leaves), rest), state, xs)

    return leaves, call
