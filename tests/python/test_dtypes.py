"""Every dtype JAX has, in every shape that might trip a copy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import storax

NAMES = [
    "bool",
    *[f"{s}int{b}" for s in ("", "u") for b in (2, 4, 8, 16, 32, 64)],
    *["float16", "bfloat16", "float32", "float64", "complex64", "complex128"],
    *[n for n in dir(ml_dtypes) if n.startswith(("float8", "float4", "float6"))],
]
WIDE = {"int64", "uint64", "float64", "complex128"}


# XLA has no arrays of the 6-bit floats yet, though JAX names them.
DTYPES = [name for name in NAMES if hasattr(jnp, name) and not name.startswith("float6")]

SHAPES = [(), (0,), (1,), (3,), (2, 0, 3), (3, 5), (7, 1, 3)]


def make(name, shape):
    """Values that tell elements apart, as far as the dtype can."""
    size = int(np.prod(shape))
    values = np.arange(size) % (2 if name in ("bool", "uint2") else 3 if "4" in name else 7)
    if name == "int2":
        values = values % 2
    return jnp.asarray(values.reshape(shape), jnp.float32).astype(getattr(jnp, name))


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(
        np.asarray(a.astype(jnp.complex64 if a.dtype.kind == "c" else jnp.float32)),
        np.asarray(b.astype(jnp.complex64 if b.dtype.kind == "c" else jnp.float32)),
    )


def x64_for(name):
    return jax.enable_x64(name in WIDE)


@pytest.mark.parametrize("name", DTYPES)
def test_round_trips(name):
    with x64_for(name):
        for shape in SHAPES:
            x = make(name, shape)
            zero = jnp.zeros_like(x)
            index = storax.StateIndex()
            storax.set_state(index, x)
            same(storax.get_state(index, zero), x)
            set_and_get = jax.jit(
                lambda x, i=index: (storax.set_state(i, x), storax.get_state(i, x))[1]
            )
            same(set_and_get(zero), zero)
            same(set_and_get(x), x)
            same(storax.get_state(index, zero), x)


@pytest.mark.parametrize("name", DTYPES)
def test_batched_masked_and_frozen(name):
    with x64_for(name):
        index = storax.StateIndex()
        x = make(name, (5, 3))
        jax.jit(jax.vmap(lambda x: storax.set_state(index, x)))(x)
        same(jax.vmap(lambda like: storax.get_state(index, like))(x), x)
        take = jnp.array([True, False, False, True, False])
        clear = lambda t, x: jax.lax.cond(
            t, lambda x: storax.set_state(index, x[::-1]), lambda x: None, x
        )
        for vmapped in (jax.jit(jax.vmap(clear)), jax.vmap(clear)):
            vmapped(take, x)
            want = jnp.where(
                take[:, None], x[:, ::-1].astype(jnp.complex64), x.astype(jnp.complex64)
            )
            got = jax.vmap(lambda like: storax.get_state(index, like))(x)
            np.testing.assert_array_equal(got.astype(jnp.complex64), want)
        frozen = eqx.nn.inference_mode(index)
        read = eqx.filter_vmap(lambda i, like: storax.get_state(i, like), in_axes=(None, 0))
        same(eqx.filter_jit(read)(frozen, x), got)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)])
def test_typed_keys(impl, shape):
    keys = (
        jax.random.split(jax.random.key(1, impl=impl), shape)
        if shape
        else jax.random.key(1, impl=impl)
    )
    index = storax.StateIndex(name="key")
    storax.set_state(index, keys)

    def same_keys(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(jax.random.key_data(a), jax.random.key_data(b))

    same_keys(storax.get_state(index, keys), keys)

    @jax.jit
    def advance(like):
        now = storax.get_state(index, like)
        split = jax.vmap(jax.random.split)(now.reshape(-1))[:, 0].reshape(now.shape)
        storax.set_state(index, split)
        return split

    if keys.size:
        first = advance(keys)
        same_keys(storax.get_state(index, keys), first)
    same_keys(
        eqx.filter_jit(storax.get_state)(eqx.nn.inference_mode(index), keys),
        storax.get_state(index, keys),
    )
    with pytest.raises(RuntimeError, match=r"'key': it holds key<.*>\["):
        storax.get_state(index, jax.random.key_data(keys))


def test_keys_under_vmap():
    index = storax.StateIndex()
    keys = jax.random.split(jax.random.key(0), 6).reshape(2, 3)
    jax.vmap(lambda k: storax.set_state(index, k), in_axes=1)(keys)
    got = jax.jit(jax.vmap(lambda k: storax.get_state(index, k), in_axes=1, out_axes=1))(keys)
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(keys))


def test_old_style_keys():
    index = storax.StateIndex()
    key = jax.random.PRNGKey(3)
    storax.set_state(index, key)
    np.testing.assert_array_equal(jax.jit(lambda k: storax.get_state(index, k))(key), key)


def test_odd_element_counts_of_small_types():
    for name in ("int4", "uint4", "int2", "uint2", "float4_e2m1fn"):
        if not hasattr(jnp, name):
            continue
        for n in (1, 2, 3, 7, 1023, (1 << 16) + 1):
            x = make(name, (n,))
            index = storax.StateIndex()
            jax.jit(lambda x, i=index: storax.set_state(i, x))(x)
            same(storax.get_state(index, x), x)


def test_x64_and_x32_do_not_agree():
    index = storax.StateIndex(name="wide")
    with jax.enable_x64(True):
        storax.set_state(index, jnp.float64(1 / 3))
        assert float(storax.get_state(index, jnp.float64(0))) == 1 / 3
    with pytest.raises(RuntimeError, match=r"'wide': it holds f64\[\], but `like` is f32\[\]"):
        storax.get_state(index, jnp.float32(0))


@pytest.mark.parametrize("leaves", [1, 16, 17, 1000])
def test_many_leaves(leaves):
    index = storax.StateIndex()
    state = [
        jnp.full((k % 4,), k, [jnp.float32, jnp.int8, jnp.bfloat16][k % 3]) for k in range(leaves)
    ]
    double = jax.jit(lambda s: storax.set_state(index, [x * 2 for x in storax.get_state(index, s)]))
    storax.set_state(index, state)
    double(state)
    for got, x in zip(storax.get_state(index, state), state, strict=True):
        same(got, x * 2)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_arrays_without_values(wrap):
    """float0, of what an integer's derivative is."""
    index = storax.StateIndex()
    slope = jax.grad(lambda n: n.astype(jnp.float32), allow_int=True)
    with pytest.raises(TypeError, match="float0"):
        wrap(lambda n: storax.set_state(index, {"slope": slope(n)}))(jnp.array(2))
