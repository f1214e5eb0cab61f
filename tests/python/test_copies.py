"""copy, pickle and files: new indices with the same state, which share it as the old ones did."""

import copy
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import storax
from duplicating import DUPLICATES
from storax import _core
from test_dtypes import DTYPES, make, same, x64_for

ZERO = jnp.float32(0)


class Stats(NamedTuple):
    mean: Any
    var: Any


class Moments(eqx.Module):
    first: jax.Array
    second: jax.Array | None
    scale: float = eqx.field(static=True)


class Model(eqx.Module):
    index: storax.StateIndex
    again: storax.StateIndex
    other: storax.StateIndex
    weight: jax.Array

    def __init__(self):
        self.index = self.again = storax.StateIndex(name="shared")
        self.other = storax.StateIndex(name="other")
        self.weight = jnp.arange(3.0)


@pytest.fixture(params=DUPLICATES)
def duplicate(request):
    return DUPLICATES[request.param]


@pytest.fixture(params=["deepcopy", "pickle", "cloudpickle"])
def copied(request):
    return DUPLICATES[request.param]


def holding(state, **kwargs):
    index = storax.StateIndex(**kwargs)
    storax.set_state(index, state)
    return index


def value(index):
    return float(storax.get_state(index, ZERO))


# --- Types ---


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "file, into what was never set"])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name, kind):
    with x64_for(name):
        state = [make(name, shape) for shape in [(), (0,), (7, 1, 3)]]
        index = DUPLICATES[kind](holding(state))
        for got, x in zip(storax.get_state(index, state), state, strict=True):
            same(got, x)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys(impl, duplicate):
    keys = jax.random.split(jax.random.key(1, impl=impl), 3)
    got = storax.get_state(duplicate(holding(keys)), keys)
    assert got.dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(keys))


def test_64_bits_without_x64(duplicate):
    with jax.enable_x64(True):
        index = holding(jnp.float64(1 / 3))
    made = duplicate(index)
    with jax.enable_x64(True):
        assert float(storax.get_state(made, jnp.float64(0))) == 1 / 3


X, Y = jnp.arange(3.0), jnp.int32(7)
STRUCTURES = {
    "none": (),
    "tuples and lists": ((X, [Y, (X,)]), []),
    "a dict": {"b": X, "a": {3: Y, 1: X}},
    "a dict with odd keys": {(1, "a"): X, (2, "b"): Y},
    "with None": (None, X, {"a": None}),
    "a namedtuple": Stats(X, (Y, Stats(X, None))),
    "an OrderedDict": OrderedDict(b=X, a=Y),
    "a module": Moments(X, Y, 0.5),
    "a module with None": [Moments(X, None, 0.25)],
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure(name, duplicate):
    state = STRUCTURES[name]
    index = duplicate(holding(state))
    assert eqx.tree_equal(storax.get_state(index, jax.tree.map(jnp.zeros_like, state)), state)
    with pytest.raises(RuntimeError, match="but `like` is"):
        storax.get_state(index, [state])


def test_batch_axes(duplicate):
    index = storax.StateIndex()
    xs = jnp.arange(24.0).reshape(2, 3, 4)

    like = lambda x: (x, ZERO)
    jax.vmap(jax.vmap(lambda x: storax.set_state(index, like(x)), in_axes=1))(xs)
    made = duplicate(index)
    get = lambda x: storax.get_state(made, like(x))
    got, zero = jax.vmap(jax.vmap(get, in_axes=1, out_axes=(1, None)), out_axes=(0, None))(0 * xs)
    np.testing.assert_array_equal(got, xs)
    assert zero == 0
    with pytest.raises(RuntimeError, match="batch axes"):
        storax.get_state(made, like(xs))


# --- Values ---


def test_they_are_independent(duplicate):
    index = holding(jnp.float32(1))
    made = duplicate(index)
    storax.set_state(index, jnp.float32(2))
    assert (value(index), value(made)) == (2, 1)
    jax.jit(lambda: storax.set_state(made, jnp.float32(3)))()
    assert (value(index), value(made)) == (2, 3)


def test_sharing(duplicate):
    model = Model()
    storax.set_state(model.index, jnp.float32(1))
    storax.set_state(model.other, jnp.float32(1))
    tree = {"model": model, "frozen": eqx.nn.inference_mode(model), "index": model.index}
    made = duplicate(tree)
    storax.set_state(made["model"].again, jnp.float32(5))
    shared = (made["model"].index, made["frozen"].index, made["frozen"].again, made["index"])
    assert [value(i) for i in shared] == [5] * 4
    assert [value(made["model"].other), value(made["frozen"].other)] == [1, 1]
    assert value(model.index) == 1


def test_never_set_stays_so(duplicate):
    index = storax.StateIndex(name="empty")
    made = duplicate({"a": index, "b": holding(jnp.float32(1))})
    with pytest.raises(RuntimeError, match=r"nothing|never"):
        storax.get_state(made["a"], ZERO)
    storax.set_state(made["a"], jnp.zeros(2))  # of any type
    assert value(made["b"]) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_inference_is_kept(inference, duplicate):
    index = eqx.tree_at(lambda i: i.inference, holding(jnp.float32(2)), inference)
    made = duplicate(index)
    assert made.inference is inference
    assert value(made) == 2
    if inference:
        with pytest.raises(RuntimeError, match="`inference` flag is true"):
            storax.set_state(made, ZERO)
        live = eqx.nn.inference_mode(made, value=False)
        storax.set_state(live, jnp.float32(3))
        assert value(made) == 3 and value(index) == 2
        assert "custom_call" not in eqx.filter_jit(value_of).lower(made).as_text()


def value_of(index):
    return storax.get_state(index, ZERO)


def test_frozen_and_never_set(duplicate):
    made = duplicate(storax.StateIndex(inference=True))
    assert made.inference is True
    with pytest.raises(RuntimeError, match="nothing has been set"):
        storax.get_state(made, ZERO)


def test_frozen_and_cast(duplicate):
    index = holding((jnp.float32(1.5), jnp.int32(3)))
    frozen = eqx.nn.inference_mode(index)
    cast = lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x
    made = duplicate({"cast": jax.tree.map(cast, frozen), "live": index})
    got = storax.get_state(made["cast"], (jnp.bfloat16(0), jnp.int32(0)))
    assert got == (1.5, 3)
    storax.set_state(made["live"], (jnp.float32(2), jnp.int32(4)))  # casts don't survive a set
    assert storax.get_state(made["cast"], (ZERO, jnp.int32(0))) == (2, 4)


def test_names_are_kept(copied):
    assert repr(copied(holding(ZERO, name="count"))) == repr(holding(ZERO, name="count"))
    made = copied(storax.StateIndex())
    assert f"made at {__file__.rsplit('/', 1)[-1]}" in repr(made)


def heavy(x):
    return jax.lax.fori_loop(0, 30, lambda _, x: jnp.tanh(x @ x) * 0.01, x)


def test_after_this_threads_programs(duplicate):
    index, first = storax.StateIndex(), storax.StateIndex()
    storax.set_state(index, ZERO)

    @jax.jit
    def late(m):
        zero = heavy(m)[0, 0] * 0
        storax.set_state(index, storax.get_state(index, ZERO) + 1 + zero)
        storax.set_state(first, 1 + zero)

    m = jnp.full((300, 300), 0.001)
    late(m)
    for k in range(2, 5):
        late(m)
        made = duplicate([index, first])
        assert [value(i) for i in made] == [k, 1]


def test_a_first_set_that_is_under_way(duplicate):
    for _ in range(3):
        index = storax.StateIndex()
        jax.jit(lambda m, i=index: storax.set_state(i, 1 + heavy(m)[0, 0] * 0))(
            jnp.full((300, 300), 0.001)
        )
        assert value(duplicate(index)) == 1


def test_frozen_while_a_first_set_is_under_way(duplicate):
    for get in (value, eqx.filter_jit(value_of)):
        index = storax.StateIndex()
        frozen = eqx.nn.inference_mode(index)
        jax.jit(lambda m, i=index: storax.set_state(i, 1 + heavy(m)[0, 0] * 0))(
            jnp.full((300, 300), 0.001)
        )
        assert get(frozen) == 1
        assert get(duplicate(frozen)) == 1


def test_an_earlier_failure_is_raised(duplicate):
    index = holding(jnp.zeros(3), name="late")
    fails = jax.jit(lambda m: storax.set_state(index, heavy(m)[0, 0]))
    fails(jnp.full((300, 300), 0.001))
    with pytest.raises(RuntimeError) as raised:
        duplicate(index)
    chain = []
    error = raised.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    assert any("'late': it holds f32[3]" in text for text in chain)
    duplicate(index)  # once


def test_not_inside_of_a_trace(copied):
    index = holding(ZERO, name="busy")
    with pytest.raises(RuntimeError, match=r"'busy'.*traces a function"):
        jax.jit(lambda: storax.get_state(copied(index), ZERO))()
    # Constructors copy layers, and run under filter_eval_shape.
    eqx.filter_eval_shape(lambda: copied(storax.StateIndex()))


def test_masks(copied):
    index = eqx.nn.inference_mode(holding(jnp.float32(2)))
    params, static = eqx.partition({"i": index, "x": X}, eqx.is_array)
    params, static = copied((params, static))
    assert value(eqx.combine(params, static)["i"]) == 2


MESH = jax.sharding.Mesh([jax.devices()[k] for k in (2, 0, 3, 1)], ("d",))


def on_each(f):
    return jax.jit(jax.shard_map(f, mesh=MESH, in_specs=(P("d"),), out_specs=P("d")))


def test_every_device(duplicate):
    index = storax.StateIndex()
    on_each(lambda x: (storax.set_state(index, x * 2), x)[1])(jnp.arange(4.0))
    made = duplicate(index)
    on_each(lambda x: (storax.set_state(index, x * 0), x)[1])(jnp.arange(4.0))
    frozen = eqx.nn.inference_mode(made)
    np.testing.assert_array_equal(storax.get_state(made, jnp.zeros((4, 1))).ravel(), [0, 2, 4, 6])
    np.testing.assert_array_equal(storax.get_state(frozen, jnp.zeros((4, 1))).ravel(), [0, 2, 4, 6])
    np.testing.assert_array_equal(
        on_each(lambda x: storax.get_state(made, x))(jnp.zeros(4)), [0, 2, 4, 6]
    )


def test_some_devices(duplicate):
    """The others have the state from before the mapped program."""
    index = holding(jnp.full(1, 5.0))

    def set_first(x):
        jax.lax.cond(x[0] == 1, lambda: storax.set_state(index, x + 6), lambda: None)
        return x

    on_each(set_first)(jnp.arange(4.0))
    made = duplicate(index)
    on_each(lambda x: (storax.set_state(index, x * 0), x)[1])(jnp.arange(4.0))
    got = on_each(lambda x: storax.get_state(made, x))(jnp.zeros(4))
    np.testing.assert_array_equal(got, [5, 7, 5, 5])


def test_on_its_device():
    device = jax.devices()[2]
    made = copy.deepcopy(holding(jax.device_put(jnp.float32(3), device)))
    assert made._slot.core.devices == [2]
    loaded = pickle.loads(pickle.dumps(made))  # where that process puts its arrays
    assert loaded._slot.core.devices == [0]
    with jax.default_device(device):
        assert pickle.loads(pickle.dumps(made))._slot.core.devices == [2]


def test_stacked_layers(duplicate):
    def make(k):
        index = storax.StateIndex()
        storax.set_state(index, k * 10)
        return index, k

    layers = storax.stack(make)(jnp.arange(3.0))
    arrays, static = eqx.partition(duplicate(layers), eqx.is_array)

    def step(total, arrays):
        index, _ = eqx.combine(arrays, static)
        got = storax.get_state(index, ZERO)
        storax.set_state(index, got + 1)
        return total + got, got

    for k in range(2):
        _, got = jax.lax.scan(step, ZERO, arrays)
        np.testing.assert_array_equal(got, [k, 10 + k, 20 + k])
    np.testing.assert_array_equal(storax.get_state(layers[0], jnp.zeros(3)), [0, 10, 20])


def test_a_shallow_copy_shares_the_state():
    index = holding(ZERO)
    for made in (copy.copy(index), copy.copy({"i": index})["i"]):
        storax.set_state(made, value_of(index) + 1)
    assert value(index) == 2
    frozen = copy.copy(eqx.nn.inference_mode(index))
    assert frozen.inference is True and value(frozen) == 2


def test_nothing_is_left_behind(duplicate, fresh_caches):
    index = holding(jnp.zeros(1000))
    before = _core.usage()
    for _ in range(3):
        duplicate([index, eqx.nn.inference_mode(index)])
    assert _core.usage() == before
