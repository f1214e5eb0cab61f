"""Random programs with state, each run in every way, against an interpreter. `make soak` runs many more."""

import collections
import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed

import storax
from random_programs import checker
from random_programs.checker import QUICK, check, check_way
from random_programs.interpreter import Interpreter, TooLarge
from random_programs.programs import programs, random_program
from random_programs.shrink import means_something, shrink
from random_programs.syntax import (
    Binding,
    Block,
    Branch,
    Carry,
    Const,
    Get,
    Grad,
    Less,
    Level,
    Mapped,
    Op,
    Program,
    Set,
    Slot,
    Unmapped,
    Var,
    Vmap,
    While,
)

# Programs in each of so many tests, which workers share.
EACH = 100 if os.environ.get("STORAX_ALL") == "1" else 15
TESTS = 10


@pytest.mark.parametrize("seed", range(TESTS))
def test_random_programs(seed):
    @with_seed(seed)
    @settings(
        max_examples=EACH,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(programs())
    def run(program):
        try:
            Interpreter(program).run()
        except TooLarge:
            return
        problems = check(program, QUICK)
        assert not problems, f"\n{program}\n{problems}"

    run()


# --- What the programs above rely on --------------------------------------------------------------

X, LANE, STATE = Var("x"), Var("m"), Var("v")
BUMP = (Get("v", "s"), Set("s", Op("+", STATE, Const(1)), False))


def in_lanes(statements, start=X, own_state=True, results=()):
    """A program with a slot, from 5, in a vmap of three lanes, each of which adds its number to `start`."""
    levels = (Level(3, 0),) if own_state else ()
    slot = Slot("s", False, levels, 5, True)
    outs = tuple(Unmapped(f"o{k}", False, 0, None) for k in range(len(results)))
    vmap = Vmap(
        "b",
        3,
        (Mapped("m", start, False, 0),),
        ("s",) if own_state else (),
        outs,
        Block(tuple(statements), results),
    )
    return Program((slot,), (0, 0, 0), Block((vmap,), tuple(Var(o.name) for o in outs)))


def branch(*statements):
    """Only lanes 0 and 1 take it."""
    return Branch("cond", Less(LANE, Const(2)), (), (Block((), ()), Block(statements, ())))


MEANINGS = {
    "every lane has a state": (in_lanes(BUMP), [6, 7, 8], (1, 1)),
    "lanes share a state": (in_lanes(BUMP, own_state=False), 6, (1, 1)),
    "lanes that take a branch": (in_lanes([branch(*BUMP)]), [6, 7, 7], (1, 1)),
    "any lane takes a branch": (in_lanes([branch(*BUMP)], own_state=False), 6, (1, 1)),
    "no lane takes a branch": (in_lanes([branch(*BUMP)], start=Const(5)), [5, 6, 7], (0, 0)),
    "each lane as often as it likes": (
        in_lanes(
            [
                While(
                    3,
                    Block((), (Less(Var("c"), Const(2)),)),
                    (Carry("c", LANE, False),),
                    (Binding("d", False),),
                    Block(BUMP, (Op("+", Var("c"), Const(1)),)),
                )
            ]
        ),
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
                assert check_way(program, way, QUICK), (name, way)
                runner.set_first(program.slots[0])


def test_programs_are_of_every_kind():
    """What is not made is not tested."""
    seen = collections.Counter()

    class Watch(Interpreter):
        inside = ()

        def do_set(self, s, env, ctx):
            seen["some lanes"] += not ctx.mask.all()
            seen["some lanes, shared state"] += not ctx.mask.all() and bool(ctx.other_axes(s.slot))
            for name in self.inside:
                seen[name] += 1
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
    for number in range(400):
        Watch(random_program(number)).run()
    rare = {kind: n for kind, n in seen.items() if n < 20}
    assert len(seen) == 16 and not rare, seen


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
