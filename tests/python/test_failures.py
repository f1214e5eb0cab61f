"""A failure while a program runs is raised, once, at the earliest occasion, and poisons nothing."""

import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import storax
from storax import _core


def heavy(x, n=20):
    for _ in range(n):
        x = jnp.tanh(x @ x) * 0.01
    return x


@pytest.fixture
def m():
    return jnp.full((300, 300), 0.001, jnp.float32)


@pytest.fixture
def fails_late(m):
    """A program without outputs, which fails after its call has returned."""
    index = storax.StateIndex(name="late")
    storax.set_state(index, jnp.zeros(3))
    f = jax.jit(lambda m: storax.set_state(index, heavy(m)[0, 0]))
    return lambda: f(m)


def test_at_the_next_eager_operation(fails_late):
    good = storax.StateIndex()
    storax.set_state(good, jnp.float32(1))
    program = jax.jit(lambda: storax.get_state(good, jnp.float32(0)))
    program()
    for operation in (
        lambda: storax.get_state(good, jnp.float32(0)),
        lambda: storax.set_state(good, jnp.float32(2)),
        storax.barrier,
    ):
        fails_late()
        with pytest.raises(
            RuntimeError, match=r"earlier program failed[^$]*'late'.*holds f32\[3\]"
        ):
            operation()
        operation()  # once


def test_once_it_has_failed(fails_late):
    """A state that no program uses is not waited for, but what has failed by then is raised."""
    unused = storax.StateIndex()
    storax.set_state(unused, jnp.float32(1))
    for operation in (
        lambda: storax.get_state(unused, jnp.float32(0)),
        lambda: storax.set_state(unused, jnp.float32(2)),
        lambda: jax.tree.leaves(eqx.nn.inference_mode(unused)),
    ):
        fails_late()
        while not _core.pending_failures():
            time.sleep(0.001)
        with pytest.raises(RuntimeError, match="earlier program failed"):
            operation()
        operation()  # once


def test_at_the_call_or_the_block(m):
    index = storax.StateIndex(name="blocked")
    f = jax.jit(lambda m: heavy(m)[0, 0] + storax.get_state(index, jnp.float32(0)))
    with pytest.raises(RuntimeError, match="'blocked'"):
        jax.block_until_ready(f(m))
    storax.barrier()  # not again

    small = jax.jit(lambda: storax.get_state(index, jnp.float32(0)))
    with pytest.raises(RuntimeError, match="'blocked'"):
        jax.block_until_ready(small())
    storax.barrier()


def test_each_failure_is_raised(m):
    indices = [storax.StateIndex(name=f"late {k}") for k in range(3)]
    for index in indices:
        storax.set_state(index, jnp.zeros(3))
    for index in indices:
        f = jax.jit(lambda m, index=index: storax.set_state(index, heavy(m)[0, 0]))
        f(m)
    with pytest.raises(RuntimeError) as raised:
        storax.barrier()
    for k in range(3):
        assert f"'late {k}'" in str(raised.value)


def test_good_work_after_a_failure(fails_late, m):
    index = storax.StateIndex()

    @jax.jit
    def count(x):
        n = storax.get_state(index, jnp.float32(0)) + 1
        storax.set_state(index, n)
        return n + heavy(x)[0, 0] * 0

    storax.set_state(index, jnp.float32(0))
    fails_late()
    for k in range(1, 4):
        assert count(m) == k
    with pytest.raises(RuntimeError, match="'late'"):
        storax.barrier()
    assert count(m) == 4


def test_other_errors_are_left_alone():
    def callback(x):
        raise ValueError("from the user")

    f = jax.jit(lambda x: jax.pure_callback(callback, x, x))
    with pytest.raises(jax.errors.JaxRuntimeError, match="from the user"):
        jax.block_until_ready(f(jnp.float32(0)))


def test_lower_and_compile_twice():
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))

    def count():
        n = storax.get_state(index, jnp.float32(0)) + 1
        storax.set_state(index, n)
        return n

    f = jax.jit(count)
    first = f.lower().compile()
    second = f.lower().compile()
    assert [first(), second(), f(), first(), second()] == [1, 2, 3, 4, 5]


def test_at_interpreter_exit():
    program = """
import jax, jax.numpy as jnp, storax
index = storax.StateIndex(name="exit")
storax.set_state(index, jnp.zeros(3))
def heavy(x):
    for _ in range(20):
        x = jnp.tanh(x @ x) * 0.01
    return x
jax.jit(lambda m: storax.set_state(index, heavy(m)[0, 0]))(jnp.ones((300, 300)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'exit': it holds f32[3], but the new state is f32[]" in done.stderr
    assert done.stderr.count("'exit'") == 1
