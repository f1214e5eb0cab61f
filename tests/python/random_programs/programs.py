"""Strategies that make programs of which the meaning is beyond doubt.

A lane's own state is what it alone sets, and where lanes share a state they agree on what they set: so
each variable is made knowing which vmaps' lanes it may differ between. Where lanes part company, at most
one of the branches uses a state that they share. And what is differentiated never meets what JAX can't
differentiate: each variable knows which derivatives it may depend on.
"""

import dataclasses

from hypothesis import strategies as st

from .syntax import (
    Binding,
    Block,
    Branch,
    Call,
    Carry,
    Const,
    Expr,
    Fori,
    Get,
    Grad,
    Less,
    Let,
    Level,
    Mapped,
    Op,
    Program,
    Psum,
    Scan,
    Set,
    Slot,
    Total,
    Unmapped,
    Var,
    Vmap,
    While,
)

NONE: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Variable:
    """What is known of a variable, or of an expression."""

    name: str = ""
    vector: bool = False
    lanes: frozenset[str] = NONE  # vmaps between whose lanes it may differ
    active: frozenset[str] = NONE  # derivatives that it may take part in


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a statement may use."""

    variables: tuple[Variable, ...]
    slots: tuple[Slot, ...]
    vmaps: tuple[tuple[str, int], ...] = ()
    bound: tuple[tuple[str, str], ...] = ()  # (slot, vmap), outermost first
    parted: frozenset[str] = NONE  # vmaps of which only some lanes may be here
    locked: frozenset[str] = NONE  # slots that another branch uses
    forward: frozenset[str] = NONE  # derivatives being taken
    backward: frozenset[str] = NONE
    # Inside custom_jvp and custom_vjp JAX takes all arguments for differentiated if any is.
    all_active: bool = False
    depth: int = 0

    @property
    def lanes(self):
        return frozenset(name for name, _ in self.vmaps)

    @property
    def derivatives(self):
        return self.forward | self.backward

    def bound_to(self, slot: Slot):
        return frozenset(v for s, v in self.bound if s == slot.name)

    def usable(self, lanes=None):
        """Slots that can be used, with parts for lanes of no other than these vmaps."""
        return [
            s
            for s in self.slots
            if len(self.bound_to(s)) == len(s.levels)
            and s.name not in self.locked
            and (lanes is None or self.bound_to(s) <= lanes)
        ]

    def plus(self, *variables):
        return dataclasses.replace(self, variables=(*variables, *self.variables))

    def but(self, **changes):
        return dataclasses.replace(self, **changes)

    def without(self, derivatives):
        """Only the variables that take no part in these derivatives."""
        return self.but(variables=tuple(v for v in self.variables if not v.active & derivatives))


SIMPLE = ("bump", "set", "get", "let", "psum")
REGIONS = ("call", "branch", "scan", "vmap", "while", "fori", "grad")
CALLS = (
    "jit",
    "checkpoint",
    "custom_jvp",
    "custom_vjp",
    "checkpoint_dots",
    "checkpoint_everything",
)


class Maker:
    """Draws one program."""

    def __init__(self, draw, size: int, max_depth: int):
        self.draw = draw
        self.left = size  # statements
        self.max_depth = max_depth
        self.made = 0

    def name(self, letter):
        self.made += 1
        return f"{letter}{self.made}"

    def flag(self):
        return self.draw(st.booleans())

    def pick(self, choices):
        return self.draw(st.sampled_from(list(choices)))

    def number(self, low, high):
        return self.draw(st.integers(low, high))

    def some(self, things):
        return frozenset(x for x in sorted(things) if self.flag())

    # Expressions

    def expr(self, scope, lanes=None, active=None, depth=2) -> tuple[Expr, Variable]:
        """An expression that differs between no other lanes than these, and what is known of it."""
        variables = [
            v
            for v in scope.variables
            if (lanes is None or v.lanes <= lanes) and (active is None or v.active <= active)
        ]
        kinds = ["var"] * 3 * bool(variables) + ["const"] + ["op", "op", "less", "total"] * (depth > 0)
        kind = self.pick(kinds)
        if kind == "const":
            return Const(self.number(0, 3)), Variable()
        if kind == "var":
            v = self.pick(variables)
            return Var(v.name), v
        left, a = self.expr(scope, lanes, active, depth - 1)
        if kind == "total":
            return (Total(left) if a.vector else left), dataclasses.replace(a, vector=False)
        right, b = self.expr(scope, lanes, active, depth - 1)
        known = Variable(vector=a.vector or b.vector, lanes=a.lanes | b.lanes)
        if kind == "less":
            return Less(left, right), known
        known = dataclasses.replace(known, active=a.active | b.active)
        return Op(self.pick("+-*"), left, right), known

    def results(self, scope, wanted):
        """An expression for each wanted variable, differing and active no more than that."""
        return tuple(self.expr(scope, w.lanes, w.active)[0] for w in wanted)

    def free_results(self, scope, count):
        return [self.expr(scope) for _ in range(count)]

    # Blocks

    def statements(self, scope):
        """Some statements, and the scope after them."""
        made = []
        most = min(self.left, 3 if scope.depth else 5)
        for _ in range(self.number(0 if scope.depth else 1, most) if most > 0 else 0):
            if self.left <= 0:
                break
            self.left -= 1
            regions = REGIONS if scope.depth < self.max_depth else ()
            kind = self.pick([*SIMPLE[:2], *SIMPLE, *regions, *regions])
            new, scope = getattr(self, kind)(scope)
            made += new
        return tuple(made), scope

    def block(self, scope, wanted):
        made, scope = self.statements(scope.but(depth=scope.depth + 1))
        return Block(made, self.results(scope, wanted))

    def free_block(self, scope, count):
        made, scope = self.statements(scope.but(depth=scope.depth + 1))
        results = self.free_results(scope, count)
        return Block(made, tuple(e for e, _ in results)), [v for _, v in results]

    def outs(self, known):
        """Variables for results of which something is known, scalars or vectors."""
        return [dataclasses.replace(v, name=self.name("v"), vector=self.flag()) for v in known]

    @staticmethod
    def bindings(variables):
        return tuple(Binding(v.name, v.vector) for v in variables)

    # Simple statements

    def let(self, scope):
        value, known = self.expr(scope)
        name = self.name("v")
        return [Let(name, value)], scope.plus(dataclasses.replace(known, name=name))

    def get(self, scope):
        slots = scope.usable()
        if not slots:
            return self.let(scope)
        slot = self.pick(slots)
        got = Variable(self.name("v"), slot.vector, scope.bound_to(slot))
        return [Get(got.name, slot.name)], scope.plus(got)

    def set(self, scope):
        slots = scope.usable()
        if not slots:
            return self.let(scope)
        slot = self.pick(slots)
        value, known = self.expr(scope, scope.bound_to(slot))
        return [Set(slot.name, value, bool(known.active) or scope.all_active)], scope

    def bump(self, scope):
        """A read-modify-write."""
        slots = scope.usable()
        if not slots:
            return self.let(scope)
        slot = self.pick(slots)
        got = Variable(self.name("v"), slot.vector, scope.bound_to(slot))
        by, known = self.expr(scope, scope.bound_to(slot), depth=1)
        value = Op(self.pick("+-*"), Var(got.name), by)
        stop = bool(known.active) or scope.all_active
        return [Get(got.name, slot.name), Set(slot.name, value, stop)], scope.plus(got)

    def psum(self, scope):
        axes = [name for name, _ in scope.vmaps if name not in scope.parted]
        if not axes:
            return self.let(scope)
        axis = self.pick(axes)
        value, known = self.expr(scope)
        name = self.name("v")
        out = Variable(name, known.vector, known.lanes - {axis})
        stop = bool(known.active) or scope.all_active
        return [Psum(name, value, axis, stop)], scope.plus(out)

    # Regions

    def call(self, scope):
        how = self.pick(CALLS)
        inner, all_active = scope, scope.all_active
        if how == "custom_vjp":
            inner = inner.without(scope.forward)
        if how.startswith("custom"):
            active = frozenset().union(*[v.active for v in inner.variables])
            all_active = all_active or bool(active)
            variables = tuple(dataclasses.replace(v, active=active) for v in inner.variables)
            inner = inner.but(variables=variables, all_active=all_active)
        closes_over = not how.startswith("custom") and self.flag()
        body, known = self.free_block(inner, self.number(0, 2))
        if how.startswith("custom"):
            known = [dataclasses.replace(v, active=active | v.active) for v in known]
        outs = self.outs(known)
        return [Call(how, closes_over, self.bindings(outs), body)], scope.plus(*outs)

    def carries(self, scope, inner, lanes):
        """Starting values of loop carries, and what is known of them in the loop and after it."""
        made, known = [], []
        for _ in range(self.number(0, 2)):
            start, v = self.expr(inner)
            more_lanes = lanes | (scope.lanes if self.flag() else NONE)
            more_active = frozenset().union(*[w.active for w in inner.variables])
            v = Variable(
                self.name("c"),
                self.flag(),
                v.lanes | more_lanes,
                v.active | (more_active if self.flag() else NONE),
            )
            made.append(Carry(v.name, start, v.vector))
            known.append(v)
        return tuple(made), known

    def scan(self, scope):
        carries, known = self.carries(scope, scope, NONE)
        item = Variable(self.name("i"))
        inner = scope.plus(item, *known)
        made, inner = self.statements(inner.but(depth=scope.depth + 1))
        results = self.results(inner, known)
        ys = self.free_results(inner, self.number(0, 1))
        outs = self.outs([*known, *[v for _, v in ys]])
        for k, v in enumerate(known):
            outs[k] = dataclasses.replace(outs[k], vector=v.vector)
        body = Block(made, (*results, *[e for e, _ in ys]))
        length, reverse, unroll = self.pick([2, 1, 3, 0]), self.flag(), self.pick([1, 1, 2])
        loop = Scan(length, reverse, unroll, item.name, carries, self.bindings(outs), body)
        return [loop], scope.plus(*outs)

    def loop_scope(self, scope, lanes):
        """Inside a loop that each lane may leave at a time of its own; no reverse mode through it."""
        return scope.without(scope.backward).but(parted=scope.parted | lanes)

    def after_loop(self, known):
        return [dataclasses.replace(v, name=self.name("v")) for v in known]

    def fori(self, scope):
        item = Variable(self.name("i"))
        if self.flag():
            count, lanes, inner = self.number(0, 3), NONE, scope
        else:
            inner = scope.without(scope.backward)
            count, v = self.expr(inner)
            lanes = v.lanes
            inner = self.loop_scope(scope, lanes)
        carries, known = self.carries(scope, inner, lanes)
        body = self.block(inner.plus(item, *known), known)
        outs = self.after_loop(known)
        return [Fori(count, item.name, carries, self.bindings(outs), body)], scope.plus(*outs)

    def while_(self, scope):
        lanes = self.some(scope.lanes)
        inner = self.loop_scope(scope, lanes)
        carries, known = self.carries(scope, inner, lanes)
        inner = inner.plus(*known)
        test = self.test(inner, lanes)
        body = self.block(inner, known)
        outs = self.after_loop(known)
        loop = While(self.number(0, 3), test, carries, self.bindings(outs), body)
        return [loop], scope.plus(*outs)

    def test(self, scope, lanes):
        """A loop's condition, which may read and write state."""
        made = []
        for _ in range(self.number(0, 2)):
            slots = scope.usable(lanes)
            if not slots:
                break
            statement = self.get if self.flag() else self.bump
            new, scope = statement(scope.but(slots=tuple(slots)))
            made += new
        return Block(tuple(made), (self.expr(scope, lanes)[0],))

    def branch(self, scope):
        index, v = self.expr(scope)
        how = self.pick(["cond", "switch"])
        n = 2 if how == "cond" else self.number(1, 3)
        inner = scope.but(parted=scope.parted | v.lanes)
        shared = [s.name for s in scope.slots if not v.lanes <= scope.bound_to(s)]
        owner = {name: self.number(0, n - 1) for name in shared}
        count = self.number(0, 2)
        blocks, known = [], []
        for k in range(n):
            locked = inner.locked | {name for name in shared if owner[name] != k}
            block, results = self.free_block(inner.but(locked=locked), count)
            blocks.append(block)
            known.append(results)
        outs = self.outs(
            [
                Variable(
                    lanes=v.lanes.union(*[r.lanes for r in column]),
                    active=NONE.union(*[r.active for r in column]),
                )
                for column in zip(*known, strict=True)
            ]
        )
        return [Branch(how, index, self.bindings(outs), tuple(blocks))], scope.plus(*outs)

    def vmap(self, scope):
        axis = self.name("b")
        waiting = {}
        for s in scope.slots:
            k = len(scope.bound_to(s))
            if k < len(s.levels):
                waiting[s.name] = s.levels[k].size
        size = self.pick([*waiting.values(), 2, 3])
        binds = tuple(s for s, n in waiting.items() if n == size and not self.number(0, 3) == 3)
        inner = scope.but(
            vmaps=(*scope.vmaps, (axis, size)), bound=(*scope.bound, *[(s, axis) for s in binds])
        )
        mapped, known = [], []
        for _ in range(self.number(0, 2)):
            start, v = self.expr(scope)
            v = Variable(self.name("m"), self.flag(), v.lanes | {axis}, v.active)
            where = self.pick([0, 1, -1, -2] if v.vector else [0, -1])
            mapped.append(Mapped(v.name, start, v.vector, where))
            known.append(v)
        body, results = self.free_block(inner.plus(*known), self.number(0, 2))
        after = self.outs([dataclasses.replace(v, lanes=v.lanes - {axis}) for v in results])
        outs = tuple(
            Unmapped(
                v.name,
                v.vector,
                self.pick([0, 1, -1, -2] if v.vector else [0, -1]),
                self.pick([None, *range(size)]),
            )
            for v in after
        )
        return [Vmap(axis, size, tuple(mapped), binds, outs, body)], scope.plus(*after)

    def grad(self, scope):
        how = self.pick(["value_and_grad", "jvp"])
        at, v = self.expr(scope)
        name = self.name("t")
        t = Variable(name, False, v.lanes, v.active | {name})
        mode = "forward" if how == "jvp" else "backward"
        inner = scope.plus(t).but(**{mode: getattr(scope, mode) | {name}})
        body, (result,) = self.free_block(inner, 1)
        result = Variable(lanes=result.lanes, active=result.active - {name})
        # The slope may depend on whatever the body has seen.
        seen = Variable(
            lanes=frozenset().union(*[w.lanes for w in inner.variables], result.lanes),
            active=frozenset().union(*[w.active for w in inner.variables]) - {name},
        )
        outs = [
            dataclasses.replace(r, name=self.name("v"), vector=False) for r in (result, seen)
        ]
        return [Grad(how, name, at, self.bindings(outs), body)], scope.plus(*outs)


setattr(Maker, "while", Maker.while_)


@st.composite
def slots(draw, name):
    vector = draw(st.booleans())
    levels, rank = [], int(vector)
    for _ in range(draw(st.sampled_from([1, 0, 1, 2]))):
        levels.insert(0, Level(draw(st.integers(2, 3)), draw(st.integers(0, rank))))
        rank += 1
    return Slot(name, vector, tuple(levels), draw(st.integers(0, 4)), draw(st.booleans()))


@st.composite
def programs(draw, size=10, max_depth=4):
    made = tuple(draw(slots(f"s{k}")) for k in range(draw(st.integers(1, 3))))
    maker = Maker(draw, size, max_depth)
    scope = Scope((Variable("x"), Variable("y", True)), made)
    statements, after = maker.statements(scope)
    new = after.variables[: len(after.variables) - len(scope.variables)]
    inputs = tuple(draw(st.integers(0, 4)) for _ in range(3))
    return Program(made, inputs, Block(statements, tuple(Var(v.name) for v in reversed(new))))
