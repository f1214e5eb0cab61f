"""Every error of the manual page: its class, when it comes, and that it names the index."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax


@pytest.fixture
def index():
    return storax.StateIndex(name="counter")


def ways_to_run(f):
    """Eager, plain jit, filter_jit, nested jit, in a scan, in a taken branch."""
    return {
        "eager": f,
        "jit": jax.jit(f),
        "filter_jit": eqx.filter_jit(f),
        "nested": jax.jit(lambda: jax.jit(f)()),
        "scan": lambda: lax.scan(lambda c, _: (c, f()), 0, None, length=2),
        "cond": jax.jit(lambda: lax.cond(jnp.arange(2)[1] > 0, f, f)),
        "grad": jax.grad(lambda x: (f(), x)[1]),
    }


WAYS = list(ways_to_run(lambda: None))


@pytest.fixture(params=WAYS)
def run(request):
    def run(f):
        wrapped = ways_to_run(lambda: jax.tree.map(lax.stop_gradient, f()))[request.param]
        if request.param == "grad":
            return wrapped(1.0)
        return jax.block_until_ready(wrapped())

    return run


NOT_ARRAYS = {
    "int": 1,
    "float": 1.0,
    "bool": True,
    "numpy": np.zeros(3),
    "numpy scalar": np.float32(1),
    "string": "state",
    "in a tree": {"a": jnp.zeros(3), "b": 2},
    "shape": jax.ShapeDtypeStruct((3,), jnp.float32),
}


@pytest.mark.parametrize("bad", NOT_ARRAYS.values(), ids=NOT_ARRAYS)
def test_only_jax_arrays(index, bad, run):
    with pytest.raises(TypeError, match=r"set_state of StateIndex 'counter'.*JAX arrays"):
        run(lambda: storax.set_state(index, bad))
    with pytest.raises(TypeError, match=r"get_state of StateIndex 'counter'.*JAX arrays"):
        run(lambda: storax.get_state(index, bad))


def test_the_leaf_is_named(index):
    with pytest.raises(TypeError, match=r"`state\['b'\]\[1\]` is 2 of type int.*jnp.asarray"):
        storax.set_state(index, {"a": jnp.zeros(1), "b": (jnp.zeros(1), 2)})


def test_never_set(index, run):
    with pytest.raises(RuntimeError, match=r"'counter': nothing has been set.*f32\[3\]"):
        run(lambda: storax.get_state(index, jnp.zeros(3)))


MISMATCHES = {
    "shape": (jnp.zeros(3), jnp.zeros(4), r"f32\[3\]", r"f32\[4\]"),
    "rank": (jnp.zeros(1), jnp.zeros(()), r"f32\[1\]", r"f32\[\]"),
    "dtype": (jnp.zeros(3), jnp.zeros(3, jnp.int32), r"f32\[3\]", r"i32\[3\]"),
    "structure": ((jnp.zeros(3),), [jnp.zeros(3)], r"\(f32\[3\],\)", r"\[f32\[3\]\]"),
    "leaves": ((jnp.zeros(3),), (), r"\(f32\[3\],\)", r"\(\)"),
    "none": (None, jnp.zeros(1), r"None", r"f32\[1\]"),
    "key": ({"a": jnp.zeros(1)}, {"b": jnp.zeros(1)}, r"\{'a': f32\[1\]\}", r"\{'b': f32\[1\]\}"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_get_of_another_type(index, case, run):
    held, like, held_text, like_text = MISMATCHES[case]
    storax.set_state(index, held)
    with pytest.raises(
        RuntimeError, match=f"'counter': it holds {held_text}, but `like` is {like_text}"
    ):
        run(lambda: storax.get_state(index, like))


@pytest.mark.parametrize("case", MISMATCHES)
def test_set_of_another_type(index, case, run):
    held, new, held_text, new_text = MISMATCHES[case]
    held = jax.tree.map(lambda x: x + 7, held)
    storax.set_state(index, held)
    with pytest.raises(
        RuntimeError, match=f"'counter': it holds {held_text}, but the new state is {new_text}"
    ):
        run(lambda: storax.set_state(index, new))
    assert eqx.tree_equal(storax.get_state(index, held), held)  # a failed set writes nothing


def test_inference_forbids_set(run):
    index = storax.StateIndex(inference=True, name="frozen")
    with pytest.raises(
        RuntimeError, match=r"set_state of StateIndex 'frozen'.*`inference`.*inference_mode"
    ):
        run(lambda: storax.set_state(index, jnp.zeros(1)))


def test_inference_of_an_unset_index(run):
    index = storax.StateIndex(inference=True, name="frozen")
    with pytest.raises(
        RuntimeError, match=r"get_state of StateIndex 'frozen'.*nothing has been set"
    ):
        run(lambda: storax.get_state(index, jnp.zeros(1)))


@pytest.mark.parametrize("bad", [None, 3, object(), storax.StateIndex, jnp.zeros(1)])
def test_not_an_index(bad, run):
    with pytest.raises(TypeError, match=r"must be a storax.StateIndex"):
        run(lambda: storax.get_state(bad, jnp.zeros(1)))
    with pytest.raises(TypeError, match=r"must be a storax.StateIndex"):
        run(lambda: storax.set_state(bad, jnp.zeros(1)))


@pytest.mark.parametrize("inference", [False, True])
def test_index_as_an_argument_of_plain_jit(inference):
    index = storax.StateIndex(name="argument")
    storax.set_state(index, jnp.zeros(1))
    index = eqx.nn.inference_mode(index, inference)
    for f in (
        lambda i: storax.get_state(i, jnp.zeros(1)),
        lambda i: storax.set_state(i, jnp.zeros(1)),
    ):
        with pytest.raises(TypeError, match=r"'argument'.*filter_jit.*storax.jit.*close over"):
            jax.jit(f)(index)


def test_half_an_index():
    index = storax.StateIndex(name="half")
    arrays, rest = eqx.partition(index, eqx.is_array)
    with pytest.raises(TypeError, match=r"'half'.*replaced by None.*equinox.combine"):
        storax.get_state(arrays, jnp.zeros(1))
    storax.set_state(rest, jnp.zeros(1))
    storax.set_state(eqx.combine(arrays, rest), jnp.zeros(1))


def test_escaped_tracer(index):
    escaped = []
    jax.jit(lambda x: escaped.append(x))(jnp.zeros(3))
    with pytest.raises(jax.errors.UnexpectedTracerError, match=r"'counter'.*escaped"):
        storax.set_state(index, escaped[0])
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.jit(lambda: storax.set_state(index, {"a": jnp.zeros(1), "b": escaped[0]}))()
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.jit(lambda: storax.get_state(index, escaped[0]))()
    storax.set_state(index, jnp.ones(2))  # nothing was set before
    assert (storax.get_state(index, jnp.zeros(2)) == 1).all()


def test_escaped_tracer_as_like(index):
    escaped = []
    jax.jit(lambda x: escaped.append(x))(jnp.zeros(3))
    storax.set_state(index, jnp.ones(3))
    with pytest.raises(jax.errors.UnexpectedTracerError, match=r"'counter'.*escaped"):
        storax.get_state(index, escaped[0])


def test_more_than_one_device_under_plain_jit(index):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    storax.set_state(index, jnp.float32(1))
    for spec in (jax.P("i"), jax.P()):
        x = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, spec))
        with pytest.raises(NotImplementedError, match=r"'counter'.*4 devices.*`storax.jit`"):
            jax.jit(lambda x: x * storax.get_state(index, jnp.float32(0)))(x)
    assert storax.get_state(index, jnp.float32(0)) == 1


def test_a_state_on_more_than_one_device_under_plain_jit():
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = storax.StateIndex(name="spread")
    x = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, jax.P("i")))
    storax.set_state(spread, x)
    with pytest.raises(NotImplementedError, match=r"'spread'.*4 devices.*`storax.jit`"):
        jax.jit(lambda x: storax.get_state(spread, x))(x)
    with pytest.raises(NotImplementedError, match=r"'spread'.*several devices.*`storax.jit`"):
        jax.jit(lambda: storax.get_state(spread, jnp.arange(4.0)))()


def test_another_device(index):
    first, second = jax.local_devices()[:2]
    storax.set_state(index, jax.device_put(jnp.float32(1), second))
    assert storax.get_state(index, jnp.float32(0)).devices() == {second}
    get = jax.jit(lambda x: x + storax.get_state(index, jnp.float32(0)))
    assert get(jax.device_put(1.0, second)) == 2
    with pytest.raises(RuntimeError, match=r"'counter'.*on device 1.*runs on device 0"):
        jax.block_until_ready(get(jax.device_put(1.0, first)))
    with pytest.raises(RuntimeError, match=r"'counter'.*on device 1.*runs on device 0"):
        storax.set_state(index, jax.device_put(jnp.float32(1), first))
    assert storax.get_state(index, jnp.float32(0)) == 1


def test_a_get_that_failed_leaves_nothing_behind(index):
    """Nor does one of the right type that was asked for too early, for the device it might have been on."""
    with pytest.raises(RuntimeError, match="nothing has been set"):
        storax.get_state(index, jnp.float32(0))
    second = jax.local_devices()[1]
    storax.set_state(index, jax.device_put(jnp.float32(1), second))
    assert storax.get_state(index, jnp.float32(0)).devices() == {second}


def test_each_eager_get_is_compared(index):
    storax.set_state(index, jnp.float32(1))
    for _ in range(2):
        assert storax.get_state(index, jnp.float32(0)) == 1
        for like in (jnp.int32(0), jnp.zeros(2)):
            with pytest.raises(RuntimeError, match=r"'counter': it holds f32\[\], but `like` is"):
                storax.get_state(index, like)


def test_a_branch_that_is_not_taken_never_raises(index):
    @jax.jit
    def f(x):
        return lax.cond(x > 0, lambda: storax.get_state(index, x), lambda: x)

    assert f(jnp.float32(-1)) == -1
    with pytest.raises(RuntimeError, match="nothing has been set"):
        jax.block_until_ready(f(jnp.float32(1)))


def test_a_failed_program_keeps_its_earlier_sets(index):
    other = storax.StateIndex(name="other")

    @jax.jit
    def f():
        storax.set_state(index, jnp.float32(1))
        storax.get_state(other, jnp.float32(0))
        storax.set_state(index, jnp.float32(2))

    def run():
        jax.block_until_ready(f())
        storax.barrier()

    with pytest.raises(RuntimeError, match="'other'"):
        run()
    assert storax.get_state(index, jnp.float32(0)) == 1


def test_where_an_index_was_made():
    class Layer(eqx.Module):
        index: storax.StateIndex

        def __init__(self):
            self.index = storax.StateIndex()

    layer = Layer()
    with pytest.raises(RuntimeError, match=r"made at test_errors.py:\d+, __init__: nothing"):
        storax.get_state(layer.index, jnp.zeros(1))


def test_weak_types_never_mismatch(index, run):
    weak = jnp.asarray(1.0)
    strong = jnp.ones((), weak.dtype)
    storax.set_state(index, weak)
    run(lambda: storax.set_state(index, strong))
    out = storax.get_state(index, weak)
    assert not out.weak_type
    run(lambda: storax.get_state(index, weak))
