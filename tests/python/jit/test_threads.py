"""storax.jit called from many threads at once."""

import gc
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax
from jit.counting import counter

THREADS = 8
# A million calls in all with STORAX_ALL=1, else a tenth of that.
CALLS = (1_000_000 if os.environ.get("STORAX_ALL") == "1" else 100_000) // THREADS


def in_threads(work):
    """Runs `work(k)` in each thread; raises what any of them raised."""
    errors = []
    start = threading.Barrier(THREADS)

    def run(k):
        try:
            start.wait()
            work(k)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("form", [{}, {"pack": False}], ids=["packed", "pure"])
@pytest.mark.parametrize("size", [None, 20_000], ids=["small", "large"])
def test_states_of_their_own(size, form):
    made = [counter(0, size) for _ in range(THREADS)]
    calls = CALLS // (1 if size is None and not form else 10)

    def work(k):
        f = storax.jit(lambda: made[k][1](), **form)
        for _ in range(calls):
            f()

    in_threads(work)
    for _, _, state in made:
        assert state() == calls


@pytest.mark.parametrize("form", [{}, {"pack": False}], ids=["packed", "pure"])
@pytest.mark.parametrize("size", [8, 20_000], ids=["small", "large"])
def test_a_shared_state_is_never_torn(size, form):
    """Each call writes its own number everywhere; what is read is of one call."""
    index = storax.StateIndex()
    like = (jnp.zeros(size), jnp.zeros(size))
    storax.set_state(index, like)

    @(lambda f: storax.jit(f, **form))
    def write(x):
        a, b = storax.get_state(index, like)
        storax.set_state(index, (a * 0 + x, b * 0 + x))
        low, high = jnp.minimum(a.min(), b.min()), jnp.maximum(a.max(), b.max())
        return high - low

    values = [jnp.float32(k) for k in range(THREADS)]

    def work(k):
        outs = []
        for n in range(CALLS // (1 if size == 8 and not form else 50)):
            outs.append(write(values[k]))
            if n % 100 == 0:
                assert all(x == 0 for x in map(float, outs))
                outs.clear()
                a, b = storax.get_state(index, like)
                assert len({*np.asarray(a), *np.asarray(b)}) == 1
            if n % 501 == 0:
                storax.set_state(index, (like[0] + k, like[1] + k))

    in_threads(work)


def test_eager_plain_and_ours_at_once():
    """In threads of their own, on one state, which moves between memory and loans meanwhile."""
    index = storax.StateIndex()
    like = jnp.zeros(20_000)
    storax.set_state(index, like)

    def bump():
        s = storax.get_state(index, like) + 1
        storax.set_state(index, s)
        return s.max() - s.min()

    ours, pure = storax.jit(bump), storax.jit(bump, pack=False)

    def work(k):
        for n in range(100):
            if k % 4 == 0:
                assert ours() == 0
            elif k % 4 == 1:
                assert pure() == 0
            elif k % 4 == 2 and n % 10 == 0:
                assert jax.jit(lambda: bump())() == 0  # compiled anew, and gone again
            else:
                assert bump() == 0

    in_threads(work)
    assert 1 <= storax.get_state(index, like)[0] <= THREADS * 100


def test_one_function_traced_in_many_threads():
    _, count, state = counter()
    f = storax.jit(lambda x: x + count())

    def work(k):
        for n in range(1, 20):
            assert f(jnp.zeros(n)).shape == (n,)

    in_threads(work)
    assert 1 <= state() <= THREADS * 19


def test_first_calls_of_one_function_at_once():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            _, count, state = counter()
            f = storax.jit(lambda count=count: count())
            in_threads(lambda k, f=f: f() if k % 2 else f.lower())
            assert 1 <= state() <= THREADS
    finally:
        sys.setswitchinterval(interval)


# Where a set may or may not run, as a flag says.
SETS = {
    "cond": lambda bump, flag: lax.cond(flag, bump, lambda: None),
    "switch": lambda bump, flag: lax.switch(flag * 1, [lambda: None, bump]),
    "while": lambda bump, flag: lax.while_loop(
        lambda k: k < flag * 1, lambda k: (bump(), k + 1)[1], 0
    ),
    "scan of cond": lambda bump, flag: lax.scan(
        lambda _, k: (None, lax.cond(flag & (k == 1), bump, lambda: None)), None, jnp.arange(3)
    ),
    "cond in jit": lambda bump, flag: jax.jit(lambda f: lax.cond(f, bump, lambda: None))(flag),
    "cond in checkpoint": lambda bump, flag: jax.checkpoint(
        lambda f: lax.cond(f, bump, lambda: None)
    )(flag),
    "vmap of cond": lambda bump, flag: jax.vmap(lambda f: lax.cond(f, bump, lambda: None))(
        jnp.stack([flag & False, flag])
    ),
    "vmap of while": lambda bump, flag: jax.vmap(
        lambda n: lax.while_loop(lambda k: k < n, lambda k: (bump(), k + 1)[1], 0)
    )(jnp.stack([0, flag * 1])),
    "scan of no steps, cond": lambda bump, flag: (
        lax.scan(lambda _, k: (None, bump()), None, jnp.zeros(0)),
        lax.cond(flag, bump, lambda: None),
    ),
}


@pytest.mark.parametrize("how", SETS)
def test_what_did_not_run_undoes_nothing(how):
    """A set by another thread, in the middle of a call, stays if the call itself sets nothing."""
    index, count, state = counter()
    others = []

    def meanwhile():
        thread = threading.Thread(
            target=lambda: others.append(storax.set_state(index, jnp.float32(100)))
        )
        thread.start()
        thread.join()

    @storax.jit
    def f(flag):
        storax.get_state(index, jnp.float32(0))  # the state is loaded by now
        jax.debug.callback(meanwhile, ordered=True)
        SETS[how](lambda: (count(), None)[1], flag)

    sets = index._slot.core.num_sets
    for flag, want in ((False, 100), (True, 101), (False, 100), (True, 101)):
        f(jnp.array(flag))
        storax.barrier()
        assert state() == want
    assert index._slot.core.num_sets == sets + 4 + 2


def test_forgetting_what_forgets_as_it_goes():
    gone = []

    class Static:
        def __del__(self):
            f.clear_cache()
            gone.append(f(jnp.ones(2), 3).sum())

    f = storax.jit(lambda x, static: x + 1)
    f(jnp.ones(2), Static())
    f.clear_cache()
    gc.collect()
    assert gone == [4]


def test_forgetting_the_programs_while_one_runs():
    _, count, state = counter()
    inside, go = threading.Event(), threading.Event()

    def callback(x):
        inside.set()
        go.wait(60)
        return np.float32(x)

    @storax.jit
    def f(x):
        spec = jax.ShapeDtypeStruct((), jnp.float32)
        return x.sum() + jax.experimental.io_callback(callback, spec, count())

    thread = threading.Thread(target=lambda: jax.block_until_ready(f(jnp.ones(2))))
    thread.start()
    inside.wait(60)
    f.clear_cache()
    go.set()
    thread.join()
    for n in (2, 3, 4):  # what was compiled before, and anew
        assert f(jnp.ones(n)) == n + state()
    assert state() == 4
