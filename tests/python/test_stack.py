"""Stacked layers: four layers scanned over are what four separate layers are."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax

N = 4
KEYS = jax.random.split(jax.random.key(0), N)


class Layer(eqx.Module):
    """A weight; a running mean, as BatchNorm has; and a count that every layer starts the same."""

    weight: jax.Array
    mean: storax.StateIndex
    count: storax.StateIndex

    def __init__(self, key):
        self.weight = jax.random.normal(key, (3, 3))
        self.mean = storax.StateIndex()
        self.count = storax.StateIndex(name="count")
        storax.set_state(self.mean, self.weight[0])  # differs from layer to layer
        storax.set_state(self.count, jnp.int32(0))  # does not

    def __call__(self, x):
        mean = storax.get_state(self.mean, jnp.zeros(3))
        y = jnp.tanh(self.weight @ x + mean)
        if not self.mean.inference:
            storax.set_state(self.mean, 0.9 * mean + 0.1 * lax.stop_gradient(y))
            count = storax.get_state(self.count, jnp.int32(0))
            storax.set_state(self.count, count + 1)
        return y


def scan(layers, x):
    arrays, static = eqx.partition(layers, eqx.is_array)
    return lax.scan(lambda x, a: (eqx.combine(a, static)(x), None), x, arrays)[0]


def loop(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def both():
    return storax.stack(Layer)(KEYS), [Layer(k) for k in KEYS]


def states(separate):
    means = jnp.stack([storax.get_state(la.mean, jnp.zeros(3)) for la in separate])
    counts = jnp.stack([storax.get_state(la.count, jnp.int32(0)) for la in separate])
    return means, counts


def stacked_states(stacked):
    means = storax.get_state(stacked.mean, jnp.zeros((N, 3)))
    return means, storax.get_state(stacked.count, jnp.zeros(N, jnp.int32))


def check(stacked, separate):
    for a, b in zip(stacked_states(stacked), states(separate), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


X = jnp.array([1.0, -2.0, 0.5])


def test_construction():
    stacked, separate = both()
    check(stacked, separate)
    assert stacked.weight.shape == (N, 3, 3)


@pytest.mark.parametrize("jit", [eqx.filter_jit, lambda f: f], ids=["jit", "eager"])
def test_forward(jit):
    stacked, separate = both()
    run = jit(scan)
    for _ in range(3):
        np.testing.assert_allclose(run(stacked, X), loop(separate, X), rtol=1e-5)
        check(stacked, separate)
    assert (stacked_states(stacked)[1] == 3).all()


def test_one_layer_at_a_time():
    stacked, separate = both()
    for k in (2, 0):
        one = jax.tree.map(lambda x, k=k: x[k] if eqx.is_array(x) else x, stacked)
        np.testing.assert_allclose(one(X), separate[k](X), rtol=1e-5)
        check(stacked, separate)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_backward(checkpoint):
    stacked, separate = both()
    wrap = eqx.filter_checkpoint if checkpoint else lambda f: f

    def scan_loss(layers):
        arrays, static = eqx.partition(layers, eqx.is_array)
        step = wrap(lambda x, a: eqx.combine(a, static)(x))
        return lax.scan(lambda x, a: (step(x, a), None), X, arrays)[0].sum()

    got = eqx.filter_jit(eqx.filter_grad(scan_loss))(stacked)
    want = eqx.filter_grad(lambda layers: loop(layers, X).sum())(separate)
    np.testing.assert_allclose(
        got.weight, jnp.stack([w.weight for w in want]), rtol=1e-4, atol=1e-6
    )
    check(stacked, separate)
    assert (stacked_states(stacked)[1] == 1).all()


def test_frozen():
    stacked, separate = both()
    scan(stacked, X), loop(separate, X)
    frozen = eqx.nn.inference_mode(stacked)
    run = eqx.filter_jit(scan)
    want = loop(eqx.nn.inference_mode(separate), X)
    np.testing.assert_allclose(run(frozen, X), want, rtol=1e-5)
    np.testing.assert_allclose(scan(frozen, X), want, rtol=1e-5)
    assert "custom_call" not in run.lower(frozen, X).as_text()
    scan(stacked, X), loop(separate, X)  # seen by the next call
    want = loop(eqx.nn.inference_mode(separate), X)
    np.testing.assert_allclose(run(frozen, X), want, rtol=1e-5)
    one = jax.tree.map(lambda x: x[1] if eqx.is_array(x) else x, frozen)
    np.testing.assert_allclose(one(X), eqx.nn.inference_mode(separate)[1](X), rtol=1e-5)


def test_vmap_over_the_layers():
    stacked, separate = both()
    call = lambda layers, x: eqx.filter_vmap(lambda la, x: la(x), in_axes=(eqx.if_array(0), None))(
        layers, x
    )
    for f in (call, eqx.filter_jit(call)):
        got = f(stacked, X)
        np.testing.assert_allclose(got, jnp.stack([la(X) for la in separate]), rtol=1e-5)
        check(stacked, separate)
    frozen = eqx.nn.inference_mode(stacked)
    want = jnp.stack([la(X) for la in eqx.nn.inference_mode(separate)])
    np.testing.assert_allclose(eqx.filter_jit(call)(frozen, X), want, rtol=1e-5)


def test_vmap_over_the_layers_masked():
    stacked, _ = both()
    before = storax.get_state(stacked.count, jnp.zeros(N, jnp.int32))
    take = jnp.array([True, False, True, False])

    def bump(layer, take):
        def yes():
            n = storax.get_state(layer.count, jnp.int32(0) * take)
            storax.set_state(layer.count, n + 1)

        lax.cond(take, yes, lambda: None)

    eqx.filter_jit(eqx.filter_vmap(bump))(stacked, take)
    after = storax.get_state(stacked.count, jnp.zeros(N, jnp.int32))
    np.testing.assert_array_equal(after - before, take.astype(jnp.int32))


def test_batched_states_in_a_scan_over_layers():
    """Lanes of a vmap inside of the scan have states of their own, in each layer."""
    stacked = storax.stack(lambda key: (storax.StateIndex(), key))(KEYS)[0]
    lanes = partial(jax.vmap, in_axes=1, out_axes=1)
    whole = lambda: lanes(lambda x: storax.get_state(stacked, x))(jnp.zeros((N, 2)))
    start, xs = jnp.arange(2.0 * N).reshape(N, 2), jnp.array([1.0, 10.0])
    lanes(lambda x: (storax.set_state(stacked, x), x)[1])(start)
    arrays, static = eqx.partition(stacked, eqx.is_array)

    def add(index, x):
        storax.set_state(index, storax.get_state(index, 0 * x) + x)
        return 2 * x

    step = lambda xs, a: (jax.vmap(partial(add, eqx.combine(a, static)))(xs), None)
    jax.jit(lambda xs: lax.scan(step, xs, arrays))(xs)
    want = start + 2.0 ** jnp.arange(N)[:, None] * xs
    np.testing.assert_allclose(whole(), want)

    # All of the layers at once have no such lanes, yet.
    maybe = lambda index, x: lax.cond(x > 5, lambda: storax.set_state(index, x), lambda: None)
    for f in (add, maybe):
        with pytest.raises(NotImplementedError, match="Scan over the layers"):
            eqx.filter_vmap(lambda index, f=f: jax.vmap(partial(f, index))(xs))(stacked)
    np.testing.assert_allclose(whole(), want)


def test_masked_by_an_unbatched_row():
    stacked, _ = both()
    arrays, static = eqx.partition(stacked, eqx.is_array)
    xs = jnp.array([1.0, -1.0, 2.0])

    def f(x):
        def step(c, a):
            layer = eqx.combine(a, static)

            def yes():
                n = storax.get_state(layer.count, jnp.int32(0))
                storax.set_state(layer.count, n + 1)

            lax.cond(c > 0, yes, lambda: None)
            return c, None

        return lax.scan(step, x, arrays)[0]

    jax.jit(jax.vmap(f))(xs)
    assert (storax.get_state(stacked.count, jnp.zeros(N, jnp.int32)) == 1).all()


def test_batch_norm_and_spectral_norm():
    class Block(eqx.Module):
        linear: storax.SpectralNorm
        norm: storax.BatchNorm

        def __init__(self, key):
            a, b = jax.random.split(key)
            linear = eqx.nn.Linear(3, 3, key=a)
            self.linear = storax.SpectralNorm(linear, "weight", key=b)
            self.norm = storax.BatchNorm(3, "batch", mode="batch")

        def __call__(self, x):
            return self.norm(jnp.tanh(self.linear(x)))

    xs = jax.random.normal(jax.random.key(1), (8, 3))
    stacked, separate = storax.stack(Block)(KEYS), [Block(k) for k in KEYS]
    batched = lambda f: lambda layers: jax.vmap(lambda x: f(layers, x), axis_name="batch")(xs)
    for _ in range(2):
        got = eqx.filter_jit(batched(scan))(stacked)
        np.testing.assert_allclose(got, batched(loop)(separate), rtol=1e-3, atol=1e-4)
    got = eqx.filter_jit(batched(scan))(eqx.nn.inference_mode(stacked))
    want = batched(loop)(eqx.nn.inference_mode(separate))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_shared_index_stays_shared():
    def make(key):
        index = storax.StateIndex()
        storax.set_state(index, jax.random.uniform(key))
        return index, index

    a, b = storax.stack(make)(KEYS)
    assert a._slot is b._slot


@pytest.mark.parametrize("differs", [True, False])
def test_states_that_are_set_under_a_vmap_of_their_own_are_refused(differs):
    def make(key):
        index = storax.StateIndex(name="lanes")
        start = jax.random.uniform(key, (N,)) if differs else jnp.zeros(N)
        jax.vmap(lambda x: storax.set_state(index, x))(start)
        return index

    with pytest.raises(NotImplementedError, match=r"'lanes' is set under a `vmap` of its own"):
        storax.stack(make)(KEYS)


def test_states_of_each_device_are_refused():
    stacked, _ = both()
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x: scan(stacked, x[0])[None]
    f = jax.shard_map(f, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    with pytest.raises(NotImplementedError, match=r"inside of `shard_map` or `pmap` are not"):
        jax.jit(f)(jnp.ones((4, 3)))


def test_states_that_a_program_in_flight_sets():
    class Late(eqx.Module):
        count: storax.StateIndex

        def __init__(self, key):
            self.count = storax.StateIndex()

            @jax.jit
            def set_late(m):
                for _ in range(12):
                    m = jnp.tanh(m @ m) * 0.01
                storax.set_state(self.count, 3 + 0 * m[0, 0])

            set_late(jnp.ones((800, 800)))

    layers = storax.stack(Late)(KEYS)
    np.testing.assert_array_equal(storax.get_state(layers.count, jnp.zeros(N)), [3] * N)


def test_errors():
    with pytest.raises(RuntimeError, match=r"storax.stack must be called outside"):
        jax.jit(lambda: storax.stack(Layer)(KEYS).weight)()

    unset = storax.stack(lambda key: (storax.StateIndex(name="unset"), key))(KEYS)[0]
    arrays, static = eqx.partition(unset, eqx.is_array)
    f = jax.jit(
        lambda: lax.scan(
            lambda c, a: (c, storax.set_state(eqx.combine(a, static), jnp.zeros(2))), 0, arrays
        )
    )

    def run():
        jax.block_until_ready(f())
        storax.barrier()

    with pytest.raises(RuntimeError, match=r"'unset'.*first set.*rows"):
        run()

    stacked, _ = both()
    one = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, stacked)
    with pytest.raises(RuntimeError, match=r"'count'.*i32\[4\].*i32\[4,7\]"):
        jax.block_until_ready(
            jax.jit(lambda: storax.get_state(one.count, jnp.zeros(7, jnp.int32)))()
        )
    with pytest.raises(TypeError, match=r"'count'.*row.*equinox.combine"):
        storax.get_state(eqx.filter(stacked, lambda x: isinstance(x, bool)).count, jnp.int32(0))


PICKS = {
    "reversed": lambda a: a[::-1],
    "repeated": lambda a: a[jnp.array([0, 0, 3])],
    "the first": lambda a: a[:2],
    "the others": lambda a: a[1:],
    "one": lambda a: a[2],
}


@pytest.mark.parametrize("pick", PICKS)
def test_rows_in_another_order(pick):
    """Each layer goes with its own state, whatever JAX's own functions have made of the stack."""
    pick = PICKS[pick]
    picked = lambda layers: jax.tree.map(lambda a: pick(a) if eqx.is_array(a) else a, layers)
    call = eqx.filter_vmap(lambda la: la(X)) if picked(jnp.arange(N)).ndim else lambda la: la(X)
    stacked, _ = both()
    before = []
    for factor in (1, -1):
        means = factor * storax.get_state(stacked.mean, jnp.zeros((N, 3)))
        storax.set_state(stacked.mean, means)
        means = storax.get_state(stacked.mean, jnp.zeros((N, 3)))
        want = pick(
            jnp.stack([jnp.tanh(w @ X + m) for w, m in zip(stacked.weight, means, strict=True)])
        )
        freeze = eqx.nn.inference_mode
        frozen = [picked(freeze(stacked)), freeze(picked(stacked))]
        # And those that were frozen when the state was another.
        for layers in (*frozen, *before):
            for f in (call, eqx.filter_jit(call)):
                np.testing.assert_allclose(f(layers), want, rtol=1e-5)
        before = frozen


@pytest.mark.parametrize(
    "jit", [eqx.filter_jit, storax.jit, lambda f: f], ids=["jit", "ours", "eager"]
)
def test_several_rows_at_once(jit):
    stacked, _ = both()
    means = np.array(storax.get_state(stacked.mean, jnp.zeros((N, 3))))
    get = jit(lambda index, k: storax.get_state(index, jnp.zeros((k, 3))))
    put = jit(lambda index, x: storax.set_state(index, x))
    some = jax.tree.map(lambda a: a[jnp.array([3, 1])] if eqx.is_array(a) else a, stacked.mean)
    np.testing.assert_array_equal(get(stacked.mean, N), means)
    np.testing.assert_array_equal(get(some, 2), means[[3, 1]])
    put(some, jnp.array([[1.0] * 3, [2.0] * 3]))
    means[[3, 1]] = [[1.0], [2.0]]
    np.testing.assert_array_equal(get(stacked.mean, N), means)
    put(stacked.mean, jnp.asarray(means + 1))
    np.testing.assert_array_equal(get(some, 2), means[[3, 1]] + 1)
    with pytest.raises(RuntimeError, match="2 rows of a stack"):
        get(some, N)


def test_rows_that_are_not_there():
    stacked, _ = both()
    shifted = jax.tree.map(lambda a: a + 10 if eqx.is_array(a) else a, stacked)
    one = jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, shifted)
    for use in (
        lambda: storax.get_state(one.count, jnp.int32(0)),
        lambda: storax.set_state(one.count, jnp.int32(0)),
        lambda: storax.get_state(shifted.count, jnp.zeros(N, jnp.int32)),
        lambda: storax.get_state(eqx.nn.inference_mode(one).count, jnp.int32(0)),
    ):
        with pytest.raises(RuntimeError, match=r" is of row .*1.* of a stack of 4: there is no"):
            use()
    assert (stacked_states(stacked)[1] == 0).all()


def test_without_an_array():
    with pytest.raises(TypeError, match=r"must be given an array, .*split"):
        storax.stack(lambda: Layer(KEYS[0]))()
