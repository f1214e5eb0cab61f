"""A compiled program keeps the slots it names alive; nothing else does."""

import gc
import resource
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax
from storax import _core

ZERO = jnp.float32(0)


def slots():
    gc.collect()
    return _core.usage()[0]


def live_bytes():
    gc.collect()
    return _core.usage()[1]


def bump(index, x=ZERO):
    n = storax.get_state(index, 0 * x) + 1
    storax.set_state(index, n)
    return n


def fails(f):
    with pytest.raises(RuntimeError):
        f()


USES = {
    "nothing": lambda i: None,
    "eager": lambda i: bump(i),
    "jit": lambda i: jax.jit(lambda x: bump(i, x))(ZERO),
    "filter_jit, frozen": lambda i: eqx.filter_jit(lambda i: storax.get_state(i, ZERO))(
        eqx.nn.inference_mode(i)
    ),
    "nested jit": lambda i: jax.jit(lambda x: jax.jit(lambda x: bump(i, x))(x))(ZERO),
    "jit scan": lambda i: jax.jit(
        lambda x: lax.scan(lambda c, _: (bump(i, c), None), x, None, length=3)[0]
    )(ZERO),
    "aot": lambda i: jax.jit(lambda x: bump(i, x)).lower(ZERO).compile()(ZERO),
    "make_jaxpr": lambda i: jax.make_jaxpr(lambda x: bump(i, x))(ZERO),
    "grad": lambda i: jax.grad(lambda x: (bump(i), x)[1])(ZERO),
    "error": lambda i: fails(jax.jit(lambda: storax.get_state(i, jnp.zeros(9)))),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_else_keeps_it_alive(use, fresh_caches):
    before = slots()
    for _ in range(30):
        index = storax.StateIndex()
        storax.set_state(index, ZERO)
        USES[use](index)
    del index
    assert slots() - before <= 1  # the last exception's traceback, at most


@pytest.mark.parametrize("kind", ["scan", "cond", "filter_jit"])
def test_what_jax_itself_caches_until_clear_caches(kind, fresh_caches):
    before = slots()

    def use():
        index = storax.StateIndex()
        storax.set_state(index, ZERO)
        if kind == "scan":
            out = lax.scan(lambda c, _: (bump(index, c), None), ZERO, None, length=3)[0]
            assert out == 3
        elif kind == "filter_jit":
            # Equinox keeps one jitted function per name, and JAX that one's programs.
            assert eqx.filter_jit(lambda i: bump(i))(index) == 1
        else:
            assert lax.cond(True, lambda: bump(index), lambda: ZERO) == 1

    for _ in range(10):
        use()
    jax.clear_caches()
    assert slots() == before


def test_a_held_program_keeps_its_slot(fresh_caches):
    before = slots()

    def compile():
        index = storax.StateIndex()
        storax.set_state(index, ZERO)
        return jax.jit(lambda: bump(index)).lower().compile()

    compiled = compile()
    assert slots() == before + 1
    assert [float(compiled()) for _ in range(3)] == [1, 2, 3]
    del compiled
    assert slots() == before


def test_a_lowered_program_keeps_its_slot(fresh_caches):
    def lower():
        index = storax.StateIndex()
        storax.set_state(index, ZERO)
        return jax.jit(lambda: bump(index)).lower()

    lowered = lower()
    gc.collect()
    compiled = lowered.compile()
    assert [float(compiled()) for _ in range(2)] == [1, 2]


def test_a_program_that_still_runs_keeps_its_slot(fresh_caches):
    def start(m):
        index = storax.StateIndex()
        storax.set_state(index, jnp.float32(5))

        @jax.jit
        def slow(m):
            for _ in range(30):
                m = jnp.tanh(m @ m) * 0.01
            return storax.get_state(index, ZERO) + m[0, 0] * 0

        return slow(m)

    m = jnp.full((300, 300), 0.001)
    for _ in range(5):
        out = start(m)  # index and function are gone, the program runs
        jax.clear_caches()
        gc.collect()
        assert out == 5


def test_memory_is_given_back(fresh_caches):
    before = live_bytes()
    index = storax.StateIndex()
    storax.set_state(index, jnp.zeros(1 << 20))
    assert live_bytes() - before >= 4 << 20
    del index
    assert live_bytes() == before


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_constant_memory_many_small(fresh_caches):
    get_and_set = jax.jit(lambda x: x + 1)

    def use(n):
        # Every thousandth is compiled into a program of its own: compiling is what takes long.
        for k in range(n):
            index = storax.StateIndex()
            storax.set_state(index, jnp.zeros(256))
            if k % 1000 == 0:
                jax.jit(lambda x, index=index: storax.set_state(index, x))(jnp.ones(256))
            else:
                storax.set_state(index, get_and_set(storax.get_state(index, ONES)))

    ONES = jnp.ones(256)  # noqa: N806
    use(5_000)
    before = peak_mib()
    use(95_000)
    assert peak_mib() - before < 60  # 100,000 KiB would be 98


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_constant_memory_many_large(fresh_caches):
    x = jnp.ones(1 << 18)

    def use(n):
        for k in range(n):
            index = storax.StateIndex()
            storax.set_state(index, x)
            if k % 50 == 0:
                jax.jit(lambda x, index=index: storax.set_state(index, x * 2))(x)
            else:
                storax.get_state(index, x)

    use(100)
    before = peak_mib()
    use(1_900)
    assert peak_mib() - before < 200  # all at once they would be 1,900


def test_indices_reuse_their_places():
    ids = set()
    for _ in range(100):
        index = storax.StateIndex()
        ids.add(index._slot.id & 0xFFFFFFFF)
        np.testing.assert_raises(RuntimeError, storax.get_state, index, ZERO)
        del index
    assert len(ids) < 50


def test_an_index_that_was_replaced(fresh_caches):
    """As when a cell of a notebook runs again: JAX remembers the jaxpr of a function that has not changed."""
    names = {}

    def run_cell():
        names["index"] = storax.StateIndex()
        storax.set_state(names["index"], ZERO)

    def body(total, _):
        return total + bump(names["index"]), None

    g = lambda: lax.scan(body, ZERO, None, length=2)[0]
    run_cell()
    jax.eval_shape(g)
    run_cell()
    gc.collect()
    with pytest.raises(RuntimeError, match=r"its name now stands for another.*jax.clear_caches"):
        g()
    jax.clear_caches()
    assert g() == 3
