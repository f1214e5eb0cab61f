"""What storax.jit compiles, and what runs in a call."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import storax
from jit.counting import counter
from nesting import WRAPPERS
from storax import _core


def custom_calls(f, *args):
    return re.findall(r"custom_call @(\S+?)\(", f.lower(*args).as_text())


def many(n):
    indices = [storax.StateIndex() for _ in range(n)]
    for index in indices:
        storax.set_state(index, jnp.zeros(4))

    def f(x):
        for index in indices:
            storax.set_state(index, storax.get_state(index, x) + x)
            x = x + storax.get_state(index, x)
        return x

    return indices, f


def test_packed_form_has_one_load_and_one_store():
    _, f = many(10)
    packed = storax.jit(f)
    assert custom_calls(packed, jnp.zeros(4)) == ["storax.load_states", "storax.store_states"]
    loop = storax.jit(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0])
    assert custom_calls(loop, jnp.zeros(4)) == ["storax.load_states", "storax.store_states"]


ONE = jnp.ones(1)
# Where a first set is, and what is then set last, of 1.
FIRST_SETS = {
    "a scan": (lambda put: lambda x: lax.scan(lambda c, y: (put(c), y), x, jnp.zeros(3)), 3),
    "a scan of nothing": (
        lambda put: lambda x: lax.scan(lambda c, y: (put(c), y), x, ONE[:0]),
        None,
    ),
    "a while_loop": (lambda put: lambda x: lax.while_loop(lambda x: x < 3, put, x), 2),
    "a branch": (lambda put: lambda x: lax.cond(x > 0, put, lambda x: x, x), 1),
    "a branch that is not taken": (
        lambda put: lambda x: lax.cond(x > 9, put, lambda x: x, x),
        None,
    ),
}


@pytest.mark.parametrize("size", [1, 20_000])
@pytest.mark.parametrize("where", FIRST_SETS)
def test_a_first_set_that_may_not_run(where, size, jit):
    index, (wrap, last) = storax.StateIndex(), FIRST_SETS[where]

    def put(x):
        storax.set_state(index, jnp.broadcast_to(x, size))
        return x + 1

    f = jit(wrap(put))
    for _ in range(3):
        f(jnp.float32(1))
        if last is None:
            with pytest.raises(RuntimeError, match="nothing has been set"):
                storax.get_state(index, jnp.zeros(size))
        else:
            np.testing.assert_array_equal(storax.get_state(index, jnp.zeros(size)), last)


AROUND = {
    "jit": jax.jit,
    "inlined jit": lambda f: jax.jit(f, inline=True),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "map": lambda f: lambda x: lax.map(f, jnp.stack([x, x]))[1],
    "fori_loop": lambda f: lambda x: lax.fori_loop(0, 2, lambda _, x: f(x), x),
    "while_loop": lambda f: lambda x: lax.while_loop(lambda x: x < 5, f, x),
    "while_loop's condition": lambda f: (
        lambda x: lax.while_loop(lambda x: f(x) < 5, lambda x: x + 1, x)
    ),
    "cond": lambda f: lambda x: lax.cond(x > 0, f, lambda x: x, x),
    "switch": lambda f: lambda x: lax.switch((x > 0) * 1, [lambda x: x, f, f], x),
    "custom_jvp": WRAPPERS["custom_jvp"],
    "custom_vjp": WRAPPERS["custom_vjp"],
    "grad": lambda f: lambda x: jax.grad(f)(x) * 0 + x,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x])).sum(),
    "vmap of cond": lambda f: (
        lambda x: jax.vmap(lambda x: lax.cond(x > 0, f, lambda x: x, x))(jnp.stack([x, -x])).sum()
    ),
    "vmap of while_loop": lambda f: (
        lambda x: jax.vmap(lambda x: lax.while_loop(lambda x: x < 5, f, x))(
            jnp.stack([x, x + 2])
        ).sum()
    ),
}


@pytest.mark.parametrize("inner", ["", "jit", "scan", "cond"])
@pytest.mark.parametrize("around", AROUND)
def test_all_is_hoisted(around, inner):
    """Nothing is left of a get or set in what is compiled, wherever it stands."""
    index, _, state = counter(1)
    zero = jnp.float32(0)

    def bump(x):
        s = storax.get_state(index, zero) + 1
        storax.set_state(index, s)
        return x + s

    f = AROUND[around](AROUND[inner](bump) if inner else bump)
    packed, plain = storax.jit(f), jax.jit(f)
    assert custom_calls(packed, jnp.float32(1)) == ["storax.load_states", "storax.store_states"]
    out, states = [], []
    for call in (packed, plain):
        storax.set_state(index, jnp.float32(1))
        out.append(call(jnp.float32(1)))
        states.append(state())
    assert out[0] == out[1] and states[0] == states[1] > 1


def test_pure_form_has_no_custom_call():
    indices, f = many(10)
    pure = storax.jit(f, pack=False)
    assert custom_calls(pure, jnp.zeros(4)) == []
    pure(jnp.ones(4))
    assert custom_calls(pure, jnp.zeros(4)) == []
    np.testing.assert_array_equal(storax.get_state(indices[0], jnp.zeros(4)), np.ones(4))


def test_reading_stores_nothing():
    index, _, _ = counter(3)
    read = storax.jit(lambda x: x + storax.get_state(index, x))
    assert custom_calls(read, jnp.float32(0)) == ["storax.load_states"]
    assert read(jnp.float32(1)) == 4
    version = index._slot.core.version
    read(jnp.float32(1))
    assert index._slot.core.version == version
    large, _, _ = counter(3, 20_000)
    first = storax.jit(lambda: storax.get_state(large, jnp.zeros(20_000))[0])
    assert first() == 3
    version = large._slot.core.version
    assert first() == 3
    assert large._slot.core.version == version


def test_what_is_overwritten_is_not_loaded():
    index, _, state = counter(3)

    @storax.jit
    def f(x):
        storax.set_state(index, x)
        return storax.get_state(index, x) + 1

    assert custom_calls(f, jnp.float32(0)) == ["storax.store_states"]
    assert f(jnp.float32(7)) == 8
    assert state() == 7


def test_large_states_are_updated_in_place():
    index, count, state = counter(0, 100_000)
    f = storax.jit(lambda: count()[0])
    f()
    addresses = set()
    for _ in range(5):
        f()
        addresses.add(_core.loan(index._slot.core)[0].unsafe_buffer_pointer())
    assert len(addresses) == 1
    assert state() == 6


def test_no_python_frame_of_ours_in_a_warm_call():
    _, count, _ = counter()
    _, count_large, _ = counter(0, 20_000)
    f = storax.jit(lambda x, how, fn: (fn(x) + count() + count_large()[0], how))
    key = jax.random.key(0)
    mlp = eqx.nn.MLP(2, 2, 8, 1, key=key)
    norm = storax.BatchNorm(2, axis_name="batch")
    model = eqx.nn.Sequential([mlp, eqx.nn.Lambda(jnp.tanh)])
    g = storax.jit(lambda model, x, name: jax.vmap(model)(x) + count())
    h = storax.jit(lambda norm, x: jax.vmap(norm, axis_name="batch")(x))
    x = jnp.ones((4, 2))

    class Holder:
        @storax.jit
        def method(self, x):
            return x + count()

    holder = Holder()
    calls = [
        lambda: f(x, "how", jnp.sin),
        lambda: g(model, x, name="a"),
        lambda: h(norm, x),
        lambda: holder.method(x),
    ]
    for call in calls * 3:
        call()
    frames = []

    def profile(frame, event, _):
        if event == "call" and "storax" in frame.f_globals.get("__name__", ""):
            frames.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")

    for call in calls:
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)
    assert frames == []


def test_lower_compile_and_call():
    _, count, state = counter()
    _, count_large, large_state = counter(0, 20_000)

    @storax.jit
    def f(x, name, *, y):
        return {name: x + y + count() + count_large()[0]}

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    lowered = f.lower(shape, "n", y=shape)
    assert "storax.load_states" in lowered.as_text()
    compiled = lowered.compile()
    assert compiled.cost_analysis() is not None
    for k in range(1, 4):
        out = compiled(jnp.zeros(3), "n", y=jnp.ones(3))
        np.testing.assert_array_equal(out["n"], 2 * k + np.ones(3))
        assert (state(), large_state()) == (k, k)
    with pytest.raises(TypeError, match="another structure"):
        compiled(jnp.zeros(3), "m", y=jnp.ones(3))
    f(jnp.zeros(3), "n", y=jnp.ones(3))
    compiled(jnp.zeros(3), "n", y=jnp.ones(3))
    assert (state(), large_state()) == (5, 5)


def test_a_compiled_program_knows_static_arguments_that_are_left_out():
    _, count, state = counter()
    f = storax.jit(lambda x, n=1: x * n * count())
    x = jnp.ones(2)
    for compiled, given, others in (
        (f.lower(x).compile(), {}, ({"n": 10}, {"n": "one"})),
        (f.lower(x, n=10).compile(), {"n": 10}, ({}, {"n": 1})),
    ):
        before = state()
        np.testing.assert_array_equal(
            compiled(x, **given), given.get("n", 1) * (before + 1) * np.ones(2)
        )
        for other in others:
            with pytest.raises(TypeError, match="other static leaves"):
                compiled(x, **other)
        assert state() == before + 1


def test_a_compiled_program_whose_large_state_plain_jit_keeps_in_place():
    index, count, state = counter(0, 20_000)
    compiled = storax.jit(lambda: count()[0]).lower().compile()
    plain = jax.jit(lambda: storax.get_state(index, jnp.zeros(20_000))[0])
    for k in range(1, 4):
        assert compiled() == k
        assert plain() == state() == k


@pytest.mark.parametrize("lent", [True, False])
def test_a_compiled_program_that_made_the_first_state_goes_on_with_it(lent):
    """It was compiled when there was none, and now finds one, which plain jit keeps in place or not."""
    index, like = storax.StateIndex(name="born"), jnp.zeros(20_000)

    def f(x):
        storax.set_state(index, like + x)
        return storax.get_state(index, like)[0]

    compiled = storax.jit(f).lower(jnp.float32(1)).compile()
    wrap = storax.jit if lent else jax.jit
    more = wrap(lambda: storax.set_state(index, storax.get_state(index, like) + 1))
    for k in range(1, 4):
        assert compiled(jnp.float32(10 * k)) == 10 * k
        more()
        storax.barrier()
        assert storax.get_state(index, like)[0] == 10 * k + 1


def test_a_state_over_devices_that_a_program_has_made_is_made_again():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    x = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.P("d")))
    index = storax.StateIndex()
    put = storax.jit(lambda x: (storax.set_state(index, x * 2), x.sum())[1])
    compiled = put.lower(x).compile()
    for k in range(1, 4):
        compiled(x + k)
        np.testing.assert_array_equal(storax.get_state(index, x), 2 * (np.arange(8) + k))
    with _core.LoanLock([index._slot.core]):
        index._slot.core.lose()
    put(x)
    np.testing.assert_array_equal(storax.get_state(index, x), 2 * np.arange(8))


def test_a_compiled_program_whose_large_state_is_lost():
    index, count, _ = counter(0, 20_000)
    compiled = storax.jit(lambda: count()[0]).lower().compile()
    assert compiled() == 1
    with _core.LoanLock([index._slot.core]):
        index._slot.core.lose()
    with pytest.raises(RuntimeError, match="is lost"):
        compiled()
    storax.set_state(index, jnp.ones(20_000))
    assert compiled() == 2


def test_export_of_the_packed_form_says_what_to_do():
    _, count, _ = counter()
    with pytest.raises(NotImplementedError, match="pack=False"):
        jax.export.export(storax.jit(lambda: count()))()


def test_a_large_state_that_is_set_and_not_read_is_worked_on_in_place():
    index = storax.StateIndex()
    storax.set_state(index, jnp.zeros(20_000))
    address = lambda: _core.loan(index._slot.core)[0].unsafe_buffer_pointer()
    f = storax.jit(lambda x: storax.set_state(index, x + jnp.zeros(20_000)))
    f(jnp.float32(1))
    before = address()
    f(jnp.float32(2))
    assert address() == before
    assert storax.get_state(index, jnp.zeros(20_000))[0] == 2


def test_trace_and_eval_shape():
    _, count, state = counter()
    f = storax.jit(lambda x: (x + count(), x.astype(jnp.int32)))
    traced = f.trace(jnp.zeros(3))
    assert "get_state" in str(traced.jaxpr)
    shapes = f.eval_shape(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert [(x.shape, x.dtype.name) for x in shapes] == [((3,), "float32"), ((3,), "int32")]
    assert state() == 0
    pure = storax.jit(f.__wrapped__, pack=False)
    compiled = pure.trace(jnp.zeros(3)).lower().compile()
    np.testing.assert_array_equal(compiled(jnp.zeros(3))[0], np.ones(3))
    assert state() == 1


def test_export_of_the_pure_form():
    _, count, state = counter(5)
    pure = storax.jit(lambda x: x * count(), pack=False)
    exported = jax.export.export(pure)(jax.ShapeDtypeStruct((2,), jnp.float32))
    again = jax.export.deserialize(exported.serialize())
    # A function of states: those it works on in place, the others it takes, and then the arguments.
    states = (), ((jnp.float32(7),),)
    (new,), out = again.call(*states, jnp.ones(2))
    np.testing.assert_array_equal(out, [8, 8])
    assert new[0] == 8
    assert state() == 5


_CACHED = """
    import os, sys
    import jax, jax.numpy as jnp, storax
    from jax._src import compilation_cache as cc
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from jax._src import monitoring
    hits = []
    monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hits" in name else None)
    first, second = storax.StateIndex(), storax.StateIndex()
    for k, index in enumerate((first, second) if sys.argv[2] == "0" else (second, first)):
        storax.set_state(index, jnp.float32(10 * (k + 1)))
    del hits[:]
    @storax.jit
    def warm(): return 0
    f = storax.jit(lambda x: (storax.set_state(first, storax.get_state(first, x) + x), x)[1], pack=False)
    f(jnp.float32(1))
    state = float(storax.get_state(first, jnp.float32(0)))
    print("hits", len(hits), "state", state, float(storax.get_state(second, jnp.float32(0))))
"""


def test_pure_form_hits_the_persistent_cache(tmp_path):
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_CACHED), str(tmp_path), order],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for order in "01"
    ]
    assert runs[0][3:] == ["11.0", "20.0"]
    assert runs[1][3:] == ["21.0", "10.0"]
    assert int(runs[1][1]) > int(runs[0][1])


def test_memory_of_a_state_of_half_a_gibibyte():
    worker = Path(__file__).parents[3] / "benchmarks" / "memory_worker.py"
    assert float(subprocess.check_output([sys.executable, worker])) <= 0.8


@pytest.mark.parametrize("pack", [None, False])
def test_what_is_for_another_platform(pack):
    """It is not lowered for this one, where it need not lower."""
    _, count, read = counter()

    def for_tpus(x):
        kernel = pl.pallas_call(lambda a, o: None, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))
        return kernel(x) * count()

    f = lambda x: lax.platform_dependent(x, tpu=for_tpus, default=lambda x: x * 2 * count())
    g = storax.jit(f, pack=pack)
    for k in range(1, 4):
        np.testing.assert_array_equal(g(jnp.ones((8, 128))), np.full((8, 128), 2 * k))
    assert read() == 3


@pytest.mark.parametrize("inline", [False, True])
def test_a_function_that_is_called_often_is_lowered_once(inline):
    """Or a program takes the longer to compile, the more often it calls one."""
    _, count, _ = counter()
    double = jax.jit(lambda x: x * 2 + 0 * count(), inline=inline)
    text = storax.jit(lambda x: double(double(double(x)))).lower(jnp.float32(1)).as_text()
    assert text.count("stablehlo.multiply") == (6 if inline else 2)
