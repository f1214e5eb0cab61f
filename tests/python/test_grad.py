"""State under grad, jvp, linearize, checkpoint and their nestings: a constant, each op run once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax


def _counter(value=0.0):
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(value))
    return index


def _bump(index, x):
    s = storax.get_state(index, jnp.float32(0))
    storax.set_state(index, s + 1)
    return x * s


def _ran(index):
    return index._slot.core.num_gets, index._slot.core.num_sets


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("transform", "want"),
    [
        (lambda f: jax.grad(f), 3.0),
        (lambda f: lambda x: jax.vjp(f, x)[1](1.0)[0], 3.0),
        (lambda f: lambda x: jax.jvp(f, (x,), (2.0,))[1], 6.0),
        (lambda f: lambda x: jax.linearize(f, x)[1](2.0), 6.0),
        (jax.jacfwd, 3.0),
        (jax.jacrev, 3.0),
    ],
    ids=["grad", "vjp", "jvp", "linearize", "jacfwd", "jacrev"],
)
def test_state_is_a_constant(transform, want, jit):
    index = _counter(3)
    got = jit(transform(lambda x: _bump(index, x)))(jnp.float32(5))
    np.testing.assert_allclose(got, want)
    assert storax.get_state(index, jnp.float32(0)) == 4
    assert _ran(index) == (2, 2)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_hessian(jit):
    index = _counter(3)
    got = jit(jax.hessian(lambda x: _bump(index, x) * x))(jnp.float32(5))
    np.testing.assert_allclose(got, 6.0)
    assert storax.get_state(index, jnp.float32(0)) == 4


def test_the_pullback_runs_nothing_again():
    index = _counter(3)
    _, pullback = jax.vjp(jax.checkpoint(lambda x: _bump(index, x)), jnp.float32(5))
    before = _ran(index)
    assert pullback(jnp.float32(1))[0] == 3
    assert pullback(jnp.float32(2))[0] == 6
    assert _ran(index) == before


@pytest.mark.parametrize(
    "transform",
    [
        jax.grad,
        jax.jacfwd,
        lambda f: lambda x: jax.jvp(f, (x,), (1.0,)),
        lambda f: lambda x: jax.linearize(f, x)[1](1.0),
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: jax.grad(lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]),
        lambda f: jax.grad(lambda x: lax.cond(x > 0, f, lambda x: x, x)),
        lambda f: jax.grad(
            lambda x: jax.vmap(lambda y: lax.cond(y > 0, f, lambda y: y, y))(x[None])[0]
        ),
    ],
    ids=["grad", "jacfwd", "jvp", "linearize", "checkpoint", "scan", "cond", "vmap of cond"],
)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_tangent_must_not_reach_the_state(transform, jit):
    index = storax.StateIndex(name="loss")

    def f(x):
        storax.set_state(index, x * 2)
        return x

    with pytest.raises(NotImplementedError, match=r"'loss'.*stop_gradient"):
        jit(transform(f))(jnp.float32(1))


def test_stop_gradient_is_the_way_out():
    index = storax.StateIndex()

    def f(x):
        storax.set_state(index, lax.stop_gradient(x * 2))
        return x * x

    assert jax.jit(jax.grad(f))(jnp.float32(3)) == 6
    assert storax.get_state(index, jnp.float32(0)) == 6


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("x", [2.0, np.float32(2), np.full(3, 2, np.float32)], ids=type)
@pytest.mark.parametrize("transform", [jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))[1]])
def test_arguments_that_are_no_jax_arrays(transform, x, jit):
    """What `stop_gradient` makes of these is no JAX array either, but it came from JAX."""
    index = storax.StateIndex()

    def f(x):
        storax.set_state(index, lax.stop_gradient(x))
        return jnp.sum(x * storax.get_state(index, lax.stop_gradient(x)))

    jit(transform(f))(x)
    assert jnp.all(storax.get_state(index, jnp.asarray(x)) == 2)


def test_state_in_both_rules_of_custom_vjp():
    forward, backward = _counter(), _counter()

    @jax.custom_vjp
    def f(x):
        return x

    def fwd(x):
        _bump(forward, x)
        return x * 2, x

    def bwd(x, ct):
        _bump(backward, x)
        return (ct * 10,)

    f.defvjp(fwd, bwd)
    g = jax.jit(jax.grad(lambda x: f(x) + f(x)))
    for k in range(1, 4):
        assert g(jnp.float32(1)) == 20
        assert storax.get_state(forward, jnp.float32(0)) == 2 * k
        assert storax.get_state(backward, jnp.float32(0)) == 2 * k


def test_state_in_custom_jvp_rule():
    index = _counter()

    @jax.custom_jvp
    def f(x):
        return x * 2

    @f.defjvp
    def _(primals, tangents):
        _bump(index, primals[0])
        return f(primals[0]), tangents[0] * 7

    assert jax.jit(lambda x: jax.jvp(f, (x,), (1.0,)))(jnp.float32(1)) == (2, 7)
    assert jax.jit(jax.grad(f))(jnp.float32(1)) == 7
    assert storax.get_state(index, jnp.float32(0)) == 2


def test_scan_of_checkpoint_of_scan():
    # jax#16637: what does not depend on the carry must still not leave the scan.
    index = _counter(1)

    def inner(x):
        return lax.scan(lambda c, _: (_bump(index, c), None), x, None, length=2)[0]

    def outer(x):
        return lax.scan(jax.checkpoint(lambda c, _: (inner(c), None)), x, None, length=2)[0]

    value, grad = jax.jit(jax.value_and_grad(outer))(jnp.float32(1))
    assert (value, grad) == (24, 24)
    assert storax.get_state(index, jnp.float32(0)) == 5


def _scan(f):
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]


def _twice(f):
    """A while loop on a value of its own, beside what is differentiated."""
    step = lambda c: (c[0] + 1, f(jnp.float32(1)))
    return lambda x: x * lax.while_loop(lambda c: c[0] < 2, step, (0, jnp.float32(0)))[1]


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("nest", "want"),
    [
        (lambda f: jax.checkpoint(_scan(jax.checkpoint(f))), 3 * 4),
        (lambda f: jax.checkpoint(_scan(_twice(f))), 4 * 6),
        (lambda f: _scan(jax.checkpoint(_scan(_twice(f)))), 4 * 6 * 8 * 10),
    ],
    ids=["checkpoint in scan", "while in scan", "while in scan in scan"],
)
def test_what_depends_on_no_carry_stays_in_a_scan_under_checkpoint(nest, want, jit):
    index = _counter(3)
    value, grad = jit(jax.value_and_grad(nest(lambda x: _bump(index, x))))(jnp.float32(1))
    assert (value, grad) == (want, want)
    assert storax.get_state(index, jnp.float32(0)) == {12: 5, 24: 7, 1920: 11}[want]


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_masked_sets_stay_in_a_scan_under_checkpoint(jit):
    """A condition's sets are not in a branch: of these, each lane's loop counts how often it asks."""
    index, limits = storax.StateIndex(), jnp.array([1.0, 2.0])
    jax.vmap(lambda x: storax.set_state(index, x))(0 * limits)

    def lane(limit):
        def goes_on(c):
            storax.set_state(index, storax.get_state(index, 0 * limit) + 1)
            return c < limit

        return lax.while_loop(goes_on, lambda c: c + 1, 0 * limit)

    f = jax.checkpoint(_scan(lambda x: x * jax.vmap(lane)(limits).sum()))
    assert jit(jax.grad(f))(jnp.float32(1)) == 9
    state = jax.vmap(lambda x: storax.get_state(index, x))(limits)
    np.testing.assert_array_equal(state, [2 * 2, 2 * 3])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("value", [True, 3, 0.5])
def test_scalars_made_under_checkpoint(value, jit):
    """JAX evaluates that jaxpr eagerly, and hands over such scalars as Python's own."""
    index, frozen = storax.StateIndex(), storax.StateIndex(inference=True)
    storax.set_state(eqx.nn.inference_mode(frozen, value=False), jnp.array(value))

    @jax.checkpoint
    def f(x):
        storax.set_state(index, jnp.array(value))
        # `like` depends on nothing, and so is a scalar too.
        got = storax.get_state(index, jnp.array(value))
        held = storax.get_state(frozen, jnp.array(value))
        lax.cond(x > 0, lambda: storax.set_state(index, jnp.array(value)), lambda: None)
        return x * got * held

    assert jit(jax.grad(f))(jnp.float32(1)) == value * value
    xs = jnp.arange(2, dtype=jnp.float32)
    assert jit(jax.vmap(jax.grad(f)))(xs).tolist() == [value * value] * 2
    assert storax.get_state(index, jnp.array(value)) == value


def _loop(f, carried):
    """A while loop that runs `f` twice, on its carry or beside it."""

    def step(c):
        k, x = c
        return k + 1, f(x) if carried else (f(jnp.float32(1)), x)[1]

    return lambda x: lax.while_loop(lambda c: c[0] < 2, step, (0, x))[1]


LOOPS = {
    "plain": lambda loop: loop,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda loop: lambda x: lax.scan(lambda c, _: (loop(c), None), x, None, length=1)[0],
    "scan of checkpoint": lambda loop: LOOPS["scan"](jax.checkpoint(loop)),
    "cond": lambda loop: lambda x: lax.cond(x > 0, loop, lambda x: x, x),
}


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_while_loop_is_not_run_again(name, jit):
    index = _counter(3)
    count = lambda x: _bump(index, x)
    carried, beside = (LOOPS[name](_loop(count, c)) for c in (True, False))
    got = jit(lambda x: jax.jvp(carried, (x,), (jnp.float32(1),)))(jnp.float32(1))
    assert got == (12, 12) and _ran(index)[1] == 3
    linearized = lambda x: jax.linearize(carried, x)[1](x)
    for derivative in (linearized, jax.grad(carried)):
        with pytest.raises(NotImplementedError, match=r"while_loop.*Use `jax.jvp`"):
            jit(derivative)(jnp.float32(1))
    # Where no derivative goes through the loop, there is nothing to run again.
    stopped = lambda x: x * beside(lax.stop_gradient(x))
    assert jit(jax.grad(stopped))(jnp.float32(5)) == 5
    assert _ran(index)[1] == 5


LOOPS_WITH_A_DERIVATIVE = {
    "grad": lambda f: jax.grad(f),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](jnp.float32(1)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "grad of checkpoint in a scan": lambda f: jax.grad(
        lambda x: lax.scan(jax.checkpoint(lambda c, _: (f(c), None)), x, None, length=1)[0]
    ),
    "grad of custom_vjp": lambda f: jax.grad(_with_a_rule(f)),
}


def _with_a_rule(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: jax.vjp(f, x), lambda pullback, ct: pullback(ct))
    return g


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", LOOPS_WITH_A_DERIVATIVE)
def test_a_while_loop_closes_over_what_is_differentiated(name, jit):
    """And uses its value alone: JAX hands it the tangent too."""
    index, other = _counter(), _counter()

    def f(x):
        def step(k):
            storax.set_state(other, lax.stop_gradient(x * x))
            return k + _bump(index, 1) * 0 + 1

        return x * lax.while_loop(lambda k: k < 2, step, jnp.float32(0))

    assert jit(LOOPS_WITH_A_DERIVATIVE[name](f))(jnp.float32(3)) == 2
    assert storax.get_state(index, jnp.float32(0)) == 2
    assert storax.get_state(other, jnp.float32(0)) == 9
