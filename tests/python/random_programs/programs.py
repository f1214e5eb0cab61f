"""Makes programs of which the meaning is beyond doubt.

A lane's own state is what it alone sets, and where lanes share a state they agree on what they set: so
each variable is made knowing which vmaps' lanes it may differ between. Where lanes part company, at most
one of the branches uses a state that they share. And what is differentiated never meets what JAX can't
differentiate: each variable knows which derivatives it may depend on.
"""

import random

from hypothesis import strategies as st

from .regions import Regions
from .scope import NONE, Scope, Variable
from .syntax import (
    Block,
    Const,
    Expr,
    Get,
    Less,
    Let,
    Level,
    Op,
    Program,
    Psum,
    Set,
    Slot,
    Total,
    Var,
)


class Maker(Regions):
    """Makes one program out of numbers that `number(low, high)` gives; the lower, the simpler."""

    def __init__(self, number, size: int):
        self.number = number
        self.left = size  # statements
        self.made = 0
        self.planned = []  # kinds of the next regions

    def name(self, letter):
        self.made += 1
        return f"{letter}{self.made}"

    def pick(self, choices):
        return choices[self.number(0, len(choices) - 1)]

    def flag(self):
        return self.number(0, 1) == 1

    # Expressions

    def expr(self, scope, lanes=None, active=None, depth=2) -> tuple[Expr, Variable]:
        """An expression that differs between no other lanes than these, and what is known of it."""
        variables = self.eligible(scope, lanes, active)
        kinds = (
            ["const"] + ["var"] * 4 * bool(variables) + ["op", "op", "less", "total"] * (depth > 0)
        )
        kind = self.pick(kinds)
        if kind == "const":
            return Const(self.number(0, 3)), Variable()
        if kind == "var":
            v = self.pick(variables)
            return Var(v.name), v
        left, a = self.expr(scope, lanes, active, depth - 1)
        if kind == "total":
            return (Total(left) if a.vector else left), a.but(vector=False)
        right, b = self.expr(scope, lanes, active, depth - 1)
        known = Variable(vector=a.vector or b.vector, lanes=a.lanes | b.lanes)
        if kind == "less":
            return Less(left, right), known
        return Op(self.pick("+-*"), left, right), known.but(active=a.active | b.active)

    @staticmethod
    def eligible(scope, lanes=None, active=None):
        return [
            v
            for v in scope.variables
            if (lanes is None or v.lanes <= lanes) and (active is None or v.active <= active)
        ]

    def decider(self, scope, lanes=None) -> tuple[Expr, Variable]:
        """A number to go by, mostly 0, 1 or 2, that differs between lanes if anything does."""
        variables = self.eligible(scope, lanes)
        differing = [v for v in variables if v.lanes]
        variables = differing if differing and self.number(0, 7) else variables
        if not variables:
            return Const(self.number(0, 2)), Variable()
        v = self.pick(variables)
        # Multiplied, modulo a prime, what lies close together is scattered.
        mixed = Op("*", Var(v.name), Const(self.pick([1, 3, 4, 7])))
        low = Less(Const(self.number(0, 4)), mixed)
        if self.flag():
            return low, v.but(active=NONE)
        return Op("+", low, Less(mixed, Const(self.number(3, 7)))), v.but(active=NONE)

    # Blocks

    def statements(self, scope, deep):
        """Some statements, regions nested so deep among them, and the scope after them."""
        made = []
        kinds = [
            *[self.simple_kind() for _ in range(self.number(0, 1))],
            self.region_kind(scope) if deep else "bump",
            *[self.simple_kind() for _ in range(self.number(0, 1))],
        ]
        if deep and self.number(0, 5) == 5:
            kinds.append(self.region_kind(scope))
        for kind in kinds:
            if self.left <= 0:
                break
            self.left -= 1
            rule = getattr(self, "make_" + kind)
            new, scope = rule(scope) if kind in SIMPLE else rule(scope, max(deep - 1, 0))
            made += new
        return tuple(made), scope

    def simple_kind(self):
        return self.pick(["bump", *SIMPLE])

    def region_kind(self, scope):
        if self.planned:
            return self.planned.pop(0)
        kinds = ["call", "branch", "scan", "while", "fori", "grad", "grad"]
        if scope.lanes:  # which may part company
            kinds += ["branch", "while", "fori"] * 3
        return self.pick([*kinds, *["vmap"] * (9 if scope.waiting() else 1)])

    def results(self, scope, wanted):
        """An expression for each wanted variable, differing and active no more than that."""
        return tuple(self.expr(scope, w.lanes, w.active)[0] for w in wanted)

    def free_results(self, scope, count):
        return [self.expr(scope) for _ in range(count)]

    def block(self, scope, deep, wanted):
        made, scope = self.statements(scope, deep)
        return Block(made, self.results(scope, wanted))

    def free_block(self, scope, deep, count):
        made, scope = self.statements(scope, deep)
        results = self.free_results(scope, count)
        return Block(made, tuple(e for e, _ in results)), [v for _, v in results]

    # Simple statements

    def make_let(self, scope):
        value, known = self.expr(scope)
        name = self.name("v")
        return [Let(name, value)], scope.plus(known.but(name=name))

    def slot(self, scope, instead):
        """A slot to use, or else the statements to make instead."""
        if slots := scope.usable():
            return self.pick(slots), None
        if scope.waiting():
            return None, self.make_vmap(scope, 0)
        return None, instead(scope)

    def make_get(self, scope):
        slot, instead = self.slot(scope, self.make_let)
        if slot is None:
            return instead
        got = Variable(self.name("v"), slot.vector, scope.bound_to(slot))
        return [Get(got.name, slot.name)], scope.plus(got)

    def make_set(self, scope):
        slot, instead = self.slot(scope, self.make_let)
        if slot is None:
            return instead
        value, known = self.expr(scope, scope.bound_to(slot))
        return [Set(slot.name, value, bool(known.active) or scope.all_active)], scope

    def make_bump(self, scope):
        """A read-modify-write."""
        slot, instead = self.slot(scope, self.make_let)
        if slot is None:
            return instead
        got = Variable(self.name("v"), slot.vector, scope.bound_to(slot))
        by, known = self.expr(scope, scope.bound_to(slot), depth=1)
        stop = bool(known.active) or scope.all_active
        update = Set(slot.name, Op(self.pick("+-*"), Var(got.name), by), stop)
        return [Get(got.name, slot.name), update], scope.plus(got)

    def make_psum(self, scope):
        axes = [name for name, _ in scope.vmaps if name not in scope.parted]
        if not axes:
            return self.make_bump(scope)
        axis = self.pick(axes)
        value, known = self.expr(scope)
        out = Variable(self.name("v"), known.vector, known.lanes - {axis})
        stop = bool(known.active) or scope.all_active
        return [Psum(out.name, value, axis, stop)], scope.plus(out)


SIMPLE = ("bump", "set", "get", "let", "psum")


def _slot(number, name):
    vector = number(0, 1) == 1
    levels, rank = [], int(vector)
    for _ in range((1, 0, 1, 1, 1, 0, 1, 2)[number(0, 7)]):
        levels.insert(0, Level(number(2, 3), number(0, rank)))
        rank += 1
    return Slot(name, vector, tuple(levels), number(0, 4), preset=number(0, 2) != 2)


def make_program(number, size=16) -> Program:
    slots = tuple(_slot(number, f"s{k}") for k in range(number(1, 3)))
    maker = Maker(number, size)
    scope = Scope((Variable("x"), Variable("y", True)), slots)
    statements, after = maker.statements(scope, (3, 2, 4, 3, 4, 2, 1)[number(0, 6)])
    new = after.variables[: len(after.variables) - len(scope.variables)]
    inputs = tuple(number(0, 4) for _ in range(3))
    return Program(slots, inputs, Block(statements, tuple(Var(v.name) for v in reversed(new))))


@st.composite
def programs(draw):
    """Programs, for hypothesis."""
    return make_program(lambda low, high: draw(st.integers(low, high)))


def random_program(seed: int | str, size: int = 16) -> Program:
    """A program, by a seed."""
    return make_program(random.Random(seed).randint, size)
