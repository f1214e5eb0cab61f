"""Makes a failing program smaller, for as long as it fails: what is left is what a person reads."""

import dataclasses
from collections.abc import Callable, Iterator

from .interpreter import RUNS, Interpreter
from .syntax import (
    Block,
    Branch,
    Call,
    Const,
    Fori,
    Get,
    Grad,
    Let,
    Op,
    Program,
    Scan,
    Set,
    Var,
    Vmap,
    While,
)


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program found that means something and for which `fails` is true."""
    while True:
        for smaller in rewrites(program):
            if means_something(smaller) and fails(smaller):
                program = smaller
                break
        else:
            return program


def means_something(program: Program) -> bool:
    """Whether it does so each time it is run, as often as any way to check it runs it."""
    try:
        meaning = Interpreter(program)
        for _ in range(RUNS):
            meaning.run()
    except Exception:  # a name that is gone, lanes that don't agree
        return False
    return True


def replace(node, old: dict):
    """The same piece of a program with other expressions for these variables."""
    if isinstance(node, Var):
        return old.get(node.name, node)
    if isinstance(node, tuple):
        return tuple(replace(n, old) for n in node)
    if not dataclasses.is_dataclass(node):
        return node
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return type(node)(**{k: replace(v, old) for k, v in fields.items()})


def rewrites(node) -> Iterator:
    """Simpler pieces of a program, the simplest first."""
    if isinstance(node, tuple):
        for k, item in enumerate(node):
            for smaller in rewrites(item):
                yield (*node[:k], smaller, *node[k + 1 :])
        return
    if not dataclasses.is_dataclass(node):
        return
    if isinstance(node, Program):
        yield from _without_a_slot(node)
    if isinstance(node, Block):
        yield from _without_a_statement(node)
    if isinstance(node, Op):
        yield from (Const(1), node.left, node.right)
    elif isinstance(node, Var):
        yield Const(1)
    yield from _with_simpler_settings(node)
    if hasattr(node, "outs") and not isinstance(node, Grad):
        yield from _without_a_result(node)
    for f in dataclasses.fields(node):
        for smaller in rewrites(getattr(node, f.name)):
            yield dataclasses.replace(node, **{f.name: smaller})


def _names(statement):
    bound = [o.name for o in getattr(statement, "outs", ())]
    return [*bound, statement.name] if hasattr(statement, "name") else bound


def _without_a_statement(block):
    for k, s in enumerate(block.statements):
        before, after = block.statements[:k], (block.statements[k + 1 :], block.results)
        gone = {name: Const(1) for name in _names(s)}
        rest, results = replace(after, gone)
        yield Block((*before, *rest), results)
        for inlined in _inlined(s):
            yield Block((*before, *inlined, *after[0]), block.results)


def _inlined(s):
    """The blocks of a statement, each as it stands."""
    lets = ()
    if isinstance(s, Call):
        blocks = (s.body,)
    elif isinstance(s, Branch):
        blocks = s.blocks
    elif isinstance(s, Scan | Fori | While):
        lets = tuple(Let(c.name, c.start) for c in s.carries)
        if not isinstance(s, While):
            lets = (*lets, Let(s.item, Const(0)))
        blocks = (s.body,)
    elif isinstance(s, Vmap):
        lets = tuple(Let(m.name, m.start) for m in s.mapped)
        blocks = (s.body,)
    elif isinstance(s, Grad):
        lets = (Let(s.name, s.at),)
        blocks = (Block(s.body.statements, (*s.body.results, Const(1))),)
    else:
        return
    for b in blocks:
        outs = tuple(Let(o.name, e) for o, e in zip(s.outs, b.results, strict=True))
        yield (*lets, *b.statements, *outs)


def _without_a_slot(program):
    for k, slot in enumerate(program.slots):
        if not _uses(program.body, slot.name):
            yield dataclasses.replace(program, slots=program.slots[:k] + program.slots[k + 1 :])


def _uses(node, slot):
    if isinstance(node, tuple):
        return any(_uses(n, slot) for n in node)
    if not dataclasses.is_dataclass(node):
        return False
    if isinstance(node, Get | Set) and node.slot == slot:
        return True
    if isinstance(node, Vmap) and slot in node.binds:
        return True
    return any(_uses(getattr(node, f.name), slot) for f in dataclasses.fields(node))


def _without_a_result(node):
    """One result fewer, of a statement with blocks, which nothing may use: or it means nothing."""
    for k in range(len(node.outs)):
        drop = lambda items, k=k: items[:k] + items[k + 1 :]
        changed = {"outs": drop(node.outs)}
        if hasattr(node, "carries") and k < len(node.carries):
            changed["carries"] = drop(node.carries)
        for name in ("body", "blocks"):
            old = getattr(node, name, None)
            if isinstance(old, Block):
                changed[name] = dataclasses.replace(old, results=drop(old.results))
            elif old is not None:
                changed[name] = tuple(dataclasses.replace(b, results=drop(b.results)) for b in old)
        yield dataclasses.replace(node, **changed)


SETTINGS = {
    "length": (1, 2),
    "limit": (1, 2),
    "count": (1, 2),
    "unroll": (1,),
    "checkpointed": (False,),
    "kind": ("",),
    "reverse": (False,),
    "vector": (False,),
    "axis": (0,),
    "preset": (True,),
    "start": (0,),
    "lane": (0,),
    "size": (2,),
    "binds": ((),),
}


def _with_simpler_settings(node):
    for name, values in SETTINGS.items():
        old = getattr(node, name, None)
        for value in values:
            if hasattr(node, name) and old != value and not dataclasses.is_dataclass(old):
                if isinstance(old, int) and isinstance(value, int) and old < value:
                    continue
                yield dataclasses.replace(node, **{name: value})
    if isinstance(node, Fori) and not isinstance(node.count, int):
        yield dataclasses.replace(node, count=2)
