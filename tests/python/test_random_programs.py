"""Random programs with state, each run in every way, against an interpreter. `make soak` runs many more."""

import collections
import contextlib
import itertools
import os
import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed

import storax
from random_programs import checker, regions
from random_programs.checker import QUICK, check, check_way
from random_programs.interpreter import Interpreter, TooLarge
from random_programs.programs import programs, random_program
from random_programs.shrink import means_something, shrink
from random_programs.syntax import (
    Binding,
    Block,
    Branch,
    Call,
    Carry,
    Const,
    Fori,
    Get,
    Grad,
    Less,
    Level,
    Mapped,
    Op,
    Program,
    Scan,
    Set,
    Slot,
    Unmapped,
    Var,
    Vmap,
    While,
)

# Programs in each of so many tests, which workers share.
EACH, TESTS = (40, 10) if os.environ.get("STORAX_ALL") == "1" else (15, 4)
# Seconds for making a failing program smaller: hypothesis can't be told to stop.
LIMIT = 60


@pytest.mark.parametrize("seed", range(TESTS))
def test_random_programs(seed):
    numbers = itertools.count(1)

    @with_seed(seed)
    @settings(
        max_examples=EACH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def run(program):
        if not means_something(program):  # a derivative may be too large for a float32
            return
        problems = check(program, QUICK, checker.sample(next(numbers)))
        if problems:
            way = next(iter(problems))
            end = time.monotonic() + LIMIT
            fails = lambda p: time.monotonic() < end and bool(check_way(p, way, QUICK))
            smaller = shrink(program, fails)
            pytest.fail(f"{smaller}\n\n{way}: {check_way(smaller, way, QUICK)}\n\n{smaller!r}")

    run()


# --- What the programs above rely on --------------------------------------------------------------

X, LANE, STATE = Var("x"), Var("m"), Var("v")
BUMP = (Get("v", "s"), Set("s", Op("+", STATE, Const(1)), False))


def vmap(axis, size, mapped, start, statements, binds=("s",), results=()):
    """A vmap of lanes that each add their number to `start`; it returns sums of lanes."""
    outs = tuple(Unmapped(f"o{k}", False, 0, None) for k in range(len(results)))
    body = Block(tuple(statements), results)
    return Vmap(axis, size, (Mapped(mapped, start, False, 0),), binds, outs, body)


OWN = (Level(3, 0),)  # a part for each of three lanes


def program(*statements, levels=OWN):
    """A program with a slot, from 5, in three lanes. It returns what the last statement does."""
    outs = tuple(Var(o.name) for o in statements[-1].outs)
    return Program((Slot("s", False, levels, 5, True),), (0, 0, 0), Block(statements, outs))


def in_lanes(statements, start=X, own_state=True, results=()):
    binds, levels = (("s",), OWN) if own_state else ((), ())
    return program(vmap("b", 3, "m", start, statements, binds, results), levels=levels)


def branch(*statements, on=LANE):
    """Where `on` is less than 2."""
    return Branch("cond", Less(on, Const(2)), (), (Block((), ()), Block(statements, ())))


def while_less_than_two(kind=""):
    """A loop that lanes leave one by one."""
    test = Block((), (Less(Var("c"), Const(2)),))
    body = Block(BUMP, (Op("+", Var("c"), Const(1)),))
    return While(3, kind, test, (Carry("c", LANE, False),), (Binding("d", False),), body)


MEANINGS = {
    "every lane has a state": (in_lanes(BUMP), [6, 7, 8], (1, 1)),
    "lanes share a state": (in_lanes(BUMP, own_state=False), 6, (1, 1)),
    "lanes that take a branch": (in_lanes([branch(*BUMP)]), [6, 7, 7], (1, 1)),
    "any lane takes a branch": (in_lanes([branch(*BUMP)], own_state=False), 6, (1, 1)),
    "no lane takes a branch": (in_lanes([branch(*BUMP)], start=Const(5)), [5, 6, 7], (0, 0)),
    "each lane as often as it likes": (
        in_lanes([while_less_than_two()]),
        [7, 7, 7],
        (2, 2),
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_a_program_means(name):
    program, state, ran = MEANINGS[name]
    meaning = Interpreter(program)
    meaning.run()
    assert meaning.states["s"].value.tolist() == state
    assert (meaning.states["s"].gets, meaning.states["s"].sets) == ran
    assert check(program, QUICK) == {}


# What such programs have found, made smaller. Each was wrong, or failed, in some way of running it.
FOUND = {
    # A predicate that differs between lanes which share the state gave the state their batch axis.
    "a branch on lanes that share a state": program(
        vmap(
            "c",
            2,
            "n",
            X,
            [vmap("b", 3, "m", Var("n"), [branch(Set("s", Const(1), False))])],
            binds=(),
        )
    ),
    # JAX saves nothing from inside of a while loop, and so not what a get returned.
    "a loop in a checkpoint": in_lanes(
        [
            Grad(
                "value_and_grad",
                "t",
                Const(1),
                (Binding("value", False), Binding("slope", False)),
                Block(
                    (
                        Call(
                            "checkpoint",
                            True,
                            (Binding("same", False),),
                            Block((Fori(LANE, "k", (), (), Block(BUMP, ())),), (Var("t"),)),
                        ),
                    ),
                    (Var("same"),),
                ),
            )
        ]
    ),
    # XLA let the loop work in place on what the program returned.
    "a loop in a branch that starts from the result": Program(
        (Slot("s", False, (), 0, True),),
        (3, 0, 0),
        Block(
            (
                Get("v", "s"),
                Branch(
                    "cond",
                    Less(Const(1), X),
                    (),
                    (
                        Block((), ()),
                        Block(
                            (
                                While(
                                    1,
                                    "",
                                    Block((), (Const(1),)),
                                    (Carry("c", Const(1), True), Carry("d", STATE, False)),
                                    (Binding("e", True), Binding("f", False)),
                                    Block((Set("s", Var("c"), False),), (Var("d"), Const(1))),
                                ),
                            ),
                            (),
                        ),
                    ),
                ),
            ),
            (STATE,),
        ),
    ),
    # Without jit JAX staged what the condition does, found out that it is not concrete, and staged it
    # again as a loop.
    "a condition that sets state, staged without jit": in_lanes(
        [branch(While(2, "", Block(BUMP, (Const(1),)), (), (), Block((), ())))], own_state=False
    ),
    # Without jit JAX ran the condition, found out that it is batched, and started again.
    "a condition that sets state": in_lanes(
        [While(2, "", Block(BUMP, (Less(LANE, Const(1)),)), (), (), Block((), ()))]
    ),
    # Equinox's loops tell JAX whether any lane still runs, not which; a bounded one of a single step runs
    # that step in any case.
    **{
        f"lanes that leave a loop of Equinox, {kind}": in_lanes([while_less_than_two(kind)])
        for kind in ("lax", "checkpointed", "bounded")
    },
    "a step that a bounded loop does not take": program(
        While(1, "bounded", Block((), (Less(X, Const(0)),)), (), (), Block(BUMP, ())), levels=()
    ),
    # It runs its steps again in the backward pass.
    "the gradient of a checkpointed loop": in_lanes(
        [
            Grad(
                "value_and_grad",
                "t",
                LANE,
                (Binding("value", False), Binding("slope", False)),
                Block(
                    (
                        Scan(
                            3,
                            True,
                            1,
                            True,
                            "k",
                            (Carry("c", Var("t"), False),),
                            (Binding("d", False),),
                            Block(BUMP, (Op("*", Var("c"), STATE),)),
                        ),
                    ),
                    (Var("d"),),
                ),
            )
        ],
        results=(Var("value"), Var("slope")),
    ),
    # JAX looked for what may leave the scan, and lost what has no results.
    "a branch without results, in a scan in a checkpoint": program(
        Grad(
            "value_and_grad",
            "t",
            X,
            (Binding("value", False), Binding("slope", False)),
            Block(
                (
                    Call(
                        "checkpoint",
                        True,
                        (),
                        Block(
                            (
                                Scan(
                                    2,
                                    False,
                                    1,
                                    False,
                                    "k",
                                    (Carry("c", Var("t"), False),),
                                    (Binding("d", False),),
                                    Block((branch(*BUMP, on=Var("k")),), (Var("c"),)),
                                ),
                            ),
                            (),
                        ),
                    ),
                ),
                (Var("t"),),
            ),
        ),
        levels=(),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_random_programs_have_found(name):
    assert check(FOUND[name], QUICK) == {}


def test_results_of_a_scan_are_summed_before_the_modulus():
    # 8, 8 and -8 are 8. With the modulus at each step they would be -3.
    early, eight = Less(Var("k"), Const(2)), Const(8)
    late = Op("-", Const(1), early)
    value = Op("-", Op("*", early, eight), Op("*", late, eight))
    summed = program(
        Scan(3, False, 1, False, "k", (), (Binding("y", False),), Block((), (value,))), levels=()
    )
    assert Interpreter(summed).run()[0] == 8
    assert check(summed, QUICK) == {}


def test_derivatives():
    # The state is 5 and then 6, a constant. d/dt (t * t * s) = 2 t s, modulo 11, where t is the lane.
    cube = Op("*", Op("*", Var("t"), Var("t")), STATE)
    outs = (Binding("value", False), Binding("slope", False))
    for how in ("value_and_grad", "jvp"):
        derivative = Grad(how, "t", LANE, outs, Block(BUMP, (cube,)))
        program = in_lanes([derivative], own_state=False, results=(Var("value"), Var("slope")))
        meaning = Interpreter(program)
        assert [x.item() for x in meaning.run()] == [(0 + 5 + 9) % 11, (0 + 10 + 9) % 11]
        assert meaning.states["s"].value == 6
        assert check(program, QUICK) == {}


def test_a_wrong_result_is_noticed(monkeypatch):
    program = in_lanes([branch(*BUMP)])
    set_state = storax.set_state
    wrong = {
        "sets twice": lambda index, x: (set_state(index, x), set_state(index, x)),
        "sets another value": lambda index, x: set_state(index, x + 1),
        "sets nothing": lambda index, x: None,
    }
    for name, replacement in wrong.items():
        runner = checker.Runner(program)
        with monkeypatch.context() as patch:
            patch.setattr(checker, "Runner", lambda program, runner=runner: runner)
            patch.setattr(runner, "preset", lambda runner=runner: None)
            runner.set_first(program.slots[0])
            patch.setattr(storax, "set_state", replacement)
            for way in checker.WAYS:
                if name != "sets twice" or checker.WAYS[way].counts:
                    assert check_way(program, way, QUICK), (name, way)
                runner.set_first(program.slots[0])


def test_programs_are_of_every_kind():
    """What is not made is not tested."""
    seen = collections.Counter()

    class Watch(Interpreter):
        inside = ()

        def do_set(self, s, env, ctx):
            seen["some lanes"] += not ctx.mask.all()
            seen["some lanes, shared state"] += not ctx.mask.all() and bool(
                ctx.other_axes(self.states[s.slot].slot)
            )
            for name in self.inside:
                seen[name] += 1
            where = iter(self.inside)
            taken_apart = (regions.BACKWARD, ["checkpoint"], ["do_scan"])
            seen["taken apart"] += all(any(n in names for n in where) for names in taken_apart)
            second = sum(name in regions.FORWARD + regions.BACKWARD for name in self.inside) > 1
            seen["second derivative"] += second
            return super().do_set(s, env, ctx)

    def watch(kind):
        def do(self, s, env, ctx):
            before = self.inside
            self.inside = (*before, getattr(s, "how", kind))
            try:
                return getattr(Interpreter, kind)(self, s, env, ctx)
            finally:
                self.inside = before

        return do

    for kind in ("call", "scan", "fori", "while", "branch", "vmap", "grad"):
        setattr(Watch, "do_" + kind, watch("do_" + kind))
    for number in range(600):
        with contextlib.suppress(TooLarge):
            Watch(random_program(number)).run()
    rare = {kind: n for kind, n in seen.items() if n < 20}
    kinds = {*regions.CALLS, *regions.FORWARD, *regions.BACKWARD, "cond", "switch"}
    assert kinds < seen.keys() and not rare, seen


def test_a_program_is_made_from_its_number():
    assert random_program("7/1") == random_program("7/1") != random_program("7/2")


def test_a_failing_program_is_made_readable():
    def fails(program):  # as if a set in a loop, under vmap, were wrong
        lines = str(program).splitlines()
        loops = [k for k, line in enumerate(lines) if " do:" in line]
        return (
            any("vmap(" in line for line in lines[: loops[0]])
            and any("set(" in line for line in lines[loops[0] :])
            if loops
            else False
        )

    found = [p for p in map(random_program, range(400)) if fails(p)]
    assert len(found) > 5
    small = shrink(max(found, key=lambda p: len(str(p))), fails)
    assert means_something(small) and fails(small)
    assert len(str(small).splitlines()) <= 12
