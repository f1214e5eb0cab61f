"""Callbacks of a program under storax.jit that get and set its state themselves."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax
from jit.counting import counter

LARGE = 1 << 14

REACHES_FOR = {
    "get": lambda index: storax.get_state(index, jnp.zeros(LARGE)),
    "set": lambda index: storax.set_state(index, jnp.zeros(LARGE)),
    "storax.jit": lambda index: storax.jit(lambda: storax.get_state(index, jnp.zeros(LARGE)))(),
    "jax.jit": lambda index: jax.jit(lambda: storax.get_state(index, jnp.zeros(LARGE)))(),
}


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("what", REACHES_FOR)
def test_a_large_state_that_is_worked_on_is_out_of_reach(what, donate):
    index, count, state = counter(0, LARGE)
    told = []

    def callback(x):
        try:
            REACHES_FOR[what](index)
        except RuntimeError as e:
            told.append(str(e))

    @(lambda f: storax.jit(f, donate=donate))
    def step(x):
        count(x)
        jax.debug.callback(callback, x, ordered=True)

    for k in range(1, 5):
        step(jnp.float32(1))
        jax.effects_barrier()
        assert state() == k
    assert len(told) == 4
    assert all("'counter'" in text and "Pass the value to the callback" in text for text in told)


def test_a_callback_in_a_thread_of_xla_does_not_wait_for_ever():
    index, count, state = counter(0, LARGE)
    told = []

    def callback(x):
        if threading.current_thread() is threading.main_thread() or told:
            return np.float32(0)
        try:
            storax.get_state(index, jnp.zeros(LARGE))
        except RuntimeError as e:
            told.append(str(e))
        return np.float32(1)

    @storax.jit
    def step(x):
        spec = jax.ShapeDtypeStruct((), jnp.float32)
        squares = [jnp.ones((300, 300)) * x + k for k in range(6)]
        total = sum((m @ m @ m).sum() for m in squares)
        count(x)
        return total, [jax.experimental.io_callback(callback, spec, x + k) for k in range(3)]

    for k in range(1, 6):
        jax.block_until_ready(step(jnp.float32(1)))
        assert state() == k
    assert all("while a program of `storax.jit` is working" in text for text in told)


def test_a_small_state_is_as_it_was_before():
    index, count, state = counter(0)
    seen = []

    @storax.jit
    def step(x):
        look = lambda _: seen.append(float(storax.get_state(index, jnp.float32(0))))
        jax.debug.callback(look, count(x), ordered=True)

    for k in range(1, 4):
        step(jnp.float32(1))
        storax.barrier()
        assert state() == k
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("form", [{}, {"pack": False}], ids=["packed", "pure"])
def test_a_set_of_the_program_overwrites_what_a_callback_has_set(form):
    index, _, state = counter()
    plain = jax.jit(lambda: storax.get_state(index, jnp.float32(0)))
    assert plain() == 0  # it keeps the state in the store's memory

    def callback(x):
        storax.set_state(index, jnp.float32(100))
        return x

    @(lambda f: storax.jit(f, **form))
    def step(x):
        spec = jax.ShapeDtypeStruct((), jnp.float32)
        x = jax.experimental.io_callback(callback, spec, x)
        storax.set_state(index, storax.get_state(index, x) + x)
        return x

    for k in range(1, 4):
        step(jnp.float32(1))
        assert state() == k


def test_callbacks_of_two_programs_do_not_wait_for_each_other_for_ever():
    made = [counter(0, LARGE) for _ in range(2)]
    meet, told = threading.Barrier(2, timeout=60), []

    def step_of(mine, other):
        def callback(x):
            meet.wait()
            try:
                return np.float32(storax.get_state(made[other][0], jnp.zeros(LARGE))[0])
            except RuntimeError as e:
                told.append(str(e))
                return x

        @storax.jit
        def step(x):
            made[mine][1](x)
            return jax.experimental.io_callback(callback, jax.ShapeDtypeStruct((), jnp.float32), x)

        return step

    work = [
        lambda f=f: jax.block_until_ready(f(jnp.float32(1))) for f in (step_of(0, 1), step_of(1, 0))
    ]
    threads = [threading.Thread(target=w, daemon=True) for w in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive()
    assert told and all("while a program of `storax.jit` is working" in text for text in told)
    assert [state() for *_, state in made] == [1, 1]
