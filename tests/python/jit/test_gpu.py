"""storax.jit on a GPU: `make test-gpu`, where there is one."""

import copy
import io
import pickle
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import storax
from jit.counting import counter, counting_lanes

GPUS = [d for d in jax.devices() if d.platform == "gpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="there is no GPU, or JAX_PLATFORMS leaves it out")


def platforms(x):
    return {d.platform for d in x.devices()}


def test_eager():
    index = storax.StateIndex()
    x = jnp.arange(3.0)
    storax.set_state(index, x)
    got = storax.get_state(index, x)
    np.testing.assert_array_equal(got, x)
    assert platforms(got) == {"gpu"}
    storax.set_state(index, x + 1)
    np.testing.assert_array_equal(storax.get_state(index, x), x + 1)
    with pytest.raises(RuntimeError, match=r"holds f32\[3\]"):
        storax.get_state(index, jnp.zeros(4))
    with pytest.raises(RuntimeError, match="nothing has been set"):
        storax.get_state(storax.StateIndex(), x)


@pytest.mark.parametrize("size", [None, 1 << 20], ids=["small", "large"])
@pytest.mark.parametrize("donate", [True, False])
def test_read_modify_write(size, donate):
    index, count, state = counter(0, size)
    f = storax.jit(lambda x: x + count().sum(), donate=donate)
    for k in range(1, 6):
        assert f(jnp.float32(0)) == k * (size or 1)
    assert state() == 5
    storax.set_state(
        index, storax.get_state(index, jnp.float32(0) if size is None else jnp.zeros(size)) * 2
    )
    f(jnp.float32(0))
    assert state() == 11


def test_large_state_in_place():
    index, count, _ = counter(0, 1 << 20)
    f = storax.jit(lambda: count()[0])
    f()
    address = lambda: storax._core.loan(index._slot.core)[0].unsafe_buffer_pointer()
    before = address()
    for _ in range(5):
        f()
    assert address() == before


def test_first_set_inside():
    index = storax.StateIndex()

    @storax.jit
    def f(x):
        storax.set_state(index, 2 * x)
        return storax.get_state(index, x) + 1

    for _ in range(3):
        np.testing.assert_array_equal(f(jnp.arange(4.0)), 2 * np.arange(4.0) + 1)
    np.testing.assert_array_equal(storax.get_state(index, jnp.zeros(4)), 2 * np.arange(4.0))


def test_control_flow():
    index, _, state = counter(0)

    def bump(x):
        s = storax.get_state(index, jnp.float32(0)) + 1
        storax.set_state(index, s)
        return x + s

    @storax.jit
    def f(x):
        x = lax.scan(lambda c, _: (bump(c), None), x, None, length=3)[0]
        x = lax.cond(x > 5, bump, lambda x: x, x)
        return lax.while_loop(lambda x: x < 20, bump, x)

    def python(x, s):
        def bump(x):
            nonlocal s
            s += 1
            return x + s

        for _ in range(3):
            x = bump(x)
        x = bump(x) if x > 5 else x
        while x < 20:
            x = bump(x)
        return x, s

    x, s = python(0.0, 0.0)
    assert (f(jnp.float32(0)), state()) == (x, s)
    x, s = python(0.0, s)
    assert (f(jnp.float32(0)), state()) == (x, s)


def test_masked():
    index = storax.StateIndex()
    xs = jnp.arange(6.0)
    storax.jit(jax.vmap(lambda x: storax.set_state(index, x)))(xs)

    program = counting_lanes(index)
    out = storax.jit(jax.vmap(program))(xs)
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(out, [2, 2, 2, 3, 5, 6])
    np.testing.assert_array_equal(state, [2, 2, 2, 3, 5, 6])


def test_grad_and_checkpoint():
    _, count, state = counter(2)
    f = storax.jit(jax.grad(jax.checkpoint(lambda x: jnp.sin(x) * count())))
    np.testing.assert_allclose(f(jnp.float32(1)), 3 * np.cos(1), rtol=1e-5)
    assert state() == 3


@pytest.mark.parametrize(
    "dtype", ["bool", "int4", "uint8", "bfloat16", "float16", "complex64", "key"]
)
def test_dtypes(dtype):
    make = {"key": lambda: jax.random.split(jax.random.key(3), 4)}
    x = make.get(dtype, lambda: jnp.array([0, 1, 1, 0]).astype(dtype))()
    index = storax.StateIndex()
    storax.set_state(index, x)
    flip = storax.jit(lambda: storax.set_state(index, storax.get_state(index, x)[::-1]))
    flip()
    flip()
    flip()
    raw = jax.random.key_data if dtype == "key" else lambda x: x
    np.testing.assert_array_equal(raw(storax.get_state(index, x)), raw(x[::-1]))


def test_what_fails():
    unset = storax.StateIndex(name="unset")
    with pytest.raises(RuntimeError, match="'unset': nothing has been set"):
        storax.jit(lambda: storax.get_state(unset, jnp.zeros(3)))()
    with pytest.raises(NotImplementedError, match=r"'unset'.*Use `storax.jit`"):
        jax.jit(lambda: storax.set_state(unset, jnp.zeros(3)))()
    with pytest.raises(
        NotImplementedError, match="'unset': this is the first set, and it is in a branch"
    ):
        storax.jit(
            lambda p: lax.cond(p, lambda: storax.set_state(unset, jnp.zeros(3)), lambda: None)
        )(True * jnp.ones((), bool))
    storax.set_state(unset, jnp.zeros(3))
    with pytest.raises(RuntimeError, match=r"holds f32\[3\], but `like` is f32\[2\]"):
        storax.jit(lambda: storax.get_state(unset, jnp.zeros(2)))()


def test_a_state_on_the_cpu_and_a_program_on_the_gpu():
    """A state stays where it was first set, as a committed array does."""
    index = storax.StateIndex(name="here")
    with jax.default_device(jax.devices("cpu")[0]):
        storax.set_state(index, jnp.float32(1))
    f = storax.jit(lambda x: x + storax.get_state(index, jnp.float32(0)))
    assert f(jnp.float32(1)) == 2
    with pytest.raises(RuntimeError, match="on another device"):
        f(jax.device_put(jnp.float32(1), GPUS[0]))


def test_plain_jit_on_the_cpu():
    """Where a GPU is the default, too."""
    with jax.default_device(jax.devices("cpu")[0]):
        _, count, state = counter(0)
        f = jax.jit(lambda: lax.fori_loop(0, 3, lambda _, c: c + count(), jnp.float32(0)))
        assert f() == 6
        assert state() == 3
        assert storax.jit(lambda: count())() == 4


def test_copies_and_files():
    index, count, state = counter(7)
    storax.jit(lambda: count())()
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert storax.get_state(other, jnp.float32(0)) == 8
        storax.set_state(other, jnp.float32(0))
    assert state() == 8
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, index)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, storax.StateIndex())
    assert storax.get_state(loaded, jnp.float32(0)) == 8


def test_inference():
    index, count, _ = counter(7)
    f = storax.jit(lambda: count())
    f()
    frozen = eqx.nn.inference_mode(index)
    read = eqx.filter_jit(lambda i, x: x + storax.get_state(i, x))
    assert read(frozen, jnp.float32(1)) == 9
    f()
    assert read(frozen, jnp.float32(1)) == 10


def test_batch_norm_training_agrees_with_the_cpu():
    def train(device):
        with jax.default_device(device):
            keys = jax.random.split(jax.random.key(0), 3)
            x = jax.random.normal(keys[0], (64, 8))
            y = (x.sum(1) > 0).astype(jnp.int32)
            a = eqx.nn.Linear(8, 16, key=keys[1])
            b = eqx.nn.Linear(16, 2, key=keys[2])
            model = a, storax.BatchNorm(16, axis_name="batch"), b
            optimiser = optax.sgd(0.1)
            params, static = eqx.partition(model, eqx.is_inexact_array)
            opt = optimiser.init(params)

            def loss(params):
                a, norm, b = eqx.combine(params, static)
                logits = jax.vmap(lambda x: b(jax.nn.relu(norm(a(x)))), axis_name="batch")(x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            @storax.jit
            def step(params, opt):
                value, grads = jax.value_and_grad(loss)(params)
                updates, opt = optimiser.update(grads, opt)
                return optax.apply_updates(params, updates), opt, value

            losses = []
            for _ in range(5):
                params, opt, value = step(params, opt)
                losses.append(float(value))
            return losses

    with jax.default_matmul_precision("float32"):
        on_gpu, on_cpu = train(GPUS[0]), train(jax.devices("cpu")[0])
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4)
    assert on_gpu[-1] < on_gpu[0]


def test_many_threads():
    made = [counter(0) for _ in range(4)]

    def work(count):
        f = storax.jit(lambda: count())
        for _ in range(200):
            f()

    threads = [threading.Thread(target=work, args=(count,)) for _, count, _ in made]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [state() for *_, state in made] == [200] * 4
