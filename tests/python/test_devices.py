"""State per device under shard_map and pmap, on four virtual CPU devices."""

import copy
import pickle
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import storax

MESH = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
AXIS = P("i")
MESH2 = jax.make_mesh((2, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
X = np.arange(4, dtype=np.float32)
S0 = np.array([1, 2, 3, 4], np.float32)
ZERO = jnp.float32(0)


def shard(f, mesh=MESH, in_specs=AXIS, out_specs=AXIS, **kwargs):
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)


def get(index):
    return storax.get_state(index, ZERO)


def inc(index, x):
    s = get(index)
    storax.set_state(index, s + x.reshape(-1)[0])
    return x * s


@pytest.fixture(params=[True, False], ids=["check_vma", "no check_vma"])
def vma(request):
    return request.param


def per_device(values=S0, mesh=MESH, spec=AXIS, vma=True):
    """An index whose state is values[k] on device k."""
    index = storax.StateIndex(name="per device")

    def init(v):
        storax.set_state(index, v.reshape(v.shape[len(spec) :] if len(spec) > 1 else v.shape[1:]))
        return v

    jax.jit(shard(init, mesh, spec, spec, check_vma=vma))(jnp.asarray(values))
    return index


def read(index, mesh=MESH, spec=AXIS, vma=True, shape=()):
    f = lambda v: (
        storax.get_state(index, jnp.zeros(shape))[(None,) * len(spec)]
        + 0 * v.reshape(v.shape + (1,) * len(shape))
    )
    sizes = tuple(mesh.shape[name] for name in spec)
    return np.asarray(jax.jit(shard(f, mesh, spec, spec, check_vma=vma))(jnp.zeros(sizes)))


def grad_of_scan_of_checkpoint(index):
    def step(c, _):
        s = get(index)
        storax.set_state(index, s + 1)
        return c * s, None

    return jax.grad(lambda x: lax.scan(jax.checkpoint(step), x, None, length=3)[0].sum())


PROGRAMS = {
    "counter": (lambda i: lambda x: inc(i, x), X * S0, S0 + X),
    "psum of state": (
        lambda i: (
            lambda x: (
                storax.set_state(i, get(i) + lax.psum(get(i), "i")),
                x * lax.psum(get(i), "i"),
            )[1]
        ),
        X * 50,
        S0 + 10,
    ),
    "set what does not vary": (
        lambda i: lambda x: (storax.set_state(i, lax.psum(x[0], "i")), x + get(i))[1],
        X + 6,
        np.full(4, 6.0),
    ),
    "scan": (
        lambda i: lambda x: lax.scan(lambda c, _: (inc(i, c), None), x, None, length=3)[0],
        X * S0 * (S0 + X) * (S0 + X + X * S0),
        S0 + X + X * S0 + X * S0 * (S0 + X),
    ),
    "scan with ppermute": (
        lambda i: (
            lambda x: lax.scan(
                lambda c, _: (
                    storax.set_state(
                        i, lax.ppermute(get(i), "i", [(k, (k + 1) % 4) for k in range(4)])
                    ),
                    (c, None),
                )[1],
                x,
                None,
                length=7,
            )[0]
        ),
        X,
        np.roll(S0, 7),
    ),
    "cond on the device's own predicate": (
        lambda i: lambda x: lax.cond(x[0] > 1, lambda x: inc(i, x), lambda x: x, x),
        np.where(X > 1, X * S0, X),
        np.where(X > 1, S0 + X, S0),
    ),
    "while with the device's own trip count": (
        lambda i: (
            lambda x: lax.while_loop(
                lambda c: get(i) < 6, lambda c: (storax.set_state(i, get(i) + 1), c + 1)[1], x
            )
        ),
        X + 6 - S0,
        np.full(4, 6.0),
    ),
    "grad inside": (
        lambda i: jax.grad(lambda x: (inc(i, lax.stop_gradient(x)), (x**2 * get(i)).sum())[1]),
        2 * X * (S0 + X),
        S0 + X,
    ),
    "grad of scan of checkpoint": (grad_of_scan_of_checkpoint, S0 * (S0 + 1) * (S0 + 2), S0 + 3),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_shard_map(program, vma):
    make, want, want_state = PROGRAMS[program]
    index = per_device(vma=vma)
    for _ in range(2):
        per_device_again = jax.jit(
            shard(lambda v, i=index: (storax.set_state(i, v[0]), v)[1], check_vma=vma)
        )
        per_device_again(jnp.asarray(S0))
        got = jax.jit(shard(make(index), check_vma=vma))(jnp.asarray(X))
        np.testing.assert_allclose(got, want)
        np.testing.assert_allclose(read(index, vma=vma), want_state)


@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p != "while with the device's own trip count"]
)
def test_pmap(program):
    make, want, want_state = PROGRAMS[program]
    index = storax.StateIndex()
    f = make(index)
    jax.pmap(lambda v: storax.set_state(index, v), axis_name="i")(jnp.asarray(S0))
    got = jax.pmap(lambda x: f(x[None])[0], axis_name="i")(jnp.asarray(X))
    np.testing.assert_allclose(got, want)
    state = jax.pmap(lambda x: get(index) + 0 * x, axis_name="i")(jnp.asarray(X))
    np.testing.assert_allclose(state, want_state)


def test_grad_and_checkpoint_outside(vma):
    def count(index):
        def f(x):
            s = get(index)
            storax.set_state(index, s + 1)
            return jnp.sin(x) * s

        return shard(f, check_vma=vma)

    for wrap in (lambda f: f, jax.checkpoint):
        index = per_device(vma=vma)
        f = wrap(count(index))
        grads = jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(jnp.asarray(X))
        np.testing.assert_allclose(grads, np.cos(X) * S0, rtol=1e-6)
        np.testing.assert_allclose(read(index, vma=vma), S0 + 1)


def test_scan_outside(vma):
    index = per_device(vma=vma)
    f = shard(lambda x: inc(index, x), check_vma=vma)
    got = jax.jit(lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0])(
        jnp.asarray(X)
    )
    np.testing.assert_allclose(got, X * S0 * (S0 + X))
    np.testing.assert_allclose(read(index, vma=vma), S0 + X + X * S0)


def test_eager_shard_map():
    index = per_device()
    np.testing.assert_allclose(shard(lambda x: inc(index, x))(jnp.asarray(X)), X * S0)
    np.testing.assert_allclose(read(index), S0 + X)


def test_two_axes(vma):
    spec = P("i", "j")
    values, x = S0.reshape(2, 2), X.reshape(2, 2)
    index = per_device(values, MESH2, spec, vma=vma)
    f = shard(lambda x: inc(index, x), MESH2, spec, spec, check_vma=vma)
    np.testing.assert_allclose(jax.jit(f)(jnp.asarray(x)), x * values)
    np.testing.assert_allclose(read(index, MESH2, spec, vma=vma), values + x)


def test_vmap_inside_and_masked(vma):
    index = storax.StateIndex()
    x = jnp.arange(8.0)
    batched = lambda f: jax.jit(shard(lambda x: jax.vmap(f)(x), check_vma=vma))
    batched(lambda x: (storax.set_state(index, 0 * x), x)[1])(x)

    def program(x):
        def body(c):
            storax.set_state(index, storax.get_state(index, 0 * x) + c)
            return c + 1

        x = lax.while_loop(lambda c: c < 4, body, x)
        return lax.cond(x > 5, body, lambda x: x, x)

    out = batched(program)(x)
    want, state = np.zeros(8), np.zeros(8)
    for k in range(8):
        c = k
        while c < 4:
            state[k] += c
            c += 1
        if c > 5:
            state[k] += c
            c += 1
        want[k] = c
    np.testing.assert_allclose(out, want)
    got = batched(lambda x: storax.get_state(index, 0 * x))(x)
    np.testing.assert_allclose(got, state)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, storax.jit], ids=["eager", "jit", "ours"])
@pytest.mark.parametrize("order", ["vmap", "vmap of grad", "grad of vmap"])
def test_inside_of_a_mask(vma, order, jit):
    """A state for each lane on each device: of lanes that take the branch, and as often as they loop."""
    index = storax.StateIndex()
    lanes, on_devices = jnp.array([1.0, 3.0, 2.0]), jnp.asarray(X)
    mapped = lambda f: lambda x: shard(f, in_specs=(P(), AXIS), check_vma=vma)(x, on_devices)
    zero = lambda x, v: 0 * lax.stop_gradient(x + v[0])
    set_zero = mapped(lambda x, v: (storax.set_state(index, zero(x, v)), v)[1])
    jit(jax.vmap(set_zero))(lanes)

    def bump(x, v):
        s = storax.get_state(index, zero(x, v))
        storax.set_state(index, s + lax.psum(v, "i")[0] + lax.stop_gradient(x))
        return x * (v + s)

    def program(x):
        y = lax.cond(x > 1.5, lambda x: mapped(bump)(x).sum(), lambda x: x, x)
        if order == "vmap":
            y += lax.while_loop(lambda k: k < x, lambda k: k + 1 + 0 * mapped(bump)(x).sum(), 1.0)
        return y

    def python(x, s):
        y, slope = x, 1
        if x > 1.5:
            slope = (X + s).sum()
            y, s = x * slope, s + X.sum() + x
        k = 1
        while order == "vmap" and k < x:
            s, k = s + X.sum() + x, k + 1
        return s, slope if "grad" in order else y + (k if order == "vmap" else 0)

    call = {
        "vmap": jax.vmap(program),
        "vmap of grad": jax.vmap(jax.grad(program)),
        "grad of vmap": jax.grad(lambda xs: jax.vmap(program)(xs).sum()),
    }[order]
    state = np.zeros((3, 4))
    for _ in range(2):
        got, want = jit(call)(lanes), []
        for k, x in enumerate(np.asarray(lanes)):
            state[k], y = python(x, state[k])
            want.append(y)
        np.testing.assert_allclose(got, want)
    read_it = mapped(lambda x, v: storax.get_state(index, zero(x, v))[None])
    np.testing.assert_allclose(jit(jax.vmap(read_it))(lanes), state)


def test_inside_of_a_mask_on_a_state_that_lanes_share(vma):
    index = per_device(vma=vma)
    inner = shard(lambda x: inc(index, x), check_vma=vma)
    program = lambda p: lax.cond(p, inner, lambda x: x, jnp.asarray(X))
    for run in (jax.vmap(program), jax.jit(jax.vmap(program))):
        before = read(index, vma=vma)
        got = run(jnp.array([True, False]))
        np.testing.assert_allclose(got, [X * before, X])
        np.testing.assert_allclose(read(index, vma=vma), before + X)
        run(jnp.array([False, False]))
        np.testing.assert_allclose(read(index, vma=vma), before + X)


@pytest.mark.timeout(100, method="thread")  # XLA hears of no signal
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "checkpoint"]
)
@pytest.mark.parametrize("outside", [True, False])
def test_derivatives_by_what_devices_share_in_a_mask(outside, wrap, vma):
    """Not on every device is there a lane that takes the branch, and the derivative is summed over all."""
    index = per_device(vma=vma)
    lanes = np.array([0, 0, 1, 2, 0, 3, 4, 0], np.float32)
    log = wrap(lambda w, x: w * jnp.log(x))

    def in_lane(w, x):
        def taken(w, x):
            storax.set_state(index, get(index) + 1)
            return log(w, x)

        return lax.cond(x > 0, taken, lambda w, x: 0 * x, w, x)

    def loss(w, x):
        return lax.psum(jax.vmap(in_lane, (None, 0))(w, x).sum(), "i")

    if outside:
        f = jax.grad(shard(loss, in_specs=(P(), AXIS), out_specs=P(), check_vma=vma))
    else:
        f = shard(jax.grad(loss), in_specs=(P(), AXIS), out_specs=P(), check_vma=vma)
    derivative = jax.jit(f)(1.5, lanes)
    if outside or vma:  # else JAX takes each device's own derivative of the sum for the whole
        np.testing.assert_allclose(derivative, np.log(24), rtol=1e-6)
    np.testing.assert_array_equal(read(index, vma=vma), [1, 3, 4, 5])


@pytest.mark.timeout(100, method="thread")  # XLA hears of no signal
@pytest.mark.parametrize("beside", [True, False])
def test_derivatives_through_a_branch_with_a_collective(beside, vma):
    """As without state: JAX stops them in lanes that don't take it, where the square root has none."""
    index = per_device(vma=vma)
    lanes = np.array([0, 0, 1, 2, 0, 3, 4, 0], np.float32)

    def derivative(add):
        def taken(x):
            if not beside:
                add()
            return jnp.sqrt(x) + lax.stop_gradient(lax.pmean(x, "i"))

        def other(x):
            if beside:
                add()
            return 2 * x

        in_lane = lambda x: lax.cond(x > 0, taken, other, x)
        loss = lambda x: lax.psum(jax.vmap(in_lane)(x).sum(), "i")
        return jax.jit(jax.grad(shard(loss, out_specs=P(), check_vma=vma)))(lanes)

    want = derivative(lambda: None)
    assert np.isfinite(want).all()
    got = derivative(lambda: storax.set_state(index, get(index) + 1))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
@pytest.mark.parametrize("name", ["psum", "all_gather", "ppermute"])
def test_a_collective_of_lanes_within_shard_map(name, jit):
    """In a branch: what lanes hear of each other is the same with state as without."""
    index = per_device(vma=False)
    talk = {
        "psum": lambda x: lax.psum(x, "lanes"),
        "all_gather": lambda x: lax.all_gather(x, "lanes").sum(0),
        "ppermute": lambda x: lax.ppermute(x, ("lanes",), [(0, 1), (1, 2), (2, 0)]),
    }[name]
    lanes = jnp.array([1.0, 2.0, 4.0])

    def program(state):
        def on_device(x):
            if state:
                storax.set_state(index, get(index) + 1)
            return talk(x)

        def taken(x):
            return shard(on_device, check_vma=False)(jnp.stack([x] * 4)).sum()

        lane = lambda x: lax.cond(x > 1, taken, lambda x: x, x)
        return jit(jax.value_and_grad(lambda x: jax.vmap(lane, axis_name="lanes")(x).sum()))

    for got, want in zip(program(True)(lanes), program(False)(lanes), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.timeout(60, method="thread")  # XLA hears of no signal
def test_a_collective_of_devices_within_a_branch():
    """It is none of the lanes: those that don't take the branch run no loop in it that would not end."""
    index = per_device(vma=False)

    def on_device(x):
        storax.set_state(index, get(index) + 1)
        return lax.psum(x, "i")

    def taken(x):
        loop = lax.while_loop(lambda v: v < 4, lambda v: v * 2, x)
        return loop + shard(on_device, check_vma=False)(jnp.stack([x] * 4)).sum()

    lane = lambda x: lax.cond(x > 0, taken, lambda x: x, x)
    got = jax.jit(jax.vmap(lane))(jnp.array([0.0, 1.0, 3.0]))
    np.testing.assert_array_equal(got, [0, 4 + 16, 6 + 48])


@pytest.mark.timeout(100, method="thread")  # XLA hears of no signal
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
def test_collectives_in_a_mask(jit, beside, vma):
    """Not on every device is there a lane that takes the branch, and the devices wait for each other."""
    lanes = np.array([0, 0, 1, 2, 0, 3, 4, 0], np.float32)

    def run(add):
        def total(x):
            return jax.nn.relu(lax.psum(x, "i") + 0 * x)

        def taken(x):
            add()
            return x if beside else total(x)

        other = total if beside else lambda x: 0 * x
        in_lane = lambda x: lax.cond((x > 1) & (x < 4), taken, other, x)
        return jit(shard(jax.vmap(in_lane), check_vma=vma))(lanes)

    index = per_device(vma=vma)
    add = lambda: storax.set_state(index, get(index) + 1)
    np.testing.assert_array_equal(run(add), run(lambda: None))
    np.testing.assert_array_equal(read(index, vma=vma), [1, 3, 4, 4])


def test_a_branch_with_a_collective_of_lanes_that_no_lane_takes():
    unset = storax.StateIndex(name="unset")

    def taken(x):
        return lax.psum(x, "lanes") + storax.get_state(unset, x)

    lane = lambda x: lax.cond(x > 9, taken, lambda x: x, x)
    in_lanes = jax.vmap(lane, axis_name="lanes")
    # JAX has no `psum` of lanes that differ from device to device where it checks that.
    got = jax.jit(shard(in_lanes, check_vma=False))(np.arange(8, dtype=np.float32))
    np.testing.assert_array_equal(got, np.arange(8))


@pytest.mark.timeout(60, method="thread")  # XLA hears of no signal
def test_a_loop_of_a_state_in_a_mask(vma):
    """On a device where no lane takes the branch, nothing would ever end it."""
    index = per_device(vma=vma)
    lanes = np.array([0, 0, 1, 2, 0, 3, 4, 0], np.float32)

    def count(k):
        storax.set_state(index, get(index) + 1)
        return k + 1

    def taken(x):
        total = lax.psum(x, "i") + 0 * x
        lax.while_loop(lambda _: get(index) < 10, count, 0)
        return total

    lane = lambda x: lax.cond(x > 0, taken, lambda x: 0 * x, x)
    got = jax.jit(shard(jax.vmap(lane), check_vma=vma))(lanes)
    np.testing.assert_array_equal(got, [0, 0, 5, 5, 0, 5, 5, 0])
    np.testing.assert_array_equal(read(index, vma=vma), [1, 10, 10, 10])


@pytest.mark.timeout(60, method="thread")  # XLA hears of no signal
def test_a_loop_of_a_state_that_other_devices_wait_for():
    """It runs where no lane takes the branch too, as often as a state says that devices share."""
    limit = storax.StateIndex()
    storax.set_state(limit, jnp.float32(2))
    lanes = np.array([0, 0, 1, 2, 0, 3, 4, 0], np.float32)

    def taken(x):
        step = lambda c: (c[0] + 1, c[1] + lax.psum(c[0] + 1, "i"))
        return x + lax.while_loop(lambda c: c[0] < get(limit), step, (jnp.float32(0),) * 2)[1]

    lane = lambda x: lax.cond(x > 0, taken, lambda x: x, x)
    got = jax.jit(shard(jax.vmap(lane), check_vma=False))(lanes)
    np.testing.assert_array_equal(got, np.where(lanes > 0, lanes + 4 + 8, 0))


def test_partly_manual_is_refused():
    index = storax.StateIndex(name="partly")
    f = shard(
        lambda x: (storax.set_state(index, x.sum()), x)[1],
        MESH2,
        P("i", None),
        P("i", None),
        axis_names={"i"},
    )
    for jit in (jax.jit, storax.jit):
        with pytest.raises(NotImplementedError, match=r"'partly'.*\['j'\].*every axis manual"):
            jit(f)(jnp.ones((2, 2)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, storax.jit], ids=["eager", "jit", "ours"])
def test_one_axis_within_the_other(jit, order):
    mesh = Mesh(np.array(jax.devices())[order].reshape(2, 2), ("i", "j"))
    index = storax.StateIndex()

    def inner(x):
        storax.set_state(index, x)
        return x + 1

    within = lambda x: jax.shard_map(inner, in_specs=P("j"), out_specs=P("j"), axis_names={"j"})(x)
    f = jit(shard(within, mesh, AXIS, AXIS, axis_names={"i"}))
    x = jax.device_put(X, jax.NamedSharding(mesh, P(("i", "j"))))
    if jit in (jax.jit, storax.jit) and jax.__version_info__ < (0, 11):
        with pytest.raises(NotImplementedError, match=r"Make one `jax.shard_map` of the two"):
            f(x)
        return
    for _ in range(2):
        np.testing.assert_array_equal(f(x), X + 1)
    state = storax.get_state(index, jnp.zeros((2, 2, 1)))
    np.testing.assert_array_equal(state.ravel(), X)


def test_a_reversed_mesh_is_the_same_devices():
    reverse = Mesh(np.array(jax.devices())[::-1], ("i",))
    index = per_device()
    got = jax.jit(shard(lambda x: inc(index, x), reverse))(jnp.asarray(X))
    np.testing.assert_allclose(got, X * S0[::-1])
    np.testing.assert_allclose(read(index), S0 + X[::-1])


def test_never_set_on_a_device_and_mixed_up():
    index = storax.StateIndex(name="mixed")
    with pytest.raises(RuntimeError, match=r"'mixed'.*nothing has been set"):
        jax.block_until_ready(jax.jit(shard(lambda x: x + get(index)))(jnp.asarray(X)))
    index = per_device()
    with pytest.raises(RuntimeError, match=r"'per device'.*mapped over mesh axes 'i' of size 4"):
        jax.block_until_ready(jax.jit(lambda: get(index))())


def test_from_the_host():
    index = per_device()
    np.testing.assert_allclose(storax.get_state(index, jnp.zeros(4)), S0)
    f = shard(lambda x: inc(index, x))
    jax.jit(f)(jnp.asarray(X))
    np.testing.assert_allclose(storax.get_state(index, jnp.zeros(4)), S0 + X)
    values = S0.reshape(2, 2)
    both = per_device(values, MESH2, P("i", "j"))
    np.testing.assert_allclose(storax.get_state(both, jnp.zeros((2, 2))), values)
    with pytest.raises(RuntimeError, match=r"'per device'"):
        storax.get_state(both, jnp.zeros(4))
    # The mesh says what comes first.
    reverse = Mesh(np.array(jax.devices())[::-1], ("i",))
    np.testing.assert_allclose(storax.get_state(per_device(mesh=reverse), jnp.zeros(4)), S0)


def test_the_order_on_the_host_is_that_of_the_program_that_set_it_last():
    index, devices = per_device(), np.array(jax.devices())
    reverse, few = Mesh(devices[::-1], ("i",)), Mesh(devices[:2], ("i",))
    on_host = lambda i: storax.get_state(i, jnp.zeros(4)).tolist()
    put = lambda mesh: jax.jit(shard(lambda x: storax.set_state(index, x[0]), mesh, out_specs=P()))

    put(reverse).lower(X)  # runs nothing
    assert on_host(index) == on_host(copy.deepcopy(index)) == S0.tolist()
    put(few)(X[:2])
    with pytest.raises(RuntimeError, match="mesh axes 'i' of size 4, but the new state is"):
        storax.barrier()
    assert on_host(index) == on_host(pickle.loads(pickle.dumps(index))) == S0.tolist()

    def where_large(x):
        bump = lambda: storax.set_state(index, x[0])
        jax.vmap(lambda large: lax.cond(large, bump, lambda: None))(x > 9)

    never = jax.jit(shard(where_large, reverse, out_specs=P()))
    never(X)
    assert on_host(index) == S0.tolist()
    put(reverse)(10 * X)
    assert on_host(index) == on_host(copy.deepcopy(index)) == (10 * X).tolist()
    assert read(index).tolist() == (10 * X[::-1]).tolist()


def test_what_is_got_differs_from_device_to_device():
    """JAX must know: it adds up what each device makes of a gradient, and checks what is returned."""
    index = per_device()
    loss = lambda w: w * get(index)
    grad = shard(jax.grad(loss), in_specs=P(), out_specs=P())
    assert jax.jit(grad)(jnp.float32(1)) == S0.sum()
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(shard(loss, in_specs=P(), out_specs=P()))(jnp.float32(1))


def test_random_programs_run_in_order_on_every_device():
    rng = np.random.default_rng(1)
    for _ in range(6):
        ops = [
            (rng.integers(4), rng.integers(3), rng.integers(3), float(rng.integers(1, 4)))
            for _ in range(8)
        ]
        length = int(rng.integers(1, 6))
        start = rng.integers(0, 4, (3, 4)).astype(np.float32)
        indices = [per_device(row) for row in start]

        def body(c, ops=ops, indices=indices):
            for op, a, b, v in ops:
                other = get(indices[b])
                if op == 0:
                    storax.set_state(indices[a], (other + v) % 17)
                elif op == 1:
                    storax.set_state(indices[a], lax.psum(other, "i") % 13)
                elif op == 2:
                    c = (c * 2 + get(indices[a])) % 101
                else:
                    ring = [(k, (k + 1) % 4) for k in range(4)]
                    storax.set_state(indices[a], lax.ppermute(other, "i", ring) + v)
            return c

        state, c = start.copy(), np.arange(4.0)
        for _ in range(length):
            for op, a, b, v in ops:
                if op == 0:
                    state[a] = (state[b] + v) % 17
                elif op == 1:
                    state[a] = state[b].sum() % 13
                elif op == 2:
                    c = (c * 2 + state[a]) % 101
                else:
                    state[a] = np.roll(state[b], 1) + v
        f = lambda x, n=length, b=body: lax.fori_loop(0, n, lambda _, carry: b(carry), x)
        np.testing.assert_allclose(jax.jit(shard(f))(jnp.arange(4.0)), c)
        for index, want in zip(indices, state, strict=True):
            np.testing.assert_allclose(read(index), want)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_batch_norm_over_devices_is_batch_norm_of_the_whole_batch(how):
    xs = jax.random.normal(jax.random.key(0), (8, 3))
    one = storax.BatchNorm(3, "batch", mode="batch")
    many = storax.BatchNorm(3, ("batch", "i"), mode="batch")
    batched = lambda bn, x: jax.vmap(bn, axis_name="batch")(x)
    if how == "shard_map":
        over = jax.jit(shard(lambda x: batched(many, x), check_vma=False))
    else:
        mapped = jax.pmap(lambda x: batched(many, x), axis_name="i")
        over = lambda x: mapped(x.reshape(4, 2, 3)).reshape(8, 3)
    for k in range(3):
        x = xs * (k + 1) + k
        want = jax.jit(lambda x: batched(one, x))(x)
        np.testing.assert_allclose(over(x), want, rtol=1e-4, atol=1e-5)
    # The statistics are the same on every device, so they are read as one.
    like = (jnp.zeros(3), jnp.zeros(3))
    for a, b in zip(
        storax.get_state(many.state_index, like),
        storax.get_state(one.state_index, like),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    frozen = [eqx.nn.inference_mode(bn) for bn in (many, one)]
    many_out, one_out = (eqx.filter_jit(lambda bn: jax.vmap(bn)(xs))(bn) for bn in frozen)
    np.testing.assert_allclose(many_out, one_out, rtol=1e-5)


def test_a_state_set_before_is_every_devices_own_from_then_on():
    index = storax.StateIndex(name="before")
    storax.set_state(index, jnp.float32(10))
    add = jax.jit(shard(lambda x: inc(index, x)))
    np.testing.assert_allclose(add(jnp.asarray(X)), 10 * X)
    np.testing.assert_allclose(storax.get_state(index, jnp.zeros(4)), 10 + X)
    np.testing.assert_allclose(add(jnp.asarray(X)), (10 + X) * X)
    with pytest.raises(RuntimeError, match=r"'before'.*mesh axes 'i' of size 4.*one per device"):
        storax.get_state(index, ZERO)
    with pytest.raises(RuntimeError, match=r"'before'.*one per device"):
        storax.set_state(index, ZERO)
    level = jax.jit(shard(lambda x: (storax.set_state(index, lax.psum(get(index), "i")), x)[1]))
    level(jnp.asarray(X))
    total = 4 * 10 + 2 * X.sum()
    assert storax.get_state(index, ZERO) == total


@pytest.mark.parametrize("when", ["before", "after a failure"])
def test_a_state_set_before_keeps_its_batch_axes(when):
    """The program's are others, as a scan moves them to the front."""
    index, lanes = storax.StateIndex(), jnp.arange(6.0).reshape(3, 2)

    def step(x, _):
        storax.set_state(index, storax.get_state(index, 0 * x) + x)
        return x, None

    over_lanes = lambda f: jax.vmap(f, in_axes=1, out_axes=1)
    scan = over_lanes(lambda x: lax.scan(step, x, None, length=1)[0])
    program = jax.jit(shard(lambda x: scan(x[0])[None]))
    x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)

    def run():
        jax.block_until_ready(program(x))
        storax.barrier()

    if when == "after a failure":
        with pytest.raises(RuntimeError, match="nothing has been set"):
            run()
    over_lanes(lambda x: (storax.set_state(index, x), x)[1])(lanes)
    run()
    np.testing.assert_allclose(storax.get_state(index, jnp.zeros((4, 3, 2))), x + lanes)


def test_masked_set_of_an_inherited_state():
    index = storax.StateIndex()
    jax.vmap(lambda x: storax.set_state(index, x))(jnp.array([1.0, 2.0]))

    def f(x):
        bump = lambda: storax.set_state(index, storax.get_state(index, 0 * x) + 10)
        lax.cond(x > 4, bump, lambda: None)
        return storax.get_state(index, 0 * x)

    got = jax.jit(shard(jax.vmap(f)))(jnp.arange(8.0))
    np.testing.assert_allclose(got, [1, 2, 1, 2, 1, 12, 11, 12])


def test_programs_over_devices_run_in_order():
    index = storax.StateIndex()
    storax.set_state(index, ZERO)
    m = jnp.full((4, 120, 120), 0.001)

    def slow(m):
        n = get(index) + 1
        for _ in range(12):
            m = jnp.tanh(m @ m)
        storax.set_state(index, n + m[0, 0, 0] * 0)
        return m

    step = jax.jit(shard(slow))
    for k in range(1, 9):
        for _ in range(3):
            step(m)
        np.testing.assert_allclose(storax.get_state(index, jnp.zeros(4)), np.full(4, 3.0 * k))


def test_good_work_after_a_failure_on_devices():
    wrong, right = storax.StateIndex(name="wrong"), per_device()
    storax.set_state(wrong, jnp.zeros(3))
    fails = jax.jit(shard(lambda x: (storax.set_state(wrong, x[0]), x)[1]))
    counts = jax.jit(shard(lambda x: inc(right, x)))
    for k in range(3):

        def run():
            jax.block_until_ready(fails(jnp.asarray(X)))
            storax.barrier()

        with pytest.raises(RuntimeError, match="'wrong'"):
            run()
        try:
            storax.barrier()
        except RuntimeError as e:
            raise AssertionError("raised twice") from e
        np.testing.assert_allclose(counts(jnp.asarray(X)), X * (S0 + k * X))


@pytest.mark.parametrize("how", ["eager", "jit", "storax.jit", "pmap"])
@pytest.mark.parametrize("what", ["set", "get"])
def test_failures_on_devices_are_raised_though_nobody_waits_for_results(what, how):
    index = per_device() if what == "set" else storax.StateIndex()

    def fails(x):
        if what == "set":
            storax.set_state(index, x.reshape(-1).astype(int))
        else:
            get(index)

    over = (
        (lambda f: jax.pmap(f, axis_name="i")) if how == "pmap" else partial(shard, out_specs=P())
    )
    jit = {"jit": jax.jit, "storax.jit": storax.jit}.get(how, lambda f: f)
    message = "but the new state is i32" if what == "set" else "nothing has been set"
    for _ in range(2):
        jit(over(fails))(jnp.asarray(X))
        with pytest.raises(RuntimeError, match=message):
            storax.barrier()
        storax.barrier()  # once
    if what == "set":
        assert read(index).tolist() == S0.tolist()


def test_failures_on_devices_are_raised_by_jax_too():
    """JAX goes on over its tokens when one has failed, while storax hears of it."""
    index, unset = per_device(), storax.StateIndex(name="unset")
    fails = jax.jit(shard(lambda x: (get(unset), None)[1], out_specs=P()))
    for _ in range(2):
        fails(X)
        with pytest.raises(RuntimeError, match="nothing has been set"):
            jax.effects_barrier()
        storax.barrier()  # it has been told
    np.testing.assert_allclose(jax.jit(shard(lambda x: inc(index, x)))(jnp.asarray(X)), X * S0)


def test_failures_of_others_are_left_to_be_raised():
    def boom(x):
        raise ValueError("of another")

    index = per_device()
    jax.jit(shard(lambda x: jax.debug.callback(boom, x), out_specs=P()))(X)
    with pytest.raises(RuntimeError, match="of another"):
        storax.barrier()
    storax.barrier()
    assert read(index).tolist() == S0.tolist()
