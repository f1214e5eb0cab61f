"""vmap of cond, switch and while with a batched predicate touches exactly the lanes it should.

Each program is written twice: for JAX, per lane, and for NumPy, one lane after the other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import storax

f32 = np.float32


class Cell:
    """A lane's state, for the NumPy programs."""

    def __init__(self, value):
        self.value = f32(value)

    def set(self, value):
        self.value = f32(value)


class Lane:
    """The same interface on an index; `x` is batched like the state."""

    def __init__(self, index, x):
        self.index, self.like = index, 0 * x

    @property
    def value(self):
        return storax.get_state(self.index, self.like)

    def set(self, value):
        storax.set_state(self.index, value + self.like)


class OnJax:
    where = staticmethod(jnp.where)
    cond = staticmethod(lax.cond)
    switch = staticmethod(lax.switch)
    loop = staticmethod(lax.while_loop)

    @staticmethod
    def repeat(n, f, x):
        return lax.scan(lambda c, t: (f(t, c), None), x, jnp.arange(n, dtype=jnp.float32))[0]

    @staticmethod
    def wrap(how, f):
        if how == "checkpoint":
            return jax.checkpoint(f)
        if how == "jit":
            return jax.jit(f)
        if how == "custom_jvp":
            g = jax.custom_jvp(f)
            g.defjvp(lambda p, t: (f(*p), t[0] * 3))
            return g
        g = jax.custom_vjp(f)
        g.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * 3,))
        return g


class OnNumpy:
    @staticmethod
    def cond(p, yes, no, x):
        return f32(yes(x) if p else no(x))

    @staticmethod
    def switch(k, branches, x):
        return f32(branches[int(np.clip(k, 0, len(branches) - 1))](x))

    @staticmethod
    def loop(p, body, x):
        while p(x):
            x = body(x)
        return x

    @staticmethod
    def repeat(n, f, x):
        for t in range(n):
            x = f32(f(f32(t), x))
        return x

    @staticmethod
    def wrap(how, f):
        return f


# --- Programs: (language, state, x) -> y ----------------------------------------------------------


def cond_sets(m, s, x):
    return m.cond(x > 1, lambda x: (s.set(s.value + x), x)[1], lambda x: x * 2, x)


def both_branches_set(m, s, x):
    return m.cond(x > 1, lambda x: (s.set(x), x)[1], lambda x: (s.set(s.value * 2), x)[1], x)


def cond_on_state(m, s, x):
    return m.cond(
        s.value > 1.5, lambda x: (s.set(0.0), x)[1], lambda x: (s.set(9.0), x + s.value)[1], x
    )


def switch_sets(m, s, x):
    k = x.astype(np.int32) if hasattr(x, "astype") else np.int32(x)
    return m.switch(
        k, [lambda x: x, lambda x: (s.set(s.value + 1), x)[1], lambda x: (s.set(x), s.value)[1]], x
    )


def body_writes(m, s, x):
    return m.loop(lambda c: c < 4, lambda c: (s.set(s.value + c), c + 1)[1], x)


def condition_reads(m, s, x):
    return m.loop(lambda c: s.value < 5, lambda c: (s.set(s.value + 1), c + x)[1], x)


def condition_writes(m, s, x):
    def more(c):
        before = s.value
        s.set(before + f32(0.25))
        return before + c < 6

    return m.loop(more, lambda c: (s.set(s.value * f32(1.5)), c + 1)[1], x)


def cond_in_while(m, s, x):
    def body(c):
        yes = lambda c: (s.set(s.value - f32(1.5)), c + 1)[1]
        no = lambda c: (s.set(s.value + x + f32(1.25)), c + f32(0.5))[1]
        return m.cond(s.value > 2, yes, no, c)

    return m.loop(lambda c: c < 5, body, x)


def scan_in_while(m, s, x):
    def step(t, c):
        s.set(s.value + t * c)
        return c + f32(0.5)

    return m.loop(lambda c: c < 5, lambda c: m.repeat(3, step, c), x)


def while_in_while_on_state(m, s, x):
    def body(c):
        s.set(0.0)
        k = m.loop(lambda k: s.value < 3 + x, lambda k: (s.set(s.value + 1), k + 1)[1], x * 0)
        return c + k

    return m.loop(lambda c: c < 9, body, x)


def finished_lane_would_loop_for_ever(m, s, x):
    # A lane that is done must not enter the inner loop: its c would keep it there.
    def body(c):
        m.loop(lambda k: s.value < c, lambda k: (s.set(s.value + 1), k + 1)[1], x * 0)
        return c + 2

    return m.loop(lambda c: c < 9, body, x)


def while_in_cond(m, s, x):
    return m.cond(x > 1, lambda x: cond_in_while(m, s, x), lambda x: (s.set(s.value + x), x)[1], x)


def while_in_scan(m, s, x):
    return m.repeat(3, lambda t, c: body_writes(m, s, c) - 3, x)


def cond_in_cond_in_cond(m, s, x):
    add = lambda v: lambda x: (s.set(s.value + f32(v)), x + f32(v))[1]
    inner = lambda x: m.cond(x > 3, add(100), add(10), x)
    middle = lambda x: m.cond(x > 2, inner, add(1), x)
    return m.cond(x > 1, middle, lambda x: x, x)


def cond_in_step(m, s, x):
    """In a branch, control flow in which all lanes go the same way."""

    def step(t, c):
        add = lambda v: lambda c: (s.set(s.value + v), c + v)[1]
        return m.cond(t < 1, add(1), add(10), c)

    return m.cond(x > 1, lambda x: m.repeat(3, step, x), lambda x: x, x)


def loop_in_step(m, s, x):
    def step(c):
        s.set(s.value + c[1])
        return c[0] + 1, c[1] + 1

    return m.loop(lambda c: c[0] < 3, step, (0, x))[1]


def loop_in_step_in_cond(m, s, x):
    return m.cond(x > 1, lambda x: loop_in_step(m, s, x), lambda x: x, x)


def unbatched_loop_inside(m, s, x):
    def body(c):
        m.repeat(3, lambda t, k: (s.set(s.value + c), k)[1], x * 0)
        return c + 3

    return m.loop(lambda c: c < 7, body, x)


def in_wrapper(how):
    def program(m, s, x):
        def f(x):
            s.set(s.value + x)
            return x + 1

        return m.loop(lambda c: c < 4, lambda c: m.wrap(how, f)(c), x)

    program.__name__ = f"in_{how}"
    return program


def cond_in_wrapper(how):
    def program(m, s, x):
        f = m.wrap(how, lambda x: (s.set(s.value * 2 + x), x + 1)[1])
        return m.cond(x > 1, f, lambda x: x, x)

    program.__name__ = f"cond_in_{how}"
    return program


WRAPPERS = ["checkpoint", "jit", "custom_jvp", "custom_vjp"]
PROGRAMS = [
    cond_sets,
    both_branches_set,
    cond_on_state,
    switch_sets,
    body_writes,
    condition_reads,
    condition_writes,
    cond_in_while,
    scan_in_while,
    while_in_while_on_state,
    finished_lane_would_loop_for_ever,
    while_in_cond,
    while_in_scan,
    cond_in_cond_in_cond,
    cond_in_step,
    loop_in_step,
    loop_in_step_in_cond,
    unbatched_loop_inside,
    *[in_wrapper(how) for how in WRAPPERS],
    *[cond_in_wrapper(how) for how in WRAPPERS],
]

SHAPES = {
    "one level": ((5,), ((0, 0),)),
    "two levels": ((2, 3), ((0, 0), (0, 0))),
    "axis 1": ((2, 3), ((0, 0), (1, 1))),
}


@pytest.mark.parametrize("levels", SHAPES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_against_lanes_one_by_one(program, levels, jit):
    shape, axes = SHAPES[levels]
    if not jit and levels != "one level":
        return
    rng = np.random.default_rng(0)
    xs = rng.choice([-1.0, 0.5, 2.0, 3.5, 8.0, 1.0], shape).astype(f32)
    xs.flat[:3] = [-1.0, 2.0, 3.5]
    start = rng.choice([0.5, 1.0, 2.0, 2.5], shape).astype(f32)
    index = storax.StateIndex()

    def batched(f):
        for in_axis, out_axis in axes:
            f = jax.vmap(f, in_axis, out_axis)
        return jax.jit(f) if jit else f

    batched(lambda x: storax.set_state(index, x))(start)
    got = batched(lambda x: program(OnJax, Lane(index, x), x))(xs)
    state = batched(lambda x: storax.get_state(index, 0 * x))(xs)

    want, want_state = np.zeros(shape, f32), np.zeros(shape, f32)
    for k in np.ndindex(shape):
        cell = Cell(start[k])
        want[k] = program(OnNumpy, cell, f32(xs[k]))
        want_state[k] = cell.value
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(state, want_state, rtol=1e-5)


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad"])
def test_derivatives_under_a_mask(how, order):
    """A custom rule stays the rule: the derivative here is 3 by rule, and 1 by the function."""
    index = storax.StateIndex()
    xs = jnp.array([0.0, 2.0, 3.0])
    jax.vmap(lambda x: storax.set_state(index, x))(xs * 0)
    slope = 3.0 if how.startswith("custom") else 1.0

    def f(x):
        def yes(x):
            storax.set_state(index, storax.get_state(index, 0 * x) + 1)
            return x

        return lax.cond(x > 1, OnJax.wrap(how, yes), lambda x: 10 * x, x)

    if order == "grad of vmap":
        grads = jax.jit(jax.grad(lambda xs: jax.vmap(f)(xs).sum()))(xs)
    else:
        grads = jax.jit(jax.vmap(jax.grad(f)))(xs)
    np.testing.assert_allclose(grads, [10, slope, slope])
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(state, [0, 1, 1])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_derivative_of_checkpoint_of_scan_in_a_branch(jit):
    """JAX calls what it knows of the scan by a primitive of its own."""
    index, xs = storax.StateIndex(), jnp.array([0.0, 2.0, 3.0])
    jax.vmap(lambda x: storax.set_state(index, x))(0 * xs + 1)

    def step(x, _):
        s = storax.get_state(index, 0 * lax.stop_gradient(x))
        storax.set_state(index, s + 1)
        return x * s, None

    f = jax.checkpoint(lambda x: lax.scan(step, x, None, length=2)[0])
    slope = lambda x: lax.cond(x > 1, jax.grad(f), lambda x: x, x)
    np.testing.assert_array_equal(jit(jax.vmap(slope))(xs), [0, 1 * 2, 1 * 2])
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(state, [1, 3, 3])


BACKWARD = {"vmap of grad": lambda g: jax.vmap(jax.grad(g))}
BACKWARD["grad of vmap"] = lambda g: jax.grad(lambda xs: jax.vmap(g)(xs).sum())


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("where", ["backward", "forward too", "beside"])
@pytest.mark.parametrize("order", BACKWARD)
def test_state_in_a_backward_rule_under_a_mask(order, where, jit):
    index = storax.StateIndex()
    xs = jnp.array([0.0, 2.0, 3.0])
    jax.vmap(lambda x: storax.set_state(index, x))(xs * 0)

    def bump(x, by):
        storax.set_state(index, storax.get_state(index, 0 * x) + by)

    def forward(x):
        if where == "forward too":
            bump(lax.stop_gradient(x), 0)
        return x

    f = jax.custom_vjp(forward)
    f.defvjp(lambda x: (forward(x), x), lambda x, ct: (bump(x, 1), (ct * 5,))[1])
    other = storax.StateIndex()
    storax.set_state(other, jnp.float32(1))

    def branch(x):
        return f(x) * storax.get_state(other, jnp.float32(0)) if where == "beside" else f(x)

    g = lambda x: lax.cond(x > 1, branch, lambda x: x, x)
    if (order, where) == ("grad of vmap", "backward"):
        # JAX has made the cond a select: before it is differentiated there is no state in it.
        with pytest.raises(NotImplementedError, match=r"no longer known. Use `vmap` of `grad`"):
            jit(BACKWARD[order](g))(xs)
        return
    np.testing.assert_allclose(jit(BACKWARD[order](g))(xs), [1, 5, 5])
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(state, [0, 1, 1])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_state_of_all_lanes_in_a_jit_in_a_backward_rule_under_a_mask(jit):
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))

    @jax.jit
    def bump():
        storax.set_state(index, storax.get_state(index, jnp.float32(0)) + 1)

    f = jax.custom_vjp(lambda x: x)
    f.defvjp(lambda x: (x, None), lambda _, ct: (bump(), (ct,))[1])
    g = jit(jax.grad(lambda xs: jax.vmap(lambda x: lax.cond(x > 1, f, lambda x: x, x))(xs).sum()))
    with pytest.raises(NotImplementedError, match="no longer known"):
        g(jnp.array([0.0, 2.0, 3.0]))


def _loop(how, f):
    """A loop without state that runs `f` twice if x > 1."""
    if how == "while":  # lanes end at different times
        goes_on = lambda c: c[0] < jnp.where(c[2] > 1, 2, 0)
        step = lambda c: (c[0] + 1, f(c[1]), c[2])
        return lambda x: lax.while_loop(goes_on, step, (0, x, x))[1]
    if how == "fori":
        return lambda x: lax.fori_loop(0, 2, lambda _, x: f(x), x)
    if how == "while in step":
        goes_on = lambda c: c[0] < 2
        return lambda x: lax.while_loop(goes_on, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]
    if how == "switch in scan":
        step = lambda x, k: (lax.switch(k, [lambda x: x, f, f], x), None)
        return lambda x: lax.scan(step, x, jnp.arange(3))[0]
    return lambda x: lax.scan(lambda x, _: (f(x), None), x, None, length=2)[0]


LOOPS = ["while", "while in step", "scan", "fori", "switch in scan"]


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("around", ["", "cond", "cond with state"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("order", ["jvp of vmap", "vmap of jvp"])
def test_state_in_a_rule_alone_in_a_loop_under_a_mask(order, loop, around, jit):
    """Until it is differentiated there is no state to be seen in the loop."""
    index, other = storax.StateIndex(), storax.StateIndex()
    xs = jnp.array([0.0, 2.0, 3.0])
    jax.vmap(lambda x: storax.set_state(index, x))(xs * 0)
    storax.set_state(other, jnp.float32(1))

    f = jax.custom_jvp(lambda x: x)

    @f.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        storax.set_state(index, storax.get_state(index, 0 * x) + 1)
        return x, 5 * t

    run = _loop(loop, f)
    branches = {
        "cond": run,
        "cond with state": lambda x: run(x) * storax.get_state(other, jnp.float32(0)),
    }
    g = (lambda x: lax.cond(x > 1, branches[around], lambda x: x, x)) if around else run
    if order == "vmap of jvp":
        call = jax.vmap(lambda x: jax.jvp(g, (x,), (jnp.ones_like(x),)))
    else:
        call = lambda xs: jax.jvp(jax.vmap(g), (xs,), (jnp.ones_like(xs),))
    masked = bool(around) or loop == "while"
    if order == "jvp of vmap" and masked and around != "cond with state":
        # JAX has made selects of it: before it is differentiated there is no state in it.
        with pytest.raises(NotImplementedError, match=r"no longer known. Use `vmap` of `grad`"):
            jit(call)(xs)
        return
    values, slopes = jit(call)(xs)
    np.testing.assert_allclose(values, xs)
    np.testing.assert_allclose(slopes, [1 if masked else 25, 25, 25])
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(state, [0 if masked else 2, 2, 2])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_state_in_a_rule_in_a_rule(jit):
    """A rule runs for lanes that have parted, and which these are no mask within it says."""
    index, other = storax.StateIndex(), storax.StateIndex()
    for i in (index, other):
        storax.set_state(i, jnp.float32(1))
    get = lambda i: storax.get_state(i, jnp.float32(0))

    @jax.custom_jvp
    def inner(x):
        return x

    @inner.defjvp
    def _(primals, tangents):
        storax.set_state(index, get(index) + 1)
        return primals[0], tangents[0] * 5

    @jax.custom_jvp
    def outer(x):
        return x

    @outer.defjvp
    def _(primals, tangents):
        in_lanes = lambda y: lax.cond(y > 0, lambda y: inner(y) * get(other), lambda y: y, y)
        return primals[0], tangents[0] * jax.vmap(in_lanes)(primals[0] * jnp.ones(2)).sum()

    slope = lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
    f = lambda x: lax.cond(x > 2, outer, lambda x: x, x)
    assert jit(slope(slope(outer)))(jnp.float32(3)) == 10
    assert get(index) == 2
    for xs, want in ((jnp.array([0.0, 1.0]), [0, 0]), (jnp.array([0.0, 3.0]), [0, 10])):
        with pytest.raises(NotImplementedError, match=r"no longer known. Use `vmap` of `grad`"):
            jit(slope(slope(jax.vmap(f))))(xs)
        np.testing.assert_array_equal(jit(jax.vmap(slope(slope(f))))(xs), want)
        assert get(index) == 2 + (10 in want)


PARTING = {
    "cond": lambda f: lambda x: lax.cond(x > 0.5, f, lambda x: x, x),
    "while": lambda f: lambda x: lax.while_loop(lambda x: x < 2, lambda x: f(x) / 2 + 1, x),
    "fori": lambda f: lambda x: lax.fori_loop(0, jnp.int32(x), lambda _, x: f(x), x),
}


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("visible", [False, True], ids=["alone", "beside state"])
@pytest.mark.parametrize("mapped", [False, True], ids=["direct", "mapped"])
@pytest.mark.parametrize("parting", PARTING)
def test_a_set_in_a_rule_of_custom_vmap(parting, mapped, visible, jit):
    """The rule has all lanes, and does not know which of them take the branch."""
    index, other, xs = storax.StateIndex(), storax.StateIndex(), jnp.arange(3.0)
    storax.set_state(other, jnp.float32(0))
    jax.vmap(lambda x: storax.set_state(index, 0 * x))(xs)
    double = jax.custom_batching.custom_vmap(lambda x: x * 2)

    @double.def_vmap
    def _(size, batched, x):
        if mapped:
            jax.vmap(lambda x: storax.set_state(index, x + 10))(x)
        else:
            storax.set_state(other, x.sum())
        return x * 2, batched[0]

    def f(x):
        if visible:
            storax.set_state(other, storax.get_state(other, jnp.float32(0)) + 1)
        return double(x)

    state = lambda: jax.vmap(lambda x: storax.get_state(index, x))(0 * xs)
    with pytest.raises(
        NotImplementedError, match=r"`custom_vmap`.*no longer known. Set the state out"
    ):
        jit(jax.vmap(PARTING[parting](f)))(xs)
    np.testing.assert_array_equal(state(), [0, 0, 0])
    assert storax.get_state(other, jnp.float32(0)) == 0
    everywhere = lambda x: lax.scan(
        lambda x, _: (lax.cond(True, f, f, x), None), x, None, length=1
    )[0]
    jit(jax.vmap(everywhere))(xs)
    np.testing.assert_array_equal(state(), [10, 11, 12] if mapped else [0, 0, 0])
    assert storax.get_state(other, jnp.float32(0)) == (visible if mapped else 3)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("beside", [False, True], ids=["in it", "beside it"])
@pytest.mark.parametrize("what", ["ref", "io_callback"])
@pytest.mark.parametrize("parting", PARTING)
def test_what_would_act_for_lanes_that_do_not_take_the_branch(parting, what, beside, jit):
    index, xs, seen = storax.StateIndex(), jnp.arange(3.0), []
    storax.set_state(index, jnp.float32(0))

    def lane(x):
        ref = jax.new_ref(0 * x)

        def act(x):
            if what == "ref":
                ref[...] += 1
            else:
                io_callback(lambda x: seen.append(x.item()), None, x)

        def f(x):
            act(x)
            if not beside:
                storax.get_state(index, jnp.float32(0))
            return x

        def g(x):
            y = PARTING[parting](f)(x)
            return y + storax.get_state(index, jnp.float32(0))

        # Beside it, it is in the other branch, or in the condition, that there is state.
        if beside and parting == "cond":
            with_state = lambda x: x + storax.get_state(index, jnp.float32(0))
            return lax.cond(x > 0.5, f, with_state, x), ref[...]
        if beside:
            goes_on = lambda x: x < 2 + storax.get_state(index, jnp.float32(0))
            return lax.while_loop(goes_on, lambda x: f(x) + 1, x), ref[...]
        return g(x), ref[...]

    name = {"ref": "a `jax.Ref`", "io_callback": "an `io_callback`"}[what]
    with pytest.raises(NotImplementedError, match=rf"{name} in a \w+ with state.*Move it out"):
        jit(jax.vmap(lane))(xs)
    assert seen == []


def test_a_ref_that_is_the_branchs_own():
    index, xs = storax.StateIndex(), jnp.arange(3.0)
    jax.vmap(lambda x: storax.set_state(index, 0 * x))(xs)

    def taken(x):
        ref = jax.new_ref(x)
        ref[...] += storax.get_state(index, 0 * x) + 1
        storax.set_state(index, ref[...])
        return ref[...]

    got = jax.jit(jax.vmap(lambda x: lax.cond(x > 0, taken, lambda x: x, x)))(xs)
    np.testing.assert_array_equal(got, [0, 2, 3])
    np.testing.assert_array_equal(jax.vmap(lambda x: storax.get_state(index, x))(xs), [0, 2, 3])


@pytest.mark.parametrize("prevent_cse", [True, False, (True, False)])
def test_which_operands_of_a_checkpoint_are_kept_apart(prevent_cse):
    index, xs = storax.StateIndex(), jnp.arange(3.0)
    jax.vmap(lambda x: storax.set_state(index, x + 1))(xs)

    @functools.partial(jax.checkpoint, prevent_cse=prevent_cse)
    def f(x, y):
        s = storax.get_state(index, 0 * x)
        storax.set_state(index, lax.stop_gradient(s + 1 + 0 * x))
        return jnp.sin(x) * y * s

    lane = lambda x: lax.cond(x > 0.5, lambda: f(x, 2.0), lambda: 0.0)
    slopes = jax.jit(jax.grad(lambda xs: jax.vmap(lane)(xs).sum()))(xs)
    np.testing.assert_allclose(slopes, [0, 4 * np.cos(1), 6 * np.cos(2)], rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(lambda x: storax.get_state(index, x))(xs), [1, 3, 4])


# --- Unbatched state, and what is not masked -------------------------------------------------------


def test_unbatched_state_is_written_if_any_lane_takes_the_branch():
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))
    zero = jnp.float32(0)

    def f(x):
        bump = lambda: storax.set_state(index, storax.get_state(index, zero) + 1)
        lax.cond(x > 2.5, bump, lambda: None)

    run = jax.jit(jax.vmap(f))
    run(jnp.array([1.0, 3.0, 2.0]))
    assert storax.get_state(index, zero) == 1
    run(jnp.zeros(3))
    assert storax.get_state(index, zero) == 1

    def loop(x):
        def body(c):
            storax.set_state(index, storax.get_state(index, zero) + 1)
            return c + 1

        return lax.while_loop(lambda c: c < 4, body, x)

    jax.jit(jax.vmap(loop))(jnp.array([1.0, 3.0, 2.0]))
    assert storax.get_state(index, zero) == 4  # three steps, while any lane runs


def test_an_unbatched_like_stays_unbatched():
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(5))
    f = lambda x, like: lax.cond(x > 0, lambda k: storax.get_state(index, k), lambda k: k, like)
    got = jax.jit(jax.vmap(f, in_axes=(0, None)))(jnp.array([1.0, -1.0]), jnp.float32(0))
    np.testing.assert_array_equal(got, [5, 0])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_unbatched_like_that_is_carried_stays_unbatched(jit):
    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(5))

    def lane(x, like):
        goes_on = lambda c: c[0] < storax.get_state(index, c[1])
        return lax.while_loop(goes_on, lambda c: (c[0] + 2, c[1]), (x, like))[0]

    got = jit(jax.vmap(lane, in_axes=(0, None)))(jnp.array([0.0, 3.0, 9.0]), jnp.float32(0))
    np.testing.assert_array_equal(got, [6, 5, 9])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_lanes_within_a_branch_of_lanes(jit):
    """What an inner vmap has masked is masked once more."""
    index = storax.StateIndex()
    takes, xs = jnp.array([True, False]), jnp.array([[1.0, -1.0, 2.0], [3.0, -3.0, 4.0]])
    jax.vmap(jax.vmap(lambda x: storax.set_state(index, x)))(0 * xs)

    def bump(x):
        storax.set_state(index, storax.get_state(index, 0 * x) + x)

    inner = jax.vmap(lambda x: lax.cond(x > 0, bump, lambda x: None, x))
    jit(jax.vmap(lambda p, xs: lax.cond(p, inner, lambda xs: None, xs)))(takes, xs)
    state = jax.vmap(jax.vmap(lambda x: storax.get_state(index, x)))(xs)
    np.testing.assert_array_equal(state, [[1, 0, 2], [0, 0, 0]])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_state_of_some_levels_keeps_them(jit):
    """The predicate is of both vmaps, the state of the inner one: batched by the other it would not fit."""
    index, lanes = storax.StateIndex(), jnp.arange(3.0)
    jax.vmap(lambda y: storax.set_state(index, y))(lanes)

    def bump(y):
        s = storax.get_state(index, 0 * y)
        storax.set_state(index, s + 1 + 0 * y)
        return s

    def program(x, y):
        return lax.cond(x * y > 2, bump, lambda y: y, y)

    out = jit(jax.vmap(jax.vmap(program, (None, 0)), (0, None)))(jnp.array([1.0, 2.0]), lanes)
    np.testing.assert_array_equal(out, [[0, 1, 2], [0, 1, 2]])
    state = jax.vmap(lambda y: storax.get_state(index, y))(lanes)
    np.testing.assert_array_equal(state, [0, 1, 3])


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_derivatives_do_not_see_lanes_that_take_another_branch(jit):
    """Their square roots have no derivative at zero (jax#1052)."""
    index, lanes = storax.StateIndex(), jnp.array([0.0, 4.0])
    jax.vmap(lambda x: storax.set_state(index, x + 1))(lanes)

    def root(x):
        s = storax.get_state(index, 0 * x)
        storax.set_state(index, s + 0 * lax.stop_gradient(x))
        return s * jnp.sqrt(x)

    program = lambda x: lax.cond(x > 0, root, lambda x: x, x)
    got = jit(jax.grad(lambda x: jax.vmap(program)(x).sum()))(lanes)
    np.testing.assert_array_equal(got, [1, 5 / 4])


def test_a_branch_that_no_lane_takes_does_nothing():
    unset = storax.StateIndex(name="unset")
    f = lambda x: lax.cond(x > 9, lambda x: storax.get_state(unset, x), lambda x: x, x)
    for run in (jax.vmap(f), jax.jit(jax.vmap(f))):
        np.testing.assert_array_equal(run(jnp.arange(3.0)), [0, 1, 2])
        with pytest.raises(RuntimeError, match=r"'unset'.*nothing has been set"):
            jax.block_until_ready(run(jnp.array([10.0, 0.0])))


def test_a_branch_that_only_lanes_that_have_ended_would_take_does_nothing():
    unset = storax.StateIndex(name="unset")

    def body(x):
        return lax.cond(x < 1, lambda x: storax.get_state(unset, x), lambda x: x - 1, x)

    f = jax.vmap(lambda x: lax.while_loop(lambda x: x > 0, body, x))
    for jit in (lambda f: f, jax.jit, storax.jit):
        np.testing.assert_array_equal(jit(f)(jnp.array([0.0, 3.0, 1.0])), 0)


@pytest.mark.parametrize("ends", ["by a number", "by a state"])
def test_a_shared_predicate_in_nested_vmaps(ends):
    """Of a loop that all lanes run in step: what it counts is no lane's own."""
    index = storax.StateIndex()
    storax.set_state(index, jnp.int32(0))
    count = lambda: storax.get_state(index, jnp.int32(0))

    def step(n):
        storax.set_state(index, n + 1)
        return n + 1

    loop = lambda: lax.while_loop(lambda n: (n if ends == "by a number" else count()) < 3, step, 0)
    f = lambda x: lax.cond(x > 0, loop, lambda: 0)
    got = jax.vmap(jax.vmap(f))(jnp.array([[1.0, -1.0], [-1.0, -1.0]]))
    np.testing.assert_array_equal(got, [[3, 0], [0, 0]])
    assert count() == 3


@pytest.mark.parametrize("rule", ["relu", "axis_index"])
@pytest.mark.parametrize("own", [True, False])
def test_a_loop_that_a_vmap_in_the_branch_has_batched(own, rule):
    """Without state JAX batches it, and its predicate has an axis."""
    index = storax.StateIndex()
    storax.set_state(index, jnp.int32(0))

    def double(v):
        number = jax.nn.relu(v) if rule == "relu" else v + 0 * lax.axis_index("lanes")
        return number * 2

    loop = lambda v: lax.while_loop(lambda v: v < 4, double, v)

    def taken(x):
        storax.set_state(index, storax.get_state(index, jnp.int32(0)) + 1)
        factors = jnp.array([1.0, 3.0])
        return jax.vmap(jax.vmap(loop))(jnp.stack([factors * (x if own else 1), factors]))[0].sum()

    f = lambda x: lax.cond(x > 0, taken, lambda x: x, x)
    got = jax.jit(jax.vmap(f, axis_name="lanes"))(jnp.array([0.0, 1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(got, [0, 4 + 6, 4 + 6, 6 + 9] if own else [0, 10, 10, 10])
    assert storax.get_state(index, jnp.int32(0)) == 1


def test_a_first_set_must_cover_all_lanes():
    index = storax.StateIndex(name="first")
    f = lambda x: lax.cond(x > 1, lambda: storax.set_state(index, x), lambda: None)

    def run(xs, wrap):
        wrap(jax.vmap(f))(xs)
        storax.barrier()

    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(RuntimeError, match=r"'first'.*first set.*before the `vmap`"):
            run(jnp.arange(3.0), wrap)
    run(jnp.arange(3.0) - 5, jax.jit)  # no lane at all
    assert not index._slot.core.type
    run(jnp.arange(3.0) + 5, jax.jit)  # every lane
    np.testing.assert_array_equal(
        jax.vmap(lambda x: storax.get_state(index, x))(jnp.zeros(3)), [5, 6, 7]
    )


def test_per_leaf_masks():
    index = storax.StateIndex()
    xs = jnp.arange(6.0).reshape(3, 2)
    set = lambda x, n: storax.set_state(index, {"row": x, "sum": x.sum(), "n": n})
    jax.vmap(set, in_axes=(0, None))(xs, jnp.int32(0))

    def f(x):
        def yes():
            like = {"row": x, "sum": x.sum(), "n": jnp.int32(0)}
            s = storax.get_state(index, like)
            storax.set_state(index, {"row": s["row"] * 10, "sum": -s["sum"], "n": s["n"] + 1})

        lax.cond(x[0] == 2, yes, lambda: None)

    jax.jit(jax.vmap(f))(xs)
    like = lambda x: {"row": x, "sum": x.sum(), "n": jnp.int32(0)}
    out_axes = {"row": 0, "sum": 0, "n": None}
    got = jax.vmap(lambda x: storax.get_state(index, like(x)), out_axes=out_axes)(xs)
    np.testing.assert_array_equal(got["row"], [[0, 1], [20, 30], [4, 5]])
    np.testing.assert_array_equal(got["sum"], [1, -5, 9])
    assert got["n"] == 1


def test_collectives_over_the_vmapped_axis():
    index = storax.StateIndex()
    xs = jnp.array([1.0, 3.0, 2.0])
    jax.vmap(lambda x: storax.set_state(index, x))(xs * 0)

    def f(x):
        def body(c):
            s = storax.get_state(index, 0 * x)
            storax.set_state(index, s + lax.psum(1.0, "v") + x)
            return c + 1

        return lax.while_loop(lambda c: c < 4, body, x)

    out = jax.jit(jax.vmap(f, axis_name="v"))(xs)
    np.testing.assert_array_equal(out, [4, 4, 4])
    state = jax.vmap(lambda x: storax.get_state(index, x))(xs)
    np.testing.assert_array_equal(state, [12, 6, 10])


def test_pure_control_flow_goes_to_jax():
    f = lambda x: lax.while_loop(
        lambda c: c < 4, lambda c: c + 1, lax.cond(x > 1, jnp.sin, jnp.cos, x)
    )
    before = str(jax.make_jaxpr(jax.vmap(f))(jnp.zeros(3)))
    storax.StateIndex()
    assert str(jax.make_jaxpr(jax.vmap(f))(jnp.zeros(3))) == before


def test_tracing_time_is_linear_in_the_nesting_depth():
    index = storax.StateIndex()
    xs = jnp.arange(4.0)
    jax.vmap(lambda x: storax.set_state(index, x))(xs)

    runs = 0

    def size(depth):
        nonlocal runs
        runs = 0

        def innermost(x):
            nonlocal runs
            runs += 1
            storax.set_state(index, storax.get_state(index, 0 * x) + 1)
            return x

        f = innermost
        for _ in range(depth):
            f = lambda x, f=f: lax.cond(x > 0, f, lambda x: x, x)
        return len(str(jax.make_jaxpr(jax.vmap(f))(xs))), runs

    (small, _), (middle, _), (large, runs_of_large) = (size(d) for d in (2, 4, 8))
    assert large - middle < 3 * (middle - small)
    assert runs_of_large <= 2
