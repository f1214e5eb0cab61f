"""Every way to run a program, against what it means."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import storax

from .interpreter import RUNS, Interpreter, TooLarge
from .runner import Runner
from .syntax import Program

# Not how storax compiles programs, but four times as fast for small ones; JAX 0.11 has no other way.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None
DEVICES = 2


@dataclasses.dataclass
class Outcome:
    results: list  # of each run
    states: dict
    counts: dict


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run a program."""

    wrap: Callable  # (function, compiler options) -> function
    # The second time a program is compiled already, and takes JAX's fast path.
    runs: int = 2
    # Whether each get and set of the program runs as often as the program says.
    counts: bool = True
    # Whether each of `DEVICES` devices runs it on an `x` of its own, and with states of its own.
    mapped: bool = False
    # When there are many programs, one in so many runs this way, from that of this number on.
    one_in: int = 1
    first: int = 0


def _without_jit(f, options):
    def run(*args):
        with jax.disable_jit():
            return f(*args)

    return run


def _hoisted(**form):
    return lambda f, options: storax.jit(f, compiler_options=options, **form)


def _ahead_of_time(f, options):
    """Compiled for the first arguments, and called with all."""
    compiled = []

    def run(*args):
        if not compiled:
            compiled.append(jax.jit(f).lower(*args).compile(options))
        return compiled[0](*args)

    return run


def _shard_map(f, options):
    def on_device(*args):
        out = f(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), out)

    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("device",))
    over = P("device")
    # With the check the two branches of a cond must vary over the same axes, and so on.
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    return jax.jit(mapped, compiler_options=options)


def _pmap(f, options):
    return jax.pmap(f, devices=jax.devices()[:DEVICES])


WAYS = {
    "jit": Way(lambda f, options: jax.jit(f, compiler_options=options)),
    "eager": Way(lambda f, options: f, runs=1, one_in=20),
    # JAX tries a loop in Python, and starts again if the lanes part company in the condition.
    "disable_jit": Way(_without_jit, runs=1, counts=False, one_in=40),
    # These load and store state when they like. What is not set at first runs as under plain jit once.
    "storax.jit": Way(_hoisted(), runs=RUNS, counts=False, one_in=2),
    "storax.jit, pure": Way(_hoisted(pack=False), runs=RUNS, counts=False, one_in=2, first=1),
    "ahead of time": Way(_ahead_of_time, one_in=20, first=1),
    "shard_map": Way(_shard_map, mapped=True, one_in=10, first=2),
    "pmap": Way(_pmap, mapped=True, one_in=20, first=3),
}
# What is refused, by JAX or by storax.
REFUSED = {
    "disable_jit": (
        "zero-length scan is not supported in disable_jit",
        "With `jax.disable_jit` JAX would start the loop again",
    )
}


def sample(number: int) -> list[str]:
    """The ways for the program of this number."""
    return [name for name, way in WAYS.items() if number % way.one_in == way.first]


def expected(program: Program, way: Way) -> Outcome:
    if not way.mapped:
        return _expected(program, way.runs)
    x, *y = program.inputs
    alone = [
        _expected(dataclasses.replace(program, inputs=(x + k, *y)), way.runs)
        for k in range(DEVICES)
    ]
    stack = lambda *each: np.stack(each)
    results, states = ([getattr(a, name) for a in alone] for name in ("results", "states"))
    counts = {
        name: tuple(map(sum, zip(*[a.counts[name] for a in alone], strict=True)))
        for name in alone[0].counts
    }
    return Outcome(jax.tree.map(stack, *results), jax.tree.map(stack, *states), counts)


def _expected(program: Program, runs: int) -> Outcome:
    meaning = Interpreter(program)
    results = [meaning.run() for _ in range(runs)]
    states = meaning.states
    return Outcome(
        results,
        {name: s.value for name, s in states.items()},
        {name: (s.gets, s.sets) for name, s in states.items()},
    )


def observed(program: Program, way: Way, options=None) -> Outcome:
    runner, args = Runner(program), Runner.inputs(program)
    if way.mapped:
        x, y = args
        args = x + jnp.arange(DEVICES, dtype=x.dtype), jnp.stack([y] * DEVICES)
        on_devices = lambda f: lambda: way.wrap(lambda x, y: f(), options)(*args)
    else:
        on_devices = lambda f: f
    on_devices(runner.preset)()
    storax.barrier()
    before = runner.counts()
    run = way.wrap(runner.__call__, options)
    results = [jax.block_until_ready(run(*args)) for _ in range(way.runs)]
    storax.barrier()
    counts = {
        name: (gets - before[name][0], sets - before[name][1])
        for name, (gets, sets) in runner.counts().items()
    }
    return Outcome(results, on_devices(runner.final_states)(), counts)


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
    way = WAYS[name]
    try:
        want = expected(program, way)
    except TooLarge:  # with the argument of another device
        return None
    try:
        got = observed(program, way, options)
    except Exception as e:
        if any(text in str(e) for text in REFUSED.get(name, ())):
            return None
        return f"{type(e).__name__}: {e}"
    return difference(want, got, way.counts)


def check(program: Program, options=None, names=tuple(WAYS)) -> dict[str, str]:
    """What is wrong, by the way of running in which it is."""
    problems = {name: check_way(program, name, options) for name in names}
    return {name: problem for name, problem in problems.items() if problem}
