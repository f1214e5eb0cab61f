"""What lanes that don't take a branch compute in it: nothing that could be told from outside.

They go through the branch all the same. So each program here is one that only a lane that takes the
branch can stand: elsewhere it has no finite derivative, or has a loop that does not end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import storax
from random_programs.runner import CALLS

W = 1.5
# Where a lane's number is 0, log has no derivative, and doubling never gets anywhere.
LANES = jnp.arange(4, dtype=jnp.float32)
PAIR = jnp.full(2, 0.5)


def counter():
    index = storax.StateIndex(name="counter")
    storax.set_state(index, jnp.float32(0))
    return index


def add_one(index, like=0.0):
    like = 0 * jnp.float32(like)
    storax.set_state(index, lax.stop_gradient(storax.get_state(index, like) + 1))


# --- Derivatives ----------------------------------------------------------------------------------


def value_of(index):
    return storax.get_state(index, jnp.float32(0))


def _in_scan(f):
    return lambda w, x: lax.scan(lambda c, _: (c + f(w, x), None), 0.0, None, length=2)[0]


def log(w, x):
    return w * w * jnp.log(x)


# Of what all lanes share, `w`, and of a lane's own, `x`.
FUNCTIONS = {
    "shared": log,
    "in a scan": _in_scan(log),
    "in a jit": jax.jit(log),
    "in a checkpoint": jax.checkpoint(log),
    "in a custom_jvp": CALLS["custom_jvp"](log),
    "in a custom_vjp": CALLS["custom_vjp"](log),
    "in a branch of a branch": lambda w, x: lax.cond(x > 1, log, lambda w, x: w, w, x),
}


def in_a_branch(f, add):
    def taken(w, x):
        add(w)
        return f(w, x)

    return lambda w, x: lax.cond(x > 0, taken, lambda w, x: w, w, x)


def beside_a_branch(f, add):
    def other(w, x):
        add(w)
        return w

    return lambda w, x: lax.switch(jnp.int32(x > 0), [other, f], w, x)


def of_a_branch_with_state(f, add):
    """In the branch is a further one, with the state in it."""

    def taken(w, x):
        return lax.cond(x > 1, lambda w, x: (add(w), f(w, x))[1], f, w, x)

    return lambda w, x: lax.cond(x > 0, taken, lambda w, x: w, w, x)


PLACES = {f.__name__: f for f in (in_a_branch, beside_a_branch, of_a_branch_with_state)}
# Whether what is got has to do with what is differentiated.
LIKES = {"like a constant": lambda w: 0.0, "like w": lambda w: w}
DERIVATIVES = {
    "grad": jax.grad,
    "grad of checkpoint": lambda f: storax.jit(jax.grad(jax.checkpoint(f))),
    "grad of grad": lambda f: jax.jit(jax.grad(jax.grad(f))),
    "hessian": lambda f: jax.jit(jax.hessian(f)),
}


def lane_by_lane(derive, f, lanes=LANES):
    return sum(derive(lambda w, x=x: f(w, x))(W) for x in map(float, lanes))


def derivatives_of(name):
    if name == "in a custom_vjp":  # which has no derivative forward
        return [d for d in DERIVATIVES if d != "hessian"]
    return list(DERIVATIVES)


@pytest.mark.parametrize("like", LIKES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_by_what_lanes_share(name, place, like):
    index, make = counter(), PLACES[place]
    f = make(FUNCTIONS[name], lambda w: add_one(index, LIKES[like](w)))
    pure = make(FUNCTIONS[name], lambda w: None)
    in_lanes = lambda w: jax.vmap(f, (None, 0))(w, LANES).sum()
    for how in derivatives_of(name):
        derive = DERIVATIVES[how]
        want = lane_by_lane(derive, pure)
        assert np.isfinite(want)
        np.testing.assert_allclose(derive(in_lanes)(W), want, rtol=1e-5, err_msg=how)


@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize("like", LIKES)
def test_derivatives_in_lanes_of_lanes(like, how):
    """The branch goes by both vmaps, and what it is of by each, by both and by none."""
    index, derive = counter(), DERIVATIVES[how]
    outer = jnp.array([0.0, 1.0])

    def f(add):
        def taken(w, x, y):
            add(w)
            return log(w, x - y) + w * jnp.log(x) + w * w * jnp.sqrt(1.5 - y)

        return lambda w, x, y: lax.cond(x > y, taken, lambda w, x, y: w, w, x, y)

    both = lambda w: jax.vmap(
        lambda y: jax.vmap(f(lambda w: add_one(index, LIKES[like](w))), (None, 0, None))(
            w, LANES, y
        ).sum()
    )(outer).sum()
    pure = f(lambda w: None)
    want = sum(lane_by_lane(derive, lambda w, x, y=y: pure(w, x, y)) for y in outer)
    np.testing.assert_allclose(derive(both)(W), want, rtol=1e-5)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("own", ["x", "y", "x and y"])
@pytest.mark.parametrize("singular", ["derivative", "loop"])
def test_what_a_state_of_some_levels_depends_on(singular, own):
    """Where x > y, both are what some lane has that takes the branch, but not all pairs of them are."""
    index = storax.StateIndex()
    outer = jnp.array([0.0, 2.5])
    like = {"x": lambda x, y: 0 * x, "y": lambda x, y: 0 * y, "x and y": lambda x, y: 0 * x + 0 * y}
    in_lanes = lambda f: jax.vmap(lambda y: jax.vmap(lambda x: f(x, y))(LANES))(outer)

    def f(add):
        def taken(w, x, y):
            add(x, y)
            return log(w, doubled(x - y) if singular == "loop" else x - y)

        return lambda w, x, y: lax.cond(x > y, taken, lambda w, x, y: w, w, x, y)

    def add(x, y):
        zero = like[own](x, y)
        storax.set_state(index, storax.get_state(index, zero) + 1)

    in_lanes(lambda x, y: storax.set_state(index, like[own](x, y)))
    with_state, pure = f(add), f(lambda x, y: None)
    run = jax.jit if singular == "loop" else lambda f: jax.jit(jax.grad(f))
    got = run(lambda w: in_lanes(lambda x, y: with_state(w, x, y)).sum())(W)
    want = sum(lane_by_lane(run, lambda w, x, y=y: pure(w, x, y)) for y in map(float, outer))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    state = in_lanes(lambda x, y: storax.get_state(index, like[own](x, y)))
    takes = outer[:, None] < LANES
    any_of = {"x": takes.any(0) * jnp.ones((2, 1)), "y": takes.any(1)[:, None] * jnp.ones(4)}
    np.testing.assert_array_equal(state, any_of.get(own, takes))


@pytest.mark.parametrize("how", DERIVATIVES)
def test_derivatives_by_what_lanes_share_of_a_state(how):
    """Lanes that don't take the branch have a state of which log has no derivative."""
    index, derive = storax.StateIndex(), DERIVATIVES[how]

    def f(w, x):
        return lax.cond(x > 0, lambda: log(w, storax.get_state(index, x)), lambda: w)

    def in_lanes(w):
        jax.vmap(lambda x: storax.set_state(index, x))(LANES)
        return jax.vmap(f, (None, 0))(w, LANES).sum()

    want = lane_by_lane(derive, lambda w, x: log(w, x) if x > 0 else w)
    np.testing.assert_allclose(derive(in_lanes)(W), want, rtol=1e-5)


@pytest.mark.parametrize("how", DERIVATIVES)
@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "checkpoint"]
)
def test_derivatives_by_what_lanes_share_of_a_lanes_number(wrap, how):
    index, derive = counter(), DERIVATIVES[how]
    number = wrap(lambda w: log(w, lax.axis_index("lanes").astype(jnp.float32)))

    def taken(w):
        add_one(index)
        return number(w)

    f = lambda w, x: lax.cond(x > 0, taken, lambda w: w, w)
    in_lanes = lambda w: jax.vmap(f, (None, 0), axis_name="lanes")(w, LANES).sum()
    want = lane_by_lane(derive, lambda w, x: log(w, x) if x > 0 else w)
    np.testing.assert_allclose(derive(in_lanes)(W), want, rtol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("levels", [1, 2])
def test_derivatives_where_no_lane_takes_the_branch(levels, place):
    index, make = counter(), PLACES[place]
    f = jax.vmap(make(log, lambda w: add_one(index)), (None, 0))
    lanes = 0 * LANES
    if levels == 2:
        f, lanes = jax.vmap(f, (None, 0)), jnp.stack([lanes, LANES])
    pure = make(log, lambda w: None)
    for derive in (jax.grad, lambda f: jax.jit(jax.hessian(f))):
        want = lane_by_lane(derive, pure, lanes.ravel())
        np.testing.assert_allclose(derive(lambda w: f(w, lanes).sum())(W), want, rtol=1e-5)


def test_no_lanes():
    index = counter()

    def taken(w, x):
        add_one(index)
        return w * doubled(x)

    f = lambda w, x: lax.cond(x > 0, taken, lambda w, x: w, w, x)
    none = jax.jit(jax.vmap(f, (None, 0)))(W, LANES[:0])
    assert none.shape == (0,)


# --- Loops ----------------------------------------------------------------------------------------


def doubled(x):
    """Until it is 4 or more."""
    return lax.while_loop(lambda v: v < 4, lambda v: v * 2, x)


def branch_with_loop(add):
    return lambda x: lax.cond(x > 0, lambda x: (add(), doubled(x))[1], lambda x: x, x)


def branch_with_loop_beside_state(add):
    return lambda x: lax.cond(x > 0, doubled, lambda x: (add(), x)[1], x)


def branch_with_loop_that_no_lane_takes(add):
    other = lambda x: (add(), x)[1]
    return lambda x: lax.switch(
        jnp.where(x > 9, 2, jnp.int32(x > 0)), [other, lambda x: doubled(x + 0), doubled], x
    )


def loop_of_state(add):
    """Which reads the state to know whether it ends."""

    def double(v):
        add()
        return v * 2

    loop = lambda x: lax.while_loop(lambda v: v < 4, double, x)
    return lambda x: lax.cond(x > 0, loop, lambda x: x, x)


def loop_in_a_loop(add):
    """A lane that has ended has 0 for its number, with which the inner loop does not end."""

    def step(carry):
        left, _ = carry
        add()
        return left - 1, doubled(left)

    def run(x):
        _, last = lax.while_loop(lambda c: c[0] > 0, step, (x, 0.0))
        return jnp.where(x > 0, doubled(x * 1 + (x == 0)), last)

    return run


def loop_in_a_condition(add):
    def goes_on(left):
        add()
        return doubled(left + 1) > 4.5

    return lambda x: lax.while_loop(goes_on, lambda left: left - 1, x)


LOOPS = {
    f.__name__: f
    for f in (
        branch_with_loop,
        branch_with_loop_beside_state,
        branch_with_loop_that_no_lane_takes,
        loop_of_state,
        loop_in_a_loop,
        loop_in_a_condition,
    )
}


@pytest.mark.timeout(60, method="thread")  # XLA hears of no signal
@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_nothing_hangs_that_the_lanes_one_by_one_would_not(name, levels, jit):
    index = counter()
    f = LOOPS[name](lambda: add_one(index))
    want = [jax.jit(f)(x).item() for x in LANES]
    in_lanes, lanes = jax.vmap(f), LANES
    if levels == 2:
        in_lanes, lanes, want = (
            jax.vmap(in_lanes),
            jnp.stack([LANES, 0 * LANES]),
            [want, [want[0]] * 4],
        )
    np.testing.assert_array_equal(jit(in_lanes)(lanes), want)


# In the backward pass of a lane by itself, loops of the branch run once more, or are those of a rule.


def times_doubled(w, x):
    return w * w * w * doubled(lax.stop_gradient(x))


def checkpoint_of_dots(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)


@jax.custom_vjp
def loop_backward(w, x):
    return w * x


loop_backward.defvjp(
    lambda w, x: (w * x, (w, x)), lambda res, ct: (ct * times_doubled(*res), 0 * ct)
)


def branch_of(f):
    def program(index):
        def taken(w, x):
            add_one(index)
            return f(w, x)

        return lambda w, x: lax.cond(x > 0, taken, lambda w, x: w, w, x)

    return program


def dot(x):
    return jnp.dot(x * PAIR, PAIR * 2)


def beside_a_derivative(kept, wrap=lambda f: f):
    """The backward pass goes through the branch only for a loop of what the forward pass has kept."""

    def program(_):
        index = storax.StateIndex()

        def taken(w, x):
            in_loop = wrap(lambda got, x: doubled(kept(got, x)))
            return w * w, in_loop(storax.get_state(index, 0 * x), x)

        def f(w, x):
            storax.set_state(index, 1 * x)
            _, y = lax.cond(x > 0, taken, lambda w, x: (w, 1.0), w, x)
            return w * w * w * y

        return checkpoint_of_dots(f)

    return program


BACKWARD = {
    "checkpoint": branch_of(jax.checkpoint(times_doubled)),
    "checkpoint in a jit": branch_of(jax.jit(jax.checkpoint(times_doubled))),
    "checkpoint in a scan": branch_of(_in_scan(jax.checkpoint(times_doubled))),
    "checkpoint around": lambda index: jax.checkpoint(branch_of(times_doubled)(index)),
    "checkpoint of a jit around": lambda index: jax.checkpoint(
        jax.jit(branch_of(times_doubled)(index))
    ),
    "checkpoint of dots around": lambda index: checkpoint_of_dots(
        branch_of(lambda w, x: times_doubled(w, dot(x)))(index)
    ),
    "checkpoint of dots around a jit": lambda index: checkpoint_of_dots(
        branch_of(jax.jit(lambda w, x: w * doubled(lax.stop_gradient(dot(x)))))(index)
    ),
    "checkpoint of everything around": lambda index: jax.checkpoint(
        branch_of(times_doubled)(index), policy=jax.checkpoint_policies.everything_saveable
    ),
    "checkpoint of a rule around": lambda index: jax.checkpoint(branch_of(loop_backward)(index)),
    "checkpoint of a scan of a rule around": lambda index: jax.checkpoint(
        _in_scan(branch_of(jax.jit(loop_backward))(index))
    ),
    "scan around": lambda index: _in_scan(branch_of(jax.checkpoint(times_doubled))(index)),
    "rule": branch_of(loop_backward),
    "rule in a checkpoint": branch_of(jax.checkpoint(loop_backward)),
    "custom_vjp": branch_of(CALLS["custom_vjp"](jax.checkpoint(times_doubled))),
    "beside a derivative, of what is got": beside_a_derivative(lambda got, x: got),
    "beside a derivative, of a dot": beside_a_derivative(lambda got, x: dot(x)),
    "beside a derivative, of a dot in a jit": beside_a_derivative(lambda got, x: dot(x), jax.jit),
    "beside a derivative, of a dot in a checkpoint": beside_a_derivative(
        lambda got, x: dot(x), jax.checkpoint
    ),
}


def in_all_lanes(f, lanes):
    for _ in lanes.shape:
        f = jax.vmap(f, (None, 0))
    return f


OF_LANES = {
    "grad": (jax.grad, LANES),
    "grad where no lane takes it": (jax.grad, 0 * LANES),
    "grad in two levels": (jax.grad, jnp.stack([LANES, 0 * LANES])),
    "grad of grad": (lambda f: jax.grad(jax.grad(f)), LANES),
    "jacfwd of grad": (lambda f: jax.jacfwd(jax.grad(f)), LANES),
}


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in BACKWARD
        for how in OF_LANES
        # JAX has no derivative of this rule in forward mode.
        if (name, how) != ("custom_vjp", "jacfwd of grad")
    ],
)
def test_the_backward_pass_of_a_lane_ends(name, how):
    derive, lanes = OF_LANES[how]
    of_lane, for_lanes = (derive(BACKWARD[name](counter())) for _ in range(2))
    want = [jax.jit(of_lane)(W, x) for x in lanes.ravel()]
    for jit in (jax.jit, storax.jit) if how == "grad" else (jax.jit,):
        got = jit(in_all_lanes(for_lanes, lanes))(W, lanes)
        np.testing.assert_allclose(got.ravel(), want, rtol=1e-5)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("name", BACKWARD)
def test_the_backward_pass_of_all_lanes_backward_passes_ends(name):
    of_lane, for_lanes = (jax.grad(BACKWARD[name](counter())) for _ in range(2))
    want = sum(jax.jit(jax.grad(of_lane))(W, x) for x in LANES)
    got = jax.jit(jax.grad(lambda w: in_all_lanes(for_lanes, LANES)(w, LANES).sum()))(W)
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- Collectives ----------------------------------------------------------------------------------


def total(x):
    return lax.psum(x, "lanes")


def neighbour(x):
    return lax.ppermute(x, "lanes", [(k, (k + 1) % 4) for k in range(4)])


def all_of(x):
    return lax.all_gather(x, "lanes").sum() + x


def collective_in_branch(add, talk):
    return lambda x: lax.cond(x > 1, lambda: (add(x), talk(x * 2))[1], lambda: x)


def collective_in_scan(add, talk):
    scan = lambda x: lax.scan(lambda c, _: ((add(x), talk(c))[1], None), x, None, length=2)[0]
    return lambda x: lax.cond(x > 1, scan, lambda x: x, x)


def collective_after_a_branch(add, talk):
    def taken(x):
        y = lax.cond(x > 2, lambda x: (add(x), x * 3)[1], lambda x: x + 1, x)
        return talk(y)

    return lambda x: lax.cond(x > 1, taken, lambda x: x, x)


def collective_of_a_state(add, talk):
    return lambda x: lax.cond(x > 1, lambda: talk(add(x) + x), lambda: x)


def collective_in_loop(add, talk):
    """The inner loop ends in any lane."""

    def step(carry):
        k, x = carry
        y = lax.while_loop(lambda v: v < 4, lambda v: v + 1, x)
        return k + 1, talk((add(x), y)[1] + k) / 8

    return lambda x: lax.while_loop(lambda c: c[0] < x, step, (0.0, x))[1]


COLLECTIVES = [
    collective_in_branch,
    collective_in_scan,
    collective_after_a_branch,
    collective_of_a_state,
    collective_in_loop,
]


@pytest.mark.parametrize("jit", [jax.jit, storax.jit])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("talk", [total, neighbour, all_of])
@pytest.mark.parametrize("make", COLLECTIVES)
def test_a_collective_is_of_what_all_lanes_have(make, talk, levels, jit):
    """As without state: whether a lane takes the branch is for the lane to know."""
    index = storax.StateIndex()

    def add(x):
        seen = storax.get_state(index, 0 * x)
        storax.set_state(index, lax.stop_gradient(seen + 0 * x))
        return seen

    def in_lanes(f, **kwargs):
        return jax.vmap(jax.vmap(f) if levels == 2 else f, **kwargs)

    x = LANES if levels == 1 else jnp.stack([LANES, LANES[::-1] + 1], 1)
    in_lanes(lambda x: storax.set_state(index, 9 * x))(x)
    run = lambda add: jit(in_lanes(make(add, talk), axis_name="lanes"))(x)
    np.testing.assert_array_equal(run(add), run(lambda x: 9 * x))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("how", ["grad", "hessian"])
@pytest.mark.parametrize("where", ["in it", "beside it"])
@pytest.mark.parametrize("name", ["of all", "of the outer", "of all lanes' squares"])
def test_derivatives_through_a_branch_with_a_collective(name, where, how, levels):
    """As without state: JAX stops them in lanes that don't take it, where the square root has none."""
    index, derive = counter(), DERIVATIVES[how]
    talk = {
        "of all": lambda w, x: w * jnp.sqrt(x) + lax.stop_gradient(lax.pmean(x, "lanes")),
        "of the outer": lambda w, x: w * w * jnp.log(x) + lax.pmean(w * x, "outer"),
        "of all lanes' squares": lambda w, x: w * lax.psum(x * w, "lanes") ** 2,
    }[name]

    def program(add):
        def taken(w, x):
            if where == "in it":
                add(w)
            return talk(w, x)

        def other(w, x):
            if where == "beside it":
                add(w)
            return w * x

        f = lambda w, x: lax.cond(x > 0, taken, other, w, x)
        for axis in ["lanes", "outer"][:levels]:
            f = jax.vmap(f, (None, 0), axis_name=axis)
        if levels == 1:
            f = jax.vmap(f, (None, None), axis_name="outer", axis_size=2)
        return lambda w, x: f(w, x).sum()

    x = LANES if levels == 1 else jnp.stack([LANES, LANES[::-1]])
    without, with_state = (program(add) for add in (lambda w: None, lambda w: add_one(index, w)))
    by_w = lambda f: jax.jit(derive(lambda w: f(w, x)))(W)
    by_x = lambda f: jax.jit(jax.grad(lambda x: f(W, x)))(x)
    for derivative in (by_w, by_x):
        want = derivative(without)
        assert np.isfinite(want).all()
        np.testing.assert_allclose(derivative(with_state), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["in it", "beside it"])
@pytest.mark.parametrize("talk", [total, neighbour])
def test_a_collective_in_a_backward_rule_in_a_branch(talk, where):
    """JAX runs the rule after it has left the `vmap`."""
    index = counter()
    f = CALLS["custom_vjp"](lambda w, x: [talk(w * x)])

    def program(add):
        def taken(w, x):
            if where == "in it":
                add(w)
            return f(w, x)[0]

        other = lambda w, x: (add(w), w)[1] if where == "beside it" else w
        lane = lambda w, x: lax.cond(x > 0, taken, other, w, x)
        return lambda w: jax.vmap(lane, (None, 0), axis_name="lanes")(w, LANES).sum()

    want = jax.grad(program(lambda w: None))(W)
    for jit in (lambda f: f, jax.jit):
        np.testing.assert_allclose(
            jit(jax.grad(program(lambda w: add_one(index))))(W), want, rtol=1e-6
        )


WITHIN = {
    "jit": jax.jit,
    "scan": lambda f: (
        lambda w, x: lax.scan(lambda c, _: (c + f(w, x), None), 0.0, None, length=1)[0]
    ),
    "checkpoint": jax.checkpoint,
    "cond": lambda f: lambda w, x: lax.cond(x > 2, f, f, w, x),
    "cond for all": lambda f: lambda w, x: lax.cond(lax.psum(x, "lanes") > 0, f, f, w, x),
}


@pytest.mark.parametrize("name", ["psum", "log"])
@pytest.mark.parametrize("within", WITHIN)
def test_a_collective_in_a_branch_with_state_deeper_in_it(within, name):
    """A derivative by what lanes share would be that of all lanes there."""
    index = counter()
    f = {
        "psum": lambda w, x: lax.psum(w * x, "lanes"),
        "log": lambda w, x: w * jnp.log(x) + lax.stop_gradient(lax.pmean(x, "lanes")),
    }[name]

    def program(add):
        taken = WITHIN[within](lambda w, x: (add(), f(w, x))[1])
        lane = lambda w, x: lax.cond(x > 0, taken, lambda w, x: 0 * x, w, x)
        return lambda w, x: jax.vmap(lane, (None, 0), axis_name="lanes")(w, x).sum()

    with_state, without = program(lambda: add_one(index)), program(lambda: None)
    np.testing.assert_allclose(with_state(W, LANES), without(W, LANES), rtol=1e-6)
    for run in (jax.grad, lambda f: lambda *args: jax.jvp(f, args, (1.0, LANES))[1]):
        by_lane = lambda f, run=run: run(lambda x, _: f(W, x))(LANES, 0.0)
        if run is jax.grad:
            np.testing.assert_allclose(by_lane(with_state), by_lane(without), rtol=1e-6)
        with pytest.raises(
            NotImplementedError, match="derivative by what lanes share, through a `"
        ):
            jax.jit(run(with_state))(W, LANES)


@pytest.mark.parametrize("of", ["a state", "a lane's number"])
def test_what_a_lane_hears_in_a_branch_passes_on_through_another(of):
    """A lane that is not in the outer branch takes the inner one, with what it has heard from one that is."""
    index = counter()

    def program(add, number):
        def taken(x):
            y = x + lax.psum(x, "lanes")
            inner = lambda y: (lax.psum(y, "lanes") * number(), add())[0]
            return lax.cond(y > -5, inner, lambda y: 0 * y, y)

        lane = lambda x: lax.cond(x > 0, taken, lambda x: 0 * x, x)
        return lambda x: jax.vmap(lane, axis_name="lanes")(x).sum()

    if of == "a state":
        with_state = program(lambda: None, lambda: 1 + 0 * value_of(index))
        without = program(lambda: None, lambda: 1.0)
    else:
        number = lambda: 1.0 + lax.axis_index("lanes")
        with_state, without = program(lambda: add_one(index), number), program(lambda: None, number)
    x, t = jnp.array([1.0, -1.0, 2.0]), jnp.array([1.0, 0.0, 0.5])
    for jit in (lambda f: f, jax.jit, storax.jit):
        np.testing.assert_array_equal(jit(jax.grad(with_state))(x), jax.grad(without)(x))
    forward = lambda f: jax.jvp(f, (x,), (t,))
    np.testing.assert_array_equal(forward(with_state), forward(without))


def until_three(index):
    """A loop that only a state ends."""

    def count(_):
        add_one(index)
        return 0.0

    return lax.while_loop(lambda _: value_of(index) < 3, count, 0.0)


def in_a_branch_of_a_branch(index):
    """A lane that is not in the outer branch takes the inner one, where lanes share the loop's condition."""

    def inner(x):
        return lax.pmean(x, "lanes") + until_three(index)

    outer = lambda x: lax.cond(x < -1, inner, lambda x: x, x)
    return (lambda x: lax.cond(x > 0, outer, lambda x: x, x)), [-2.0, 1.0], [-2.0, 1.0], 0


def in_a_loop_that_has_ended(index):
    def body(x):
        taken = lambda x: lax.pmean(x, "lanes") * 0 + x + 1 + until_three(index)
        return lax.cond(x > 4.5, taken, lambda x: x + 1, x)

    goes_on = lambda x: (x < 3) | (x == 7)
    return (lambda x: lax.while_loop(goes_on, body, x)), [0.0, 5.0, 1.0], [3.0, 5.0, 3.0], 0


def a_loop_that_ends_by_itself(index):
    """It runs for the lanes that are not active too: a collective hears of them."""

    def step(n):
        add_one(index)
        return n + 1

    def inner(x):
        return lax.pmean(x, "lanes") * 0 + x + lax.while_loop(lambda n: n < 3, step, 0.0)

    outer = lambda x: lax.psum(lax.cond(x < -1, inner, lambda x: x, x), "lanes")
    return (lambda x: lax.cond(x > 0, outer, lambda x: x, x)), [-2.0, 1.0], [-2.0, 2.0], 0


def beside_a_branch_with_a_collective(index):
    """A loop that ends in a lane that takes its branch, and in no other."""

    def loop(x):
        add_one(index)
        return lax.while_loop(lambda y: y != 0, lambda y: y - 1, x)

    talk = lambda x: lax.psum(x, "lanes")
    return (lambda x: lax.cond(x < 1, talk, loop, x)), [0.5, 3.0, 0.5], [4.0, 0.0, 4.0], 1


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, storax.jit])
@pytest.mark.parametrize(
    "make",
    [
        in_a_branch_of_a_branch,
        in_a_loop_that_has_ended,
        a_loop_that_ends_by_itself,
        beside_a_branch_with_a_collective,
    ],
)
def test_no_loop_hangs_for_a_collective(make, jit):
    index = counter()
    f, lanes, want, counted = make(index)
    got = jit(jax.vmap(f, axis_name="lanes"))(jnp.array(lanes))
    np.testing.assert_array_equal(got, want)
    assert value_of(index) == counted


@pytest.mark.parametrize("where", ["in the other branch", "in the branch"])
def test_a_collective_of_a_state_is_of_what_each_lane_holds_then(where):
    index, x = storax.StateIndex(), jnp.array([1.0, 2.0, -3.0])
    jax.vmap(lambda x: storax.set_state(index, x))(jnp.array([1.0, 10.0, 100.0]))
    put = lambda x: (storax.set_state(index, x * 7), 0 * x)[1]

    def taken(x):
        if where == "in the branch":
            put(x)
        return lax.psum(storax.get_state(index, 0 * x), "lanes")

    other = put if where == "in the other branch" else lambda x: 0 * x
    got = jax.vmap(lambda x: lax.cond(x > 0, taken, other, x), axis_name="lanes")(x)
    heard = 1 + 10 - 21 if where == "in the other branch" else 7 + 14 + 100
    np.testing.assert_array_equal(got, [heard, heard, 0])


def test_a_lane_that_has_ended_goes_on_if_it_hears_that_it_should():
    """As without state: in a condition with a collective."""
    index = counter()

    def run(add):
        goes_on = lambda x: (x < lax.pmean(x, "lanes") + 0.5) & (x < 20)
        loop = lambda x: lax.while_loop(goes_on, lambda x: (x + 1, add())[0], x)
        return jax.jit(jax.vmap(loop, axis_name="lanes"))(jnp.array([0.0, 3.0, 5.5]))

    np.testing.assert_array_equal(run(lambda: add_one(index)), run(lambda: None))
    assert value_of(index) == 20


# --- State and custom derivatives of the same operand ----------------------------------------------

PAIRS = jnp.array([1.0, 2.0])


def in_pairs(f):
    return jax.vmap(lambda x: jax.vmap(lambda y: f(x, y))(PAIRS))(PAIRS)


@jax.jit
def printed(x):
    jax.debug.callback(lambda x: None, x)
    return x + 0


def without_derivative(x):
    """As of functions that say that they have none."""

    def backward(_, ct):
        raise NotImplementedError("no derivative")

    f = jax.custom_vjp(lambda x: x * 1)
    f.defvjp(lambda x: (x * 1, None), backward)
    return f(lax.stop_gradient(x))


IDENTITIES = {
    "relu": jax.nn.relu,
    "without derivative": without_derivative,
    "custom_jvp": lambda x: CALLS["custom_jvp"](lambda x: [x])(x)[0],
    "custom_vjp": lambda x: CALLS["custom_vjp"](lambda x: [x])(x)[0],
    "in a jit": jax.jit(jax.nn.relu),
    "debug": printed,
}


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize(
    ("name", "leads"),
    # What leads to state runs a callback once, with that.
    [
        (name, leads)
        for name in IDENTITIES
        for leads in (False, True)
        if (name, leads) != ("debug", True)
    ],
)
def test_what_a_state_and_a_custom_rule_share(name, leads):
    """Each of a lane's operands is what some lane has that takes the branch; together they may be of none."""
    index, identity = storax.StateIndex(), IDENTITIES[name]
    in_pairs(lambda x, y: storax.set_state(index, x * y))

    def program(of):
        def taken(w, x, y):
            distance = jnp.abs(x - y)
            same = identity(distance)
            storax.set_state(index, lax.stop_gradient(same if leads else distance))
            return w * of(same)

        f = lambda w, x, y: lax.cond(x != y, taken, lambda w, x, y: w, w, x, y)
        return lambda w: in_pairs(lambda x, y: f(w, x, y)).sum()

    assert jax.jit(jax.grad(program(jnp.log)))(W) == 2  # log(1) is 0
    assert jax.jit(program(doubled))(W) == 2 * W * 4 + 2 * W
    np.testing.assert_array_equal(
        in_pairs(lambda x, y: storax.get_state(index, 0 * x * y)), [[1, 1], [1, 4]]
    )


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
def test_a_rule_with_state_of_an_operand_that_leads_to_state(rule):
    """It runs once, although what leads to state and the rest of a branch are computed apart."""
    index, calls = storax.StateIndex(), counter()
    in_pairs(lambda x, y: storax.set_state(index, x * y))

    def count():
        storax.set_state(calls, storax.get_state(calls, jnp.float32(0)) + 1)

    if rule == "custom_jvp":
        identity = jax.custom_jvp(lambda x: x * 1)
        identity.defjvp(lambda primals, tangents: (count(), (primals[0] * 1, tangents[0] * 1))[1])
    else:
        identity = jax.custom_vjp(lambda x: x * 1)
        identity.defvjp(lambda x: (count(), (x * 1, None))[1], lambda _, ct: (ct * 1,))

    def taken(w, x, y):
        scaled = identity(w * (x + y))
        storax.set_state(index, lax.stop_gradient(scaled))
        return scaled

    f = lambda w, x, y: lax.cond(x != y, taken, lambda w, x, y: w, w, x, y)
    slope = jax.jit(jax.grad(lambda w: in_pairs(lambda x, y: f(w, x, y)).sum()))(W)
    assert (slope, storax.get_state(calls, jnp.float32(0))) == (2 * 3 + 2, 1)
    np.testing.assert_array_equal(
        in_pairs(lambda x, y: storax.get_state(index, 0 * x * y)), [[1, 4.5], [4.5, 4]]
    )


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
def test_a_rule_that_calls_back(rule):
    index, seen = storax.StateIndex(), []
    jax.vmap(lambda x: storax.set_state(index, x))(LANES)

    def call_back(x):
        jax.debug.callback(lambda x: seen.append(x), x)
        return x * 1

    identity = {
        "custom_jvp": jax.custom_jvp(lambda x: x * 1),
        "custom_vjp": jax.custom_vjp(lambda x: x * 1),
    }[rule]
    if rule == "custom_jvp":
        identity.defjvp(lambda primals, tangents: (call_back(primals[0]), tangents[0] * 1))
    else:
        identity.defvjp(lambda x: (call_back(x), None), lambda _, ct: (ct * 1,))

    def taken(w, x):
        scaled = identity(x * w)
        storax.set_state(index, lax.stop_gradient(scaled))
        return w * scaled

    f = lambda w, x: lax.cond(x > 1, taken, lambda w, x: w, w, x)
    jax.jit(jax.grad(lambda w: jax.vmap(f, (None, 0))(w, LANES).sum()))(W)
    storax.barrier()
    jax.effects_barrier()
    assert len(seen) == len(LANES)


def test_rules_that_call_each_other_are_not_looked_at_for_ever():
    index, runs = storax.StateIndex(), []
    jax.vmap(lambda x: storax.set_state(index, x))(LANES)
    f = lambda x: x * 1
    for _ in range(8):
        inner, f = f, jax.custom_jvp(lambda x: x * 1)

        def rule(primals, tangents, inner=inner):
            runs.append(1)
            return inner(primals[0]), inner(tangents[0]) + inner(primals[0])

        f.defjvp(rule)

    def taken(x):
        y = f(x)
        storax.set_state(index, y)
        return y

    jax.vmap(lambda x: lax.cond(x > 1, taken, lambda x: x, x))(LANES)
    assert 0 < len(runs) < 60


def test_rules_of_functions_made_in_one_place():
    """Of which one has state: it is to run once."""
    index, calls = storax.StateIndex(), counter()
    in_pairs(lambda x, y: storax.set_state(index, x * y))

    def make(inner, count):
        f = jax.custom_jvp(lambda x: x * 1)

        def rule(primals, tangents):
            if count:
                storax.set_state(calls, storax.get_state(calls, jnp.float32(0)) + 1)
            return inner(primals[0]), tangents[0]

        f.defjvp(rule)
        return f

    f = make(make(lambda x: x, True), False)

    def taken(w, x, y):
        scaled = f(w * (x + y))
        storax.set_state(index, lax.stop_gradient(scaled))
        return scaled

    lane = lambda w, x, y: lax.cond(x != y, taken, lambda w, x, y: w, w, x, y)
    in_lanes = lambda w: in_pairs(lambda x, y: lane(w, x, y)).sum()
    slope = lambda f: lambda w: jax.jvp(f, (w,), (1.0,))[1]
    assert jax.jit(slope(in_lanes))(W) == 2 * 3 + 2
    assert storax.get_state(calls, jnp.float32(0)) == 0
    jax.jit(slope(slope(in_lanes)))(W)  # the outer one's rule calls the inner one
    assert storax.get_state(calls, jnp.float32(0)) == 1


def test_a_rule_sets_a_state_of_some_levels():
    """What it sets is of the inner lanes alone, as in a branch."""
    index, other = storax.StateIndex(), storax.StateIndex()
    for i in (index, other):
        jax.vmap(lambda y, i=i: storax.set_state(i, 0 * y))(PAIRS)
    identity = jax.custom_jvp(lambda x: x * 1)

    @identity.defjvp
    def _(primals, tangents):
        storax.set_state(other, lax.stop_gradient(primals[0]))
        return primals[0] * 1, tangents[0] * 1

    def taken(x, y):
        storax.set_state(index, lax.stop_gradient(y))
        return x * identity(y)

    lane = lambda x, y: lax.cond(x != y, taken, lambda x, y: y, x, y)
    in_lanes = lambda ys: jax.vmap(lambda x: jax.vmap(lambda y: lane(x, y))(ys))(PAIRS).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(in_lanes))(PAIRS), [2 + 1, 1 + 1])
    for i in (index, other):
        np.testing.assert_array_equal(
            jax.vmap(lambda y, i=i: storax.get_state(i, 0 * y))(PAIRS), PAIRS
        )
