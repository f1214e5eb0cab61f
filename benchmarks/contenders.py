"""Ways to keep N states of f32[128] from one call of a jitted function to the next.

Each contender makes N slots of zeros. A call adds its argument to each of them, and returns the sum of
the first: one input, one output, and one read-modify-write per slot.
"""

import functools
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import storax

__all__ = ["CONTENDERS", "HAND", "SHAPE", "Contender", "Slots", "on_cpu", "why_missing"]

SHAPE = (128,)
HAND = "hand"

Step = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Slots:
    """Some slots: a call to time, and a way to see what they hold."""

    step: Step
    read: Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Contender:
    key: str
    label: str
    make: Callable[[int], Slots]
    needs: str | None  # as `module:name`
    many: bool  # whether to try it with 10,000 slots too: others take minutes to compile
    everywhere: bool  # or on a CPU only


CONTENDERS: list[Contender] = []


def contender(
    key: str, label: str, *, needs: str | None = None, many: bool = False, everywhere: bool = True
):
    def register(make: Callable[[int], Slots]) -> Callable[[int], Slots]:
        CONTENDERS.append(Contender(key, label, make, needs, many, everywhere))
        return make

    return register


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def why_missing(c: Contender) -> str | None:
    """Why a contender must be left out: a peer, or the part of it that is needed, isn't there."""
    if not c.everywhere and not on_cpu():
        return "runs on the CPU only"
    try:
        if c.needs is not None:
            pkgutil.resolve_name(c.needs)
    except (ImportError, AttributeError) as e:
        return str(e)
    return None


def zeros(n: int) -> list[jax.Array]:
    return [jnp.zeros(SHAPE) for _ in range(n)]


# --- By hand --------------------------------------------------------------------------------------


@contender(HAND, "by hand: arguments and results, donated", many=True)
def hand(n: int) -> Slots:
    @functools.partial(jax.jit, donate_argnums=0)
    def program(state, x):
        state = [s + x for s in state]
        return state, state[0].sum()

    state = zeros(n)

    def step(x):
        nonlocal state
        state, out = program(state, x)
        return out

    return Slots(step, lambda: state)


# --- storax ---------------------------------------------------------------------------------------


def with_storax(jit: Callable[[Step], Step], n: int) -> Slots:
    indices = [storax.StateIndex() for _ in range(n)]
    for index in indices:
        storax.set_state(index, jnp.zeros(SHAPE))

    @jit
    def step(x):
        new = [storax.get_state(index, like=x) + x for index in indices]
        for index, value in zip(indices, new, strict=True):
            storax.set_state(index, value)
        return new[0].sum()

    return Slots(
        step, lambda: [storax.get_state(index, like=jnp.zeros(SHAPE)) for index in indices]
    )


@contender("storax", "storax, jax.jit", everywhere=False)
def storax_jax_jit(n: int) -> Slots:
    return with_storax(jax.jit, n)


@contender("storax.jit", "storax, storax.jit", needs="storax:jit", many=True)
def storax_jit(n: int) -> Slots:
    return with_storax(storax.jit, n)


# --- JAX ------------------------------------------------------------------------------------------


@contender("ref", "jax.Ref, closed over", needs="jax:new_ref", many=True)
def ref_closed_over(n: int) -> Slots:
    refs = [jax.new_ref(z) for z in zeros(n)]

    @jax.jit
    def step(x):
        for ref in refs:
            ref[...] = ref[...] + x
        return refs[0][...].sum()

    return Slots(step, lambda: [ref[...] for ref in refs])


@contender("ref-passed", "jax.Ref, passed", needs="jax:new_ref", many=True)
def ref_passed(n: int) -> Slots:
    refs = [jax.new_ref(z) for z in zeros(n)]

    @jax.jit
    def program(refs, x):
        for ref in refs:
            ref[...] = ref[...] + x
        return refs[0][...].sum()

    return Slots(functools.partial(program, refs), lambda: [ref[...] for ref in refs])


@contender("io_callback", "io_callback, ordered")
def host_callback(n: int) -> Slots:
    state = [np.zeros(SHAPE, np.float32) for _ in range(n)]
    like = jax.ShapeDtypeStruct(SHAPE, jnp.float32)

    def load(i):
        return state[i]

    def save(i, value):
        state[i] = np.array(value)

    @jax.jit
    def step(x):
        new = []
        for i in range(n):
            old = jax.experimental.io_callback(functools.partial(load, i), like, ordered=True)
            new.append(old + x)
            jax.experimental.io_callback(functools.partial(save, i), None, new[i], ordered=True)
        return new[0].sum()

    def read():
        jax.effects_barrier()
        return state

    return Slots(step, read)


# --- Equinox --------------------------------------------------------------------------------------


class Counters(eqx.Module):
    indices: list[eqx.nn.StateIndex]

    def __init__(self, n: int):
        self.indices = [eqx.nn.StateIndex(z) for z in zeros(n)]

    def __call__(self, x, state):
        for index in self.indices:
            state = state.set(index, state.get(index) + x)
        return state, state.get(self.indices[0]).sum()


def with_equinox(jit: Callable[..., Any], n: int) -> Slots:
    model, state = eqx.nn.make_with_state(Counters)(n)
    program = jit(model)

    def step(x):
        nonlocal state
        state, out = program(x, state)
        return out

    return Slots(step, lambda: [state.get(index) for index in model.indices])


@contender("eqx", "eqx.nn.State, eqx.filter_jit", many=True)
def equinox_filter_jit(n: int) -> Slots:
    def jit(model):
        program = eqx.filter_jit(lambda x, model, state: model(x, state), donate="all-except-first")
        return lambda x, state: program(x, model, state)

    return with_equinox(jit, n)


@contender("eqx-jax.jit", "eqx.nn.State, jax.jit", many=True)
def equinox_jax_jit(n: int) -> Slots:
    return with_equinox(lambda model: jax.jit(model.__call__, donate_argnums=1), n)


# --- Flax -----------------------------------------------------------------------------------------


def with_nnx(jit: Callable[..., Any], n: int) -> Slots:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.variables = nnx.List([nnx.Variable(z) for z in zeros(n)])

    def program(model, x):
        for variable in model.variables:
            variable[...] = variable[...] + x
        return model.variables[0][...].sum()

    model = Model()
    return Slots(jit(nnx, program, model), lambda: [variable[...] for variable in model.variables])


@contender("nnx", "flax, nnx.jit", needs="flax.nnx:jit")
def nnx_jit(n: int) -> Slots:
    return with_nnx(lambda nnx, f, model: functools.partial(nnx.jit(f), model), n)


@contender("nnx-tree", "flax, nnx.jit(graph=False)", needs="flax.nnx:jit")
def nnx_jit_of_trees(n: int) -> Slots:
    return with_nnx(lambda nnx, f, model: functools.partial(nnx.jit(f, graph=False), model), n)


@contender("nnx-cached", "flax, nnx.cached_partial", needs="flax.nnx:cached_partial")
def nnx_cached_partial(n: int) -> Slots:
    def jit(nnx, f, model):
        program = nnx.jit(f, graph=True, graph_updates=True)
        return nnx.cached_partial(program, model, graph=True, graph_updates=True)

    return with_nnx(jit, n)


@contender("nnx-partial", "flax, nnx.jit_partial", needs="flax.nnx:jit_partial")
def nnx_jit_partial(n: int) -> Slots:
    return with_nnx(lambda nnx, f, model: nnx.jit_partial(f, model, graph=False), n)
