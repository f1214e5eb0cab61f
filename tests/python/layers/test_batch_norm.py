"""BatchNorm in training, against NumPy and against functions without state."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_norm_reference import MODES, Reference, apply, assert_close, batches, running

import storax

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


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
def test_ensemble(jit):
    """A vmap that is not in axis_name is over several models: made by storax.stack, each has its own."""
    make = lambda _: storax.BatchNorm(3, "batch", momentum=0.9)
    step = jit(eqx.filter_vmap(apply))
    norms, alone = storax.stack(make)(jnp.arange(4)), [make(None) for _ in range(4)]
    for x in batches(3, 4, 6, 3):
        assert_close(
            step(norms, x), jnp.stack([apply(n, m) for n, m in zip(alone, x, strict=True)])
        )
    one = make(None)
    with pytest.raises(RuntimeError, match=r"BatchNorm.*the new state is .* with batch axes 0"):
        jax.block_until_ready(jit(eqx.filter_vmap(apply, in_axes=(None, 0)))(one, x))


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
