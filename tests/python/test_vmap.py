"""Batch axes are part of a state's type, recorded per leaf and per vmap level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax


@pytest.fixture(params=["eager", "jit"])
def jit(request):
    return {"eager": lambda f: f, "jit": jax.jit}[request.param]


@pytest.fixture
def index():
    return storax.StateIndex(name="batched")


def setter(index):
    return lambda x: storax.set_state(index, x)


def getter(index):
    return lambda like: storax.get_state(index, like)


XS = jnp.arange(12.0).reshape(3, 4)


def test_the_manual_example(index, jit):
    jit(jax.vmap(setter(index)))(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(jit(jax.vmap(getter(index)))(jnp.array([3.0, 4.0])), [1, 2])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis(index, jit, axis):
    jit(jax.vmap(setter(index), in_axes=axis))(XS)
    np.testing.assert_array_equal(
        jit(jax.vmap(getter(index), in_axes=axis, out_axes=axis))(0 * XS), XS
    )


def test_axes_must_agree_even_where_shapes_do(index, jit):
    square = jnp.arange(9.0).reshape(3, 3)
    jit(jax.vmap(setter(index), in_axes=1))(square)
    with pytest.raises(
        RuntimeError, match=r"'batched'.*batch axes 1, but.*batch axes 0.*in_axes.*0"
    ):
        jax.block_until_ready(jit(jax.vmap(getter(index)))(square))
    np.testing.assert_array_equal(
        jit(jax.vmap(getter(index), in_axes=1, out_axes=1))(square), square
    )


def test_batched_and_unbatched_do_not_agree(index, jit):
    jit(jax.vmap(setter(index)))(XS)
    with pytest.raises(RuntimeError, match=r"'batched'.*f32\[3,4\] with batch axes 0.*`0 \* x`"):
        jax.block_until_ready(jit(getter(index))(XS))
    with pytest.raises(RuntimeError, match=r"'batched'.*`0 \* x`"):
        # zeros_like of a batched array is not batched.
        jax.block_until_ready(jit(jax.vmap(lambda x: getter(index)(jnp.zeros_like(x))))(XS))
    np.testing.assert_array_equal(jit(jax.vmap(lambda x: getter(index)(0 * x)))(XS), XS)

    other = storax.StateIndex(name="plain")
    storax.set_state(other, jnp.zeros(()))
    with pytest.raises(RuntimeError, match=r"'plain'.*not batched"):
        jax.block_until_ready(jit(jax.vmap(getter(other)))(jnp.zeros(3)))


def test_unbatched_state_stays_unbatched(index, jit):
    storax.set_state(index, jnp.float32(0))

    def f(x):
        n = storax.get_state(index, jnp.float32(0))
        storax.set_state(index, n + 1)
        return x + n

    np.testing.assert_array_equal(jit(jax.vmap(f))(jnp.arange(3.0)), [0, 1, 2])
    assert storax.get_state(index, jnp.float32(0)) == 1


def test_a_level_that_no_leaf_has_is_not_recorded(index, jit):
    # One statistic for the whole batch, as BatchNorm keeps.
    f = lambda x: storax.set_state(index, lax.pmean(x, "batch"))
    jit(jax.vmap(f, axis_name="batch"))(jnp.arange(5.0))
    assert storax.get_state(index, jnp.float32(0)) == 2


def test_per_leaf(index, jit):
    def f(x):
        storax.set_state(index, (x, jnp.float32(7), {"row": x[0]}))
        return storax.get_state(index, (0 * x, jnp.float32(0), {"row": x[0]}))

    row, seven, more = jit(jax.vmap(f, out_axes=(0, None, 0)))(XS)
    np.testing.assert_array_equal(row, XS)
    assert seven == 7
    np.testing.assert_array_equal(more["row"], XS[:, 0])
    with pytest.raises(RuntimeError, match=r"with batch axes \(0, None, 0\)"):
        storax.get_state(index, (XS, jnp.float32(0), {"row": XS[:, 0]}))


@pytest.mark.parametrize("inner", [0, 1, 2])
@pytest.mark.parametrize("outer", [0, 1, 2, 3])
def test_two_levels(index, jit, inner, outer):
    x = jnp.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    nest = lambda f: jax.vmap(
        jax.vmap(f, in_axes=inner, out_axes=inner), in_axes=outer, out_axes=outer
    )
    jit(nest(setter(index)))(x)
    np.testing.assert_array_equal(jit(nest(getter(index)))(0 * x), x)
    sums = jit(nest(lambda x: storax.get_state(index, 0 * x) + x))(x)
    np.testing.assert_array_equal(sums, 2 * x)


def test_only_one_of_two_levels(index, jit):
    x, y = jnp.arange(3.0), jnp.arange(4.0)

    def f(x, y):
        storax.set_state(index, x)
        return storax.get_state(index, x) + y

    pair = jax.vmap(jax.vmap(f, in_axes=(None, 0)), in_axes=(0, None))
    np.testing.assert_array_equal(jit(pair)(x, y), x[:, None] + y)


def test_in_a_program_and_eagerly(index):
    jax.jit(jax.vmap(setter(index)))(XS)
    np.testing.assert_array_equal(jax.vmap(getter(index))(XS * 0), XS)
    jax.vmap(setter(index))(XS * 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(getter(index)))(XS * 0), XS * 2)


LOOPS = {
    "scan": lambda f, x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "fori": lambda f, x: lax.fori_loop(0, 2, lambda _, c: f(c), x),
    "while": lambda f, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(c[1])), (0, x))[
        1
    ],
    "cond": lambda f, x: lax.cond(jnp.bool_(True), f, lambda x: x, x),
    "switch": lambda f, x: lax.switch(1, [lambda x: x, f], x),
    "batched cond": lambda f, x: lax.cond(x.sum() > -1, f, lambda x: x, x),
    "scan of jit": lambda f, x: lax.scan(lambda c, _: (jax.jit(f)(c), None), x, None, length=2)[0],
    "scan of cond": lambda f, x: lax.scan(
        lambda c, _: (lax.cond(jnp.bool_(True), f, lambda x: x, c), None), x, None, length=2
    )[0],
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("loop", LOOPS)
def test_control_flow_that_jax_batches_moves_axes(index, jit, loop, axis):
    """What is set outside a loop, batched along any axis, is the same state inside it."""
    x = jnp.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    times = 1 if ("cond" in loop and "scan" not in loop) or loop == "switch" else 2

    def f(x):
        storax.set_state(index, x)

        def step(c):
            s = storax.get_state(index, 0 * c)
            storax.set_state(index, s + 1)
            return c + s

        out = LOOPS[loop](step, x)
        return out, storax.get_state(index, 0 * x)

    out, state = jit(jax.vmap(f, in_axes=axis, out_axes=axis))(x)
    np.testing.assert_array_equal(state, x + times)
    np.testing.assert_array_equal(out, 2 * x if times == 1 else 3 * x + 1)


@pytest.mark.parametrize("axes", [(1, 0), (0, 2), (2, 1)])
def test_moved_axes_at_two_levels(index, jit, axes):
    x = jnp.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    inner, outer = axes

    def f(x):
        storax.set_state(index, x)

        def body(c, _):
            s = storax.get_state(index, 0 * c)
            storax.set_state(index, s * 2)
            return c + s, None

        return lax.scan(body, x, None, length=2)[0], storax.get_state(index, 0 * x)

    inner = min(inner, 1)
    nested = jax.vmap(jax.vmap(f, inner, inner), outer, outer)
    out, state = jit(nested)(x)
    np.testing.assert_array_equal(state, 4 * x)
    np.testing.assert_array_equal(out, 4 * x)


def test_vmap_of_grad_and_grad_of_vmap(index, jit):
    jax.vmap(setter(index))(jnp.arange(3.0))

    def f(x):
        s = storax.get_state(index, 0 * x)
        storax.set_state(index, s + 1)
        return x * s

    xs = jnp.ones(3)
    np.testing.assert_array_equal(jit(jax.vmap(jax.grad(f)))(xs), [0, 1, 2])
    np.testing.assert_array_equal(jit(jax.grad(lambda xs: jax.vmap(f)(xs).sum()))(xs), [1, 2, 3])
    np.testing.assert_array_equal(jax.vmap(getter(index))(xs), [2, 3, 4])


def test_vmap_with_axis_size_only(index, jit):
    f = lambda: storax.set_state(index, jnp.float32(1))
    jit(jax.vmap(f, axis_size=3))()
    assert storax.get_state(index, jnp.float32(0)) == 1
