"""SpectralNorm: against NumPy's singular values, and against a function without state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax


def linear(n_in=5, n_out=4, **kwargs):
    return eqx.nn.Linear(n_in, n_out, key=jax.random.key(0), **kwargs)


def spectral(layer=None, **kwargs):
    layer = linear() if layer is None else layer
    return storax.SpectralNorm(layer, "weight", key=jax.random.key(1), **kwargs)


def uv(norm, weight=None, dtype=jnp.float32):
    weight = norm.layer.weight if weight is None else weight
    rows = weight.shape[0]
    like = jnp.zeros(rows, dtype), jnp.zeros(weight.size // rows, dtype)
    return storax.get_state(norm.uv_index, like=like)


def spectral_norm_of(weight):
    weight = np.asarray(weight, np.float64)
    return np.linalg.svd(weight.reshape(weight.shape[0], -1), compute_uv=False)[0]


def with_weight(norm, weight):
    return eqx.tree_at(lambda n: n.layer.weight, norm, weight)


def power_iteration(weight, u, v):
    u = weight @ v
    u = u / np.linalg.norm(u)
    v = weight.T @ u
    return u, v / np.linalg.norm(v)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: linear(), (5,)),
        (lambda: linear(3, 7), (3,)),
        (lambda: eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0)), (3, 6, 6)),
    ],
)
def test_divides_by_the_largest_singular_value(make, shape):
    layer = make()
    norm = spectral(layer)
    x = jax.random.normal(jax.random.key(2), shape)
    call = jax.jit(lambda x: norm(x))
    for _ in range(200):
        out = call(x)
    weight = layer.weight / spectral_norm_of(layer.weight)
    expected = eqx.tree_at(lambda m: m.weight, layer, weight)(x)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    u, v = uv(norm)
    matrix = np.asarray(layer.weight).reshape(layer.weight.shape[0], -1)
    left, values, right = np.linalg.svd(matrix)
    np.testing.assert_allclose(abs(u @ left[:, 0]), 1, rtol=1e-4)
    np.testing.assert_allclose(abs(v @ right[0]), 1, rtol=1e-4)
    np.testing.assert_allclose(u @ matrix @ v, values[0], rtol=1e-4)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_each_call_makes_as_many_iterations_as_asked(num):
    norm = spectral(num_power_iterations=num)
    # Another weight than at first: there is something left to iterate towards.
    weight = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    norm = with_weight(norm, jnp.asarray(weight))
    u, v = map(np.asarray, uv(norm))
    x = jnp.arange(5.0)
    for _ in range(3):
        for _ in range(num):
            u, v = power_iteration(weight, u, v)
        expected = weight @ x / (u @ weight @ v) + norm.layer.bias
        np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(uv(norm)[0], u, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(uv(norm)[1], v, rtol=1e-4, atol=1e-5)


def test_the_start_is_close_already():
    norm = spectral()
    u, v = uv(norm)
    sigma = u @ norm.layer.weight @ v
    np.testing.assert_allclose(sigma, spectral_norm_of(norm.layer.weight), rtol=0.02)


def test_weight_of_zeros():
    norm = with_weight(spectral(), jnp.zeros((4, 5)))
    np.testing.assert_array_equal(norm(jnp.ones(5)), norm.layer.bias)


def test_sixteen_bits():
    layer = linear(dtype=jnp.float16)
    norm = spectral(layer)
    out = norm(jnp.ones(5, jnp.float16))
    assert out.dtype == jnp.float16
    expected = layer.weight.astype(jnp.float32) / spectral_norm_of(layer.weight)
    expected = expected @ jnp.ones(5) + layer.bias
    np.testing.assert_allclose(out, expected, rtol=0.02, atol=0.02)
    assert all(a.dtype == jnp.float32 for a in uv(norm))


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_gradient(inference):
    norm = spectral(inference=inference)
    weight = jax.random.normal(jax.random.key(3), (4, 5))
    x = jnp.arange(5.0)

    def stateful(weight):
        return jnp.sum(jnp.sin(with_weight(norm, weight)(x)))

    u, v = map(np.asarray, uv(norm))
    if not inference:
        u, v = power_iteration(np.asarray(weight), u, v)

    def pure(weight):
        sigma = jnp.asarray(u) @ weight @ jnp.asarray(v)
        return jnp.sum(jnp.sin(weight / sigma @ x + norm.layer.bias))

    value, grad = jax.jit(jax.value_and_grad(stateful))(weight)
    expected_value, expected_grad = jax.value_and_grad(pure)(weight)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-5)


def test_checkpoint_neither_repeats_nor_loses_an_update():
    results = []
    for wrap in (lambda f: f, jax.checkpoint):
        norm = spectral()
        core = norm.uv_index._slot.core
        before = core.num_sets
        f = wrap(lambda w, norm=norm: jnp.sum(jnp.sin(with_weight(norm, w)(jnp.ones(5)))))
        results.append(jax.jit(jax.value_and_grad(f))(jnp.arange(20.0).reshape(4, 5)))
        assert core.num_sets == before + 1
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-5)


# --- Where it is called ---------------------------------------------------------------------------


def test_under_vmap_it_iterates_once():
    xs = jax.random.normal(jax.random.key(2), (6, 5))
    norm, other = spectral(), spectral()
    core = norm.uv_index._slot.core
    before = core.num_sets
    out = jax.jit(jax.vmap(norm))(xs)
    assert core.num_sets == before + 1
    np.testing.assert_allclose(out[0], other(xs[0]), rtol=1e-5)
    # The state is not batched: this would raise if it were.
    np.testing.assert_allclose(uv(norm)[1], uv(other)[1], rtol=1e-5)


def test_inside_scan():
    weight = jax.random.normal(jax.random.key(3), (4, 5))
    xs = jax.random.normal(jax.random.key(2), (4, 5))
    norm, other = with_weight(spectral(), weight), with_weight(spectral(), weight)
    out = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, norm(x)), None, xs)[1])(xs)
    np.testing.assert_allclose(out, jnp.stack([other(x) for x in xs]), rtol=1e-4, atol=1e-5)


def test_ensemble():
    """Made under vmap, each of several models has its own vectors."""

    @eqx.filter_jit
    @eqx.filter_vmap
    def make(key):
        return storax.SpectralNorm(eqx.nn.Linear(5, 4, key=key), "weight", key=key)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
    def call(norm, x):
        return norm(x)

    norm = make(jax.random.split(jax.random.key(0), 3))
    x = jnp.arange(5.0)
    for _ in range(100):
        out = call(norm, x)
    layer = norm.layer
    for i in range(3):
        expected = layer.weight[i] / spectral_norm_of(layer.weight[i]) @ x + layer.bias[i]
        np.testing.assert_allclose(out[i], expected, rtol=1e-3, atol=1e-4)
    frozen = eqx.nn.inference_mode(norm)
    np.testing.assert_allclose(call(frozen, x), out, rtol=1e-4, atol=1e-5)


# --- Inference ------------------------------------------------------------------------------------


def test_frozen():
    norm = with_weight(spectral(), jax.random.normal(jax.random.key(3), (4, 5)))
    x = jnp.ones(5)
    frozen = eqx.nn.inference_mode(norm)
    assert frozen.inference and frozen.uv_index.inference
    u, v = uv(norm)
    weight = norm.layer.weight
    expected = weight @ x / (u @ weight @ v) + norm.layer.bias
    call = eqx.filter_jit(lambda norm, x: norm(x))
    np.testing.assert_allclose(call(frozen, x), expected, rtol=1e-5)
    np.testing.assert_allclose(norm(x, inference=True), expected, rtol=1e-5)
    np.testing.assert_array_equal(uv(norm)[0], u)
    assert "custom_call" not in call.lower(frozen, x).as_text()
    assert "custom_call" in call.lower(norm, x).as_text()
    # What is trained later is what is used later.
    out = [norm(x) for _ in range(3)][-1]
    assert not np.allclose(out, expected, rtol=1e-4)
    np.testing.assert_allclose(call(frozen, x), out, rtol=1e-5)


def test_made_frozen():
    norm, other = spectral(inference=True), spectral()
    assert norm.inference and norm.uv_index.inference
    np.testing.assert_allclose(norm(jnp.ones(5)), other(jnp.ones(5), inference=True), rtol=1e-5)
    thawed = eqx.nn.inference_mode(norm, value=False)
    core = norm.uv_index._slot.core
    before = core.num_sets
    np.testing.assert_allclose(thawed(jnp.ones(5)), other(jnp.ones(5)), rtol=1e-5)
    assert core.num_sets == before + 1


def test_constructor_and_attributes_of_old():
    layer = linear()
    norm = storax.SpectralNorm(layer, "weight", 2, 1e-6, True, key=jax.random.key(1))
    assert norm.layer is layer and norm.weight_name == "weight"
    assert norm.num_power_iterations == 2 and norm.eps == 1e-6 and norm.inference is True
    assert isinstance(norm.uv_index, storax.StateIndex)
    assert norm(jnp.ones(5), key=None).shape == (4,)


# --- In the place of a weight ----------------------------------------------------------------------


def of_weight(layer=None, **kwargs):
    layer = linear() if layer is None else layer
    norm = storax.SpectralNorm(layer.weight, key=jax.random.key(1), **kwargs)
    return eqx.tree_at(lambda m: m.weight, layer, norm)


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit, storax.jit])
def test_in_the_place_of_a_weight(jit):
    alone, wrapped = of_weight(), spectral()
    xs = jax.random.normal(jax.random.key(2), (3, 5))

    @jit
    def step(model):
        def loss(model):
            return jnp.sum(jax.vmap(model)(xs) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        return value, grads, eqx.apply_updates(model, jax.tree.map(lambda g: -0.01 * g, grads))

    core = alone.weight.uv_index._slot.core
    before = core.num_sets
    for _ in range(4):
        value, grads, alone = step(alone)
        expected, expected_grads, wrapped = step(wrapped)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(grads.weight.weight, expected_grads.weight, rtol=1e-5)
        for x, y in zip(uv(alone.weight, alone.weight.weight), uv(wrapped), strict=True):
            np.testing.assert_array_equal(x, y)
    assert core.num_sets == before + 4
    frozen, expected = map(eqx.nn.inference_mode, (alone, wrapped))
    np.testing.assert_allclose(jit(lambda m: m(xs[0]))(frozen), expected(xs[0]), rtol=1e-6)
    assert core.num_sets == before + 4


def test_constructor_of_old():
    """As `equinox.experimental` had it: in every `Linear` of a model, by its flag alone in inference."""
    key = jax.random.PRNGKey(0)
    is_linear = lambda x: isinstance(x, eqx.nn.Linear)
    is_norm = lambda x: isinstance(x, storax.SpectralNorm)
    put = storax.SpectralNorm.withkey(key)
    mlp = eqx.nn.MLP(2, 2, 4, 2, key=key)
    model = jax.tree.map(
        lambda m: eqx.tree_at(lambda m: m.weight, m, replace_fn=put) if is_linear(m) else m,
        mlp,
        is_leaf=is_linear,
    )
    norms = [x for x in jax.tree.leaves(model, is_leaf=is_norm) if is_norm(x)]
    assert len(norms) == 3 and norms[0].weight is mlp.layers[0].weight
    before = [n.uv_index._slot.core.num_sets for n in norms]
    out = [model(jnp.ones(2)) for _ in range(100)][-1]
    assert [n.uv_index._slot.core.num_sets for n in norms] == [b + 100 for b in before]
    weights = [x.weight for x in mlp.layers]
    scaled = [w / spectral_norm_of(w) for w in weights]
    where = lambda m: [x.weight for x in m.layers]
    np.testing.assert_allclose(out, eqx.tree_at(where, mlp, scaled)(jnp.ones(2)), rtol=1e-4)
    frozen = jax.tree.map(
        lambda n: eqx.tree_at(lambda n: n.inference, n, True) if is_norm(n) else n,
        model,
        is_leaf=is_norm,
    )
    np.testing.assert_allclose(frozen(jnp.ones(2)), out, rtol=1e-5)
    assert [n.uv_index._slot.core.num_sets for n in norms] == [b + 100 for b in before]


def test_as_an_array_in_functions():
    weight = of_weight().weight
    assert (weight.shape, weight.ndim, weight.dtype) == ((4, 5), 2, jnp.float32)
    core = weight.uv_index._slot.core
    before = core.num_sets
    x = jnp.arange(5.0)
    expected = jnp.dot(jnp.asarray(weight), x)
    assert core.num_sets == before + 1
    frozen = eqx.nn.inference_mode(weight)
    np.testing.assert_allclose(jnp.asarray(frozen) @ x, expected, rtol=1e-5)
    with pytest.raises(TypeError, match=r"Give it `jnp.asarray\(norm\)`"):
        jnp.dot(weight, x)


def test_neither_form_is_taken_for_the_other():
    with pytest.raises(TypeError, match=r"put it in the place of the weight"):
        of_weight().weight(jnp.ones(5))
    with pytest.raises(TypeError, match=r"it is no array: call it"):
        spectral() @ jnp.ones(5)
    with pytest.raises(TypeError, match=r"all else by name; not of a Linear and None"):
        storax.SpectralNorm(linear(), key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"all else by name; not of a ArrayImpl and 2"):
        storax.SpectralNorm(linear().weight, 2, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"`layer` must be .* two dimensions, but it is float32\[4\]"
    ):
        storax.SpectralNorm(linear().bias, key=jax.random.key(0))


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit, storax.jit])
def test_frozen_and_cast(jit):
    norm = spectral()
    norm(jnp.ones(5))
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x,
        eqx.nn.inference_mode(norm),
    )
    out = jit(lambda m, x: m(x))(half, jnp.ones(5, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected = norm(jnp.ones(5), inference=True)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0.05, atol=0.02)


# --- Errors ---------------------------------------------------------------------------------------


def test_bad_arguments():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"Linear\.bias.*two dimensions.*float32\[4\]"):
        storax.SpectralNorm(linear(), "bias", key=key)
    with pytest.raises(ValueError, match=r"Linear\.bias.*None"):
        storax.SpectralNorm(linear(use_bias=False), "bias", key=key)
    with pytest.raises(ValueError, match="complex64"):
        storax.SpectralNorm(linear(dtype=jnp.complex64), "weight", key=key)
    with pytest.raises(ValueError, match="num_power_iterations"):
        spectral(num_power_iterations=-1)
    with pytest.raises(AttributeError, match="wait"):
        storax.SpectralNorm(linear(), "wait", key=key)


def test_training_a_frozen_layer():
    with pytest.raises(RuntimeError, match=r"`inference` flag is true.*value=False"):
        spectral(inference=True)(jnp.ones(5), inference=False)


def test_weight_of_another_shape():
    norm = with_weight(spectral(), jnp.ones((4, 6)))
    with pytest.raises(RuntimeError, match=r"in SpectralNorm: it holds \(f32\[4\], f32\[5\]\)"):
        norm(jnp.ones(6))


def test_argument_of_plain_jit():
    layer = eqx.nn.Linear(5, 4, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"equinox\.filter_jit"):
        jax.jit(lambda norm: norm(jnp.ones(5)))(spectral(layer))
