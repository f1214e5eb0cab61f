"""States that are spread over several devices."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import storax
from jit.counting import counter


def mesh_of(kind):
    return jax.make_mesh((4,), ("i",), axis_types=(kind,))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return mesh_of(request.param)


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def test_a_state_keeps_the_sharding_of_the_value_set(mesh):
    index = storax.StateIndex()
    like = put(jnp.zeros((8, 3)), mesh, "i")
    storax.set_state(index, like)

    @storax.jit
    def f(x):
        s = storax.get_state(index, x) + x
        storax.set_state(index, s)
        return s.sum()

    for k in range(1, 4):
        assert f(put(jnp.ones((8, 3)), mesh, "i")) == 24 * k
    state = storax.get_state(index, like)
    np.testing.assert_array_equal(state, 3 * np.ones((8, 3)))
    assert state.sharding.is_equivalent_to(like.sharding, 2)


def test_a_state_set_before_on_one_device_is_replicated(mesh):
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))

    @storax.jit
    def f(x):
        n = storax.get_state(index, jnp.float32(0)) + 1
        storax.set_state(index, n)
        return x + n

    xs = put(jnp.zeros(8), mesh, "i")
    for k in range(1, 4):
        out = f(xs)
        np.testing.assert_array_equal(out, k)
        assert out.sharding.is_equivalent_to(xs.sharding, 1)
    assert storax.get_state(index, jnp.float32(0)) == 3
    storax.set_state(index, jnp.float32(7))
    np.testing.assert_array_equal(f(xs), 8 * np.ones(8))


@pytest.mark.parametrize("set_mesh", [False, True])
def test_one_device_first_and_then_several(mesh, set_mesh):
    index, count, _ = counter()
    f = storax.jit(lambda x: x * count())
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(f(x), x)
    np.testing.assert_array_equal(f(x), 2 * x)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        xs = put(x, mesh, "i")
        np.testing.assert_array_equal(f(xs), 3 * x)
        np.testing.assert_array_equal(f(xs), 4 * x)
        assert storax.get_state(index, jnp.float32(0)) == 4
    with pytest.raises(NotImplementedError, match="Leave `pack` out"):
        storax.jit(f.__wrapped__, pack=True)(xs)


@pytest.mark.parametrize("size", [None, 20_000])
def test_a_state_set_before_under_set_mesh(mesh, size):
    _, count, state = counter(0, size)
    f = storax.jit(lambda x: x + count().sum() / (size or 1))
    with jax.set_mesh(mesh):
        xs = put(jnp.zeros(4), mesh, "i")
        for k in range(1, 4):
            np.testing.assert_array_equal(f(xs), k)
        assert state() == 3


def test_first_set_inside(mesh):
    index = storax.StateIndex()

    @storax.jit
    def f(x):
        storax.set_state(index, 2 * x)
        return storax.get_state(index, x).sum()

    xs = put(jnp.arange(8.0), mesh, "i")
    for _ in range(3):
        assert f(xs) == 56
    np.testing.assert_array_equal(storax.get_state(index, xs), 2 * np.arange(8))


def test_first_set_in_a_branch_is_a_clear_error(mesh):
    index = storax.StateIndex(name="late")

    @storax.jit
    def f(x, p):
        def start(x):
            storax.set_state(index, x)
            return x

        return jax.lax.cond(p, start, lambda x: x, x)

    args = put(jnp.zeros(8), mesh, "i"), put(jnp.array(True), mesh)
    for call in (f, f.lower):
        with pytest.raises(
            NotImplementedError, match=r"'late': this is the first set, and it is in a"
        ):
            call(*args)
    storax.set_state(index, args[0])
    f(*args)


def test_what_is_wrong_is_said_as_it_is(mesh):
    """Not that plain `jax.jit`, which would run it elsewhere, can't run it here."""
    x = put(jnp.zeros(8), mesh, "i")
    index = storax.StateIndex(name="unset")
    get = storax.jit(lambda x: storax.get_state(index, x))
    bump = storax.jit(lambda x: storax.set_state(index, storax.get_state(index, x) + 1))
    for call in (get, bump, get.lower):
        with pytest.raises(
            RuntimeError, match=r"'unset': nothing has been set, so there is no f32\[8"
        ):
            call(x)
    storax.set_state(index, jnp.zeros(3))
    for call in (get, bump):
        with pytest.raises(
            RuntimeError, match=r"'unset': it holds f32\[3\], but `like` is f32\[8\]"
        ):
            call(x)
    with pytest.raises(RuntimeError, match=r"it holds f32\[3\], but the new state is f32\[8\]"):
        storax.jit(lambda x: storax.set_state(index, x))(x)
    two = storax.StateIndex(name="two")

    @storax.jit
    def disagrees(x):
        storax.set_state(two, x)
        return storax.get_state(two, x.sum())

    with pytest.raises(RuntimeError, match=r"'two' is used as a state of f32\[8\] and f32\[\]"):
        disagrees(x)
    inside = storax.StateIndex(name="inside")

    inner = jax.custom_batching.custom_vmap(lambda x: storax.get_state(inside, x))
    inner.def_vmap(lambda size, batched, x: (x, True))
    with pytest.raises(NotImplementedError, match="inside `custom_vmap_call`"):
        storax.jit(inner)(x)
    with jax.debug_nans(True), pytest.raises(NotImplementedError, match="debug_nans"):
        storax.jit(lambda x: storax.set_state(index, x.sum() + jnp.zeros(3)))(x)


def test_scan_and_grad(mesh):
    index = storax.StateIndex()
    w = put(jnp.ones((4, 8)), mesh, None, "i")
    storax.set_state(index, w)

    @storax.jit
    def f(w, n):
        def body(c, _):
            s = storax.get_state(index, w)
            storax.set_state(index, s * 2)
            return c + s * w, None

        def loss(w):
            return jax.lax.scan(body, w, None, length=3)[0].sum()

        return jax.grad(lambda w: (storax.get_state(index, jax.lax.stop_gradient(w)) * w).sum())(
            w
        ), loss(w)

    grad, loss = f(w, 1)
    np.testing.assert_array_equal(grad, np.ones((4, 8)))
    assert loss == 32 * (1 + 1 + 2 + 4)
    np.testing.assert_array_equal(storax.get_state(index, w), 8 * np.ones((4, 8)))


def test_shardings_given(mesh):
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(1))
    rows, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())

    @functools.partial(storax.jit, in_shardings=(rows, None), out_shardings={"a": rows, "b": whole})
    def f(x, tree):
        n = storax.get_state(index, jnp.float32(0))
        storax.set_state(index, n + 1)
        return {"a": x + n, "b": tree["y"] * n}

    if mesh.axis_types[0] == AxisType.Explicit:
        x = put(np.zeros(8, np.float32), mesh, "i")
    else:
        x = np.zeros(8, np.float32)
    for k in range(1, 4):
        out = f(x, {"y": jnp.float32(2)})
        np.testing.assert_array_equal(out["a"], k * np.ones(8))
        assert out["a"].sharding.is_equivalent_to(rows, 1)
        assert float(out["b"]) == 2 * k


def test_two_jits_of_one_function_each_keep_their_shardings(mesh):
    """JAX traces the function once, and the two share what it found."""
    index = storax.StateIndex()
    x = put(np.arange(8, dtype=np.float32), mesh, "i")
    storax.set_state(index, jnp.zeros(()))
    rows, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())

    def f(x):
        n = storax.get_state(index, jnp.zeros(()))
        storax.set_state(index, n + 1)
        return x * 2

    both = lambda f: lambda x: [jax.jit(f, out_shardings=s)(x) for s in (rows, whole)]
    without = jax.jit(both(lambda x: x * 2))(x)
    for got, want in zip(storax.jit(both(f))(x), without, strict=True):
        np.testing.assert_array_equal(got, 2 * np.arange(8))
        assert got.sharding.is_equivalent_to(want.sharding, 1)
    assert without[0].sharding.is_equivalent_to(rows, 1)
    assert storax.get_state(index, jnp.zeros(())) == 2


def test_plain_jit_says_what_to_do(mesh):
    index = storax.StateIndex(name="spread")
    x = put(jnp.zeros(8), mesh, "i")
    storax.set_state(index, x)
    with pytest.raises(NotImplementedError, match=r"spread.*storax\.jit"):
        jax.jit(lambda x: storax.get_state(index, x))(x)
    np.testing.assert_array_equal(storax.get_state(index, x), np.zeros(8))
    with pytest.raises(RuntimeError, match=r"it holds f32\[8\]"):
        storax.get_state(index, jnp.zeros(7))
    with pytest.raises(RuntimeError, match=r"it holds f32\[8\]"):
        storax.set_state(index, jnp.zeros(7))


def test_large_state_in_place(mesh):
    index = storax.StateIndex()
    x = put(jnp.zeros((4096, 8)), mesh, "i")
    storax.set_state(index, x)
    f = storax.jit(lambda x: storax.set_state(index, storax.get_state(index, x) + 1))
    f(x)
    before = {
        s.data.unsafe_buffer_pointer()
        for s in storax._core.loan(index._slot.core)[0].addressable_shards
    }
    f(x)
    after = {
        s.data.unsafe_buffer_pointer()
        for s in storax._core.loan(index._slot.core)[0].addressable_shards
    }
    assert before == after


def test_a_replicated_set_does_not_change_the_sharding():
    mesh = mesh_of(AxisType.Auto)
    index = storax.StateIndex()
    x = put(jnp.arange(8.0), mesh, "i")
    storax.set_state(index, x)

    @storax.jit
    def f(x):
        mean = jax.lax.with_sharding_constraint(x.mean(), NamedSharding(mesh, P()))
        whole = jnp.full(8, mean)
        storax.set_state(index, jax.lax.with_sharding_constraint(whole, NamedSharding(mesh, P())))

    for _ in range(2):
        f(x)
        state = storax.get_state(index, x)
        np.testing.assert_array_equal(state, np.full(8, 3.5))
        assert state.sharding.is_equivalent_to(x.sharding, 1)


def test_shard_map_in_storax_jit(mesh):
    index = storax.StateIndex()

    def per_device(x):
        storax.set_state(index, x.sum(keepdims=True))
        s = storax.get_state(index, x[:1])
        storax.set_state(index, s + 1)
        return x + s

    f = storax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
    x = put(jnp.arange(8.0), mesh, "i")
    np.testing.assert_array_equal(f(x), [1, 2, 7, 8, 13, 14, 19, 20])


@pytest.mark.parametrize("donate", [True, False])
def test_a_state_per_device_beside_others(mesh, donate):
    """The ones stay calls, within the mapped function; the others are arguments and results."""
    each, all_, spread = (storax.StateIndex(name=n) for n in ("each", "all", "spread"))
    x = put(jnp.arange(8.0), mesh, "i")
    storax.set_state(all_, jnp.float32(0))
    storax.set_state(spread, x)

    def per_device(x):
        s = storax.get_state(each, x)
        storax.set_state(each, s + x)
        return s

    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=P("i"), out_specs=P("i"))

    def step(x):
        storax.set_state(all_, storax.get_state(all_, jnp.float32(0)) + 1)
        y = mapped(x)
        storax.set_state(spread, storax.get_state(spread, x) + y)
        return y

    @functools.partial(storax.jit, donate=donate)
    def f(x):
        return jax.lax.scan(lambda c, _: (step(x), None), x, None, length=2)[0]

    storax.set_state(each, jnp.zeros(2))
    for k in range(1, 4):
        np.testing.assert_array_equal(f(x), (2 * k - 1) * np.arange(8.0))
    assert storax.get_state(all_, jnp.float32(0)) == 6
    np.testing.assert_array_equal(storax.get_state(spread, x), 16 * np.arange(8.0))
    np.testing.assert_array_equal(
        storax.get_state(each, jnp.zeros((4, 2))), 6 * np.arange(8.0).reshape(4, 2)
    )
    text = f.lower(x).as_text()
    assert "storax.get_state" in text and "storax.load_states" not in text

    @storax.jit
    def both(x):
        return mapped(x) + storax.get_state(each, jnp.zeros((4, 2))).sum()

    with pytest.raises(NotImplementedError, match="'each' is used inside of a `shard_map`"):
        both(x)


def test_a_state_per_device_on_a_mesh_of_one():
    """There small states are packed: the store comes after what may fail in the mapped function."""
    mesh = jax.make_mesh((1,), ("i",), devices=jax.devices()[:1])
    each, all_ = storax.StateIndex(name="each"), storax.StateIndex()
    storax.set_state(all_, jnp.float32(0))
    storax.set_state(each, jnp.zeros(3))

    @storax.jit
    def f(x):
        storax.set_state(all_, storax.get_state(all_, jnp.float32(0)) + 1)
        set_it = lambda x: (storax.set_state(each, x), x)[1]
        return jax.shard_map(set_it, mesh=mesh, in_specs=P(), out_specs=P())(x)

    f(jnp.ones(3))
    assert storax.get_state(all_, jnp.float32(0)) == 1
    with pytest.raises(RuntimeError, match="'each'"):
        jax.block_until_ready(f(jnp.ones(4)))
    assert storax.get_state(all_, jnp.float32(0)) == 1


def _cond(count):
    return lambda x: lax.cond(x > 1, lambda x: x * count(), lambda x: x, x)


def _cond_of_what_is_replicated(count):
    k = jnp.float32(3)
    return lambda x: lax.cond(x > 1, lambda: k * count(), lambda: k)


def _switch(count):
    return lambda x: lax.switch((x > 1) * 1, [lambda x: x * count(), lambda x: x], x)


def _while(count):
    body = lambda c: (c[0] - count(), c[1] + 1)
    return lambda x: lax.while_loop(lambda c: c[0] > 0, body, (x, 0.0))[1]


def _scan_in_cond(count):
    scan = lambda x: lax.scan(lambda c, _: (c * count(), None), x, None, length=2)[0]
    return lambda x: lax.cond(x > 1, scan, lambda x: x, x)


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("own_state", [False, True])
@pytest.mark.parametrize(
    "make", [_cond, _cond_of_what_is_replicated, _switch, _while, _scan_in_cond]
)
def test_lanes_over_a_mesh_part_company(make, own_state, set_mesh, mesh):
    """As they do on a single device, whatever the kind of the mesh's axes."""

    def run(x):
        index = storax.StateIndex()

        def in_lane(x, start):
            like = start if own_state else jnp.float32(0)

            def count():
                storax.set_state(index, storax.get_state(index, like) + 1)
                return 2.0

            return make(count)(x)

        first = lambda start: storax.set_state(index, start)
        storax.jit(jax.vmap(first))(0 * x) if own_state else first(jnp.float32(0))
        f = storax.jit(jax.vmap(in_lane))
        out = [f(x, 0 * x), f(x, 0 * x)]
        get = lambda like: storax.get_state(index, like)
        state = storax.jit(jax.vmap(get))(0 * x) if own_state else get(jnp.float32(0))
        return [*out, state]

    x = np.arange(8, dtype=np.float32)
    want = run(jnp.asarray(x))
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        got = run(put(x, mesh, "i"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def batch_norm_model():
    norm = storax.BatchNorm(3, axis_name="batch")

    def step(w, x):
        def loss(w):
            out = jax.vmap(norm, axis_name="batch")(x * w)
            return (out**3).mean()

        value, grad = jax.value_and_grad(loss)(w)
        return w - 0.1 * grad, value

    return norm, step


def test_data_parallel_batch_norm_is_batch_norm_of_the_whole():
    # With Explicit axes JAX itself refuses `x - lax.pmean(x, "batch")` under such a vmap.
    mesh = mesh_of(AxisType.Auto)
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=(16, 3)), jnp.float32) for _ in range(3)]
    norm, step = batch_norm_model()
    alone, w = storax.jit(step), jnp.ones(3)
    want = []
    for x in xs:
        w, value = alone(w, x)
        want.append(float(value))
    norm2, step = batch_norm_model()
    spread, w2 = storax.jit(step), put(jnp.ones(3), mesh)
    got = []
    for x in xs:
        w2, value = spread(w2, put(x, mesh, "i"))
        got.append(float(value))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(w2, w, rtol=1e-5)
    like = (jnp.zeros(3), jnp.zeros(3))
    for a, b in zip(
        storax.get_state(norm2.state_index, like),
        storax.get_state(norm.state_index, like),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)


_WORKER = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    rank, size, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if size > 1:
        jax.distributed.initialize(address, size, rank)
    import storax
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
    norm = storax.BatchNorm(3, axis_name="batch")

    @storax.jit
    def step(w, x):
        def loss(w):
            return (jax.vmap(norm, axis_name="batch")(x * w) ** 3).mean()
        value, grad = jax.value_and_grad(loss)(w)
        return w - 0.1 * grad, value

    rng = np.random.default_rng(0)
    w = jax.make_array_from_callback((3,), whole, lambda i: np.ones(3, np.float32)[i])
    values = []
    for _ in range(5):
        x = rng.normal(size=(16, 3)).astype(np.float32)
        w, value = step(w, jax.make_array_from_callback(x.shape, rows, lambda i: x[i]))
        values.append(float(value))
    like = (jnp.zeros(3), jnp.zeros(3))
    state = [np.asarray(s.addressable_data(0)).tolist() for s in storax.get_state(norm.state_index, like)]
    print(json.dumps([values, np.asarray(w.addressable_data(0)).tolist(), state]))
"""


def run_workers(size):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // size}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WORKER), str(k), str(size), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for k in range(size)
    ]
    outs = [w.communicate(timeout=300) for w in workers]
    assert all(w.returncode == 0 for w in workers), outs
    return [json.loads(out.splitlines()[-1]) for out, _ in outs]


def test_two_processes_agree():
    one, other = run_workers(2)
    assert one == other  # to the last bit
    (alone,) = run_workers(1)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
