"""States that are updated in place are nobody else's memory."""

import jax.numpy as jnp
import numpy as np
import pytest

import storax

SIZE = 20_000


@pytest.fixture
def index():
    index = storax.StateIndex()
    storax.set_state(index, jnp.zeros(SIZE))
    return index


def first(index):
    return float(storax.get_state(index, jnp.zeros(SIZE))[0])


def bump(index, jit):
    @jit
    def f():
        s = storax.get_state(index, jnp.zeros(SIZE)) + 1
        storax.set_state(index, s)
        return s[0]

    return f


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("make", [np.full, jnp.full], ids=["numpy", "jax"])
def test_arguments_and_constants(jit, index, fresh, make):
    index = storax.StateIndex() if fresh else index
    argument, constant = make(SIZE, 5.0, "float32"), make(SIZE, 7.0, "float32")
    add = bump(index, jit)
    set_argument = jit(lambda x: storax.set_state(index, x))
    set_constant = jit(lambda: storax.set_state(index, jnp.asarray(constant)))
    for _ in range(2):
        set_argument(argument), add(), add()
        assert (argument[0], first(index)) == (5, 7)
        set_constant(), add()
        assert (constant[0], first(index)) == (7, 8)
        storax.set_state(index, jnp.asarray(argument))
        add()
        assert (argument[0], first(index)) == (5, 6)


def test_results(jit, index):
    add = bump(index, jit)
    get = jit(lambda: storax.get_state(index, jnp.zeros(SIZE)))

    @jit
    def double():
        s = storax.get_state(index, jnp.zeros(SIZE))
        storax.set_state(index, s * 2)
        return s

    add()
    before, eager = get(), storax.get_state(index, jnp.zeros(SIZE))
    add(), add()
    old = double()
    add()
    assert (before[0], eager[0], old[0], first(index)) == (1, 1, 3, 7)


def test_one_state_as_another(jit, index):
    other = storax.StateIndex()
    storax.set_state(other, jnp.full(SIZE, 10.0))
    like = jnp.zeros(SIZE)

    @jit
    def exchange():
        a, b = storax.get_state(index, like), storax.get_state(other, like)
        storax.set_state(index, b)
        storax.set_state(other, a)

    @jit
    def copy():
        s = storax.get_state(index, like)
        storax.set_state(other, s)
        storax.set_state(index, s)

    add = bump(index, jit)
    exchange(), add()
    assert (first(index), first(other)) == (11, 0)
    exchange(), exchange(), add()
    assert (first(index), first(other)) == (12, 0)
    copy(), copy(), add()
    assert (first(index), first(other)) == (13, 12)


def test_no_weak_type_gets_into_a_state(index):
    bump(index, storax.jit)()
    weak = jnp.full(SIZE, 9.0)
    assert weak.weak_type
    storax.set_state(index, weak)
    got = storax.get_state(index, jnp.zeros(SIZE))
    assert not got.weak_type and (got * jnp.bfloat16(1)).dtype == jnp.float32
