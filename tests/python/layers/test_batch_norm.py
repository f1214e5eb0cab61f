"""BatchNorm: its values and gradients, against NumPy and against functions without state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax

MODES = ["ema", "batch"]
LIKE = (jnp.zeros(3), jnp.zeros(3))


class Reference:
    """The same layer on a whole batch of shape (batch, channels, ...), in NumPy and 64 bits."""

    def __init__(self, channels, mode, momentum, eps=1e-5):
        self.mode, self.momentum, self.eps = mode, momentum, eps
        self.first_time = mode == "ema"
        self.running = np.zeros(channels), np.ones(channels)

    def train(self, x):
        x = np.asarray(x, np.float64)
        axes = (0, *range(2, x.ndim))
        batch = x.mean(axes), x.var(axes)
        momentum = 0 if self.first_time else self.momentum
        self.first_time = False
        self.running = tuple(
            momentum * r + (1 - momentum) * b for r, b in zip(self.running, batch, strict=True)
        )
        return self.normalise(x, *(self.running if self.mode == "ema" else batch))

    def normalise(self, x, mean, var):
        shape = (-1, *(1,) * (x.ndim - 2))
        return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + self.eps)


def batches(n, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(i, 1 + i, shape), jnp.float32) for i in range(n)]


def running(norm, like=LIKE):
    """The running statistics; asks for unbatched ones, so it fails if they are not."""
    return storax.get_state(norm.state_index, like=like)


def assert_close(actual, expected, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol), actual, expected
    )


def apply(norm, x):
    return jax.vmap(norm, axis_name="batch")(x)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spatial", [(), (5,), (2, 4)])
def test_training_matches_numpy(mode, spatial):
    norm = storax.BatchNorm(3, "batch", momentum=0.9, mode=mode)
    reference = Reference(3, mode, 0.9)
    step = jax.jit(lambda x: apply(norm, x))
    for x in batches(4, 6, 3, *spatial):
        assert_close(step(x), reference.train(x))
        assert_close(running(norm), reference.running)


@pytest.mark.parametrize("mode", MODES)
def test_ways_to_run_agree(mode):
    def eager(norm, x):
        return apply(norm, x)

    def closed_over(norm, x):
        return jax.jit(lambda x: apply(norm, x))(x)

    results = []
    for way in (eager, closed_over, eqx.filter_jit(apply)):
        norm = storax.BatchNorm(3, "batch", momentum=0.5, mode=mode)
        results.append([(way(norm, x), running(norm)) for x in batches(3, 6, 3)])
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_first_call_sets_running_to_batch_in_ema_mode_only():
    (x,) = batches(1, 6, 3)
    norm = storax.BatchNorm(3, "batch", momentum=0.75)
    apply(norm, x)
    assert_close(running(norm), (x.mean(0), x.var(0)))
    norm = storax.BatchNorm(3, "batch", momentum=0.75, mode="batch")
    apply(norm, x)
    assert_close(running(norm), (x.mean(0) / 4, 0.75 + x.var(0) / 4))


def test_momentum_is_the_weight_of_the_old():
    x, y = batches(2, 6, 3)
    for momentum, kept in [(1, x), (0, y)]:
        norm = storax.BatchNorm(3, "batch", momentum=momentum)
        apply(norm, x)
        apply(norm, y)
        assert_close(running(norm), (kept.mean(0), kept.var(0)))


def test_variance_is_sound_where_the_mean_is_large():
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 0.1, (64, 3)), jnp.float32)
    norm = storax.BatchNorm(3, "batch", mode="batch", momentum=0)
    out = apply(norm, x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(running(norm)[1], exact.var(0), rtol=1e-2)
    np.testing.assert_allclose(out.std(0), 1, atol=1e-2)


def test_affine():
    norm = storax.BatchNorm(3, "batch")
    assert_close((norm.weight, norm.bias), (jnp.ones(3), jnp.zeros(3)))
    weight, bias = jnp.array([1.0, -2.0, 3.0]), jnp.array([4.0, 5.0, -6.0])
    changed = eqx.tree_at(lambda n: (n.weight, n.bias), norm, (weight, bias))
    (x,) = batches(1, 6, 3, 4)
    plain = storax.BatchNorm(3, "batch", channelwise_affine=False)
    assert plain.weight is None and plain.bias is None
    expected = apply(plain, x) * weight[:, None] + bias[:, None]
    assert_close(apply(changed, x), expected)
    # A copy by tree_at shares the state.
    assert_close(running(norm), running(changed))
    assert changed.state_index._slot is norm.state_index._slot


def test_dtypes():
    (x,) = batches(1, 64, 3)
    norm = storax.BatchNorm(3, "batch")
    half = x.astype(jnp.bfloat16)
    out = apply(norm, half)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(half, np.float64)
    # Statistics in bfloat16 would be off by about 1e-2.
    assert_close(running(norm), (exact.mean(0), exact.var(0)))

    low = storax.BatchNorm(3, "batch", dtype=jnp.bfloat16)
    assert low.weight.dtype == low.bias.dtype == jnp.bfloat16
    assert apply(low, x).dtype == jnp.float32
    like = (jnp.zeros(3, jnp.bfloat16),) * 2
    assert all(a.dtype == jnp.bfloat16 for a in running(low, like))

    integers = storax.BatchNorm(3, "batch")
    assert apply(integers, jnp.arange(12).reshape(4, 3)).dtype == jnp.float32


# --- Gradients ------------------------------------------------------------------------------------


def functional(mode, momentum, old, weight, bias, x):
    """What a layer without state would be: `old` is `None` on the first call."""
    batch = mean, var = jnp.mean(x, 0), jnp.var(x, 0)
    if mode == "ema" and old is not None:
        mean, var = (momentum * r + (1 - momentum) * b for r, b in zip(old, batch, strict=True))
    return (x - mean) / jnp.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    norm = storax.BatchNorm(3, "batch", momentum=0.6, mode=mode)
    weight, bias = jnp.array([1.0, -2.0, 3.0]), jnp.array([4.0, 5.0, -6.0])
    weigh = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def stateful(args):
        new = eqx.tree_at(lambda n: (n.weight, n.bias), norm, args[:2])
        return jnp.sum(weigh * apply(new, args[2]) ** 2)

    @jax.value_and_grad
    def pure(args, old):
        return jnp.sum(weigh * functional(mode, 0.6, old, *args) ** 2)

    old = None
    for x in batches(3, 6, 3):
        args = (weight, bias, x)
        assert_close(stateful(args), pure(args, old), atol=5e-4)
        old = running(norm)


def test_checkpoint_neither_repeats_nor_loses_an_update():
    (x,) = batches(1, 6, 3)

    def loss(norm, wrap):
        f = wrap(lambda x: jnp.sum(jnp.sin(apply(norm, jnp.sin(x)))))
        return jax.jit(jax.value_and_grad(f))(x)

    results = []
    for wrap in (lambda f: f, jax.checkpoint):
        norm = storax.BatchNorm(3, "batch")
        cores = norm.state_index._slot.core, norm.first_time_index._slot.core
        before = [core.num_sets for core in cores]
        results.append((loss(norm, wrap), running(norm)))
        assert [core.num_sets for core in cores] == [b + 1 for b in before]
    assert_close(results[1], results[0])


# --- Where it is called ---------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("inner", "outer"), ["outer", "inner"]])
def test_statistics_over_two_axes(names):
    (x,) = batches(1, 4, 6, 3)
    norm = storax.BatchNorm(3, names)
    assert norm.axis_name == tuple(names)
    out = jax.vmap(jax.vmap(norm, axis_name="inner"), axis_name="outer")(x)
    flat = storax.BatchNorm(3, "batch")
    assert_close(out.reshape(24, 3), apply(flat, x.reshape(24, 3)))
    assert_close(running(norm), running(flat))


@pytest.mark.parametrize("axis_name", [None, ()])
def test_statistics_of_one_example(axis_name):
    (x,) = batches(1, 3, 20)
    norm = storax.BatchNorm(3, axis_name)
    reference = Reference(3, "ema", 0.99)
    assert_close(norm(x), reference.train(x[None])[0])
    assert_close(running(norm), reference.running)


def test_inside_scan():
    xs = jnp.stack(batches(4, 6, 3))
    norm = storax.BatchNorm(3, "batch", momentum=0.9)
    out = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, apply(norm, x)), None, xs)[1])(xs)
    reference = Reference(3, "ema", 0.9)
    assert_close(out, np.stack([reference.train(x) for x in xs]))
    assert_close(running(norm), reference.running)


def test_several_calls_in_one_step():
    x, y = batches(2, 6, 3)
    norm = storax.BatchNorm(3, "batch", momentum=0.9)
    reference = Reference(3, "ema", 0.9)
    out = jax.jit(lambda x, y: (apply(norm, x), apply(norm, y)))(x, y)
    assert_close(out, (reference.train(x), reference.train(y)))
    assert_close(running(norm), reference.running)


def test_made_under_jit():
    norm = eqx.filter_jit(lambda: storax.BatchNorm(3, "batch", momentum=0.9))()
    reference = Reference(3, "ema", 0.9)
    for x in batches(2, 6, 3):
        assert_close(apply(norm, x), reference.train(x))


# --- Inference ------------------------------------------------------------------------------------


def trained(mode="ema", **kwargs):
    norm = storax.BatchNorm(3, "batch", momentum=0.9, mode=mode, **kwargs)
    reference = Reference(3, mode, 0.9)
    for x in batches(3, 6, 3, 4):
        apply(norm, x)
        reference.train(x)
    return norm, reference


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


def test_never_trained_is_mean_zero_variance_one():
    norm = eqx.nn.inference_mode(storax.BatchNorm(3, "batch"))
    (x,) = batches(1, 3, 4)
    assert_close(norm(x), x / np.sqrt(1 + 1e-5))


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
