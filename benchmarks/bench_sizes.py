"""One row update of one state per call, as the state grows: what its size costs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from contenders import HAND, on_cpu
from report import Findings
from timing import AGAIN, Clock, repeated

import storax

LABELS = {
    HAND: "by hand: argument and result, donated",
    "storax.jit": "storax, storax.jit",
    "storax": "storax, jax.jit",
    "ref": "jax.Ref, closed over",
    "eqx": "eqx.nn.State, eqx.filter_jit, donated",
    "nnx": "flax, nnx.jit, donated",
    "io_callback": "io_callback, ordered",
}
# Beyond this, copies take longer than is worth waiting for.
MOST_COPIED = 1 << 24


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "sizes",
        "One row of one state per call, as the state grows",
        "A call adds one to a row of 4 bytes of a state of f32[n], and returns that row. Under plain "
        "`jax.jit` the state is copied out and in; by hand and under `storax.jit` it stays in place.",
    )
    sizes = [4, 1 << 10, 1 << 15, 1 << 20] if quick else [4 << (3 * k) for k in range(10)]
    for size in sizes:
        _measure(found, size, quick)
    return found


def _measure(found: Findings, size: int, quick: bool) -> None:
    n = size // 4
    made = {HAND: _by_hand(n), AGAIN: _by_hand(n), "storax.jit": _storax(n, storax.jit)}
    made |= {"ref": _ref(n), "eqx": _equinox(n), "nnx": _nnx(n)}
    if size <= MOST_COPIED:
        if on_cpu():
            made["storax"] = _storax(n, jax.jit)
        made["io_callback"] = _host_callback(n)
    i = jnp.int32(0)
    for call in made.values():
        for _ in range(3):
            out = call(i)
        assert float(out) == 3
    clock = Clock(rounds=10 if quick else 100, seconds=0.001, at_most=8)
    runs = {key: repeated(lambda call=call: call(i)) for key, call in made.items()}
    title = f"{size:,} B" if size < 1024 else f"{size >> 10:,} KiB"
    samples = clock.measure(runs)
    found.add_table(title, samples, LABELS, HAND, bytes=size)


def _by_hand(n: int):
    @functools.partial(jax.jit, donate_argnums=0)
    def program(state, i):
        state = state.at[i].add(1.0)
        return state, state[i]

    state = jnp.zeros(n) + 0

    def call(i):
        nonlocal state
        state, out = program(state, i)
        return out

    return call


def _storax(n: int, jit):
    index = storax.StateIndex()
    storax.set_state(index, jnp.zeros(n))

    @jit
    def program(i):
        state = storax.get_state(index, jnp.zeros(n)).at[i].add(1.0)
        storax.set_state(index, state)
        return state[i]

    return program


def _ref(n: int):
    ref = jax.new_ref(jnp.zeros(n))

    @jax.jit
    def program(i):
        ref[i] += 1.0
        return ref[i]

    return program


def _equinox(n: int):
    class Model(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.zeros(n))

    model, state = eqx.nn.make_with_state(Model)()

    @functools.partial(eqx.filter_jit, donate="all-except-first")
    def program(i, model, state):
        new = state.get(model.index).at[i].add(1.0)
        return state.set(model.index, new), new[i]

    def call(i):
        nonlocal state
        state, out = program(i, model, state)
        return out

    return call


def _nnx(n: int):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.state = nnx.Variable(jnp.zeros(n))

    @functools.partial(nnx.jit, donate_argnums=0)
    def program(model, i):
        new = model.state[...].at[i].add(1.0)
        model.state[...] = new
        return new[i]

    return functools.partial(program, Model())


def _host_callback(n: int):
    state = np.zeros(n, np.float32)
    like = jax.ShapeDtypeStruct((n,), jnp.float32)

    def save(value):
        nonlocal state
        state = np.array(value)

    @jax.jit
    def program(i):
        new = jax.experimental.io_callback(lambda: state, like, ordered=True).at[i].add(1.0)
        jax.experimental.io_callback(save, None, new, ordered=True)
        return new[i]

    return program
