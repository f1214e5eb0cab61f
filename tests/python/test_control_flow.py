"""Program order through jit, scan, while (condition and body), fori, cond, switch and map."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax

ZERO = jnp.int32(0)

JITS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "filter_jit": eqx.filter_jit,
    "nested": lambda f: jax.jit(lambda *args: jax.jit(f)(*args)),
    "aot": lambda f: lambda *args: jax.jit(f).lower(*args).compile()(*args),
    "disable_jit": lambda f: jax.disable_jit()(f),
}


@pytest.fixture(params=JITS)
def jit(request):
    return JITS[request.param]


@pytest.fixture
def index():
    index = storax.StateIndex()
    storax.set_state(index, jnp.int32(0))
    return index


def get(index):
    return storax.get_state(index, ZERO)


def bump(index, by=1):
    n = get(index) + by
    storax.set_state(index, n)
    return n


def test_program_order(index, jit):
    def f(x):
        a = bump(index)
        storax.set_state(index, x)
        b = get(index)
        return a, b, bump(index)

    assert jax.tree.map(int, jit(f)(jnp.int32(10))) == (1, 10, 11)
    assert get(index) == 11


def test_the_first_set_may_be_inside(jit):
    index = storax.StateIndex()

    def f(x):
        storax.set_state(index, {"a": x, "b": (x * 2,)})
        return storax.get_state(index, {"a": x, "b": (x,)})

    out = jit(f)(jnp.arange(3.0))
    np.testing.assert_array_equal(out["b"][0], [0, 2, 4])
    np.testing.assert_array_equal(storax.get_state(index, out)["a"], [0, 1, 2])


def test_scan(index, jit):
    f = lambda: lax.scan(lambda _, x: (None, bump(index, x)), None, jnp.arange(5))[1]
    np.testing.assert_array_equal(jit(f)(), [0, 1, 3, 6, 10])
    assert get(index) == 10


def test_scan_reversed_and_unrolled(index, jit):
    body = lambda c, x: (c, bump(index, x) * 10)
    f = lambda: lax.scan(body, None, jnp.arange(4), reverse=True, unroll=2)[1]
    np.testing.assert_array_equal(jit(f)(), [60, 60, 50, 30])


def test_scan_of_length_zero(index):
    f = lambda: lax.scan(lambda c, _: (c, bump(index)), None, None, length=0)[1]
    assert jax.jit(f)().shape == f().shape == (0,)
    assert get(index) == 0


def test_while_body_and_condition(index, jit):
    conditions = storax.StateIndex()
    storax.set_state(conditions, jnp.int32(0))

    def f():
        def cond(c):
            bump(conditions)
            return get(index) < 5

        return lax.while_loop(cond, lambda c: c + bump(index), 0)

    assert jit(f)() == 15
    assert get(index) == 5
    assert get(conditions) == 6


def test_fori_loop(index, jit):
    assert jit(lambda n: lax.fori_loop(0, n, lambda i, c: c + bump(index), 0))(4) == 10
    assert jit(lambda: lax.fori_loop(0, 4, lambda i, c: c + bump(index), 0))() == 26


def test_cond_and_switch(index, jit):
    f = lambda p: lax.cond(p, lambda: bump(index, 1), lambda: bump(index, 100))
    assert [int(jit(f)(p)) for p in (True, False, True)] == [1, 101, 102]
    g = lambda k: lax.switch(k, [lambda k=k: bump(index, 10**k) for k in range(3)])
    before = int(get(index))
    for k in (0, 2, 1):
        jit(g)(jnp.int32(k))
    assert get(index) == before + 111


def test_map(index, jit):
    f = lambda: lax.map(lambda x: bump(index, x), jnp.arange(4))
    np.testing.assert_array_equal(jit(f)(), [0, 1, 3, 6])


def test_nested_loops(index, jit):
    def f():
        def outer(c, i):
            inner = lambda k, c: lax.cond(k % 2 == 0, lambda: c + bump(index), lambda: c)
            return lax.fori_loop(0, i, inner, c), get(index)

        return lax.scan(outer, 0, jnp.arange(5))

    total, seen = jit(f)()
    assert total == sum(range(1, 7))
    np.testing.assert_array_equal(seen, [0, 1, 2, 4, 6])


def test_two_indices(index, jit):
    other = storax.StateIndex()
    storax.set_state(other, jnp.int32(100))

    def f():
        def body(_, __):
            a, b = get(index), get(other)
            storax.set_state(index, b)
            storax.set_state(other, a + 1)
            return None, None

        lax.scan(body, None, None, length=5)

    jit(f)()
    assert (int(get(index)), int(get(other))) == (102, 3)


def test_a_jitted_function_called_twice_in_a_program(index, jit):
    step = jax.jit(lambda x: bump(index, x))
    assert jit(lambda: step(1) * 1000 + step(2))() == 1003


def test_abstract_evaluation_touches_nothing(index):
    f = lambda: bump(index)
    assert jax.eval_shape(f) == jax.ShapeDtypeStruct((), jnp.int32)
    jax.make_jaxpr(f)()
    jax.jit(f).lower().compile()
    eqx.filter_eval_shape(f)
    assert get(index) == 0


def test_many_leaves(jit):
    index = storax.StateIndex()
    state = {str(k): jnp.full((k % 5,), k, jnp.float32) for k in range(100)}

    def f(state):
        storax.set_state(index, state)
        return storax.get_state(index, state)

    assert eqx.tree_equal(jit(f)(state), state)
    assert eqx.tree_equal(storax.get_state(index, state), state)


def test_empty_states(jit):
    for state in ((), None, {}, jnp.zeros((0, 3))):
        index = storax.StateIndex()

        def f(state=state, index=index):
            storax.set_state(index, state)
            return storax.get_state(index, state)

        assert eqx.tree_equal(jit(f)(), state)
        with pytest.raises(RuntimeError):
            storax.get_state(index, jnp.zeros(1))


def test_eager_results_do_not_alias(index):
    given = jnp.arange(1000.0)
    index = storax.StateIndex()
    storax.set_state(index, given)
    first = storax.get_state(index, given)
    host = np.array(given)
    held = storax.get_state(index, given)
    del given
    storax.set_state(index, first * 2)
    np.testing.assert_array_equal(first, host)
    np.testing.assert_array_equal(held, host)
    jax.jit(lambda x: (storax.set_state(index, x), x + 1)[1], donate_argnums=0)(jnp.zeros(1000))
    np.testing.assert_array_equal(held, host)
    assert (storax.get_state(index, host + jnp.zeros(1000)) == 0).all()


@pytest.mark.parametrize("jit", [jax.jit, storax.jit], ids=["jit", "ours"])
@pytest.mark.parametrize(
    "dtype",
    ["float32", "int8", "bool", "complex64", "int4", "uint4", "int2", "uint2", "float4_e2m1fn"],
)
def test_a_single_result_that_a_loop_in_a_branch_starts_from(jit, dtype):
    """XLA let the loop work on it in place."""
    index = storax.StateIndex()
    start = jnp.array([0, 1, 1]).astype(dtype)
    storax.set_state(index, start)

    @jit
    def f(x):
        first = storax.get_state(index, start)[0]

        def loop():
            def body(c):
                k, value = c
                storax.set_state(index, jnp.stack([value, value, value]))
                return k + 1, jnp.ones((), dtype)

            lax.while_loop(lambda c: c[0] < 2, body, (0, first))

        lax.cond(x > 1, loop, lambda: None)
        return first

    # NumPy does not compare all of them.
    number = lambda x: np.asarray(x if dtype == "complex64" else x.astype(jnp.float32))
    assert number(f(jnp.float32(2))) == 0
    np.testing.assert_array_equal(number(storax.get_state(index, start)), [1, 1, 1])
    assert number(f(jnp.float32(0))) == 1


def test_a_program_whose_only_result_is_a_token():
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))

    @jax.jit
    def f(x):
        jax.debug.callback(lambda x: None, x, ordered=True)
        lax.cond(x > 0, lambda: storax.set_state(index, x), lambda: None)

    f(jnp.float32(3))
    jax.effects_barrier()
    assert storax.get_state(index, jnp.float32(0)) == 3
