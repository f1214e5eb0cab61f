"""A child that was forked from a process with JAX in it is told so, by whatever it tries."""

import subprocess
import sys

import pytest

PROGRAM = """
import copy, io, os, pickle, signal, sys, warnings
import equinox as eqx, jax, jax.numpy as jnp, storax

one = jnp.float32(1)
index, empty = storax.StateIndex(name="kept"), storax.StateIndex()
storax.set_state(index, one)
frozen = eqx.nn.inference_mode(index)
keys = jax.random.split(jax.random.key(0), 3)
keyed = storax.StateIndex()
storax.set_state(keyed, keys)

@jax.jit
def count():
    n = storax.get_state(index, one) + 1
    storax.set_state(index, n)
    return n

assert count() == 2
pickled = pickle.dumps(index)
ours = storax.jit(count.__wrapped__)
ours(), ours()
warm = storax.jit(lambda x: x + 1)
warm(one), warm(one)

OPERATIONS = {
    "make an index": lambda: storax.StateIndex(),
    "get": lambda: storax.get_state(index, one),
    "set": lambda: storax.set_state(index, one),
    "first set": lambda: storax.set_state(empty, one),
    "get keys": lambda: storax.get_state(keyed, keys),
    "get a frozen one": lambda: storax.get_state(frozen, one),
    "flatten a frozen one": lambda: jax.tree.leaves(frozen),
    "trace a get": lambda: jax.make_jaxpr(lambda: storax.get_state(index, one))(),
    "trace a set": lambda: jax.jit(lambda x: storax.set_state(index, x)).lower(one),
    "jit": lambda: jax.jit(lambda x: storax.get_state(index, x))(one),
    "storax.jit": lambda: ours(),
    "storax.jit, without state": lambda: warm(one),
    "deepcopy": lambda: copy.deepcopy(index),
    "pickle": lambda: pickle.dumps(index),
    "unpickle": lambda: pickle.loads(pickled),
    "save": lambda: storax.tree_serialise_leaves(io.BytesIO(), index),
    "save, by Equinox": lambda: eqx.tree_serialise_leaves(io.BytesIO(), index),
    "barrier": storax.barrier,
}

def attempt():
    for name, operation in OPERATIONS.items():
        signal.alarm(20)  # rather than hang
        try:
            operation()
            outcome = "no error"
        except BaseException as e:
            while e.__cause__ is not None:
                e = e.__cause__
            outcome = f"{type(e).__name__}: {e}"
        print(name, "|", outcome, flush=True)

if sys.argv[1] == "os.fork":
    child = os.fork()
    if child == 0:
        attempt()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
else:
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=attempt)
    process.start()
    process.join()
    assert process.exitcode == 0
print("parent |", float(count()), float(storax.get_state(index, one)), storax.StateIndex(name="x"))
"""


@pytest.mark.parametrize("way", ["os.fork", "multiprocessing"])
def test_in_a_forked_child(way):
    done = subprocess.run(
        # JAX warns about any fork, and Python about one with threads.
        [sys.executable, "-W", "ignore", "-c", PROGRAM, way],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *child, parent = done.stdout.splitlines()
    assert len(child) == 18
    for line in child:
        assert "| RuntimeError: storax: this process was forked" in line and "'spawn'" in line
    assert parent == "parent | 5.0 5.0 StateIndex(inference=False, name=\"StateIndex 'x'\")"
