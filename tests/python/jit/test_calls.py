"""What can be passed to a function under storax.jit, and what it gives back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax
from jit.counting import counter


@pytest.mark.parametrize("size", [None, 20_000], ids=["small", "large"])
def test_reads_and_writes(jit, size):
    _, count, state = counter(0, size)
    f = jit(lambda x: x + count())
    for k in range(1, 5):
        np.testing.assert_allclose(np.ravel(f(jnp.float32(10)))[0], 10 + k)
        assert state() == k


def test_shapes_and_dtypes_are_compiled_apart(jit):
    _, count, state = counter()
    f = jit(lambda x: x * 0 + count().astype(x.dtype))
    for k, x in enumerate(
        [jnp.zeros(2), jnp.zeros(3), jnp.zeros(2, jnp.int32), jnp.zeros(2), np.zeros(2)], 1
    ):
        out = f(x)
        assert out.shape == x.shape
        np.testing.assert_allclose(out, k)
    assert state() == 5


def test_static_leaves(jit):
    _, count, state = counter()
    traced = []

    @jit
    def f(x, how, options, *, fn):
        traced.append(how)
        return fn(x) + count() * options["scale"], how

    x = jnp.zeros(())
    assert f(x, "a", {"scale": 2}, fn=jnp.cos) == (3, "a")
    assert f(x, "a", {"scale": 2}, fn=jnp.cos) == (5, "a")
    assert len(traced) == 1
    assert f(x, "b", {"scale": 2}, fn=jnp.cos) == (7, "b")
    assert f(x, "b", {"scale": 2.0}, fn=jnp.cos) == (9, "b")  # 2 and 2.0 are not the same
    assert f(x, "b", {"scale": True}, fn=jnp.cos) == (6, "b")
    assert f(x, "b", {"scale": 1}, fn=jnp.cos) == (7, "b")
    assert len(traced) == 5
    assert state() == 6


def test_static_leaf_that_cannot_be_hashed(jit):
    class Unhashable:
        __hash__ = None

        def __repr__(self):
            return "<it>"

    f = lambda x, y: x
    for call, where in (
        (lambda: jit(f)(jnp.zeros(()), Unhashable()), "argument 1 is not an array"),
        (lambda: jit(f)(0, y={"a": Unhashable()}), r"\['a'\] of the argument `y` is not an array"),
        (lambda: jit(f, static_argnums=1)(0, Unhashable()), "argument 1 is static"),
        (lambda: jit(f, static_argnames="y")(0, y=Unhashable()), "the argument `y` is static"),
    ):
        with pytest.raises(TypeError, match=f"{where}, and.*can't be hashed: <it>"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnames": "z"},
        {"static_argnums": 5},
        {"donate_argnames": "z"},
        {"donate_argnums": 5},
        {"static_argnums": 0, "donate_argnums": 0},
    ],
    ids=str,
)
def test_options_that_jax_refuses(options):
    for jit in (jax.jit, storax.jit):
        with pytest.raises(ValueError, match=r"static_arg|donate_arg"):
            jit(lambda x: x, **options)


def test_static_argnums_and_names(jit):
    _, count, _ = counter()

    def f(x, shape, *, power=1):
        return jnp.full(shape, x + count() ** power)

    for g in (
        jit(f, static_argnums=1, static_argnames="power"),
        jit(f, static_argnames=("shape", "power")),
        jit(static_argnums=(1,), static_argnames="power")(f),
    ):
        assert g(jnp.float32(0), (2, 3)).shape == (2, 3)
        assert g(jnp.float32(0), (3,), power=2).shape == (3,)
        assert g(jnp.float32(0), shape=(4,)).shape == (4,)


def test_modules_and_methods(jit):
    class Layer(eqx.Module):
        weight: jax.Array
        index: storax.StateIndex
        activation: object = jnp.tanh

        @jit
        def __call__(self, x):
            n = storax.get_state(self.index, jnp.array(0))
            storax.set_state(self.index, n + 1)
            return self.activation(self.weight * x) + n

    index = storax.StateIndex()
    storax.set_state(index, jnp.array(0))
    layer = Layer(jnp.float32(1), index)
    assert layer(jnp.float32(0)) == 0
    assert layer(jnp.float32(0)) == 1
    outside = jit(lambda layer, x: (layer, layer(x)))
    same, out = outside(layer, jnp.float32(0))
    assert out == 2
    assert same.activation is jnp.tanh
    assert eqx.tree_equal(same, layer)
    assert storax.get_state(index, jnp.array(0)) == 3


def test_method_of_an_ordinary_class(jit):
    class Meter:
        def __init__(self):
            _, self.count, self.state = counter()

        @jit
        def step(self, x):
            return x + self.count()

    one, other = Meter(), Meter()
    assert [float(one.step(jnp.float32(0))) for _ in range(3)] == [1, 2, 3]
    assert float(other.step(jnp.float32(0))) == 1
    assert (one.state(), other.state()) == (3, 1)


def test_looks_like_the_function():
    def f(x):
        """Adds one."""
        return x + 1

    g = storax.jit(f)
    assert (g.__wrapped__, g.__name__, g.__doc__, g.__module__) == (f, "f", "Adds one.", __name__)
    assert "test_looks_like_the_function" in repr(g)
    with pytest.raises(TypeError, match="must be callable, not 3"):
        storax.jit(3)
    with pytest.raises(TypeError, match="nonsense"):
        storax.jit(f, nonsense=1)
    with pytest.raises(TypeError, match="`donate` must be a bool, not 'no'"):
        storax.jit(f, donate="no")
    with pytest.raises(TypeError, match="`pack` must be a bool, not 0"):
        storax.jit(f, pack=0)


def test_donated_arguments(jit):
    _, count, _ = counter()
    f = jit(lambda a, tree: (a + count(), jax.tree.map(lambda x: x + 1, tree)), donate_argnums=1)
    a, tree = jnp.zeros(1000), {"x": jnp.zeros(1000), "name": "n", "y": jnp.ones(10)}
    _, with_name = jit(lambda t: (count(), {"x": t["x"], "name": t["name"]}))(tree)
    assert with_name["name"] == "n"
    for _ in range(2):
        _, new = f(a, {k: v for k, v in tree.items() if k != "name"})
        assert not a.is_deleted()
        assert tree["x"].is_deleted()
        tree = {**new, "name": "n"}
    g = jit(lambda a, b: (a + count(), b + 1), donate_argnames="b")
    b = jnp.zeros(1000)
    g(a, b=b)
    assert b.is_deleted()


def test_first_set_inside(jit):
    index = storax.StateIndex(name="late")

    @jit
    def f(x):
        storax.set_state(index, x)
        return storax.get_state(index, x) + 1

    for k in range(3):
        assert f(jnp.float32(k)) == k + 1
        assert storax.get_state(index, jnp.float32(0)) == k


def test_first_set_in_a_branch(jit):
    index = storax.StateIndex(name="late")

    @jit
    def f(x, first):
        def start(x):
            storax.set_state(index, x)
            return x

        def go_on(x):
            return storax.get_state(index, x) + x

        out = jax.lax.cond(first, start, go_on, x)
        storax.set_state(index, out)
        return out

    with pytest.raises(RuntimeError, match=r"late.*nothing has been set"):
        jax.block_until_ready(f(jnp.float32(1), jnp.array(False)))
    assert f(jnp.float32(1), jnp.array(True)) == 1
    assert f(jnp.float32(1), jnp.array(False)) == 2
    assert f(jnp.float32(1), jnp.array(False)) == 3


def test_never_set_and_types_that_do_not_match(jit):
    index = storax.StateIndex(name="it")
    f = jit(lambda x: storax.get_state(index, x))
    with pytest.raises(RuntimeError, match="'it': nothing has been set"):
        jax.block_until_ready(f(jnp.zeros(3)))
    storax.set_state(index, jnp.ones(3))
    np.testing.assert_array_equal(f(jnp.zeros(3)), jnp.ones(3))
    with pytest.raises(RuntimeError, match=r"it holds f32\[3\], but `like` is f32\[4\]"):
        jax.block_until_ready(f(jnp.zeros(4)))
    np.testing.assert_array_equal(f(jnp.zeros(3)), jnp.ones(3))
    g = jit(lambda x: storax.set_state(index, x))

    def set_another():
        g(jnp.zeros(4))
        storax.barrier()

    with pytest.raises(RuntimeError, match=r"it holds f32\[3\], but the new state is f32\[4\]"):
        set_another()


def test_what_is_not_taken_does_not_raise(jit):
    index = storax.StateIndex(name="unset")
    f = jit(lambda x, p: jax.lax.cond(p, lambda x: storax.get_state(index, x), lambda x: x, x))
    assert f(jnp.float32(2), jnp.array(False)) == 2
    assert f(jnp.float32(2), jnp.array(False)) == 2
    storax.set_state(index, jnp.float32(5))
    assert f(jnp.float32(2), jnp.array(True)) == 5


def test_a_later_trace_may_use_other_states(jit):
    _, small, small_state = counter()
    _, large, large_state = counter(0, 20_000)

    @jit
    def f(x):
        if x.ndim == 0:
            return x + small()
        return x + small() + large()[0]

    for k in range(1, 4):
        f(jnp.float32(0))
        f(jnp.zeros(2))
        assert (small_state(), large_state()) == (2 * k, k)


def test_no_state_at_all(jit):
    f = jit(lambda x, name: (x + 1, name))
    assert f(jnp.float32(1), "n") == (2, "n")
    assert f(jnp.float32(2), "n") == (3, "n")


def test_clear_cache_forgets():
    _, count, state = counter()
    traced = []

    @storax.jit
    def f():
        traced.append(1)
        return count()

    f(), f()
    assert len(traced) == 1
    f.clear_cache()
    f()
    assert len(traced) == 2
    assert state() == 3


def test_disable_jit(jit):
    _, count, state = counter()
    seen = []

    @jit
    def f(x):
        seen.append(float(x) if not isinstance(x, jax.core.Tracer) else None)
        return x + count()

    f(jnp.float32(1))
    with jax.disable_jit():
        assert f(jnp.float32(7)) == 9
    assert f(jnp.float32(1)) == 4
    assert seen == [None, 7.0]
    assert state() == 3


def test_results_that_are_not_finite_are_found(jit):
    _, count, state = counter()
    f = jit(lambda x: jnp.log(x) + count())
    f(jnp.float32(1))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        f(jnp.float32(-1))
    f(jnp.float32(1))
    assert state() >= 2


def test_static_arguments_are_told_apart_by_type():
    for how in ({"static_argnums": 1}, {"static_argnames": "n"}, {}):
        f = storax.jit(lambda x, n: x * n if n is not True else x - 1, **how)
        x = jnp.int32(3)
        assert [f(x, n=n).item() for n in (2, 2.0, 1, True, 1.0)] == [6, 6.0, 3, 2, 3.0]
        assert f(x, n=2).dtype == jnp.int32 and f(x, n=2.0).dtype == jnp.float32


def test_static_floats_are_told_apart_by_their_bits():
    traced = []

    @storax.jit
    def f(x, n):
        traced.append(n)
        return x / n

    assert [f(jnp.float32(1), n).item() for n in (0.0, -0.0)] == [np.inf, -np.inf]
    sign = storax.jit(lambda z: jnp.copysign(1, jnp.imag(jnp.asarray(z))))
    assert [sign(complex(1, zero)).item() for zero in (0.0, -0.0, 0.0)] == [1, -1, 1]
    for _ in range(3):
        f(jnp.float32(1), float("nan"))
    assert len(traced) == 3


def test_donated_is_what_is_given():
    def f(params, batch=None):
        return params if batch is None else params + batch

    f = storax.jit(f, donate_argnums=1)
    params, batch = jnp.ones(3), jnp.ones(3)
    f(params)
    f(params, batch=batch)
    assert not params.is_deleted()
    f(params, jnp.ones(3))
    assert not params.is_deleted()


def test_a_change_of_the_configuration():
    """After a call that ran as plain jit, too, as its state was not there yet."""
    index = storax.StateIndex()

    def g(a):
        jax.lax.cond(a.sum() > 0, lambda: storax.set_state(index, a), lambda: None)
        return a @ a

    g = storax.jit(g)
    a = jnp.ones((2, 2))
    g(a)
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in g.lower(a).as_text()
    assert "HIGHEST" not in g.lower(a).as_text()


def test_what_is_wrong_with_the_function_is_raised_as_it_is():
    _, count, _ = counter()

    def f(text):
        count()
        raise ValueError(text)

    for text in ("CONFIG: bad", "incompatible devices in my list"):
        with pytest.raises(ValueError, match=text) as raised:
            storax.jit(f)(text)
        assert raised.type is ValueError


def test_an_index_made_inside():
    @storax.jit
    def f(x):
        storax.set_state(storax.StateIndex(), x)
        return x

    for _ in range(2):
        with pytest.raises(RuntimeError, match="made inside of a function that JAX traced"):
            f(jnp.float32(1))


def test_indices_that_are_returned_are_new_ones_at_each_call(jit):
    """As they are without jit, though what is traced once would make them once."""

    @jit
    def make(x):
        index = storax.StateIndex()
        storax.set_state(index, x)
        return index, x

    @jit
    def look_up(x):
        return index, x

    values = lambda indices: [storax.get_state(i, jnp.float32(0)).item() for i in indices]
    for x in (jnp.float32(2), jnp.zeros(2)):  # another trace
        indices = [make(x + k)[0] for k in range(3)]
        storax.set_state(indices[1], x + 7)
        if x.ndim == 0:
            assert values(indices) == [2, 9, 4]
    norms = [jit(lambda: storax.BatchNorm(2, axis_name="b", mode="batch"))() for _ in range(2)]
    assert norms[0].state_index._slot is not norms[1].state_index._slot
    index = indices[0]
    assert look_up(jnp.float32(0))[0]._slot is index._slot
    assert look_up(jnp.float32(0))[0]._slot is index._slot


def test_shapes_of_results_that_are_no_arrays():
    _, count, _ = counter()
    f = storax.jit(lambda x: ("name", x + count(), None))
    for shapes in (f.eval_shape(jnp.float32(0)), f.lower(jnp.float32(0)).out_info):
        assert shapes[0] == "name" and shapes[1].shape == () and shapes[2] is None
