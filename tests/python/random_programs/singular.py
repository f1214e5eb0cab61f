"""Random programs that only the lanes that take a branch can stand, and what they come to lane by lane.

In the other lanes, what is in the branch has no finite derivative, or a loop that does not end. So a
program under `vmap` must be what Python's loop over its lanes is, with a state for each, in its value and
its derivatives. With collectives in it, it must be what it is without state. (The other random programs
compute in whole numbers, and nothing of theirs is infinite.)
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import storax

from .runner import CALLS


@dataclasses.dataclass(frozen=True)
class Node:
    """A piece of a program: what it does, how, and the pieces in it."""

    kind: str
    how: Any = None
    of: tuple["Node", ...] = ()

    def __str__(self):
        inner = "".join(f"\n{piece}" for piece in self.of).replace("\n", "\n    ")
        return f"{self.kind} {'' if self.how is None else self.how}{inner}"

    def has(self, test: Callable[["Node"], bool]) -> bool:
        return test(self) or any(piece.has(test) for piece in self.of)


@dataclasses.dataclass(frozen=True)
class Program:
    """A piece, and a derivative of it by a number, taken in one way of running it.

    Of `w` all lanes share the number; an `x` is each lane's own, if the outermost ones differ in theirs.
    """

    piece: Node
    derivative: str
    jit: str
    by: str = "w"

    def __str__(self):
        return f"{self.derivative} by {self.by}, {self.jit}:\n{self.piece}"


# --- What programs are made of ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Env:
    """What there is in a lane: floats, and the lane's states."""

    w: Any  # what is differentiated
    x: Any
    y: Any
    zero: Any  # of all the lanes around
    of_start: Any  # what `start` holds
    counter: Any = None
    start: Any = None  # `x` as the lane had it first

    def arrays(self):
        return self.w, self.x, self.y, self.zero, self.of_start

    def but(self, *arrays, **others):
        names = ("w", "x", "y", "zero", "of_start")[: len(arrays)]
        return dataclasses.replace(self, **dict(zip(names, arrays, strict=True)), **others)


# What may be positive, and go by in a branch.
NUMBERS = {"x": lambda e: e.x, "y": lambda e: e.y, "x - y": lambda e: e.x - e.y}


def doubled(z):
    """Until it is 4 or more: of 0, for ever."""
    return lax.while_loop(lambda v: v < 4, lambda v: v * 2, lax.stop_gradient(z))


# Of what is differentiated, and of what must be positive.
SINGULAR = {
    "log": lambda w, z: w * w * jnp.log(z),
    "sqrt": lambda w, z: jnp.sin(w) * jnp.sqrt(z),
    "inverse": lambda w, z: w * w / z,
    "power": lambda w, z: z**w,
    "relu": lambda w, z: w * jnp.log(jax.nn.relu(z)),
    "loop": lambda w, z: w * w * doubled(z),
}
DERIVATIVES = {
    "value": lambda f: f,
    "grad": jax.grad,
    "jacfwd": jax.jacfwd,
    "jvp": lambda f: lambda w: jax.jvp(f, (w,), (jnp.ones_like(w),))[1],
    "linearize": lambda f: lambda w: jax.linearize(f, w)[1](jnp.ones_like(w)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "grad of grad": lambda f: jax.grad(jax.grad(f)),
    "hessian": jax.hessian,
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
}
# A custom_vjp has no derivative but these; a loop of unknown length, none but those.
BACKWARD = ("value", "grad", "grad of checkpoint", "grad of grad")
FORWARD = ("value", "jacfwd", "jvp", "jacfwd of jacfwd")
JITS = {
    "jax.jit": jax.jit,
    "storax.jit": storax.jit,
    "storax.jit, pure": lambda f: storax.jit(f, pack=False),
    "eager": lambda f: f,
}
# Of a lane's number, and the lanes' axis.
COLLECTIVES = {
    "psum": lax.psum,
    "pmean": lambda x, axis: lax.stop_gradient(lax.pmean(x, axis)),
    "ppermute": lambda x, axis: lax.ppermute(x, axis, [(0, 1), (1, 2), (2, 0)]),
    "all_gather": lambda x, axis: lax.all_gather(x, axis)[0],
    "axis_index": lambda x, axis: x * lax.axis_index(axis),
}
# The rest takes what it uses as arguments.
CLOSING = ("jit", "jit_inline", *[name for name in CALLS if name.startswith("checkpoint")])


def derivatives_of(node: Node) -> list[str]:
    custom_vjp = node.has(lambda n: n.kind == "call" and n.how[0].startswith("custom_vjp"))
    loop = node.has(lambda n: n.kind == "loop")
    return [
        name
        for name in DERIVATIVES
        if not ((custom_vjp and name not in BACKWARD) or (loop and name not in FORWARD))
    ]


# --- What they come to ------------------------------------------------------------------------------


class Run:
    """Runs a piece with `vmap`, or lane by lane with states of each lane's own; or without any state."""

    def __init__(self, piece: Node, vmapped: bool, state: bool):
        self.vmapped, self.state = vmapped, state
        self.talks = talks(piece)  # with and without state it is to come to the same
        self.indices: dict = {}

    def index(self, *name):
        return self.indices.setdefault(name, storax.StateIndex())

    def preset(self, node: Node, *sizes: int) -> None:
        """Sets the states under `vmap`: a first set is of all lanes."""
        if node.kind == "vmap":
            number, _, offsets = node.how
            sizes = *sizes, max(map(len, offsets.values()))
            for slot in (0, 1):
                put = lambda x, slot=slot: storax.set_state(self.index(number, slot), x)
                for _ in sizes:
                    put = jax.vmap(put)
                put(jnp.zeros(sizes))
        for piece in node.of:
            self.preset(piece, *sizes)

    def __call__(self, node: Node, env: Env):
        return getattr(self, "do_" + node.kind)(env, node.how, *node.of)

    def number(self, what, env):
        if what != "start":
            return NUMBERS[what](env)
        return self.get(env.start, env) if self.state else env.of_start

    def do_smooth(self, env, how):
        return env.w * env.w * (env.x + env.y * 0.5) + jnp.sin(env.w)

    def do_singular(self, env, how):
        name, what = how
        return SINGULAR[name](env.w, self.number(what, env))

    def do_sum(self, env, how, a, b):
        return self(a, env) + self(b, env)

    # State

    def get(self, index, env, like="zero"):
        return storax.get_state(index, 0 * getattr(env, like) + env.zero)

    def set(self, index, env, value):
        storax.set_state(index, lax.stop_gradient(value + env.zero))

    def do_bump(self, env, how, piece):
        if not self.state:
            return self(piece, env)
        like, by, first = how
        value = 0.0 if first else self(piece, env)
        add = {
            "1": lambda: 1.0,
            "x": lambda: env.x,
            "w": lambda: env.w,
            "log x": lambda: jnp.log(env.x),
            "value": lambda: value,
        }[by]()
        got = self.get(env.counter, env, like)
        self.set(env.counter, env, got + add)
        got = 0 * got if self.talks else got
        return got * env.w + (self(piece, env) if first else value)

    # Control flow

    def do_branch(self, env, how, taken, other):
        what, form, closes = how
        z = self.number(what, env)
        run = lambda piece: lambda *arrays: self(piece, env.but(*arrays))
        args = () if closes else env.arrays()
        yes, no = run(taken), run(other)
        if form == "cond":
            return lax.cond(z > 0, yes, no, *args)
        if form == "not":
            return lax.cond(z <= 0, no, yes, *args)
        return lax.switch(jnp.int32(z > 0) * (1 + jnp.int32(z > 1)), [no, yes, yes], *args)

    def do_scan(self, env, how, piece):
        length, unroll, reverse = how

        def body(carry, factor):
            w, total = carry
            return (w, total + self(piece, env.but(w * factor))), None

        factors = 1.0 + jnp.arange(length, dtype=jnp.float32) / 4
        start = env.w, jnp.float32(0)
        return lax.scan(body, start, factors, unroll=unroll, reverse=reverse)[0][1]

    def do_loop(self, env, how, piece):
        """Runs where x > 0."""
        trips = jnp.int32(jnp.clip(jnp.ceil(lax.stop_gradient(env.x)), 0, 2))

        def goes_on(carry):
            if how == "counts" and self.state:
                self.set(env.counter, env, self.get(env.counter, env) + 1)
            return carry[0] < trips

        def body(carry):
            # Or XLA moves a loop in it to before this one, which may have no trip.
            x = env.x + jnp.float32(lax.min(carry[0], 0))
            return carry[0] + 1, carry[1] + self(piece, env.but(x=x))

        return lax.while_loop(goes_on, body, (jnp.int32(0), jnp.float32(0)))[1]

    # Functions of functions

    def do_call(self, env, how, piece):
        name, closes = how
        wrap = CALLS[name]
        if closes:
            return wrap(lambda: [self(piece, env)])()[0]
        return wrap(lambda *arrays: [self(piece, env.but(*arrays))])(*env.arrays())[0]

    def do_talk(self, env, how, piece):
        name, number = how
        value = self(piece, env)
        return value + env.w * COLLECTIVES[name](value, f"lanes{number}")

    def do_hear(self, env, how, piece):
        name, number = how
        heard = COLLECTIVES[name](env.x, f"lanes{number}")
        return self(piece, env.but(y=env.y + heard / 2))

    def do_derivative(self, env, how, piece):
        return DERIVATIVES[how](lambda w: self(piece, env.but(w)))(env.w)

    def do_vmap(self, env, how, piece):
        number, axis, offsets = how
        arrays = {name: getattr(env, name) + np.float32(offsets[name]) for name in offsets}

        def lane(arrays, *where):
            zero = env.zero + 0 * lax.stop_gradient(sum(arrays.values()))
            counter, start = (self.index(number, slot, *where) for slot in (0, 1))
            inside = env.but(**arrays, zero=zero, counter=counter, start=start)
            inside = inside.but(of_start=lax.stop_gradient(inside.x))
            if not self.state:
                return self(piece, inside)
            self.set(counter, inside, 0.0)
            self.set(start, inside, inside.x)
            value = self(piece, inside)
            last = self.get(counter, inside)
            return value if self.talks else value + inside.w * last

        if not self.vmapped:
            around = id(env.counter)
            size = max(map(len, offsets.values()))
            lanes = [{name: a[k] for name, a in arrays.items()} for k in range(size)]
            return sum(lane(a, around, k) for k, a in enumerate(lanes))
        name = f"lanes{number}"
        if axis == 0:
            return jax.vmap(lane, axis_name=name)(arrays).sum()
        rows = {name: jnp.stack([a, a + 1]) for name, a in arrays.items()}
        of_first = lambda rows: lane({name: r[0] for name, r in rows.items()})
        return jax.vmap(of_first, in_axes=1, axis_name=name)(rows).sum()


def talks(piece: Node) -> bool:
    """Whether lanes learn of each other."""
    return piece.has(lambda n: n.kind in ("talk", "hear"))


def result(program: Program, vmapped: bool, state: bool = True):
    run = Run(program.piece, vmapped, state)
    if vmapped and state:
        run.preset(program.piece)

    # All are arguments: of what it knows XLA computes loops while it compiles, whether or not they run.
    def f(*numbers):
        env = Env(*numbers)
        of = lambda v: run(program.piece, dataclasses.replace(env, **{program.by: v}))
        return DERIVATIVES[program.derivative](of)(getattr(env, program.by))

    jit = JITS[program.jit] if vmapped and state else jax.jit
    zero = jnp.float32(0)
    return jit(f)(jnp.float32(1.5), zero, zero, zero, zero)


# What JAX itself raises for such functions under vmap, also without state: a branch, or a `custom_vjp`, in a
# `custom_jvp` whose rule differentiates it.
REFUSED = (
    "for 'stop_gradient' not implemented",
    "Linearization failed to produce known values",
    "can't apply forward-mode autodiff (jvp) to a custom_vjp function",
    "is differentiated inside of a `jax.checkpoint`",
)


def check(program: Program) -> str | None:
    """What is wrong with a program."""
    try:
        if talks(program.piece):
            want = result(program, vmapped=True, state=False)
        else:
            want = result(program, vmapped=False)
    except Exception as e:
        # Residuals of a cond's branches have places in common: in second derivatives the loop of one may so
        # be differentiated by what is another's, also without state.
        if talks(
            program.piece
        ) or "Reverse-mode differentiation does not work for lax.while" in str(e):
            return None  # JAX can't
        raise
    if not np.isfinite(want):  # too large, or with collectives not what JAX can do
        return None
    try:
        got = result(program, vmapped=True)
    except Exception as e:
        if talks(program.piece) and "a derivative by what lanes share" in str(e):
            return None
        within_rule = program.piece.has(
            lambda n: n.kind == "call" and n.how[0].startswith("custom_jvp")
        )
        if within_rule and any(text in str(e) for text in REFUSED):
            return None
        return f"{type(e).__name__}: {e}"
    if np.allclose(got, want, rtol=2e-3, atol=1e-3):
        return None
    return f"{got} and not {want}"


# --- Making them ------------------------------------------------------------------------------------


def still_known(known: frozenset, changed) -> frozenset:
    """What is positive whatever these numbers are now."""
    return frozenset(what for what in known if not any(name in what for name in changed))


class Maker:
    """Makes a piece out of numbers that `number(low, high)` gives; the lower, the simpler."""

    def __init__(self, number):
        self.number = number
        self.vmaps = self.derivatives = 0
        # The vmaps around, if lanes may learn of each other.
        self.around: list[int] | None = None if number(0, 3) else []

    def pick(self, choices):
        choices = list(choices)
        return choices[self.number(0, len(choices) - 1)]

    def flag(self):
        return self.number(0, 1) == 1

    def piece(self, known: frozenset, deep: int) -> Node:
        """`known` are the numbers that are positive wherever it runs."""
        if deep == 0:
            if not known:
                return Node("smooth")
            what = self.pick(sorted(known))
            if what == "x" and self.number(0, 3) == 3:
                what = "start"
            # With a collective beside it JAX's own loop may not end.
            names = SINGULAR if self.around is None else SINGULAR.keys() - {"loop"}
            return Node("singular", (self.pick(sorted(names)), what))
        kinds = ["branch"] * 4 + ["bump"] * 3 + ["call"] * 2 + ["scan", "sum"]
        kinds += ["vmap"] * (self.vmaps < 3)
        if self.around is None:
            kinds += ["loop"] + ["derivative"] * (self.derivatives < 1)
        elif self.around:
            # Of a loop with state, lanes that don't take the branch it is in don't let a collective know.
            # And the `grad` of a branch with one is under JAX's vmap one thing with jit, another without.
            kinds += ["talk"] * 3 + ["hear"] * 4
        return getattr(self, "make_" + self.pick(kinds))(known, deep - 1)

    def make_branch(self, known, deep):
        what = self.pick([*NUMBERS, *NUMBERS, "start"])
        form = self.pick(["cond", "not", "switch"])
        known_there = known | {"x" if what == "start" else what}
        hears = self.around and self.flag()
        taken = (self.make_talk if hears else self.piece)(known_there, deep)
        other = self.piece(known, self.number(0, deep))
        return Node("branch", (what, form, self.flag()), (_with_state(taken, other), other))

    def make_bump(self, known, deep):
        first = self.flag()
        by = ["1", "x", "w", *["log x"] * ("x" in known), *["value"] * (not first)]
        how = self.pick(["zero", "w", "x"]), self.pick(by), first
        return Node("bump", how, (self.piece(known, deep),))

    def make_sum(self, known, deep):
        return Node("sum", None, (self.piece(known, deep), self.piece(known, self.number(0, deep))))

    def make_call(self, known, deep):
        name = self.pick(CALLS)
        closes = self.flag() and name in CLOSING
        return Node("call", (name, closes), (self.piece(known, deep),))

    def make_scan(self, known, deep):
        how = self.number(1, 3), self.number(1, 2), self.flag()
        return Node("scan", how, (self.piece(known, deep),))

    def make_loop(self, known, deep):
        how = self.pick(["", "counts"])
        return Node("loop", how, (_with_state(self.piece(known | {"x"}, deep)),))

    def make_talk(self, known, deep):
        how = self.pick(COLLECTIVES), self.pick(self.around)
        return Node("talk", how, (self.piece(known, deep),))

    def make_hear(self, known, deep):
        how = self.pick(COLLECTIVES), self.pick(self.around)
        return Node("hear", how, (self.piece(still_known(known, "y"), deep),))

    def make_derivative(self, known, deep):
        self.derivatives += 1
        piece = self.piece(known, deep)
        return Node("derivative", self.pick(derivatives_of(piece)), (piece,))

    def make_vmap(self, known, deep):
        self.vmaps += 1
        number, axis = self.vmaps, self.number(0, 1)
        names = self.pick(["x", "xy", "y", "wx", "wxy"])
        offsets = {name: self.pick(OFFSETS[name]) for name in names}
        if self.around is not None:
            self.around.append(number)
        piece = self.piece(still_known(known, names), deep)
        if self.around is not None:
            self.around.pop()
        return Node("vmap", (number, axis, offsets), (piece,))


# What is added to a number in each of three lanes.
_ZEROS = [(0.0, 1.0, 2.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (2.0, 1.0, 1.5), (0.0, 0.0, 3.0)]
OFFSETS = {"w": [(0.0, 0.5, 1.0)], "x": _ZEROS, "y": _ZEROS}


def _with_state(piece: Node, *others: Node) -> Node:
    """Where there is no state all is JAX's, in which a loop may not end that no lane is to run."""
    endless = lambda n: n.kind == "singular" and n.how[0] == "loop"
    state = lambda n: n.kind in ("bump", "vmap") or (n.kind == "loop" and n.how == "counts")
    pieces = (piece, *others)
    if any(p.has(endless) for p in pieces) and not any(p.has(state) for p in pieces):
        return Node("bump", ("zero", "1", True), (piece,))
    return piece


def make_program(number, deep: int = 5) -> Program:
    """A program of so many pieces within each other, at most."""
    maker = Maker(number)
    # What is heard within a branch is to go into another.
    deep += 2 * (maker.around is not None)
    piece = maker.make_vmap(frozenset(), number(2, deep))
    names = derivatives_of(piece)
    derivative = names[number(0, len(names) - 1)]
    jit = list(JITS)[(0, 0, 0, 0, 1, 1, 2, 2, 3)[number(0, 8)]]
    return Program(piece, derivative, jit, "wx"[number(0, 1)])


def random_program(seed: int | str) -> Program:
    """A program, by a seed."""
    return make_program(random.Random(seed).randint)


def stands(node: Node, known: frozenset = frozenset()) -> bool:
    """Whether each lane alone comes to an end, and to a number."""
    if node.kind == "singular":
        return ("x" if node.how[1] == "start" else node.how[1]) in known
    if node.kind in ("branch", "loop") and _with_state(*node.of) is not node.of[0]:
        return False
    inside = [known] * len(node.of)
    if node.kind == "branch":
        inside[0] = known | {"x" if node.how[0] == "start" else node.how[0]}
    elif node.kind == "loop":
        inside[0] = known | {"x"}
    elif node.kind == "hear":
        inside[0] = still_known(known, "y")
    elif node.kind == "vmap":
        inside[0] = still_known(known, node.how[2])
    return all(stands(piece, k) for piece, k in zip(node.of, inside, strict=True))


def smaller(node: Node, whole: bool = True) -> Iterator[Node]:
    """The node with less in it."""
    if not whole:
        yield from node.of
        if node.of:
            yield Node("smooth")
    for k, piece in enumerate(node.of):
        for less in smaller(piece, False):
            yield dataclasses.replace(node, of=(*node.of[:k], less, *node.of[k + 1 :]))


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program found for which `fails` is true."""
    while True:
        for piece in smaller(program.piece):
            less = dataclasses.replace(program, piece=piece)
            if stands(piece) and program.derivative in derivatives_of(piece) and fails(less):
                program = less
                break
        else:
            return program
