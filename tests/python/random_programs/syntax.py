"""A small language of programs with state, and a printer for it.

All numbers are small whole ones, so float32 is exact: arithmetic is modulo `MODULUS`, with the sign of
the dividend. Every variable is a scalar or a vector of `WIDTH` elements. Where one is wanted and the
other given, a scalar is repeated and a vector summed.
"""

import dataclasses
import textwrap

MODULUS = 11
WIDTH = 2

node = dataclasses.dataclass(frozen=True)


# --- Expressions ----------------------------------------------------------------------------------


@node
class Const:
    value: int

    def __str__(self):
        return str(self.value)


@node
class Var:
    name: str

    def __str__(self):
        return self.name


@node
class Op:
    symbol: str  # + - *
    left: "Expr"
    right: "Expr"

    def __str__(self):
        return f"({self.left} {self.symbol} {self.right})"


@node
class Total:
    """The sum of a vector's elements."""

    of: "Expr"

    def __str__(self):
        return f"total({self.of})"


@node
class Less:
    """As a number 1 or 0, as a predicate true or false."""

    left: "Expr"
    right: "Expr"

    def __str__(self):
        return f"({self.left} < {self.right})"


Expr = Const | Var | Op | Total | Less


# --- Statements -----------------------------------------------------------------------------------


@node
class Binding:
    """A variable that a statement binds: a scalar or a vector."""

    name: str
    vector: bool


@node
class Block:
    statements: tuple["Statement", ...]
    results: tuple[Expr, ...]

    def __str__(self):
        lines = [str(s) for s in self.statements]
        if self.results:
            lines.append("return " + ", ".join(map(str, self.results)))
        return "\n".join(lines) or "pass"


def _indent(block) -> str:
    return textwrap.indent(str(block), "    ")


def _targets(outs) -> str:
    return ", ".join(o.name for o in outs) + " = " if outs else ""


@node
class Let:
    name: str
    value: Expr

    def __str__(self):
        return f"{self.name} = {self.value}"


@node
class Get:
    name: str
    slot: str

    def __str__(self):
        return f"{self.name} = get({self.slot})"


@node
class Set:
    slot: str
    value: Expr
    stop: bool  # whether the value may be differentiated, so that stop_gradient is needed

    def __str__(self):
        value = f"stop_gradient({self.value})" if self.stop else self.value
        return f"set({self.slot}, {value})"


@node
class Psum:
    """The sum over the lanes of a surrounding vmap."""

    name: str
    value: Expr
    axis: str
    stop: bool

    def __str__(self):
        value = f"stop_gradient({self.value})" if self.stop else self.value
        return f"{self.name} = psum({value}, {self.axis!r})"


@node
class Call:
    """jit, checkpoint, custom_jvp and the like: the block as it stands."""

    how: str
    closes_over: bool  # or else all that the block needs is passed as an argument
    outs: tuple[Binding, ...]
    body: Block

    def __str__(self):
        passed = "" if self.closes_over else ", all passed as arguments"
        return (
            f"{_targets(self.outs)}{self.how}:{passed and '  #' + passed[1:]}\n{_indent(self.body)}"
        )


@node
class Carry:
    name: str
    start: Expr
    vector: bool


def _carries(carries) -> str:
    return "".join(f", {c.name}={c.start}" for c in carries)


@node
class Scan:
    """Over 0, 1, ...; the block returns the carries, and then what is summed over the iterations."""

    length: int
    reverse: bool
    unroll: int
    checkpointed: bool  # Equinox's, which runs its steps again in the backward pass
    item: str
    carries: tuple[Carry, ...]
    outs: tuple[Binding, ...]
    body: Block

    def __str__(self):
        options = (", reverse" if self.reverse else "") + (", unroll=2" if self.unroll > 1 else "")
        options += ", checkpointed" if self.checkpointed else ""
        head = f"{_targets(self.outs)}scan({self.item} in range({self.length}){options}"
        return f"{head}{_carries(self.carries)}):\n{_indent(self.body)}"


@node
class Fori:
    count: int | Expr  # between 0 and 3, if it is an expression
    item: str
    carries: tuple[Carry, ...]
    outs: tuple[Binding, ...]
    body: Block

    def __str__(self):
        count = self.count if isinstance(self.count, int) else f"clip({self.count}, 0, 3)"
        head = f"{_targets(self.outs)}fori({self.item} in range({count}){_carries(self.carries)})"
        return f"{head}:\n{_indent(self.body)}"


@node
class While:
    limit: int  # iterations, at the most
    kind: str  # of Equinox's `while_loop`, or else JAX's if it is ""
    test: Block
    carries: tuple[Carry, ...]
    outs: tuple[Binding, ...]
    body: Block

    def __str__(self):
        kind = f", {self.kind} of Equinox" if self.kind else ""
        options = f"at most {self.limit} times{kind}{_carries(self.carries)}"
        head = f"{_targets(self.outs)}while({options}):"
        return f"{head}\n  while:\n{_indent(self.test)}\n  do:\n{_indent(self.body)}"


@node
class Branch:
    """cond, with two blocks and a predicate, or switch."""

    how: str  # cond, switch
    index: Expr
    outs: tuple[Binding, ...]
    blocks: tuple[Block, ...]

    def __str__(self):
        names = ["else", "then"] if self.how == "cond" else map(str, range(len(self.blocks)))
        parts = [f"  {n}:\n{_indent(b)}" for n, b in zip(names, self.blocks, strict=True)]
        return "\n".join([f"{_targets(self.outs)}{self.how}({self.index}):", *parts])


@node
class Mapped:
    """Lane k gets `start` + k; as an array, the lanes are along `axis`."""

    name: str
    start: Expr
    vector: bool
    axis: int


@node
class Unmapped:
    """What becomes of the lanes' results: their sum, or what one lane has."""

    name: str
    vector: bool
    axis: int
    lane: int | None


@node
class Vmap:
    axis_name: str
    size: int
    mapped: tuple[Mapped, ...]
    binds: tuple[str, ...]  # slots with a part of their own for each of these lanes
    outs: tuple[Unmapped, ...]
    body: Block

    def __str__(self):
        ins = "".join(f", {m.name}={m.start}+lane in_axes={m.axis}" for m in self.mapped)
        parts = f", a part for each lane of {', '.join(self.binds)}" if self.binds else ""
        outs = [
            f"{'sum of lanes' if o.lane is None else f'lane {o.lane}'} out_axes={o.axis}"
            for o in self.outs
        ]
        head = f"{_targets(self.outs)}vmap({self.axis_name!r}, {self.size} lanes{ins}{parts})"
        return f"{head}:{'  # ' + '; '.join(outs) if outs else ''}\n{_indent(self.body)}"


@node
class Grad:
    """The value and derivative of a block, at a scalar."""

    how: str  # of FORWARD or BACKWARD in regions.py
    name: str
    at: Expr
    outs: tuple[Binding, Binding]
    body: Block

    def __str__(self):
        return f"{_targets(self.outs)}{self.how}({self.name} at {self.at}):\n{_indent(self.body)}"


Statement = Let | Get | Set | Psum | Call | Scan | Fori | While | Branch | Vmap | Grad


# --- Programs -------------------------------------------------------------------------------------


@node
class Level:
    """A vmap level that a state has a part for each lane of, outermost first."""

    size: int
    axis: int


@node
class Slot:
    name: str
    vector: bool
    levels: tuple[Level, ...]
    start: int  # elements are start, start + 1, ...
    preset: bool  # or else the first set is in the program itself

    def __str__(self):
        kind = f"vector of {WIDTH}" if self.vector else "scalar"
        lanes = "".join(f", for each of {v.size} lanes along axis {v.axis}" for v in self.levels)
        when = "" if self.preset else ", first set inside the program"
        return f"{self.name} = state({kind}{lanes}), from {self.start}{when}"


@node
class Program:
    slots: tuple[Slot, ...]
    inputs: tuple[int, ...]  # x is a scalar, y a vector
    body: Block

    def __str__(self):  # its repr is Python
        x, *y = self.inputs
        head = [*map(str, self.slots), f"def program(x={x}, y={y}):"]
        return "\n".join([*head, _indent(self.body)])


def used_names(node) -> frozenset[str]:
    """The variables and slots that are named anywhere in a piece of a program."""
    if isinstance(node, Var):
        return frozenset([node.name])
    if isinstance(node, tuple):
        return frozenset().union(*map(used_names, node))
    if not dataclasses.is_dataclass(node):
        return frozenset()
    found = used_names(tuple(getattr(node, f.name) for f in dataclasses.fields(node)))
    if isinstance(node, Get | Set):
        found |= {node.slot}
    return found | frozenset(node.binds) if isinstance(node, Vmap) else found
