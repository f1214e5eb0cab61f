"""BatchNorm in inference and in models, and its errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_norm_reference import MODES, Reference, apply, assert_close, batches, running, trained

import storax


def lowered(f, *args):
    return eqx.filter_jit(f).lower(*args).as_text()


@pytest.mark.parametrize("mode", MODES)
def test_frozen(mode):
    norm, reference = trained(mode)
    frozen = eqx.nn.inference_mode(norm)
    assert frozen.inference and frozen.state_index.inference
    assert not norm.inference and not norm.state_index.inference
    (x,) = batches(1, 6, 3, 4, seed=5)
    expected = reference.normalise(x, *reference.running)
    assert_close(eqx.filter_jit(apply)(frozen, x), expected)
    assert_close(apply(frozen, x), expected)
    # No name is needed, nor a batch.
    assert_close(jax.vmap(frozen)(x), expected)
    assert_close(frozen(x[0]), expected[0])
    assert_close(running(norm), reference.running)


def test_frozen_program_has_no_custom_call():
    norm, _ = trained()
    (x,) = batches(1, 6, 3)
    assert "custom_call" in lowered(apply, norm, x)
    assert "custom_call" not in lowered(apply, eqx.nn.inference_mode(norm), x)


def test_frozen_copy_sees_later_training():
    norm, reference = trained()
    frozen = eqx.nn.inference_mode(norm)
    traces = []

    @eqx.filter_jit
    def evaluate(norm, x):
        traces.append(None)
        return apply(norm, x)

    for x in batches(3, 6, 3, 4, seed=7):
        apply(norm, x)
        reference.train(x)
        assert_close(evaluate(frozen, x), reference.normalise(x, *reference.running))
    assert len(traces) == 1


def test_thawed_goes_on_training():
    norm, reference = trained()
    thawed = eqx.nn.inference_mode(eqx.nn.inference_mode(norm), value=False)
    (x,) = batches(1, 6, 3, 4, seed=5)
    assert_close(apply(thawed, x), reference.train(x))


def test_inference_of_one_call():
    norm, reference = trained()
    (x,) = batches(1, 6, 3, 4, seed=5)
    expected = reference.normalise(x, *reference.running)
    infer = jax.vmap(lambda x: norm(x, inference=True))
    num_sets = norm.state_index._slot.core.num_sets
    assert_close(infer(x), expected)
    assert_close(jax.jit(infer)(x), expected)
    assert norm.state_index._slot.core.num_sets == num_sets
    # Of the state, just the statistics are read.
    assert str(jax.make_jaxpr(infer)(x)).count("get_state[") == 1
    # The flag of the layer alone: its state is not frozen, and one call may train.
    layer = eqx.tree_at(lambda n: n.inference, norm, True)
    assert_close(apply(layer, x), expected)
    train = jax.vmap(lambda x: layer(x, inference=False), axis_name="batch")
    assert_close(train(x), reference.train(x))


@pytest.mark.parametrize("mode", MODES)
def test_made_frozen(mode):
    norm = storax.BatchNorm(3, "batch", inference=True, momentum=0.9, mode=mode)
    assert norm.inference and norm.state_index.inference
    (x,) = batches(1, 6, 3)
    assert_close(eqx.filter_jit(apply)(norm, x), x / np.sqrt(1 + 1e-5))
    assert "custom_call" not in lowered(apply, norm, x)
    # Once thawed, it trains from the start.
    reference = Reference(3, mode, 0.9)
    assert_close(apply(eqx.nn.inference_mode(norm, value=False), x), reference.train(x))
    assert_close(apply(norm, x), reference.normalise(np.asarray(x), *reference.running))


def test_made_frozen_under_jit():
    norm = eqx.filter_jit(lambda: storax.BatchNorm(3, "batch", inference=True))()
    (x,) = batches(1, 6, 3)
    assert norm.inference and norm.state_index.inference
    assert_close(apply(norm, x), x / np.sqrt(1 + 1e-5))


def test_never_trained_is_mean_zero_variance_one():
    norm = eqx.nn.inference_mode(storax.BatchNorm(3, "batch"))
    (x,) = batches(1, 3, 4)
    assert_close(norm(x), x / np.sqrt(1 + 1e-5))


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit, storax.jit])
@pytest.mark.parametrize("mode", MODES)
def test_frozen_and_cast(mode, jit):
    norm = storax.BatchNorm(3, "batch", mode=mode)
    (x,) = batches(1, 6, 3)
    apply(norm, x)
    frozen = eqx.nn.inference_mode(norm)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, frozen)
    out = jit(apply)(half, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), apply(frozen, x), rtol=0.05, atol=0.05)


def test_frozen_in_the_loss_its_statistics_are_not_for_an_optimiser():
    """Frozen outside, they are leaves as weights are, which a weight decay takes for such."""
    norm = storax.BatchNorm(3, "batch")
    (x,) = batches(1, 6, 3)
    apply(norm, x)
    before = running(norm)

    @eqx.filter_jit
    def step(model):
        def loss(model):
            return jnp.sum(apply(eqx.nn.inference_mode(model), x) ** 2)

        grads = eqx.filter_grad(loss)(model)
        decayed = jax.tree.map(lambda p: -0.5 * p, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, jax.tree.map(lambda g, d: d - 0.1 * g, grads, decayed))

    frozen = eqx.nn.inference_mode(step(norm))
    assert not jnp.array_equal(frozen.weight, norm.weight)
    expected = eqx.tree_at(
        lambda m: (m.weight, m.bias), eqx.nn.inference_mode(norm), (frozen.weight, frozen.bias)
    )
    np.testing.assert_array_equal(apply(frozen, x), apply(expected, x))
    assert_close(running(norm), before)
    # The other way.
    shrunk = jax.tree.map(lambda p: p * 0.5 if eqx.is_inexact_array(p) else p, frozen)
    assert not jnp.array_equal(apply(shrunk, x), apply(frozen, x))


# --- In a model -----------------------------------------------------------------------------------


def test_training_a_model():
    """With SpectralNorm, in `Sequential`, as an argument of a jitted step of gradient descent."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = storax.SpectralNorm(eqx.nn.Linear(4, 8, key=keys[0]), "weight", key=keys[1])
    layers = [hidden, storax.BatchNorm(8, "batch", momentum=0.5), jax.nn.relu]
    layers = [eqx.nn.Lambda(f) if f is jax.nn.relu else f for f in layers]
    model = eqx.nn.Sequential([*layers, eqx.nn.Linear(8, 1, key=keys[2])])
    x = batches(1, 16, 4)[0]
    y = jnp.sum(x**2, axis=1, keepdims=True)

    @eqx.filter_jit
    def step(model):
        def loss(model):
            return jnp.mean((apply(model, x) - y) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates = jax.tree.map(lambda g: -0.05 * g, grads)
        return value, eqx.apply_updates(model, updates)

    cores = [i._slot.core for i in (hidden.uv_index, layers[1].state_index)]
    before = [core.num_sets for core in cores]
    losses = []
    for _ in range(40):
        value, model = step(model)
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]
    assert [core.num_sets for core in cores] == [b + 40 for b in before]
    assert not jnp.array_equal(model[1].weight, jnp.ones(8))
    frozen = eqx.nn.inference_mode(model)
    assert "custom_call" not in lowered(apply, frozen, x)
    assert jnp.mean((eqx.filter_jit(apply)(frozen, x) - y) ** 2) < 0.2 * losses[0]


def test_constructor_and_attributes_of_old():
    norm = storax.BatchNorm(3, "batch", 1e-3, False, 0.5, True)
    assert norm.input_size == 3 and norm.axis_name == "batch" and norm.eps == 1e-3
    assert norm.channelwise_affine is False and norm.momentum == 0.5 and norm.inference is True
    assert isinstance(norm.state_index, storax.StateIndex)
    assert isinstance(norm.first_time_index, storax.StateIndex)
    assert norm.mode == "ema"
    assert norm(jnp.ones(3), key=None).shape == (3,)


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
def test_wrong_shape(shape):
    norm = storax.BatchNorm(3, None)
    with pytest.raises(ValueError, match=r"3 channels, but it is of shape \(.*vmap"):
        norm(jnp.zeros(shape))
    with pytest.raises(ValueError, match="3 channels"):
        norm(jnp.zeros(shape), inference=True)


def test_complex_input():
    with pytest.raises(ValueError, match="must be real"):
        storax.BatchNorm(3, None)(jnp.zeros(3, jnp.complex64))


@pytest.mark.parametrize(
    "kwargs",
    [{"mode": "legacy"}, {"momentum": 1.5}, {"momentum": -0.1}, {"dtype": jnp.int32}],
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        storax.BatchNorm(3, "batch", **kwargs)
    with pytest.raises(TypeError, match=r"`input_size`.* must be an integer, not 'batch'"):
        storax.BatchNorm("batch", 3)


def test_missing_axis():
    norm = storax.BatchNorm(3, "batch")
    with pytest.raises(NameError, match=r"BatchNorm.*'batch'.*axis_name='batch'"):
        norm(jnp.ones(3))
    with pytest.raises(NameError, match=r"BatchNorm.*'batch'"):
        jax.vmap(norm, axis_name="other")(jnp.ones((2, 3)))


def test_unnamed_axis_is_refused_and_leaves_the_state_alone():
    norm = storax.BatchNorm(3, "batch", momentum=0.9)
    x, y = batches(2, 6, 3)
    with pytest.raises(RuntimeError, match=r"in BatchNorm: .*batch axes"):
        jax.vmap(jax.vmap(norm, axis_name="batch"))(jnp.stack([x, y]))
    assert_close(running(norm), (jnp.zeros(3), jnp.ones(3)))
    # The first time is still to come.
    assert_close(apply(norm, x), Reference(3, "ema", 0.9).train(x))


@pytest.mark.parametrize("mode", MODES)
def test_training_a_frozen_layer(mode):
    norm = storax.BatchNorm(3, None, inference=True, mode=mode)
    with pytest.raises(RuntimeError, match=r"`inference` flag is true.*value=False"):
        norm(jnp.ones((3, 2)), inference=False)


def test_argument_of_plain_jit():
    norm = storax.BatchNorm(3, None)
    with pytest.raises(TypeError, match=r"equinox\.filter_jit"):
        jax.jit(lambda norm, x: norm(x))(norm, jnp.ones((3, 2)))
