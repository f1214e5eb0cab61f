"""A get and a set in each step of a scan: what an operation on state costs inside of a program."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import on_cpu
from jax import lax
from report import Findings
from timing import AGAIN, Clock, Samples, repeated

import storax
from storax import _core, _jax

NOTHING = "nothing"
CARRY = "carry"
TARGET = "storax.bench.nothing"
LABELS = {
    NOTHING: "two ordered FFI calls that do nothing",
    "storax": "get and set, jax.jit",
    "storax.jit": "get and set, storax.jit",
    CARRY: "a carry, by hand",
    "ref": "jax.Ref",
    "io_callback": "two ordered io_callbacks",
    "io_callback-1": "one ordered io_callback for both",
}


# --- Custom calls that do nothing, made and ordered as storax's own are ---------------------------


def _nothing_primitive(name: str, num_results: int) -> Any:
    primitive = _jax.Primitive(name)
    primitive.multiple_results = True

    @primitive.def_effectful_abstract_eval
    def _(*args):
        return [_jax.shaped((), np.float32)] * num_results, {_jax.STATE}

    def lower(ctx, *args):
        return _jax.ordered_ffi_call(ctx, _jax.STATE, TARGET, args, ctx.avals_in, ctx.avals_out)

    _jax.define_lowering(primitive, lower, platform="cpu")
    return primitive


# --- Contenders -----------------------------------------------------------------------------------


# f32, since XLA knows what counting in integers comes to, without counting.
ZERO = jnp.zeros(())


@dataclass(frozen=True)
class Loop:
    """A program of so many steps, and the number of steps that its state has counted."""

    program: Callable[[], Any]
    steps: int
    counted: Callable[[], Any] | None


def _loop(
    body: Callable[[jax.Array], jax.Array],
    steps: int,
    counted: Callable[[], Any] | None,
    jit: Callable[..., Any] = jax.jit,
) -> Loop:
    """A scan whose carry counts the steps as well."""
    program = jit(lambda i: lax.scan(lambda i, _: (body(i), None), i, None, length=steps)[0])
    return Loop(lambda: program(ZERO), steps, counted)


def _carry(steps: int) -> Loop:
    program = jax.jit(
        lambda carry: lax.scan(
            lambda carry, _: ((carry[0] + 1, carry[1] + 1), None), carry, None, length=steps
        )[0]
    )
    state = ZERO

    def run():
        nonlocal state
        i, state = program((ZERO, state))
        return i

    return Loop(run, steps, lambda: state)


def _nothing(steps: int) -> Loop:
    storax.StateIndex()  # from here on JAX knows of the effect
    jax.ffi.register_ffi_target(TARGET, _core.handlers()["nothing"], platform="cpu")
    get, set = _nothing_primitive("nothing_to_get", 1), _nothing_primitive("nothing_to_set", 0)

    def body(i):
        (value,) = get.bind()
        set.bind(value + 1)
        return i + 1

    return _loop(body, steps, None)


def _storax(steps: int, jit: Callable[..., Any] = jax.jit) -> Loop:
    index = storax.StateIndex()
    storax.set_state(index, ZERO)

    def body(i):
        storax.set_state(index, storax.get_state(index, like=ZERO) + 1)
        return i + 1

    return _loop(body, steps, lambda: storax.get_state(index, like=ZERO), jit)


def _ref(steps: int) -> Loop:
    ref = jax.new_ref(ZERO)

    def body(i):
        ref[...] = ref[...] + 1
        return i + 1

    return _loop(body, steps, lambda: ref[...])


def _io_callback(steps: int, one_for_both: bool = False) -> Loop:
    state = np.zeros((), np.float32)
    like = jax.ShapeDtypeStruct((), jnp.float32)

    def load():
        return state

    def save(value):
        state[...] = value

    def both():
        state[...] += 1
        return state

    def body(i):
        if one_for_both:
            jax.experimental.io_callback(both, like, ordered=True)
        else:
            value = jax.experimental.io_callback(load, like, ordered=True)
            jax.experimental.io_callback(save, None, value + 1, ordered=True)
        return i + 1

    def counted():
        jax.effects_barrier()
        return state

    return _loop(body, steps, counted)


# --- Measuring ------------------------------------------------------------------------------------


def measure(quick: bool, large: bool) -> Findings:
    steps, callbacks = (20_000, 100) if quick else (100_000, 300)
    found = Findings(
        "scan",
        "A get and a set in each step of a scan",
        f"Time per step of a scan of {steps:,} steps that counts its steps in a state of f32[] "
        f"({callbacks} steps where each calls back to Python).",
    )
    if on_cpu():
        _measure_operations(found, steps, callbacks, quick)
    else:  # where a step is a launch or two
        steps = 1000
    for kind, state, n in (
        ("a scalar", jnp.zeros(()), steps),
        ("1 MiB", jnp.zeros((512, 512)), 100),
        ("a row of f32[4096,256]", jnp.zeros((4096, 256)), 4096),
    ):
        _measure_in_place(found, kind, state, n, quick)
    return found


def _measure_operations(found: Findings, steps: int, callbacks: int, quick: bool) -> None:
    loops = {
        NOTHING: _nothing(steps),
        AGAIN: _nothing(steps),
        "storax": _storax(steps),
        "storax.jit": _storax(steps, storax.jit),
        CARRY: _carry(steps),
        "ref": _ref(steps),
        "io_callback": _io_callback(callbacks),
        "io_callback-1": _io_callback(callbacks, one_for_both=True),
    }
    for key, loop in loops.items():
        _check(key, loop)
    clock = Clock(rounds=10 if quick else 60, seconds=0.001)
    samples = clock.measure({key: repeated(loop.program) for key, loop in loops.items()})
    samples = Samples({key: samples.seconds[key] / loops[key].steps for key in loops})

    found.add_table("Time per step", samples, LABELS, NOTHING)
    pair = "get and set in a scan"
    found.add_goal(f"{pair} to {LABELS[NOTHING]}", 1.4, samples, "storax", NOTHING)
    text = f"{LABELS['io_callback']}, to {pair}"
    found.add_goal(text, 300, samples, "io_callback", "storax", at_least=True, baseline=NOTHING)


def _measure_in_place(found: Findings, kind: str, state: Any, steps: int, quick: bool) -> None:
    """storax.jit beside a carry written by hand, of the same update."""

    def update(state, i):
        if kind.startswith("a row"):
            return state.at[i].add(1.0)
        return state + 1.0

    def counted(i, state):
        return (i if state.ndim == 0 else 0 * i) + state.reshape(-1)[0] * 0

    def by_hand():
        @functools.partial(jax.jit, donate_argnums=0)
        def program(state):
            body = lambda s, i: (update(s, i), counted(i, s))
            return jax.lax.scan(body, state, jnp.arange(steps))[0], 0

        kept = state + 0

        def run():
            nonlocal kept
            kept, _ = program(kept)
            return kept

        return run

    def ours():
        index = storax.StateIndex()
        storax.set_state(index, state)

        @storax.jit
        def program():
            def body(c, i):
                s = storax.get_state(index, state)
                storax.set_state(index, update(s, i))
                return c, counted(i, s)

            return jax.lax.scan(body, 0.0, jnp.arange(steps))[0]

        return program

    loops = {CARRY: by_hand(), AGAIN: by_hand(), "storax.jit": ours()}
    for run in loops.values():
        for _ in range(3):
            jax.block_until_ready(run())
    clock = Clock(rounds=10 if quick else 100, seconds=0.002)
    samples = clock.measure({key: repeated(run) for key, run in loops.items()})
    samples = Samples({key: samples.seconds[key] / steps for key in loops})
    found.add_table(f"Time per step: {kind}", samples, LABELS, CARRY)
    text = f"a step that updates {kind}, storax.jit to a carry"
    found.add_goal(text, 1.05, samples, "storax.jit", CARRY)


def _check(key: str, loop: Loop) -> None:
    before = float(loop.counted()) if loop.counted else 0.0
    for _ in range(2):
        if int(loop.program()) != loop.steps:
            raise AssertionError(f"{LABELS[key]}: not {loop.steps} steps")
    if loop.counted and float(loop.counted()) - before != 2 * loop.steps:
        raise AssertionError(f"{LABELS[key]}: counted from {before} to {loop.counted()}")
