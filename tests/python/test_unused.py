"""State in what has results that nothing uses, or none, inside of loops that are differentiated.

JAX divides such programs again and again, into what is known and what is not, and into what may leave a
loop and what may not, and leaves out what has no use. Every set must stay, as often as it is written.
"""

import itertools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import storax

ALL = os.environ.get("STORAX_ALL") == "1"


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (ct,))
    return g


HELPERS = ("read", "count", "counted", "if_")


def scanned(f):
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0]


class Counting:
    """Ways to count once. What decides is the loop's counter `k`, a constant `c` or the value `v`."""

    def __init__(self):
        self.index = storax.StateIndex()
        storax.set_state(self.index, jnp.array(0))

    def read(self):
        return storax.get_state(self.index, jnp.array(0))

    def count(self):
        storax.set_state(self.index, self.read() + 1)

    def counted(self, x):
        self.count()
        return x

    def if_(self, x):
        lax.cond(x >= 0, self.count, lambda: None)

    def plain(self, v, k, c):
        self.count()

    def cond_by_counter(self, v, k, c):
        self.if_(k)

    def cond_by_constant(self, v, k, c):
        self.if_(c)

    def cond_by_value(self, v, k, c):
        self.if_(v + 9)

    def cond_by_state(self, v, k, c):
        self.if_(self.read())

    def cond_with_result(self, v, k, c):
        lax.cond(c >= 0, lambda: self.counted(c * 2), lambda: c)

    def switch(self, v, k, c):
        lax.switch(c.astype(int) * 0, [self.count, lambda: None, self.count])

    def cond_in_cond(self, v, k, c):
        lax.cond(k >= 0, lambda: self.if_(c), lambda: None)

    def scan(self, v, k, c):
        lax.scan(lambda a, _: (self.counted(a + 1), None), c, None, length=1)

    def scan_without_results(self, v, k, c):
        lax.scan(lambda a, _: (self.count(), None), None, None, length=1)

    def scan_of_cond(self, v, k, c):
        lax.scan(lambda a, _: (self.if_(c), None), None, None, length=1)

    def scan_with_outputs(self, v, k, c):
        lax.scan(lambda a, x: (self.counted(a + x), x), k, jnp.arange(1))

    def fori(self, v, k, c):
        lax.fori_loop(0, 1, lambda _, a: self.counted(a), 0)

    def while_(self, v, k, c):
        lax.while_loop(lambda n: n < c + 1, lambda n: self.counted(n + c), c)

    def while_of_cond(self, v, k, c):
        lax.while_loop(lambda n: n < 1, lambda n: (self.if_(c), n + 1)[1], 0)

    def jit(self, v, k, c):
        jax.jit(lambda x: self.counted(x * 2))(c)

    def jit_without_results(self, v, k, c):
        jax.jit(self.count)()

    def jit_of_cond(self, v, k, c):
        jax.jit(self.if_)(c)

    def jit_of_value(self, v, k, c):
        jax.jit(lambda x: self.counted(x * 2))(v)

    def storax_jit(self, v, k, c):
        storax.jit(lambda x: self.counted(x * 2))(c)

    def checkpoint(self, v, k, c):
        jax.checkpoint(lambda x: self.counted(jnp.sin(x)))(c)

    def checkpoint_without_results(self, v, k, c):
        jax.checkpoint(self.count)()

    def checkpoint_of_cond(self, v, k, c):
        jax.checkpoint(self.if_)(c)

    def custom_jvp(self, v, k, c):
        custom_jvp(self.counted)(c)

    def custom_jvp_of_value(self, v, k, c):
        custom_jvp(self.counted)(v)

    def custom_jvp_of_cond(self, v, k, c):
        custom_jvp(lambda x: (self.if_(x), x)[1])(c)

    def custom_vjp(self, v, k, c):
        custom_vjp(self.counted)(c)

    def custom_vjp_of_value(self, v, k, c):
        custom_vjp(self.counted)(v)

    def custom_vjp_of_cond(self, v, k, c):
        custom_vjp(lambda x: (self.if_(x), x)[1])(c)

    def vmap_of_cond(self, v, k, c):
        jax.vmap(self.if_)(c + jnp.arange(2.0))

    def vmap_of_while(self, v, k, c):
        steps = lambda x: lax.while_loop(lambda n: n < x, lambda n: self.counted(n + 1), 0.0)
        jax.vmap(steps)(c + jnp.zeros(2))


WAYS = [name for name in vars(Counting) if name[0] != "_" and name not in HELPERS]

# What the loop's body returns of the value and the constant.
BODIES = {
    "as it was": lambda v, c: v,
    "sine": lambda v, c: jnp.sin(v),
    "linear": lambda v, c: v * 2,
    "times the constant": lambda v, c: v * c,
}
# Each runs the body three times.
LOOPS = {
    "scan": lambda body, x: lax.scan(body, x, jnp.arange(3))[0],
    "fori": lambda body, x: lax.fori_loop(0, 3, lambda k, v: body(v, k)[0], x),
    "scan in scan": lambda body, x: lax.scan(
        lambda v, _: lax.scan(body, v, jnp.arange(3)), x, None, length=1
    )[0],
    "no loop": lambda body, x: body(body(body(x, 0)[0], 1)[0], 2)[0],
}
everything = jax.checkpoint_policies.everything_saveable
DERIVATIVES = {
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "none": lambda f: f,
    "grad": jax.grad,
    "jit": lambda f: jax.jit(jax.grad(jax.checkpoint(f))),
    "storax.jit": lambda f: storax.jit(jax.grad(jax.checkpoint(f))),
    "policy": lambda f: jax.grad(jax.checkpoint(f, policy=everything)),
    "of jit": lambda f: jax.grad(jax.checkpoint(jax.jit(f))),
    "twice": lambda f: jax.grad(jax.checkpoint(jax.checkpoint(f))),
    "linearize": lambda f: lambda x, c: jax.linearize(lambda x: jax.checkpoint(f)(x, c), x)[1](1.0),
    "vmap": lambda f: lambda x, c: jax.vmap(jax.grad(jax.checkpoint(f)), (0, None))(jnp.ones(2), c),
}


SAMPLE = ("cond_by_counter", "checkpoint", "custom_jvp")


def cases():
    """All of them, or those that differ from the usual one in one thing, for a sample in two."""
    usual = [next(iter(choices)) for choices in (BODIES, LOOPS, DERIVATIVES)]
    for way, *rest in itertools.product(WAYS, BODIES, LOOPS, DERIVATIVES):
        others = sum(a != b for a, b in zip(rest, usual, strict=True))
        if ALL or others <= (way in SAMPLE) or rest == ["sine", "no loop", "checkpoint"]:
            yield pytest.param(way, *rest, id="-".join([way, *rest]))


@pytest.mark.parametrize(("way", "body", "loop", "derivative"), list(cases()))
def test_unused_results(way, body, loop, derivative):
    counting = Counting()

    def f(x, c):
        def step(v, k):
            getattr(counting, way)(v, k, c)
            return BODIES[body](v, c), None

        return LOOPS[loop](step, x)

    jax.block_until_ready(DERIVATIVES[derivative](f)(jnp.float32(1), jnp.float32(1)))
    assert counting.read() == 3


REMAT_WAYS = {
    "eager": lambda g: jax.grad(g),
    "jit": lambda g: jax.jit(jax.grad(g)),
    "of jit": lambda g: jax.grad(jax.jit(g)),
    "storax.jit": lambda g: storax.jit(jax.grad(g)),
    "checkpoint": lambda g: jax.grad(jax.checkpoint(g)),
    "scan": lambda g: jax.grad(scanned(g)),
    "vmap": lambda g: lambda x: jax.jit(jax.vmap(jax.grad(g)))(jnp.stack([x, x])),
}


@pytest.mark.parametrize("where", ["fwd", "function", "both"])
@pytest.mark.parametrize("way", REMAT_WAYS)
def test_optimize_remat(way, where):
    """JAX would run the function instead of its forward rule, where nothing uses what the rule saves."""
    in_function, in_rule = Counting(), Counting()

    @jax.custom_vjp
    def g(x):
        if where != "fwd":
            in_function.count()
        return jnp.sin(x)

    def forward(x):
        if where != "function":
            in_rule.count()
        return jnp.sin(x), None

    g.defvjp(forward, lambda _, ct: (ct,), optimize_remat=True)
    for k in range(1, 3):
        REMAT_WAYS[way](g)(jnp.float32(1))
        assert (in_function.read(), in_rule.read()) == (0, k * (where != "function"))
    g(jnp.float32(1))
    assert in_function.read() == (where != "fwd")


@pytest.mark.parametrize("has_result", [True, False])
@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
@pytest.mark.parametrize("around", ["nothing", "scan", "cond", "grad"])
def test_shard_map(around, jit, has_result):
    """What needs no inputs and has no results would be a program on one device to JAX."""
    counting = Counting()
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    body = counting.counted if has_result else lambda x: counting.count()
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=P("i"), out_specs=P("i") if has_result else None
    )

    def f(x):
        mapped(jnp.ones(4))
        return jnp.sin(x)

    programs = {
        "nothing": f,
        "scan": scanned(f),
        "cond": lambda x: lax.cond(x > 0, f, lambda x: x, x),
        "grad": jax.grad(jax.checkpoint(f)),
    }
    for k in range(1, 3):
        jit(programs[around])(jnp.float32(1))
        assert counting.read() == k


def test_a_remat_needs_no_more_inputs_than_its_state():
    """Flax finds out so what a scan in a layer depends on."""
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            storax.set_state(index, storax.get_state(index, jnp.float32(0)) + 1)
            return nn.Dense(3)(x), None

    for options, runs in (({}, 5), ({"check_constancy_invariants": False}, 4)):
        over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 4}
        layers = nn.scan(nn.remat(Layer), **over, **options)()
        variables = layers.init(jax.random.key(0), jnp.ones(3), None)
        storax.set_state(index, jnp.float32(0))
        layers.apply(variables, jnp.ones(3), None)
        assert storax.get_state(index, jnp.float32(0)) == runs


def test_what_would_be_left_to_the_backward_pass_is_refused():
    counting = Counting()

    @jax.custom_batching.custom_vmap
    def by_hand(x):
        return counting.counted(jnp.sin(x))

    by_hand.def_vmap(lambda size, batched, x: (jnp.sin(x), batched[0]))
    rule = jax.custom_vjp(jnp.sin)
    forward = lambda x: (counting.counted(jnp.sin(x)), x)
    rule.defvjp(forward, lambda x, ct: (ct * jnp.cos(x),), optimize_remat=True)
    unused = lambda f: lambda x: (f(x), x * 2)[1]
    for f, what in (
        (unused(by_hand), "`custom_vmap_call`"),
        (jax.grad(rule), "`custom_vjp` with `optimize_remat=True`"),
        (unused(jax.grad(rule)), "`custom_vjp` with `optimize_remat=True`"),
    ):
        with pytest.raises(NotImplementedError, match=f"state inside a {what} that is diff"):
            jax.grad(jax.checkpoint(f))(jnp.float32(1))
    assert counting.read() == 0
