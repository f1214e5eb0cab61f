"""Every way to run a program, against what it means."""

import dataclasses

import jax
import numpy as np

import storax

from .interpreter import Interpreter
from .runner import Runner
from .syntax import Program

# Not how storax compiles programs, but four times as fast for small ones.
QUICK = {"xla_cpu_use_fusion_emitters": False}


@dataclasses.dataclass
class Outcome:
    results: list  # of each run
    states: dict
    counts: dict


def ways(options=None):
    """How to make a program run, by name."""
    jit = lambda f: jax.jit(f, compiler_options=options)
    found = {
        "eager": lambda f: f,
        "jit": jit,
        "nested jit": lambda f: jit(lambda *args: jax.jit(f)(*args)),
    }
    if hasattr(storax, "jit"):
        found["storax.jit"] = storax.jit
    return found


def runs(way: str) -> int:
    """The second time a program is compiled already, and takes JAX's fast path."""
    return 1 if way == "eager" else 2


def expected(program: Program, runs: int) -> Outcome:
    meaning = Interpreter(program)
    results = [meaning.run() for _ in range(runs)]
    states = meaning.states
    return Outcome(
        results,
        {name: s.value for name, s in states.items()},
        {name: (s.gets, s.sets) for name, s in states.items()},
    )


def observed(program: Program, way, runs: int) -> Outcome:
    runner = Runner(program)
    runner.preset()
    before = runner.counts()
    run, args = way(runner.__call__), runner.inputs()
    results = [jax.block_until_ready(run(*args)) for _ in range(runs)]
    storax.barrier()
    counts = {
        name: (gets - before[name][0], sets - before[name][1])
        for name, (gets, sets) in runner.counts().items()
    }
    return Outcome(results, runner.final_states(), counts)


def difference(want: Outcome, got: Outcome, count: bool) -> str | None:
    """The first thing in which they differ."""
    for k, (a, b) in enumerate(zip(want.results, got.results, strict=True)):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            if not np.array_equal(x, y):
                return f"run {k + 1}, result {n}: {np.asarray(y)} and not {x}"
    for name, x in want.states.items():
        if not np.array_equal(x, got.states[name]):
            return f"state {name} in the end: {np.asarray(got.states[name])} and not {x}"
    if count and want.counts != got.counts:
        return f"gets and sets that ran: {got.counts} and not {want.counts}"
    return None


def check_way(program: Program, name: str, options=None) -> str | None:
    """What is wrong with a program that is run this way."""
    want = expected(program, runs(name))
    try:
        got = observed(program, ways(options)[name], runs(name))
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    # storax.jit loads and stores state when it likes.
    return difference(want, got, count=name != "storax.jit")


def check(program: Program, options=None) -> dict[str, str]:
    """What is wrong, by the way of running in which it is."""
    problems = {name: check_way(program, name, options) for name in ways()}
    return {name: problem for name, problem in problems.items() if problem}
