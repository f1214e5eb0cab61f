"""StateIndex as a PyTree: in JAX's and Equinox's tools, copied, compared, and frozen."""

import copy
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax import lax

import storax

ZERO = jnp.float32(0)


class Counter(eqx.Module):
    index: storax.StateIndex
    scale: jax.Array

    def __init__(self, value=0.0):
        self.index = storax.StateIndex()
        self.scale = jnp.float32(1)
        storax.set_state(self.index, jnp.float32(value))

    def __call__(self):
        n = storax.get_state(self.index, ZERO) + self.scale
        if not self.index.inference:
            storax.set_state(self.index, n)
        return n


def value(index):
    return float(storax.get_state(index, ZERO))


@pytest.fixture
def index():
    index = storax.StateIndex(name="counter")
    storax.set_state(index, jnp.float32(3))
    return index


# --- As an argument and as a closure ---


def test_as_an_argument_of_filter_jit():
    model = Counter()
    step = eqx.filter_jit(lambda model: model())
    assert [float(step(model)) for _ in range(3)] == [1, 2, 3]


def test_as_a_closure():
    model = Counter()
    step = jax.jit(lambda: model())
    assert [float(step()) for _ in range(3)] == [1, 2, 3]
    assert [float(eqx.filter_jit(model)()) for _ in range(2)] == [4, 5]


@pytest.mark.parametrize(
    "transform", ["filter_vmap", "filter_grad", "filter_value_and_grad", "filter_checkpoint"]
)
def test_filtered_transformations(transform):
    model = Counter()
    if transform == "filter_vmap":
        got = eqx.filter_vmap(lambda m, x: m() * x, in_axes=(None, 0))(model, jnp.arange(3.0))
        np.testing.assert_array_equal(got, [0, 1, 2])
    elif transform == "filter_checkpoint":
        assert eqx.filter_checkpoint(lambda m: m())(model) == 1
    else:

        def loss(m):
            with_stop = eqx.tree_at(lambda m: m.scale, m, lax.stop_gradient(m.scale))
            return with_stop() * m.scale

        out = getattr(eqx, transform)(loss)(model)
        grads = out[1] if transform == "filter_value_and_grad" else out
        assert grads.scale == 1
    assert value(model.index) == 1


# --- PyTree operations share the slot ---


def copies(model):
    leaves, treedef = jtu.tree_flatten(model)
    dynamic, static = eqx.partition(model, eqx.is_array)
    yield jtu.tree_unflatten(treedef, leaves)
    yield jax.tree.map(lambda x: x, model)
    yield eqx.combine(dynamic, static)
    yield eqx.combine(eqx.filter(model, eqx.is_array), model)
    yield eqx.tree_at(lambda m: m.scale, model, jnp.float32(2))
    yield eqx.apply_updates(
        model, eqx.filter(jax.tree.map(jnp.zeros_like, model), eqx.is_inexact_array)
    )
    yield eqx.nn.inference_mode(eqx.nn.inference_mode(model), value=False)


@pytest.mark.parametrize("k", range(7))
def test_copies_share_the_state(k):
    model = Counter()
    copy = list(copies(model))[k]
    copy()
    assert value(model.index) == value(copy.index) > 0


def test_masks_take_the_place_of_leaves(index):
    mask = jax.tree.map(lambda _: True, {"i": index, "x": jnp.ones(2)})
    assert jtu.tree_leaves(mask) == [True, True]
    for frozen in (index, eqx.nn.inference_mode(index)):
        for leaf in (None, "a", object(), 3.0, np.zeros(2)):
            tree = jax.tree.map(lambda _, leaf=leaf: leaf, frozen)
            again = jax.tree.map(lambda x: x, tree)
            assert jtu.tree_structure(tree) == jtu.tree_structure(again)
        grads = eqx.filter_grad(lambda t: t["x"].sum())({"i": frozen, "x": jnp.ones(2)})
        assert grads["i"].inference is None


def test_tree_pformat_and_repr(index):
    assert "StateIndex" in eqx.tree_pformat({"a": index})
    assert "'counter'" in repr(index) and "inference=False" in repr(index)
    assert "StateIndex" in repr(Counter())


def test_paths(index):
    paths = [jtu.keystr(p) for p, _ in jtu.tree_leaves_with_path({"a": index})]
    assert paths == ["['a'].inference"]


def test_it_is_not_hashable(index):
    with pytest.raises(TypeError, match="unhashable"):
        hash(index)


def test_equality_is_tree_equality(index):
    other = storax.StateIndex()
    copy = jax.tree.map(lambda x: x, index)
    assert index == copy
    assert (index != copy) is False
    assert index != other
    assert index != eqx.nn.inference_mode(index)
    assert index != 3
    assert eqx.tree_equal([index], [copy])


def test_inference_is_a_leaf(index):
    assert jtu.tree_leaves(index) == [False]
    assert jtu.tree_leaves(eqx.tree_inference(index, True))[0] is True
    assert eqx.tree_at(lambda i: i.inference, index, True).inference is True


# --- Frozen ---


def test_frozen_state_is_an_input(index):
    frozen = eqx.nn.inference_mode(index)
    traces = []

    @eqx.filter_jit
    def read(i, x):
        traces.append(1)
        return storax.get_state(i, ZERO) + x

    assert read(frozen, 1.0) == 4
    text = read.lower(frozen, 1.0).as_text()
    assert "custom_call" not in text
    assert "custom_call" in read.lower(index, 1.0).as_text()
    traces.clear()
    for k in range(3):  # a later set is seen, with no retrace
        storax.set_state(index, jnp.float32(10 * k))
        assert read(frozen, 1.0) == 10 * k + 1
    assert not traces


def test_frozen_sees_sets_made_under_jit(index):
    frozen = eqx.nn.inference_mode(index)
    m = jnp.full((200, 200), 0.001)

    @jax.jit
    def train(m):
        for _ in range(10):
            m = jnp.tanh(m @ m)
        storax.set_state(index, storax.get_state(index, ZERO) + 1 + m[0, 0] * 0)

    read = eqx.filter_jit(lambda i: storax.get_state(i, ZERO))
    for k in range(1, 5):
        train(m)
        assert read(frozen) == 3 + k


def test_closed_over_it_is_baked_in(index):
    frozen = eqx.nn.inference_mode(index)
    read = jax.jit(lambda: storax.get_state(frozen, ZERO))
    assert read() == 3
    assert "custom_call" not in read.lower().as_text()
    storax.set_state(index, jnp.float32(5))
    assert read() == 3
    assert jax.jit(lambda: storax.get_state(frozen, ZERO))() == 5


def test_frozen_eager_get_is_current(index):
    frozen = eqx.nn.inference_mode(index)
    for k in range(3):
        storax.set_state(index, jnp.float32(k))
        assert value(frozen) == k


def test_frozen_inside_a_program(index):
    @eqx.filter_jit
    def f(i):
        storax.set_state(i, storax.get_state(i, ZERO) + 1)
        return storax.get_state(eqx.nn.inference_mode(i), ZERO)

    assert [float(f(index)) for _ in range(2)] == [4, 5]


def test_flattening_again_inside_a_trace_keeps_the_tracers(index):
    frozen = eqx.nn.inference_mode(index)

    @eqx.filter_jit
    def read(i):
        again = jax.tree.map(lambda x: x, i)
        out = eqx.filter_vmap(lambda i, x: storax.get_state(i, ZERO) + x, in_axes=(None, 0))(
            again, jnp.arange(2.0)
        )
        return out + lax.cond(out[0] > 0, lambda: storax.get_state(again, ZERO), lambda: 0.0)

    np.testing.assert_array_equal(read(frozen), [6, 7])
    storax.set_state(index, jnp.float32(1))
    np.testing.assert_array_equal(read(frozen), [2, 3])


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_a_set_in_a_transformation_does_not_change_its_inputs(index, jit):
    frozen = eqx.nn.inference_mode(index)

    def loss(pair):
        storax.set_state(index, jnp.float32(10))
        again = jax.tree.map(lambda x: x, pair)
        return storax.get_state(again[0], ZERO) * pair[1]

    assert jit(eqx.filter_grad(loss))((frozen, jnp.float32(2)))[1] == 3
    assert value(frozen) == 10


def test_first_set_after_freezing():
    index = storax.StateIndex()
    frozen = eqx.nn.inference_mode(index)
    read = eqx.filter_jit(lambda i: storax.get_state(i, ZERO))
    with pytest.raises(RuntimeError, match="nothing has been set"):
        read(frozen)
    storax.set_state(index, jnp.float32(2))
    assert read(frozen) == 2
    assert value(frozen) == 2


@pytest.mark.parametrize("like", [jnp.zeros(3), jnp.int32(0), (ZERO,)])
def test_frozen_mismatch(index, like):
    frozen = eqx.nn.inference_mode(index)
    for run in (lambda f, i: f(i), lambda f, i: eqx.filter_jit(f)(i)):
        with pytest.raises(RuntimeError, match=r"'counter'.*holds f32\[\], but `like` is"):
            run(lambda i: storax.get_state(i, like), frozen)


def test_frozen_state_has_no_gradient(index):
    frozen = eqx.nn.inference_mode(index)
    loss = lambda pair: storax.get_state(pair[0], ZERO) * pair[1]
    grads = eqx.filter_jit(eqx.filter_grad(loss))((frozen, jnp.float32(2)))
    assert grads[1] == 3
    assert all(float(g) == 0 for g in jtu.tree_leaves(grads[0]))


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_frozen_state_is_a_constant_whatever_like_depends_on(index, jit):
    frozen = eqx.nn.inference_mode(index)
    f = lambda x: x * storax.get_state(frozen, 0 * x)
    assert jit(jax.value_and_grad(f))(jnp.float32(2)) == (6, 3)
    assert jit(lambda x: jax.jvp(f, (x,), (x,)))(jnp.float32(2)) == (6, 6)


def test_frozen_batched_state():
    index = storax.StateIndex()
    xs = jnp.arange(3.0)
    jax.vmap(lambda x: storax.set_state(index, x * 10))(xs)
    frozen = eqx.nn.inference_mode(index)
    get = lambda i, x: storax.get_state(i, x) + x
    for wrap in (lambda f: f, eqx.filter_jit):
        out = wrap(eqx.filter_vmap(get, in_axes=(None, 0)))(frozen, xs)
        np.testing.assert_array_equal(out, [0, 11, 22])
        with pytest.raises(RuntimeError, match="batch axes"):
            wrap(eqx.filter_vmap(get, in_axes=(None, None), axis_size=3))(frozen, ZERO)


def test_an_ensemble_of_models():
    def build(k):
        model = Counter.__new__(Counter)
        index = storax.StateIndex()
        object.__setattr__(model, "index", index)
        object.__setattr__(model, "scale", k)
        storax.set_state(index, k)
        return model

    models = eqx.filter_vmap(build)(jnp.arange(1.0, 4.0))
    call = lambda m: storax.get_state(m.index, m.scale) * 2
    np.testing.assert_array_equal(eqx.filter_vmap(call)(models), [2, 4, 6])
    frozen = eqx.nn.inference_mode(models)
    np.testing.assert_array_equal(eqx.filter_vmap(call)(frozen), [2, 4, 6])
    np.testing.assert_array_equal(eqx.filter_jit(eqx.filter_vmap(call))(frozen), [2, 4, 6])


def test_a_cast_frozen_model_does_not_agree(index):
    frozen = eqx.nn.inference_mode(index)
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, frozen)
    for wrap in (lambda f: f, eqx.filter_jit):
        with pytest.raises(RuntimeError, match=r"holds bf16\[\], but `like` is f32\[\]"):
            wrap(lambda i: storax.get_state(i, ZERO))(cast)
        assert wrap(lambda i: storax.get_state(i, jnp.bfloat16(0)))(cast) == 3


@pytest.mark.parametrize("value", [jnp.array(0), jnp.zeros(3), 1, None], ids=str)
def test_an_index_has_no_initial_value(value):
    with pytest.raises(TypeError, match=r"`inference` must be a bool.*use `storax.set_state`"):
        storax.StateIndex(value)
    assert storax.StateIndex(np.bool_(True)).inference is True


def test_a_frozen_model_that_was_donated_can_be_frozen_again(index):
    """A program takes the arrays it is given for good; the next freezing has others."""
    for donate in (
        eqx.filter_jit(lambda i: storax.get_state(i, ZERO), donate="all"),
        storax.jit(lambda i: storax.get_state(i, ZERO), donate_argnums=0),
    ):
        before = storax.get_state(index, ZERO)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what can't be donated here
            np.testing.assert_array_equal(donate(eqx.nn.inference_mode(index)), before)
        again = eqx.nn.inference_mode(index)
        np.testing.assert_array_equal(storax.get_state(again, ZERO), before)


def test_what_is_got_is_committed_by_the_default_device_of_its_time():
    """Not by that of the first get."""
    other, like = jax.devices()[1], jnp.array(0)
    for device in (None, other):
        for read_first in (None, other):
            index = storax.StateIndex()
            with jax.default_device(device):
                storax.set_state(index, jnp.array(0))
            with jax.default_device(read_first):
                storax.get_state(index, like)
            for now in (None, other):
                with jax.default_device(now):
                    x = storax.get_state(index, like)
                    home = device or jax.devices()[0]
                    assert x.devices() == {home}
                    assert x.committed == (home != (now or jax.devices()[0]))
                    storax.set_state(index, x + 1)


def test_two_states_of_one_name_are_told_apart(index):
    with pytest.raises(ValueError, match=r"(?s)'counter', state \d+\n.*'counter', state \d+"):
        jax.tree.map(lambda a, b: a, index, copy.deepcopy(index))
