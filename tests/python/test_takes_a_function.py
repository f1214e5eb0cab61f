"""Everything in JAX and Equinox that takes a function, with state inside of that function.

The function multiplies by the state and adds one to it: its values tell the order in which it ran,
and the slot's own counts how often. Control flow, masks and devices have files of their own, too.
"""

import operator
import os
import subprocess
import sys
from functools import partial

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import checkify, io_callback, sparse
from jax.experimental import pallas as pl
from jax.experimental.compute_on import compute_on
from jax.experimental.jet import jet
from jax.experimental.scheduling_groups import scheduling_group
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import storax

ONE, X, LANES = jnp.float32(1), jnp.float32(5), jnp.arange(3.0)


def count(index, x):
    s = storax.get_state(index, jnp.float32(0))
    storax.set_state(index, s + 1)
    return x * s


class Counter:
    def __init__(self):
        self.index = storax.StateIndex(name="counter")
        storax.set_state(self.index, jnp.float32(3))

    def __call__(self, x):
        return count(self.index, x)

    @property
    def state(self):
        return float(storax.get_state(self.index, jnp.float32(0)))

    def runs(self, n, g, *args):
        """Calls `g`, and checks how often that has run the counter."""
        state, core = self.state, self.index._slot.core
        before = core.num_gets, core.num_sets
        out = jax.block_until_ready(g(*args))
        storax.barrier()
        # A program of storax.jit loads and stores the state when it likes.
        counts = "STORAX_JIT" not in os.environ
        assert not counts or (core.num_gets, core.num_sets) == (before[0] + n, before[1] + n)
        assert self.state == state + n
        return out


@pytest.fixture
def f():
    return Counter()


@pytest.fixture(params=["eager", "jit"])
def jit(request):
    return {"eager": lambda f: f, "jit": lambda f: jax.jit(lambda *args: f(*args))}[request.param]


# --- What calls its function once, and returns what that returns ----------------------------------


def _ruled(make, **rules):
    def wrap(f):
        g = make(f)
        for define, rule in rules.items():
            getattr(g, define)(*rule(f))
        return g

    return wrap


KINDS = {
    "lax": {},
    "checkpointed": {"max_steps": 4, "checkpoints": 2},
    "bounded": {"max_steps": 4, "base": 2},
}


def _while(kind, steps=1):
    loop = partial(eqxi.while_loop, lambda c: c[0] < steps, kind=kind, **KINDS[kind])
    return lambda f: lambda x: loop(lambda c: (c[0] + 1, f(c[1])), (0, x))[1]


# Of scheduling_group JAX knows the effects since 0.11.
TELLS = jax.__version_info__ >= (0, 11)
# A primitive since JAX 0.11.
_SPACE = {} if jax.__version_info__ < (0, 11) else {"out_memory_spaces": jax.memory.Space.Device}

WRAPPERS = {
    "jit": jax.jit,
    "inlined jit": lambda f: jax.jit(f, inline=True),
    "checkpoint": jax.checkpoint,
    "named_call": lambda f: jax.named_call(f, name="named"),
    "named_scope": lambda f: jax.named_scope("named")(f),
    "annotate_function": lambda f: jax.profiler.annotate_function(f, name="f"),
    "closure_convert": lambda f: lambda x: (lambda g, c: g(x, *c))(*jax.closure_convert(f, x)),
    "custom_jvp": _ruled(jax.custom_jvp, defjvp=lambda f: [partial(jax.jvp, f)]),
    "custom_vjp": _ruled(jax.custom_vjp, defvjp=lambda f: [partial(jax.vjp, f), operator.call]),
    "custom_gradient": lambda f: jax.custom_gradient(lambda x: jax.vjp(f, x)),
    "custom_vmap": _ruled(
        custom_vmap, def_vmap=lambda f: [lambda _, __, x: (jax.vmap(f)(x), True)]
    ),
    "sequential_vmap": sequential_vmap,
    "vectorize": jnp.vectorize,
    "platform_dependent": lambda f: lambda x: lax.platform_dependent(x, cpu=f, default=jnp.sin),
    "map": lambda f: lambda x: lax.map(f, x[None])[0],
    "checkify": lambda f: lambda x: checkify.checkify(f)(x)[1],
    "sparsify": sparse.sparsify,
    "compute_on": compute_on(compute_type="device_host", **_SPACE),
    "custom_linear_solve": lambda f: (
        lambda b: lax.custom_linear_solve(lambda v: v, b, lambda _, b: f(b), lambda _, b: f(b))
    ),
    "vjp": lambda f: lambda x: jax.vjp(f, x)[0],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[0],
    "filter_jit": eqx.filter_jit,
    "filter_checkpoint": eqx.filter_checkpoint,
    "filter_closure_convert": lambda f: lambda x: eqx.filter_closure_convert(f, x)(x),
    "filter_custom_jvp": _ruled(
        eqx.filter_custom_jvp, def_jvp=lambda f: [partial(eqx.filter_jvp, f)]
    ),
    "filter_custom_vjp": _ruled(
        eqx.filter_custom_vjp,
        def_fwd=lambda f: [lambda _, x: jax.vjp(f, x)],
        def_bwd=lambda f: [lambda pullback, ct, *_: pullback(ct)[0]],
    ),
    "assert_max_traces": lambda f: eqx.debug.assert_max_traces(f, max_traces=None),
    **{f"while_loop, {kind}": _while(kind) for kind in KINDS},
    **({"scheduling_group": scheduling_group(name="group")} if TELLS else {}),
}
# Their derivatives don't exist, or call the function again, with state or without.
NO_GRADIENT = {"custom_vmap", "sequential_vmap", "while_loop, lax", "custom_linear_solve"}
# What storax's masks don't reach into.
NO_MASK = {"custom_vmap", "sequential_vmap", "custom_linear_solve", "compute_on"}
NO_MASK |= {"scheduling_group"} & set(WRAPPERS)


def wrappers(without=()):
    return pytest.mark.parametrize("name", [n for n in WRAPPERS if n not in without])


@wrappers()
def test_in_program_order(name, f, jit):
    g = WRAPPERS[name](f)
    assert f.runs(4, jit(lambda x: (f(x), g(x), f(ONE), g(ONE))), X) == (15, 20, 5, 6)


@wrappers({"checkpoint", "filter_checkpoint"})
def test_in_a_loop_that_ignores_the_result(name, f):
    """JAX drops what nobody uses and has no effect, and moves it out of loops."""
    g = WRAPPERS[name](f)
    step = lambda x: lambda c, _: (c + (g(x), 1)[1], None)
    assert f.runs(3, jax.jit(lambda x: lax.scan(step(x), 0, None, length=3)[0]), X) == 3


@wrappers(NO_GRADIENT)
def test_in_the_gradient_of_checkpoints_in_a_scan(name, f):
    g = WRAPPERS[name](f)
    step = jax.checkpoint(lambda x, _: (g(x), None))
    loop = lambda x: lax.scan(step, x, None, length=2)[0]
    assert f.runs(2, jax.jit(jax.value_and_grad(loop)), X) == (5 * 3 * 4, 3 * 4)


@wrappers(NO_MASK)
def test_under_vmap_and_under_a_mask(name, f):
    g = WRAPPERS[name](f)
    h = jax.jit(jax.vmap(lambda p, x: (g(x), lax.cond(p, g, lambda x: x, x))))
    np.testing.assert_array_equal(f.runs(1, h, LANES < 0, LANES), [[0, 3, 6], [0, 1, 2]])
    np.testing.assert_array_equal(f.runs(2, h, LANES > 1, LANES), [[0, 4, 8], [0, 1, 10]])


@pytest.mark.parametrize("name", sorted(NO_MASK - {"compute_on"}))
def test_masks_that_do_not_reach_the_state_are_refused(name, f):
    h = jax.vmap(lambda p, x: lax.cond(p, WRAPPERS[name](f), lambda x: x, x))
    with pytest.raises(NotImplementedError, match=r"storax.*Move the get and set out of it"):
        jax.jit(h)(LANES > 1, LANES)


# --- Derivatives: state is a constant, and each operation runs once -------------------------------


def _fwd_and_bwd(f):
    fwd, bwd = jax.fwd_and_bwd(f, argnums=0)
    return lambda x: (lambda y, residuals: (y, bwd(residuals, ONE)))(*fwd(x))


DERIVATIVES = {
    "grad": (jax.grad, 3),
    "value_and_grad": (jax.value_and_grad, (15, 3)),
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (ONE,)), (15, 3)),
    "vjp": (lambda f: lambda x: jax.vjp(f, x)[1](ONE), (3,)),
    "linearize": (lambda f: lambda x: jax.linearize(f, x)[1](ONE), 3),
    "linear_transpose": (lambda f: lambda x: jax.linear_transpose(f, x)(ONE), (3,)),
    "fwd_and_bwd": (_fwd_and_bwd, (15, 3)),
    "jacfwd": (jax.jacfwd, 3),
    "jacrev": (jax.jacrev, 3),
    "hessian": (lambda f: jax.hessian(lambda x: f(x) * x), 6),
    "jet": (lambda f: lambda x: jet(f, (x,), ((ONE,),)), (15, [3])),
    "filter_value_and_grad": (eqx.filter_value_and_grad, (15, 3)),
    "filter_jvp": (lambda f: lambda x: eqx.filter_jvp(f, (x,), (ONE,)), (15, 3)),
    "filter_vjp": (lambda f: lambda x: eqx.filter_vjp(f, x)[1](ONE), (3,)),
    **{f"filter_{n}": (getattr(eqx, f"filter_{n}"), 3) for n in ("grad", "jacfwd", "jacrev")},
    "filter_hessian": (lambda f: eqx.filter_hessian(lambda x: f(x) * x), 6),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, f, jit):
    derivative, want = DERIVATIVES[name]
    assert f.runs(1, jit(derivative(f)), X) == want


def test_of_a_model_as_an_argument(f):
    """With the index in it, whose flag is a leaf that is no array."""
    call = lambda model, x: model[0] * count(model[1], x)
    model, tangents = (ONE, f.index), (ONE, jax.tree.map(lambda _: None, f.index))
    assert f.runs(1, eqx.filter_jit(call), model, X) == 15
    assert f.runs(1, eqx.filter_closure_convert(call, model, X), model, X) == 20
    assert f.runs(1, eqx.filter_jvp, call, (model, X), (tangents, ONE)) == (25, 25 + 5)
    pullback = eqx.filter_vjp(call, model, X)[1]
    assert f.runs(0, lambda: pullback(ONE)[0][0]) == 30
    for k, transform in enumerate((eqx.filter_jacfwd, eqx.filter_jacrev, eqx.filter_grad)):
        assert f.runs(1, lambda t=transform: t(call)(model, X)[0]) == 35 + 5 * k


def test_custom_jvp(f, jit):
    rule = Counter()
    for make, define in ((jax.custom_jvp, "defjvp"), (eqx.filter_custom_jvp, "def_jvp")):
        g = make(f)
        getattr(g, define)(lambda primals, tangents: (rule(*primals), tangents[0] * 7))
        f.runs(1, jit(g), X)
        rule.runs(1, jit(lambda x, g=g: jax.jvp(g, (x,), (ONE,))), X)
        assert f.runs(0, jit(jax.grad(lambda x, g=g: g(x))), X) == 7


def test_custom_vjp(f, jit):
    forward, backward = Counter(), Counter()
    in_jax, in_equinox = jax.custom_vjp(f), eqx.filter_custom_vjp(f)
    in_jax.defvjp(lambda x: (forward(x), x), lambda x, ct: (backward(ct),))
    in_equinox.def_fwd(lambda _, x: (forward(x), x))
    in_equinox.def_bwd(lambda x, ct, *_: backward(ct))
    by_hand = jax.custom_gradient(lambda x: (forward(x), lambda ct: backward(ct)))
    for k, g in enumerate((in_jax, in_equinox, by_hand)):
        f.runs(g is not by_hand, jit(g), X)
        assert f.runs(0, jit(jax.grad(lambda x, g=g: g(x))), X) == 3 + k
    assert (forward.state, backward.state) == (3 + 3 + 1, 3 + 3)


def test_custom_linear_solve(jit):
    """`solve` runs for the value and for the tangent, `transpose_solve` in the backward pass."""
    solve, back = Counter(), Counter()
    halve = lambda counter: lambda _, b: b / 2 + 0 * counter(b)
    g = lambda b: lax.custom_linear_solve(lambda v: 2 * v, b, halve(solve), halve(back))
    assert solve.runs(1, jit(g), X) == 2.5
    assert solve.runs(2, jit(lambda x: jax.jvp(g, (x,), (ONE,))), X) == (2.5, 0.5)
    assert back.state == 3
    assert back.runs(1, jit(jax.grad(g)), X) == 0.5
    np.testing.assert_array_equal(solve.runs(1, jit(jax.vmap(g)), LANES), LANES / 2)


def test_custom_root(f, jit):
    def g(a):
        solve = lambda g, x: x - g(x) + 0 * f(x)
        return lax.custom_root(lambda x: x - 2 * a, a, solve, lambda g, y: y / g(ONE))

    assert f.runs(1, jit(g), X) == 10
    assert f.runs(1, jit(jax.grad(g)), X) == 2


def test_custom_root_in_a_mask(f):
    """One of JAX's classes since 0.11, into which a mask can't go."""

    def root(a):
        solve = lambda g, x: x - g(x) + 0 * f(x)
        return lax.custom_root(lambda x: x - 2 * a, a, solve, lambda g, y: y / g(ONE))

    in_lanes = jax.vmap(lambda x: lax.cond(x > 0, root, lambda x: x, x))
    if jax.__version_info__ < (0, 11):
        np.testing.assert_array_equal(f.runs(1, in_lanes, jnp.array([0.0, 1.0])), [0, 2])
    else:
        with pytest.raises(NotImplementedError, match=r"state inside `CustomRoot`.*Move the get"):
            in_lanes(LANES)


# --- What calls its function more often, later, or not at all -------------------------------------


def test_lanes_and_batches(f, jit):
    rule, g = Counter(), custom_vmap(f)
    g.def_vmap(lambda size, batched, x: (rule(x), True))
    np.testing.assert_array_equal(rule.runs(1, jit(jax.vmap(g)), LANES), [0, 3, 6])
    g = jax.vmap(sequential_vmap(f))
    np.testing.assert_array_equal(f.runs(4, jit(g), jnp.ones(4)), [3, 4, 5, 6])
    g = lambda xs: lax.map(f, xs, batch_size=4)
    np.testing.assert_array_equal(f.runs(3, jit(g), jnp.ones(10)), [7] * 4 + [8] * 4 + [9] * 2)


def test_associative_scan(f):
    """A tree of calls, not a loop: as many as JAX makes while it traces."""
    calls = []
    combine = lambda a, b: (calls.append(None), a + b + 0 * f(a))[1]
    out = jax.jit(lambda x: lax.associative_scan(combine, x))(jnp.ones(8))
    np.testing.assert_array_equal(out, jnp.arange(1, 9))
    assert f.state == 3 + len(calls)


REDUCTIONS = {
    "reduce": lambda f: lax.reduce(LANES, X, f, [0]),
    "reduce, two operands": lambda f: lax.reduce(
        (LANES, LANES), (X, X), lambda a, b: (f(a[0], b[0]), a[1]), [0]
    ),
    "reduce_window": lambda f: lax.reduce_window(LANES, X, f, (2,), (1,), "VALID"),
    "apply": lambda f: LANES.at[0].apply(lambda x: f(x, x)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_have_no_order(name, f, jit):
    reduction = jit(lambda: REDUCTIONS[name](lambda a, b: a + f(b)))
    with pytest.raises(NotImplementedError, match=r"storax: state inside .* Use `jax.lax.scan`"):
        f.runs(0, reduction)
    assert REDUCTIONS[name](lambda a, b: a + b) is not None


def _solve(f):
    lineax = pytest.importorskip("lineax")

    def solve(b):
        like = jax.ShapeDtypeStruct(b.shape, b.dtype)
        matrix = lineax.FunctionLinearOperator(f, like, lineax.positive_semidefinite_tag)
        return lineax.linear_solve(matrix, b, lineax.CG(1e-5, 1e-5)).value

    return solve


# JAX isn't told what the functions of these do besides computing.
HIDING = {
    "composite": lambda f: lax.composite(f, "my.op"),
    "linear_call": lambda f: lambda x: linear_call(lambda _, x: f(x), lambda _, x: f(x), (), x),
    **({} if TELLS else {"scheduling_group": lambda f: scheduling_group(name="group")(f)}),
    "noinline": lambda f: lambda x: eqxi.noinline(f)(x),
    "linear_solve": _solve,
    "pallas_call": lambda f: pl.pallas_call(
        lambda x, out: out.__setitem__(..., f(x[...])),
        jax.ShapeDtypeStruct((), jnp.float32),
        interpret=True,
    ),
}
PLACES = {
    "in a program": lambda g: g,
    "unused": lambda g: lambda x: (g(x), x)[1],
    "in a jit": lambda g: lambda x: (jax.jit(g)(x), x)[1],
    "in a scan": lambda g: lambda x: lax.scan(lambda c, _: (c, g(c)), x, None, length=2)[0],
    "in a branch": lambda g: lambda x: lax.cond(x > 0, g, lambda x: x, x),
    "vmap": lambda g: lambda x: jax.vmap(g)(x[None])[0],
    "grad": jax.grad,
    "checkpoint": jax.checkpoint,
}


# But JAX has no rules for these, with state or without.
NO_RULE = {
    ("composite", "vmap"),
    ("composite", "grad"),
    ("linear_call", "vmap"),
    ("pallas_call", "grad"),
}


@pytest.mark.parametrize(
    ("name", "place"), [(n, p) for n in HIDING for p in PLACES if (n, p) not in NO_RULE]
)
def test_functions_that_are_hidden_from_jax_are_refused(name, place, f):
    refused = pytest.raises(NotImplementedError, match="storax: state inside the function of a `")
    g, jitted = HIDING[name](f), jax.jit(f)
    for h in (g, g, HIDING[name](jitted)):
        with refused:
            f.runs(0, jax.jit(PLACES[place](h)), X)
        with refused:
            f.runs(0, storax.jit(PLACES[place](h)), X)
    without = jax.jit(PLACES[place](HIDING[name](lambda x: 3 * x)))
    assert jnp.isfinite(without(X))


REFUSED = pytest.raises(
    (NotImplementedError, jax.errors.JaxRuntimeError), match="storax: state inside the f"
)


@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
def test_what_is_hidden_until_it_is_lowered_is_refused_then(jit, f):
    mine = Primitive("mine")
    mine.def_impl(f)
    mine.def_abstract_eval(lambda x: x)
    lower = mlir.lower_fun(f, multiple_results=False)
    mlir.register_lowering(mine, lower)
    with REFUSED:
        f.runs(0, jit(lambda x: (mine.bind(x), f(x))), X)
    mlir.register_lowering(mine, lower, cacheable=False)
    with REFUSED:
        f.runs(0, jit(mine.bind), X)
    both = jit(lambda x: (f(x), mine.bind(x), f(x)))
    if jit is jax.jit and "STORAX_JIT" not in os.environ:  # it is lowered where it stands
        assert f.runs(3, both, X) == (15, 20, 25)
    else:
        with REFUSED:
            f.runs(0, both, X)


def test_what_is_left_for_the_backward_pass_is_refused(f):
    late = Primitive("late")
    late.def_impl(f)
    late.def_abstract_eval(lambda x: jax.eval_shape(lambda x: f(x), x))
    ad.primitive_jvps[late] = lambda x, t: (jnp.sin(*x), late.bind(*t))
    ad.primitive_transposes[late] = lambda ct, x: [late.bind(ct)]
    with REFUSED:
        f.runs(0, jax.grad(late.bind), X)


def test_index_maps_of_kernels_are_refused(f):
    def index_map(k):
        f(k.astype(jnp.float32))
        return (k,)

    def kernel(x, out):
        out[...] = x[...]

    spec = partial(pl.BlockSpec, (1,))
    call = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((2,), jnp.float32),
        grid=2,
        in_specs=[spec(index_map)],
        out_specs=spec(lambda k: (k,)),
        interpret=True,
    )
    with REFUSED:  # when it is traced: unused, it would never be lowered
        jax.make_jaxpr(call)(jnp.ones(2))


def test_noinline_is_refused_whatever_else_jax_knows_of_its_function(f):
    named = eqxi.noinline(f, abstract_fn=lambda f, x: x)
    with REFUSED:
        jax.block_until_ready(jax.jit(lambda x: named(x))(X))
    g = eqxi.noinline(f)
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    eager = jax.shard_map(lambda x: g(x[0])[None], mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    for _ in range(2):
        with REFUSED:
            eager(jnp.ones(4))
        with REFUSED:
            f.runs(0, jax.jit(lambda x: (g(x), x)[1]), X)


@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
def test_primitives_that_jax_expands_later(jit, f):
    hijax = pytest.importorskip("jax.experimental.hijax")
    if not hasattr(hijax, "VJPHiPrimitive"):
        pytest.skip("this JAX exports no such primitives")

    class Late(hijax.VJPHiPrimitive):
        def __init__(self):
            self.in_avals, self.out_aval, self.params = (jax.typeof(X),), jax.typeof(X), {}
            super().__init__()

        def expand(self, x):
            return f(x)

    late = Late()
    assert f.runs(2, jit(lambda x: (late(x), f(x))), X) == (15, 20)
    assert f.state == 5


def test_functions_that_a_linear_solve_does_not_run(f, jit):
    """JAX tells of them once it runs them."""
    half = lambda _, b: b / 2
    solve = partial(lax.custom_linear_solve, lambda x: 2 * x + 0 * f(x))
    assert f.runs(0, jit(lambda b: solve(b, half)), X) == 2.5
    transposed = lambda _, b: f(b) / 6
    solve = lambda b: lax.custom_linear_solve(lambda x: 2 * x, b, half, transposed)
    assert f.runs(0, jit(solve), X) == 2.5
    assert f.runs(1, jit(jax.grad(solve)), X) == 0.5


@pytest.mark.parametrize("name", [n for n in HIDING if n != "composite"])
def test_derivatives_of_hidden_functions_are_refused_without_jit_too(name, f):
    with pytest.raises(NotImplementedError, match="storax: state inside the function of a `"):
        jax.value_and_grad(HIDING[name](f))(X)


@pytest.mark.parametrize("kind", KINDS)
def test_equinox_loops(kind, f, jit):
    for steps in (0, 3):
        assert f.runs(steps, jit(_while(kind, steps)(f)), ONE) == np.prod(range(3, 3 + steps))
    assert f.state == 6
    if kind != "lax":
        assert f.runs(3, jit(jax.grad(_while(kind, 3)(f))), ONE) == 6 * 7 * 8
    if kind != "bounded":
        checkpoints = {"checkpoints": 2} if kind == "checkpointed" else {}
        scan = lambda x: eqxi.scan(lambda c, x: (f(c), x), x, LANES, kind=kind, **checkpoints)[0]
        first = f.state
        assert f.runs(3, jit(scan), ONE) == np.prod(np.arange(first, first + 3))
        if kind == "checkpointed":
            assert f.runs(3, jit(jax.grad(scan)), ONE) == np.prod(np.arange(first + 3, first + 6))


def test_lanes_that_leave_a_checkpointed_loop_one_by_one(f, jit):
    lanes = storax.StateIndex()
    jax.vmap(lambda x: storax.set_state(lanes, x))(jnp.zeros(3))

    def step(carry):
        k, n, x = carry
        seen = storax.get_state(lanes, 0 * x) + 1
        storax.set_state(lanes, seen)
        return k + 1, n, f(x) * seen

    loop = partial(eqxi.while_loop, lambda c: c[0] < c[1], step, kind="checkpointed", max_steps=40)
    gradient = jax.vmap(jax.value_and_grad(lambda x, n: loop((0, n, x))[2]))
    y, slope = f.runs(3, jit(gradient), jnp.full(3, 2.0), jnp.array([0, 1, 3]))
    np.testing.assert_array_equal(slope, [1, 3 * 1, 3 * 1 * 4 * 2 * 5 * 3])
    np.testing.assert_array_equal(y, 2 * slope)
    get = jax.vmap(lambda x: storax.get_state(lanes, 0 * x))
    np.testing.assert_array_equal(get(LANES), [0, 1, 3])


def test_what_a_checkpointed_loop_closes_over_is_differentiated(f, jit):
    def loop(a, x, steps):
        start = (0, x, jnp.zeros(4))
        body = lambda c: (c[0] + 1, f(c[1] * a), c[2].at[c[0]].set(c[1]))
        loop = partial(eqxi.while_loop, lambda c: c[0] < steps, buffers=lambda c: c[2])
        _, x, seen = loop(body, start, kind="checkpointed", max_steps=4)
        return x + seen.sum()

    y, slopes = f.runs(2, jit(jax.value_and_grad(loop, argnums=(0, 1))), X, ONE, 2)
    assert y == 5 * 3 * 5 * 4 + 1 + 5 * 3
    assert slopes == (2 * 5 * 3 * 4 + 3, 5 * 3 * 5 * 4 + 1 + 5 * 3)


def test_gradients_of_checkpointed_loops_that_are_refused(f, jit):
    loop = partial(eqxi.while_loop, kind="checkpointed", checkpoints=2)
    endless = lambda x: loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]
    assert f.runs(2, jit(endless), ONE) == 3 * 4
    with pytest.raises(NotImplementedError, match=r"storax.*in its steps.*Give it `max_steps`"):
        jit(jax.grad(endless))(ONE)

    def counting(x):
        body = lambda c: (c[0] + 1, f(c[1]))
        return loop(lambda c: c[0] + 0 * f(ONE) < 2, body, (0.0, x), max_steps=4)[1]

    with pytest.raises(NotImplementedError, match=r"storax.*a set in its condition"):
        jit(jax.grad(counting))(ONE)

    def reading(x):
        more = lambda c: c[0] + 7 > storax.get_state(f.index, ONE)
        body = lambda c: (c[0], f(c[1]))
        return loop(more, body, (0.0, x), max_steps=4)[1]

    start = f.state
    assert jit(jax.grad(reading))(ONE) == np.prod(np.arange(start, 7))
    assert f.state == 7


def test_what_only_looks_runs_nothing(f):
    looks = [jax.eval_shape, eqx.filter_eval_shape, eqxi.cached_filter_eval_shape]
    looks += [lambda g, x, make=m: make(g)(x) for m in (jax.make_jaxpr, eqx.filter_make_jaxpr)]
    looks += [lambda g, x, jit=j: jit(g).lower(x).compile() for j in (jax.jit, eqx.filter_jit)]
    for look in looks:
        f.runs(0, lambda look=look: (look(f, X), None)[1])
    for jit in (jax.jit, eqx.filter_jit):
        compiled = jit(f).lower(X).compile()
        assert f.runs(1, compiled, X) + 5 == f.runs(1, compiled, X)


def test_modes_of_jax(f):
    modes = (jax.disable_jit, jax.debug_nans, jax.debug_infs, jax.debug_key_reuse)
    for mode in (*modes, jax.check_tracer_leaks):
        with mode(True):
            f.runs(1, jax.jit(f), X)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(lambda x: jnp.log(-f(x)))(X)


def test_checkify(f, jit):
    g = lambda x: f(x)

    def checked(x):
        x = lax.cond(x > 0, g, lambda x: x, x)
        x = lax.while_loop(lambda x: x < 70, g, x)
        checkify.check(x < 0, "{} is too much", x)
        return f(x)

    error, out = f.runs(4, jit(checkify.checkify(checked, errors=checkify.all_checks)), X)
    assert out == 5 * 3 * 4 * 5 * 6
    assert "300.0 is too much" in error.get()


def test_checkify_of_a_condition_with_state(f, jit):
    """JAX would run it once to know whether it fails, and once more to know whether to go on."""

    def loop(step):
        def goes_on(k):
            checkify.check(k < 3, "{} is too much", k)
            return f(ONE) < 7

        return lax.while_loop(goes_on, lambda k: k + step, 0)

    error, out = f.runs(5, jit(checkify.checkify(loop)), 1)
    assert out == 4 and "3 is too much" in error.get()
    # And with nothing to hand on.
    state_only = lambda: lax.while_loop(lambda _: f(ONE) < 10, lambda _: (), ())
    error, _ = f.runs(3, jit(checkify.checkify(state_only)))
    assert error.get() is None


def test_a_python_number_that_a_checkpointed_loop_closes_over(f):
    """Not an array to Equinox, but differentiated by JAX all the same."""

    def loop(w):
        body = lambda c: (c[0] + 1, c[1] + 2 * w * jnp.sign(f(ONE)))
        start = (0, w)
        return eqxi.while_loop(lambda c: c[0] < 3, body, start, kind="checkpointed", max_steps=4)[1]

    assert f.runs(3, jax.grad(loop), 1.0) == 7
    np.testing.assert_array_equal(jax.vmap(jax.grad(loop))(jnp.ones(2)), [7, 7])


@pytest.mark.parametrize("flag", ["jax_remat3", "jax_scan3"])
def test_experiments_of_jax_are_refused(flag):
    index = storax.StateIndex()
    storax.set_state(index, ONE)
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        with pytest.raises(NotImplementedError, match=rf"`{flag}` of JAX .*Leave that flag off"):
            jax.jit(lambda: storax.get_state(index, ONE))()
    finally:
        jax.config.update(flag, before)


def test_without_jit_no_loop_starts_again(f):
    """Under vmap JAX finds out too late that it can't run a loop in Python."""

    def loop(x):
        more = lambda x: (f(ONE) < 5) & (x < 2)
        return lax.while_loop(more, lambda x: x + 1, x)

    with jax.disable_jit():
        assert f.runs(3, loop, jnp.float32(0)) == 2
        count = lambda n: lax.fori_loop(0, n, lambda _, x: f(x), ONE)
        np.testing.assert_array_equal(f.runs(2, jax.vmap(count), jnp.arange(3)), [1, 6, 6 * 7])
        with pytest.raises(NotImplementedError, match=r"Run it without `jax.disable_jit`"):
            jax.vmap(loop)(LANES)


def test_without_jit_no_loop_is_staged_twice(f):
    """What its condition does at first would stay in the branch."""

    def loop(x):
        return lax.while_loop(lambda k: (f(ONE) < 99) & (k < 3), lambda k: k + 1, 0) + x

    with jax.disable_jit():
        branch = jax.vmap(lambda x: lax.cond(x > LANES[0], loop, lambda x: x, x))
        assert f.runs(4, branch, LANES).shape == LANES.shape
        staged = str(jax.make_jaxpr(jax.vmap(loop))(LANES))
        assert staged.count("set_state") == 1
        assert f.runs(0, lambda: lax.while_loop(lambda k: k < 3, lambda k: k + 1, 0)) == 3


def test_callbacks_next_to_state(f, jit):
    seen, spec = [], jax.ShapeDtypeStruct((), jnp.float32)
    add_one = lambda x, index=None: np.float32(x + 1)

    def g(x):
        jax.debug.callback(seen.append, f(x))
        x = jax.pure_callback(add_one, spec, f(x))
        x = eqx.filter_pure_callback(add_one, f(x), f.index, result_shape_dtypes=spec)
        return io_callback(add_one, spec, f(x), ordered=True)

    assert f.runs(4, jit(g), X) == ((5 * 4 + 1) * 5 + 1) * 6 + 1
    jax.effects_barrier()
    assert seen == [15]


# --- Kernels, devices and processes ------------------------------------------------------------------------


def test_export(f):
    with pytest.raises(NotImplementedError, match=r"export.*inference_mode"):
        jax.export.export(jax.jit(f))(X)
    frozen = eqx.nn.inference_mode(f.index)
    program = lambda x: x * storax.get_state(frozen, ONE)
    assert f.runs(0, jax.export.export(jax.jit(program))(X).call, X) == 15


@pytest.mark.parametrize("how", [jax.shard_map, jax.pmap, eqx.filter_pmap])
def test_each_device_counts_for_itself(how):
    mesh, spec = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,)), P("i")
    kwargs = {"mesh": mesh, "in_specs": spec, "out_specs": spec} if how is jax.shard_map else {}
    index, x = storax.StateIndex(), jnp.arange(4.0)

    def step(x):
        s = storax.get_state(index, x)
        storax.set_state(index, s + x)
        return s

    how(lambda x: (storax.set_state(index, x), x)[1], **kwargs)(x)
    step = how(step, **kwargs)
    np.testing.assert_array_equal([step(x), step(x)], [x, 2 * x])
    assert index._slot.core.num_gets == 8


_IN_ANOTHER_PROCESS = """
import sys, jax, jax.numpy as jnp, storax
a, b = (storax.StateIndex() for _ in range(2))
a, b = (a, b) if sys.argv[1] == "ab" else (b, a)  # they are numbered as they are made
for index, x in ((a, 1.0), (b, 10.0)):
    storax.set_state(index, jnp.array(x))
@jax.jit
def count(x):
    s = storax.get_state(a, x)
    storax.set_state(a, s + 1)
    return s
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: x * 7 + 1)(1.0)  # no state: comes from the cache
print("/jax/compilation_cache/cache_hits" in events)
print(count(0.0), count(0.0), *(storax.get_state(i, jnp.array(0.0)) for i in (a, b)))
"""


def test_persistent_compilation_cache(tmp_path):
    """A program names its slots by numbers of its process: from a cache it must not be mistaken."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    for order, hit in (("ab", "False"), ("ba", "True")):
        command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, order]
        out = subprocess.check_output(command, env=os.environ | cache, text=True)
        assert out.split() == [hit, "1.0", "2.0", "3.0", "10.0"]
