"""Saving and loading by Equinox's own functions; test_copies.py has what files share with copies."""

import gc
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax
from duplicating import fails, load, save, unset
from storax import _core, _record

ZERO = jnp.float32(0)


class Net(eqx.Module):
    norm: storax.BatchNorm
    linear: eqx.nn.Linear
    calls: storax.StateIndex

    def __init__(self, key, size=3):
        self.norm = storax.BatchNorm(size, axis_name="batch")
        self.linear = eqx.nn.Linear(2, size, key=key)
        self.calls = storax.StateIndex(name="calls")
        storax.set_state(self.calls, jnp.int32(0))

    def __call__(self, x):
        if not self.calls.inference:
            storax.set_state(self.calls, storax.get_state(self.calls, jnp.int32(0)) + 1)
        return self.norm(self.linear(x))


KEY = jax.random.key(0)
XS = jnp.arange(8.0).reshape(4, 2)


@pytest.fixture
def net():
    net = Net(KEY)
    for k in range(3):
        jax.vmap(net, axis_name="batch")(XS * (k + 1))
    return net


def calls(net):
    return int(storax.get_state(net.calls, jnp.int32(0)))


def predict(net):
    return jax.vmap(eqx.nn.inference_mode(net), axis_name="batch")(XS)


# --- Models ---


@pytest.mark.parametrize("module", [eqx, storax])
@pytest.mark.parametrize("inference", [False, True])
def test_a_model(net, module, inference, tmp_path):
    if inference:
        net = eqx.nn.inference_mode(net)
    module.tree_serialise_leaves(tmp_path / "net", net)
    assert (tmp_path / "net.eqx").exists()
    for like in (
        net,
        Net(jax.random.key(1)),
        eqx.filter_eval_shape(Net, KEY),
        unset(eqx.nn.inference_mode(net)),
    ):
        loaded = module.tree_deserialise_leaves(tmp_path / "net.eqx", like)
        assert calls(loaded) == 3
        assert loaded.calls.inference is loaded.norm.inference is inference
        np.testing.assert_array_equal(predict(loaded), predict(net))
        if not inference:
            jax.vmap(loaded, axis_name="batch")(XS)
            assert (calls(loaded), calls(net)) == (4, 3)


def test_another_process(net, tmp_path):
    eqx.tree_serialise_leaves(tmp_path / "net.eqx", net)
    (tmp_path / "net.pickle").write_bytes(pickle.dumps(net))
    program = f"""
import os, pickle, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
os.chdir({str(tmp_path)!r})
import equinox as eqx, jax
from test_serialise import KEY, Net, calls, predict
like = eqx.filter_eval_shape(Net, KEY)
for net in (eqx.tree_deserialise_leaves("net", like), pickle.load(open("net.pickle", "rb"))):
    print(calls(net), predict(net).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        count, outputs = line.split(" ", 1)
        assert int(count) == 3
        np.testing.assert_allclose(json.loads(outputs), predict(net), rtol=1e-6)


def test_a_model_and_what_goes_with_it(net):
    """An optimiser's state has the model's structure, its indices' slots included, and no state."""
    moments = jax.tree.map(jnp.zeros_like, eqx.filter(net, eqx.is_inexact_array))
    for tree in ({"m": net, "o": moments}, {"a": moments, "m": net}):
        for like in (tree, unset(tree)):
            loaded = load(save(tree), like)
            m, o = (loaded[k] for k in sorted(loaded, key=lambda k: k != "m"))
            added = eqx.apply_updates(m, o)
            assert calls(added) == 3
            storax.set_state(added.calls, jnp.int32(9))
            assert (calls(m), calls(net)) == (9, 3)
    alone = load(save(moments), moments)
    assert calls(eqx.apply_updates(net, alone)) == 3


def test_a_frozen_model_in_two_halves(net):
    frozen = eqx.nn.inference_mode(net)
    params, static = eqx.partition(frozen, eqx.is_array)
    like = jax.tree.map(jnp.zeros_like, params)
    loaded = eqx.combine(load(save(params), like), static)
    np.testing.assert_array_equal(predict(loaded), predict(net))


def test_flags_that_are_arrays(net):
    index = jax.tree.map(jnp.asarray, net.calls)
    loaded = load(save(index), jax.tree.map(jnp.asarray, unset(net.calls)))
    assert isinstance(loaded.inference, jax.Array) and not loaded.inference
    assert int(storax.get_state(jax.tree.map(bool, loaded), jnp.int32(0))) == 3
    like = jax.eval_shape(lambda: storax.StateIndex())
    assert isinstance(like.inference, jax.ShapeDtypeStruct)
    assert int(storax.get_state(load(save(index), like), jnp.int32(0))) == 3


def test_two_saves_in_one_file():
    """Whose slots have nothing to do with each other, though loaded together."""
    file = io.BytesIO()
    for k in range(2):
        index = storax.StateIndex(name="either")
        storax.set_state(index, jnp.float32(k))
        eqx.tree_serialise_leaves(file, index)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, [storax.StateIndex(), storax.StateIndex()])
    assert [float(storax.get_state(i, ZERO)) for i in loaded] == [0, 1]


# --- Filter specs ---


def test_specs_that_leave_the_state_alone(net):
    skip = lambda default: lambda f, x: x if isinstance(x, np.ndarray) else default(f, x)
    data = save(net, filter_spec=skip(eqx.default_serialise_filter_spec))
    assert b"storax" not in data
    like = Net(jax.random.key(1))
    loaded = load(data, like, filter_spec=skip(eqx.default_deserialise_filter_spec))
    assert jnp.array_equal(loaded.linear.weight, net.linear.weight)
    storax.set_state(loaded.calls, jnp.int32(7))
    assert calls(like) == 7


@pytest.mark.parametrize("inference", [False, True])
def test_specs_for_each_leaf(net, inference):
    if inference:
        net = eqx.nn.inference_mode(net)
    like = unset(net)
    specs = lambda spec, tree: jax.tree.map(lambda _: spec, tree)
    data = save(net, filter_spec=specs(eqx.default_serialise_filter_spec, net))
    for spec in (
        specs(eqx.default_deserialise_filter_spec, like),
        eqx.default_deserialise_filter_spec,
    ):
        loaded = load(data, like, filter_spec=spec)
        assert calls(loaded) == 3 and calls(net) == 3
        np.testing.assert_array_equal(predict(loaded), predict(net))
        assert loaded.calls._slot.id not in (net.calls._slot.id, like.calls._slot.id)


def test_specs_of_ones_own(net):
    """As the documentation of Equinox has them."""
    write = lambda f, x: jnp.save(f, x) if eqx.is_array(x) else None
    read = lambda f, x: jnp.load(f) if eqx.is_array(x) else x
    loaded = load(save(net, filter_spec=write), unset(net), filter_spec=read)
    assert calls(loaded) == 3


def test_is_leaf(net):
    is_none = lambda x: x is None
    loaded = load(save(net, is_leaf=is_none), unset(net), is_leaf=is_none)
    assert calls(loaded) == 3


# --- Errors: each says what is wrong, and nothing changes ---


@pytest.fixture(params=[eqx, storax], ids=["equinox", "storax"])
def module(request):
    return request.param


def test_a_truncated_file(net, fresh_caches):
    data = save(net)
    like = Net(KEY)
    before = _core.usage()[:2]
    for length in [*range(0, len(data), 211), len(data) - 1]:
        fails(data[:length], like, r"ends too early, is damaged, or is that of another", storax)
        fails(data[:length], like, r"Error at leaf", eqx)
    gc.collect()
    assert _core.usage()[:2] == before


def test_another_models_file(net, module):
    match = r"'calls', but an array float32\[2\] in its place. It was saved from another model"
    fails(save([jnp.zeros(2)]), [net.calls], match, module)
    fails(save([net.calls]), [jnp.zeros(2)], "has changed shape from", module)


def test_another_type(net, module):
    match = (
        r"BatchNorm cannot be loaded .*it holds \(f32\[4\], f32\[4\]\).*has \(f32\[3\], f32\[3\]\)"
    )
    tree = lambda net: [net.norm.state_index]
    fails(save(tree(net)), tree(Net(KEY, size=4)), match, module)
    loaded = load(save(tree(net)), unset(tree(Net(KEY, size=4))))  # nothing to differ from yet
    with pytest.raises(RuntimeError, match=r"holds \(f32\[3\], f32\[3\]\), but `like` is"):
        storax.get_state(loaded[0], (jnp.zeros(4), jnp.ones(4)))


def test_a_file_without_state(net, module):
    file = io.BytesIO()
    np.save(file, np.array(False))
    fails(
        file.getvalue(), net.calls, "no state for StateIndex 'calls': only its `inference`", module
    )


def test_an_unknown_equinox(net, monkeypatch):
    """Where no state would be saved, say so."""
    monkeypatch.setitem(_record.__dict__, "encode", None)
    source = "def tree_serialise_leaves(tree):\n  return jtu.tree_flatten(tree)\n"
    space = {}
    exec(source, eqx.tree_serialise_leaves.__globals__, space)
    with pytest.raises(RuntimeError, match="in a way that storax does not know"):
        space["tree_serialise_leaves"](net)


# --- Structures that a file cannot hold in full ---


class Local(NamedTuple):
    a: Any


class Node(eqx.Module):
    a: jax.Array
    n: int = eqx.field(static=True)


def in_new_process(state, data, **env):
    program = f"""
import sys, io
sys.path.insert(0, {str(Path(__file__).parent)!r})
import equinox as eqx, jax.numpy as jnp, storax
import test_serialise as t
data = sys.stdin.buffer.read()
index = storax.StateIndex(name="index")
state = {state}
try:
    loaded = storax.tree_deserialise_leaves(io.BytesIO(data), index)
except RuntimeError as e:
    print("refused:", e)
    eqx.filter_eval_shape(lambda: storax.set_state(index, state))  # as a constructor would
    loaded = storax.tree_deserialise_leaves(io.BytesIO(data), index)
print(storax.get_state(loaded, state))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=data,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_namedtuples_and_modules_in_another_process():
    index = storax.StateIndex()
    storax.set_state(index, Local(jnp.int32(3)))
    assert (
        in_new_process("t.Local(jnp.int32(0))", save(index)) == "Local(a=Array(3, dtype=int32))\n"
    )
    index = storax.StateIndex()
    storax.set_state(index, Node(jnp.int32(3), 5))
    text = in_new_process("t.Node(jnp.int32(0), 5)", save(index))
    assert re.match(r"refused: .*test_serialise:Node, of which.*Set the state", text)
    assert text.endswith("Node(a=i32[], n=5)\n")


def test_states_of_devices_where_there_are_fewer():
    """As one, if they are the same everywhere."""
    one = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    index = storax.StateIndex()
    put = lambda factor: jax.pmap(lambda x: storax.set_state(index, jnp.ones(2) + factor * x))
    put(0)(jnp.arange(4.0))
    assert in_new_process("jnp.zeros(2)", save(index), **one) == "[1. 1.]\n"
    put(1)(jnp.arange(4.0))
    with pytest.raises(
        AssertionError, match=r"devices \[0, 1, 2, 3\], not all the same.*choose one"
    ):
        in_new_process("jnp.zeros(2)", save(index), **one)
    # The way out.
    chosen = storax.StateIndex()
    storax.set_state(chosen, storax.get_state(index, jnp.zeros((4, 2)))[2])
    assert in_new_process("jnp.zeros(2)", save(chosen), **one) == "[3. 3.]\n"
