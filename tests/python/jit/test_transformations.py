"""storax.jit inside of other transformations, and they inside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax
from jit.counting import counter, counting_lanes


def test_under_grad(jit):
    _, count, state = counter(2)
    f = jit(lambda x: x**2 * count())
    assert jax.grad(f)(jnp.float32(3)) == 18
    assert state() == 3
    value, grad = jax.value_and_grad(jax.checkpoint(f))(jnp.float32(1))
    assert (value, grad) == (4, 8)
    assert state() == 4
    assert f(jnp.float32(1)) == 5


def test_under_vmap(jit):
    index = storax.StateIndex()
    xs = jnp.arange(4.0)
    jax.vmap(lambda x: storax.set_state(index, x))(xs)

    @jit
    def f(x):
        s = storax.get_state(index, x) + x
        storax.set_state(index, s)
        return s

    np.testing.assert_array_equal(jax.vmap(f)(xs), 2 * xs)
    np.testing.assert_array_equal(jit(jax.vmap(f))(xs), 3 * xs)
    np.testing.assert_array_equal(jax.jit(jax.vmap(f))(xs), 4 * xs)
    np.testing.assert_array_equal(jit(jax.vmap(f))(xs), 5 * xs)


def test_under_jit_and_scan(jit):
    _, count, state = counter()
    f = jit(lambda x: x + count())

    def loop(x):
        return lax.scan(lambda c, _: (f(c), None), x, None, length=5)[0]

    assert jax.jit(loop)(jnp.float32(0)) == 15
    assert jit(loop)(jnp.float32(0)) == 40
    assert state() == 10


def test_inside_of_another_in_every_order(jit):
    _, count, state = counter()
    inner = jit(lambda x: x + count())
    outer = jit(lambda x: inner(inner(x)) + count())
    assert outer(jnp.float32(0)) == 6
    assert inner(jnp.float32(0)) == 4
    assert outer(jnp.float32(0)) == 18
    assert state() == 7


def test_while_whose_condition_sets(jit):
    _, count, state = counter()

    def f(n):
        return lax.while_loop(lambda c: count() < n, lambda c: c + count(), jnp.float32(0))

    def loop(n, s=0.0):
        c = 0.0
        while True:
            s += 1
            if s >= n:
                return c, s
            s += 1
            c += s

    assert float(jit(f)(jnp.float32(7))) == loop(7)[0]
    assert state() == loop(7)[1]


def test_nested_whiles_trace_in_linear_time(jit):
    _, count, _ = counter()
    traced = []

    def nest(depth):
        if depth == 0:
            return lambda c: c + 1

        def cond(c):
            traced.append(depth)
            return count() < 3

        inner = nest(depth - 1)
        return lambda c: lax.while_loop(cond, inner, c)

    text = {d: len(jit(nest(d)).lower(jnp.float32(0)).as_text()) for d in (1, 2, 4)}
    assert text[4] - text[2] < 4 * (text[2] - text[1])


def test_masked(jit):
    index = storax.StateIndex()
    xs = jnp.arange(6.0)
    jax.vmap(lambda x: storax.set_state(index, x))(xs)

    program = counting_lanes(index)
    out = jit(jax.vmap(program))(xs)
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(out, [2, 2, 2, 3, 5, 6])
    np.testing.assert_array_equal(state, [2, 2, 2, 3, 5, 6])


def test_batch_axes_that_control_flow_moves(jit):
    index = storax.StateIndex()
    x = jnp.arange(6.0).reshape(2, 3)
    lanes = lambda f: jax.vmap(f, in_axes=1, out_axes=1)
    jax.vmap(lambda x: storax.set_state(index, x), in_axes=1)(x)

    def loop(x):
        def body(c, _):
            s = storax.get_state(index, c)
            storax.set_state(index, s + c)
            return c, s

        return lax.scan(body, x, None, length=3)[1][-1]

    want = x + 2 * x
    np.testing.assert_array_equal(jit(lanes(loop))(x), want)
    got = lanes(lambda x: storax.get_state(index, x))(x)
    np.testing.assert_array_equal(got, x + 3 * x)


def test_stacked_layers(jit):
    import equinox as eqx

    class Layer(eqx.Module):
        index: storax.StateIndex
        weight: jax.Array

        def __init__(self, w):
            self.index, self.weight = storax.StateIndex(), w
            storax.set_state(self.index, jnp.zeros(3))

        def __call__(self, x):
            s = storax.get_state(self.index, jnp.zeros(3)) + self.weight
            storax.set_state(self.index, s)
            return x + s

    layers = storax.stack(Layer)(jnp.arange(4.0))
    arrays, static = eqx.partition(layers, eqx.is_array)

    def run(x):
        return lax.scan(lambda c, a: (eqx.combine(a, static)(c), None), x, arrays)[0]

    f = jit(run)
    np.testing.assert_array_equal(f(jnp.zeros(3)), 6 * jnp.ones(3))
    np.testing.assert_array_equal(f(jnp.zeros(3)), 12 * jnp.ones(3))
    np.testing.assert_array_equal(jax.jit(run)(jnp.zeros(3)), 18 * jnp.ones(3))
    np.testing.assert_array_equal(f(jnp.zeros(3)), 24 * jnp.ones(3))


@pytest.mark.parametrize("size", [None, 20_000], ids=["small", "large"])
def test_eager_plain_and_ours_see_each_other(jit, size):
    index, count, state = counter(0, size)
    ours, plain = jit(count), jax.jit(count)
    like = jnp.float32(0) if size is None else jnp.zeros(size)
    want = 0
    rng = np.random.default_rng(0)
    for k in range(60):
        how = rng.integers(5)
        if how == 0:
            ours(), ours()
            want += 2
        elif how == 1:
            plain()
            want += 1
        elif how == 2:
            count()
            want += 1
        elif how == 3:
            storax.set_state(index, like + k)
            want = k
        else:
            assert state() == want
    assert state() == want
