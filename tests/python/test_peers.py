"""What other ways to keep state do where storax promises something, each used as its manual says.

The table in README.md says what these tests find, cell by cell, so that it stays true when peers change.
`python tests/python/test_peers.py` prints it anew.
"""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback

import storax

ONES, TAKEN = jnp.ones(3), jnp.array([True, False, True])


def library_scan(f, x, length):
    """Stands for code of somebody else's, who calls our function and knows of no state."""
    return lax.scan(lambda x, _: (f(x), None), x, None, length=length)[0]


def with_backward_rule(f):
    """The identity, whose derivative is `f` of the cotangent."""
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, ct: (f(ct),))
    return identity


def failing(x):
    def fail(x):
        raise ValueError("on purpose")

    return jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), x)


# --- Peers whose state is read and written where it is used ----------------------------------------


class ByClosure:
    """`count` multiplies by the state and adds one to it; each row returns what is right or wrong."""

    def count(self, x):
        s = self.get(x)
        self.set(s + 1)
        return x * s

    def written_by_a_jitted_closure(self):
        f = jax.jit(self.count)
        return f(1.0), f(1.0), self.read()

    def written_in_a_library_scan(self):
        return jax.jit(lambda x: library_scan(self.count, x, 3))(1.0), self.read()

    def read_in_a_loop_condition(self):
        more = lambda k: (self.get(1.0) < 3) & (k < 9)
        step = lambda k: (self.count(1.0), k + 1)[1]
        return jax.jit(lambda: lax.while_loop(more, step, 0))(), self.read()

    def vmap_with_a_state_per_lane(self):
        self.make(jnp.arange(3.0))
        return jax.jit(jax.vmap(self.count))(ONES), self.read()

    def vmap_of_cond(self):
        self.make(jnp.arange(3.0))
        program = lambda p, x: lax.cond(p, self.count, lambda x: x, x)
        return jax.jit(jax.vmap(program))(TAKEN, ONES), self.read()

    def grad_of_checkpoint(self):
        f = jax.checkpoint(lambda x: jnp.sin(x) * self.count(1.0))
        return jax.jit(jax.grad(f))(0.0), self.read()

    def grad_of_scan(self):
        loop = lambda x: lax.scan(lambda x, _: (self.count(x), None), x, None, length=2)[0]
        return jax.jit(jax.grad(loop))(1.0), self.read()

    def written_in_a_backward_rule(self):
        return jax.jit(jax.grad(with_backward_rule(self.count)))(1.0), self.read()

    def kept_after_a_failure(self):
        try:
            jax.block_until_ready(jax.jit(lambda x: failing(self.count(x)))(1.0))
        except Exception as e:
            if "on purpose" not in str(e):
                raise
        return self.read()

    def gradient_through_the_state(self):
        def f(x):
            self.make(2 * x)
            self.set(3 * x)
            return self.get(x)

        return jax.grad(f)(jnp.float32(1))


class Storax(ByClosure):
    name = "storax"

    def make(self, value):
        self.index = storax.StateIndex()
        self.lanes = jax.vmap if jnp.ndim(value) else lambda f: f
        self.zero = 0 * value
        self.lanes(lambda v: storax.set_state(self.index, v))(value)

    def get(self, x):
        return storax.get_state(self.index, 0.0 * jnp.asarray(x, jnp.float32))

    def set(self, value):
        storax.set_state(self.index, value)

    def read(self):
        return self.lanes(lambda v: storax.get_state(self.index, v))(self.zero)


class Ref(ByClosure):
    name = "`jax.Ref`"

    def make(self, value):
        self.ref = jax.new_ref(value)

    def get(self, x):
        return self.ref[...]

    def set(self, value):
        self.ref[...] = value

    def read(self):
        return self.ref[...]

    def _over_lanes(self, f):
        """A ref can be an argument: each lane gets its own part."""

        def lane(ref, *args):
            peer = Ref()
            peer.ref = ref
            return f(peer, *args)

        return jax.jit(lambda *args: jax.vmap(lane)(self.ref, *args))

    def vmap_with_a_state_per_lane(self):
        self.make(jnp.arange(3.0))
        return self._over_lanes(Ref.count)(ONES), self.read()

    def vmap_of_cond(self):
        self.make(jnp.arange(3.0))
        program = lambda peer, p, x: lax.cond(p, peer.count, lambda x: x, x)
        return self._over_lanes(program)(TAKEN, ONES), self.read()


class IoCallback(ByClosure):
    name = "`io_callback`"

    def make(self, value):
        self.value = np.array(value, np.float32)

    def get(self, x):
        spec = jax.ShapeDtypeStruct((), np.float32)
        return io_callback(lambda x: self.value, spec, lax.stop_gradient(x), ordered=True)

    def set(self, value):
        def write(value):
            self.value = np.array(value)

        io_callback(write, None, value, ordered=True)

    def read(self):
        jax.effects_barrier()
        return self.value


# --- Peers whose state is passed along and returned ------------------------------------------------


class PassedAlong(ByClosure):
    """Where code leaves no room to pass a state, it is used by closure all the same."""

    def step(self, state, x):
        s = self.get_from(state)
        return x * s, self.set_in(state, s + 1)

    def get(self, x):
        return self.get_from(self.state)

    def set(self, value):
        self.state = self.set_in(self.state, value)

    def read(self):
        return self.get_from(self.state)

    def vmap_with_a_state_per_lane(self):
        self.make(jnp.arange(3.0))
        out, self.state = jax.jit(jax.vmap(self.step))(self.state, ONES)
        return out, jax.vmap(self.get_from)(self.state)

    def vmap_of_cond(self):
        self.make(jnp.arange(3.0))
        keep = lambda state, x: (x, state)
        program = lambda state, p, x: lax.cond(p, self.step, keep, state, x)
        out, self.state = jax.jit(jax.vmap(program))(self.state, TAKEN, ONES)
        return out, jax.vmap(self.get_from)(self.state)

    def grad_of_checkpoint(self):
        def f(x, state):
            out, state = self.step(state, 1.0)
            return jnp.sin(x) * out, state

        out, self.state = jax.jit(jax.grad(jax.checkpoint(f), has_aux=True))(0.0, self.state)
        return out, self.read()

    def grad_of_scan(self):
        def f(x, state):
            step = lambda c, _: (self.step(c[1], c[0]), None)
            return lax.scan(step, (x, state), None, length=2)[0]

        out, self.state = jax.jit(jax.grad(f, has_aux=True))(1.0, self.state)
        return out, self.read()


class EquinoxState(PassedAlong):
    name = "`eqx.nn.State`"

    def make(self, value):
        self.index = eqx.nn.StateIndex(jnp.float32(0))
        state = eqx.nn.State(self.index)
        self.state = jax.tree.map(lambda _: jnp.asarray(value, jnp.float32), state)

    def get_from(self, state):
        return state.get(self.index)

    def set_in(self, state, value):
        return state.set(self.index, value)


class Nnx(PassedAlong):
    name = "`nnx`"

    def make(self, value):
        self.graph, self.state = nnx.split(nnx.Variable(jnp.asarray(value, jnp.float32)))

    def get_from(self, state):
        return nnx.merge(self.graph, state)[...]

    def set_in(self, state, value):
        variable = nnx.merge(self.graph, state)
        variable[...] = value
        return nnx.split(variable)[1]


# --- The table ------------------------------------------------------------------------------------

PEERS = {peer.name: peer for peer in (Storax, Ref, IoCallback, EquinoxState, Nnx)}
# What the rows say, and what is right. The state is 2 at first, or 0, 1, 2 in three lanes.
ROWS = {
    "written_by_a_jitted_closure": ("written by a jitted closure", (2, 3, 4)),
    "written_in_a_library_scan": ("written in a function that a library scans", (24, 5)),
    "read_in_a_loop_condition": ("read in the condition of a `while_loop`", (1, 3)),
    "vmap_with_a_state_per_lane": ("`vmap`, a state per lane", ([0, 1, 2], [1, 2, 3])),
    "vmap_of_cond": ("`vmap` of `cond`: only lanes that take it", ([0, 1, 2], [1, 1, 3])),
    "grad_of_checkpoint": ("`grad` of `checkpoint`: written once", (2, 3)),
    "grad_of_scan": ("`grad` of `scan`: written at every step", (6, 4)),
    "written_in_a_backward_rule": ("written in a `custom_vjp` backward rule", (2, 3)),
    "kept_after_a_failure": ("written before the program failed: kept", 3),
    "gradient_through_the_state": ("gradients through the state", 3),
}
README = pathlib.Path(__file__).parents[2] / "README.md"


def outcome(row, peer):
    """yes, wrong or error: what a cell of the table says."""
    state = peer()
    try:
        state.make(jnp.float32(2))
        got = jax.tree.map(np.asarray, getattr(state, row)())
        jax.effects_barrier()
    except Exception:
        return "error"
    want = ROWS[row][1]
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    return "yes" if all(np.array_equal(a, b) for a, b in pairs) else "**wrong**"


def line(*cells):
    return f"| {' | '.join(cells)} |"


def table_in_readme():
    """By row and peer."""
    rows = [
        [cell.strip() for cell in text.split("|")[1:-1]]
        for text in README.read_text().splitlines()
        if text.startswith("|")
    ]
    assert ["", *PEERS] in rows
    cells = {row[0]: dict(zip(PEERS, row[1:], strict=False)) for row in rows}
    return {row: cells[text] for row, (text, _) in ROWS.items()}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("row", ROWS)
def test_the_table_in_the_readme(row, peer):
    assert table_in_readme()[row][peer] == outcome(row, PEERS[peer])


if __name__ == "__main__":
    print(line("", *PEERS))
    print(line(*["---"] * (1 + len(PEERS))))
    for row, (text, _) in ROWS.items():
        print(line(text, *[outcome(row, peer) for peer in PEERS.values()]))


# --- Inside of a peer ------------------------------------------------------------------------------


class _Counting(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.data(storax.BatchNorm(2, "batch", mode="batch"))
        self.calls = storax.StateIndex()
        storax.set_state(self.calls, jnp.int32(0))

    def __call__(self, x):
        storax.set_state(self.calls, storax.get_state(self.calls, jnp.int32(0)) + 1)
        return jax.vmap(self.norm, axis_name="batch")(self.linear(x))


def _scanned(model, xs):
    step = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return step(model, jnp.stack([xs] * 3))


@pytest.mark.parametrize(
    ("run", "calls"),
    [
        (lambda m, x: m(x), 1),
        (nnx.jit(lambda m, x: m(x)), 1),
        (storax.jit(lambda m, x: m(x)), 1),
        (nnx.jit(nnx.grad(lambda m, x: m(x).sum())), 1),
        (_scanned, 3),
    ],
    ids=["eager", "nnx.jit", "storax.jit", "nnx.grad", "nnx.scan"],
)
def test_an_index_in_a_module_of_nnx(run, calls):
    model, x = _Counting(), jax.random.normal(jax.random.key(0), (8, 3))
    mean = model.linear(x).mean(0)
    for k in range(1, 3):
        run(model, x)
        assert storax.get_state(model.calls, jnp.int32(0)) == k * calls
    like = jnp.zeros(2), jnp.zeros(2)
    running, _ = storax.get_state(model.norm.state_index, like)
    np.testing.assert_allclose(running, (1 - 0.99 ** (2 * calls)) * mean, rtol=1e-4)
