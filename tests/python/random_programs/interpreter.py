"""What a program means. All lanes go in step; a mask says which of them are active.

Every value has an axis for each surrounding vmap, outermost first. Derivatives are exact: a number has
a coefficient for each set of the derivatives being taken, of which products of a set's parts add up.
"""

import dataclasses
import itertools

import numpy as np

from .syntax import (
    MODULUS,
    WIDTH,
    Binding,
    Block,
    Branch,
    Call,
    Const,
    Expr,
    Fori,
    Get,
    Grad,
    Less,
    Let,
    Op,
    Program,
    Psum,
    Scan,
    Set,
    Slot,
    Total,
    Var,
    Vmap,
    While,
)

# How often a program is run, at most, on the states that it left.
RUNS = 3
VALUE = frozenset()
# Beyond this a float32 might not be exact.
LARGEST = 2.0**20


class TooLarge(Exception):  # noqa: N818
    """A derivative is too large for float32 to be exact."""


class Number:
    """Coefficients by set of derivatives; that of no derivative is the value."""

    def __init__(self, parts):
        self.parts = parts

    @property
    def value(self):
        return self.parts[VALUE]

    def map(self, f):
        return Number({k: f(p) for k, p in self.parts.items()})


def combine(symbol, a, b):
    return modulo(exactly(symbol, a, b))


def exactly(symbol, a, b):
    if symbol == "*":
        parts = {}
        for (i, x), (j, y) in itertools.product(a.parts.items(), b.parts.items()):
            if not i & j:
                parts[i | j] = parts.get(i | j, 0) + x * y
    else:
        sign = {"+": 1, "-": -1}[symbol]
        zero = np.zeros(())
        keys = a.parts.keys() | b.parts.keys()
        parts = {k: a.parts.get(k, zero) + sign * b.parts.get(k, zero) for k in keys}
    if any(np.abs(p).max(initial=0) > LARGEST for p in parts.values()):
        raise TooLarge
    return Number(parts)


def modulo(x):
    return Number({k: np.fmod(p, MODULUS) if k == VALUE else p for k, p in x.parts.items()})


def choose(mask, x, y):
    """`x` where the mask over lanes is true, else `y`."""
    parts = {}
    for k in x.parts.keys() | y.parts.keys():
        a, b = x.parts.get(k, np.zeros(())), y.parts.get(k, np.zeros(()))
        rank = max(a.ndim, b.ndim, mask.ndim)
        parts[k] = np.where(mask.reshape(mask.shape + (1,) * (rank - mask.ndim)), a, b)
    return Number(parts)


@dataclasses.dataclass
class State:
    """One slot: an axis for each of its levels, outermost first, and how often it was used."""

    slot: Slot
    value: np.ndarray
    gets: int = 0
    sets: int = 0


def first_state(slot: Slot) -> np.ndarray:
    shape = [level.size for level in slot.levels] + [WIDTH] * slot.vector
    return np.fmod(slot.start + np.arange(np.prod(shape, dtype=int)), MODULUS).reshape(shape) * 1.0


@dataclasses.dataclass(frozen=True)
class Context:
    """Where in a program we are: the lanes, which of them are active, and whose parts slots have."""

    mask: np.ndarray
    axes: tuple[str, ...] = ()
    bound: tuple[tuple[str, int], ...] = ()  # (slot, position of the vmap), outermost first

    @property
    def lanes(self):
        return self.mask.shape

    def where(self, mask):
        return dataclasses.replace(self, mask=self.mask & mask)

    def other_axes(self, slot: Slot):
        """Lanes that share the slot's state."""
        own = {k for s, k in self.bound if s == slot.name}
        if len(own) != len(slot.levels):
            raise AssertionError(f"{slot.name} is used outside of a vmap that it has a part for")
        return tuple(k for k in range(len(self.lanes)) if k not in own)


class Interpreter:
    def __init__(self, program: Program):
        self.program = program
        self.states = {s.name: State(s, first_state(s)) for s in program.slots}

    def run(self):
        """Runs the program once more, from the state it left; returns its results."""
        for state in self.states.values():
            if not state.slot.preset:
                state.value, state.sets = first_state(state.slot), state.sets + 1
        x, *y = self.program.inputs
        ctx = Context(np.array(True))
        env = {"x": self.array(ctx, np.float64(x)), "y": self.array(ctx, np.array(y, np.float64))}
        return [r.value for r in self.block(self.program.body, env, ctx)]

    # Values

    def array(self, ctx, x):
        """The same in every lane."""
        return Number({VALUE: np.broadcast_to(x, ctx.lanes + np.shape(x))})

    def expr(self, e: Expr, env, ctx):
        match e:
            case Const(value):
                return self.array(ctx, np.float64(value))
            case Var(name):
                return env[name]
            case Op(symbol, left, right):
                pair = self.expr(left, env, ctx), self.expr(right, env, ctx)
                return combine(symbol, *self.same_rank(ctx, *pair))
            case Total(of):
                return self.fit(self.expr(of, env, ctx), False, ctx)
            case Less(left, right):
                pair = self.expr(left, env, ctx), self.expr(right, env, ctx)
                a, b = self.same_rank(ctx, *pair)
                return Number({VALUE: (a.value < b.value) * 1.0})
        raise TypeError(e)

    def same_rank(self, ctx, *numbers):
        vector = any(x.value.ndim > len(ctx.lanes) for x in numbers)
        return [self.fit(x, True, ctx) if vector else x for x in numbers]

    def fit(self, x, vector, ctx):
        """A scalar is repeated, a vector summed."""
        rank = len(ctx.lanes)
        if (x.value.ndim > rank) == vector:
            return x
        if vector:
            return x.map(lambda p: np.broadcast_to(p[..., None], (*p.shape, WIDTH)))
        return modulo(x.map(lambda p: p.sum(-1)))

    def scalar(self, e, env, ctx):
        return self.fit(self.expr(e, env, ctx), False, ctx).value

    def bind(self, env, outs, values, ctx):
        fitted = [self.fit(v, o.vector, ctx) for o, v in zip(outs, values, strict=True)]
        return {**env, **{o.name: v for o, v in zip(outs, fitted, strict=True)}}

    # Statements

    def block(self, block: Block, env, ctx):
        for s in block.statements:
            env = getattr(self, "do_" + type(s).__name__.lower())(s, env, ctx)
        return [self.expr(e, env, ctx) for e in block.results]

    def do_let(self, s: Let, env, ctx):
        return {**env, s.name: self.expr(s.value, env, ctx)}

    def do_get(self, s: Get, env, ctx):
        state = self.states[s.slot]
        state.gets += 1
        value = np.expand_dims(state.value, ctx.other_axes(state.slot))
        shape = ctx.lanes + (WIDTH,) * state.slot.vector
        return {**env, s.name: Number({VALUE: np.broadcast_to(value, shape)})}

    def do_set(self, s: Set, env, ctx):
        state = self.states[s.slot]
        shared = ctx.other_axes(state.slot)
        state.sets += 1
        value = self.fit(self.expr(s.value, env, ctx), state.slot.vector, ctx).value
        one = value
        for axis in reversed(shared):
            one = one.take(0, axis)
        if not (np.expand_dims(one, shared) == value).all():
            raise AssertionError(f"ambiguous: lanes that share {s.slot} set it to different values")
        mask = ctx.mask.any(shared)
        mask = mask.reshape(mask.shape + (1,) * (one.ndim - mask.ndim))
        state.value = np.where(mask, one, state.value)
        return env

    def do_psum(self, s: Psum, env, ctx):
        axis = ctx.axes.index(s.axis)
        x = self.expr(s.value, env, ctx).value
        return {
            **env,
            s.name: modulo(
                Number({VALUE: np.broadcast_to(x.sum(axis, keepdims=True), x.shape)}),
            ),
        }

    def do_call(self, s: Call, env, ctx):
        return self.bind(env, s.outs, self.block(s.body, env, ctx), ctx)

    def do_scan(self, s: Scan, env, ctx):
        carry = [self.fit(self.expr(c.start, env, ctx), c.vector, ctx) for c in s.carries]
        sums = [self.array(ctx, np.zeros((WIDTH,) * o.vector)) for o in s.outs[len(carry) :]]
        steps = range(s.length)
        for k in reversed(steps) if s.reverse else steps:
            inner = self.bind(env, s.carries, carry, ctx)
            inner[s.item] = self.array(ctx, np.float64(k))
            out = self.bind({}, s.outs, self.block(s.body, inner, ctx), ctx)
            out = [out[o.name] for o in s.outs]
            carry, ys = out[: len(carry)], out[len(carry) :]
            sums = [exactly("+", a, y) for a, y in zip(sums, ys, strict=True)]
        return self.bind(env, s.outs, [*carry, *map(modulo, sums)], ctx)

    def do_fori(self, s: Fori, env, ctx):
        if isinstance(s.count, int):
            count = np.broadcast_to(s.count, ctx.lanes)
        else:
            count = np.clip(self.scalar(s.count, env, ctx), 0, 3)
        more = lambda k, env, ctx: k < count
        item = Binding(s.item, False)
        return self.loop(s, env, ctx, more, lambda k: [(item, self.array(ctx, np.float64(k)))])

    def do_while(self, s: While, env, ctx):
        def more(k, env, ctx):
            (test,) = self.block(s.test, env, ctx)
            return (self.fit(test, False, ctx).value != 0) & (k < s.limit)

        return self.loop(s, env, ctx, more, lambda k: [])

    def loop(self, s, env, ctx, more, items):
        carry = [self.fit(self.expr(c.start, env, ctx), c.vector, ctx) for c in s.carries]
        # What all lanes agree on must stay so, in lanes that are not active too.
        going, k = np.ones(ctx.lanes, bool), 0
        while True:
            inner = self.bind(env, s.carries, carry, ctx)
            going = going & more(k, inner, ctx.where(going))
            running = ctx.where(going)
            if not running.mask.any():
                return self.bind(env, s.outs, carry, ctx)
            inner.update({b.name: v for b, v in items(k)})
            out = self.bind({}, s.outs, self.block(s.body, inner, running), ctx)
            carry = [choose(going, out[o.name], c) for o, c in zip(s.outs, carry, strict=True)]
            k += 1

    def do_branch(self, s: Branch, env, ctx):
        index = self.scalar(s.index, env, ctx)
        index = index != 0 if s.how == "cond" else np.clip(index, 0, len(s.blocks) - 1)
        results = [self.array(ctx, np.zeros((WIDTH,) * o.vector)) for o in s.outs]
        for k, block in enumerate(s.blocks):
            here = ctx.where(index == k)
            if here.mask.any():
                out = self.bind({}, s.outs, self.block(block, env, here), ctx)
                results = [
                    choose(index == k, out[o.name], r) for o, r in zip(s.outs, results, strict=True)
                ]
        return self.bind(env, s.outs, results, ctx)

    def do_vmap(self, s: Vmap, env, ctx):
        rank = len(ctx.lanes)
        spread = lambda p: np.broadcast_to(
            np.expand_dims(p, rank), p.shape[:rank] + (s.size,) + p.shape[rank:]
        )
        inner = Context(
            spread(ctx.mask), (*ctx.axes, s.axis_name), (*ctx.bound, *[(b, rank) for b in s.binds])
        )
        lane = Number({VALUE: np.broadcast_to(np.arange(s.size) * 1.0, inner.lanes)})
        lanes_env = {k: v.map(spread) for k, v in env.items()}
        for m in s.mapped:
            start = self.fit(self.expr(m.start, env, ctx), m.vector, ctx).map(spread)
            pair = self.same_rank(inner, start, lane)
            lanes_env[m.name] = combine("+", *pair)
        out = self.bind({}, s.outs, self.block(s.body, lanes_env, inner), inner)
        values = [
            modulo(out[o.name].map(lambda p: p.sum(rank)))
            if o.lane is None
            else out[o.name].map(lambda p, o=o: p.take(o.lane, rank))
            for o in s.outs
        ]
        return self.bind(env, s.outs, values, ctx)

    def do_grad(self, s: Grad, env, ctx):
        at = self.fit(self.expr(s.at, env, ctx), False, ctx)
        one = np.ones(at.value.shape)
        key = frozenset([s.name])
        inner = {**env, s.name: Number({**at.parts, key: one})}
        (out,) = self.block(s.body, inner, ctx)
        out = self.fit(out, False, ctx)
        value = Number({k: p for k, p in out.parts.items() if s.name not in k})
        slope = Number({k - key: p for k, p in out.parts.items() if s.name in k})
        slope.parts.setdefault(VALUE, np.zeros(ctx.lanes))
        return self.bind(env, s.outs, [value, modulo(slope)], ctx)
