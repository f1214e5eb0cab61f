"""Copying, saving, freezing and stacking states that storax.jit has on loan."""

import copy
import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import storax
from jit.counting import counter

SIZES = pytest.mark.parametrize("size", [None, 20_000], ids=["small", "large"])


def through_file(index):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, index)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, storax.StateIndex())


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda index: pickle.loads(pickle.dumps(index)),
    "file": through_file,
}


@SIZES
@pytest.mark.parametrize("way", WAYS)
def test_copies(jit, size, way):
    index, count, state = counter(0, size)
    f = jit(lambda: count())
    f(), f(), f()
    like = jnp.float32(0) if size is None else jnp.zeros(size)
    copied = WAYS[way](index)
    f()
    np.testing.assert_array_equal(storax.get_state(copied, like), 3 + 0 * like)
    assert state() == 4
    g = jit(lambda: storax.set_state(copied, storax.get_state(copied, like) + 10))
    g(), g(), g()
    np.testing.assert_array_equal(storax.get_state(WAYS[way](copied), like), 33 + 0 * like)
    assert state() == 4


@SIZES
def test_frozen(jit, size):
    index, count, _ = counter(0, size)
    like = jnp.float32(0) if size is None else jnp.zeros(size)
    frozen = eqx.nn.inference_mode(index)
    f = jit(lambda: count())
    read = jit(lambda index: storax.get_state(index, like))
    for k in range(1, 4):
        f()
        np.testing.assert_array_equal(read(frozen), k + 0 * like)
        np.testing.assert_array_equal(storax.get_state(frozen, like), k + 0 * like)


def test_of_what_is_spread(jit):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("i")))
    index = storax.StateIndex()
    storax.set_state(index, x)
    f = jit(lambda x: storax.set_state(index, storax.get_state(index, x) + 1))
    f(x), f(x)
    for way in WAYS.values():
        np.testing.assert_array_equal(storax.get_state(way(index), jnp.zeros(8)), np.arange(8) + 2)


def test_of_what_is_lost():
    def fails(x):
        raise ValueError("the user's own")

    index, _, _ = counter(1, 20_000)

    @storax.jit
    def f():
        s = storax.get_state(index, jnp.zeros(20_000))
        y = jax.pure_callback(fails, jax.ShapeDtypeStruct((), jnp.float32), s[0])
        storax.set_state(index, s + y)
        return y

    with pytest.raises(RuntimeError, match=r"user's own|is lost"):
        jax.block_until_ready(f())
    for way in ("deepcopy", "pickle"):
        with pytest.raises(RuntimeError, match="is lost"):
            WAYS[way](index)


@SIZES
def test_on_another_device(jit, size):
    first, second = jax.local_devices()[:2]
    index = storax.StateIndex(name="there")
    like = jnp.float32(0) if size is None else jnp.zeros(size)
    storax.set_state(index, jax.device_put(like, second))

    @jit
    def f(x):
        s = storax.get_state(index, like) + 1
        storax.set_state(index, s)
        return s + x

    there, here = jax.device_put(jnp.float32(1), second), jax.device_put(jnp.float32(1), first)
    for _ in range(3):
        out = f(there)
    assert out.devices() == {second}
    with pytest.raises(RuntimeError, match="device"):
        jax.block_until_ready(f(here))
    np.testing.assert_array_equal(f(there), 5 + 0 * like)
