"""What storax adds to tracing and lowering: to programs without state nothing, to others little."""

import contextlib
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from networks import Form, by_hand, flat, with_equinox, with_storax
from report import Findings, Goal
from timing import AGAIN, Clock, Run, repeated

WITHOUT = "without"
HAND = "hand"
WIDTH = 16
STATELESS = {
    "deep": "tracing and lowering grad of 50 layers",
    "nested": "tracing and lowering vmap of grad of checkpoint of scan of cond",
    "dispatch": "calling a jitted addition",
}


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "tracing",
        "Tracing and lowering",
        "Programs without state run in processes that have imported storax and run a program with "
        "state, and in processes that have not; they take turns, and the goal is to differ by no more "
        "than the upper quartile of A/A. Networks with BatchNorm are traced "
        "and lowered, in training, from a function that JAX has not seen before.",
    )
    _measure_stateless(found, quick)
    _measure_batch_norm(found, quick)
    return found


# --- Without state --------------------------------------------------------------------------------


def _measure_stateless(found: Findings, quick: bool) -> None:
    labels = {WITHOUT: "without storax", "with": "with storax imported and at work"}
    with contextlib.ExitStack() as stack:
        # More than one process each: processes of one program differ in speed as well.
        roles = {
            role: [
                stack.enter_context(_worker(with_storax=role == "with"))
                for _ in range(1 if quick else 2)
            ]
            for role in (WITHOUT, AGAIN, "with")
        }
        for worker in itertools.chain.from_iterable(roles.values()):
            _expect(worker, "ready")
        for what, text in STATELESS.items():
            runs = {role: _in_turn(workers, what) for role, workers in roles.items()}
            if what == "dispatch":
                clock = Clock(20 if quick else 300, seconds=0.005)
            else:
                clock = Clock(1 if quick else 30, seconds=0.02)
            samples = clock.measure(runs)
            found.add_table(f"Without state: {text}", samples, labels, WITHOUT)
            again = samples.ratio(AGAIN, WITHOUT)
            # No more than a process differs from another one of its kind.
            text = f"{text}, with storax to without"
            limit = max(1.0, again.high)
            found.goals.append(Goal(text, limit, samples.ratio("with", WITHOUT), again=again))


def _worker(with_storax: bool) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).parent / "stateless_worker.py")]
    if with_storax:
        command.append("with-storax")
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _in_turn(workers: list[subprocess.Popen], what: str) -> Run:
    turns = itertools.cycle(workers)

    def run(calls: int) -> None:
        worker = next(turns)
        worker.stdin.write(f"{what} {calls}\n")
        _expect(worker, "done")

    return run


def _expect(worker: subprocess.Popen, answer: str) -> None:
    line = worker.stdout.readline().strip()
    if line != answer:
        raise RuntimeError(f"a process that traces programs answered {line!r}, not {answer!r}")


# --- BatchNorm ------------------------------------------------------------------------------------


def _measure_batch_norm(found: Findings, quick: bool) -> None:
    depth = 10 if quick else 50
    labels = {HAND: "by hand", "storax": "storax", "eqx": "eqx.nn.BatchNorm"}
    forms = {HAND: by_hand, AGAIN: by_hand, "storax": with_storax, "eqx": with_equinox}
    made = {key: _as_function(form(WIDTH, depth)) for key, form in forms.items()}
    expected = None
    for key, (f, args) in made.items():
        out, _ = jax.jit(f)(*args)
        expected = out if expected is None else expected
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3, err_msg=key)

    clock = Clock(5 if quick else 30, seconds=0.02)
    for title, stage in (("traced", _trace), ("traced and lowered", _lower)):
        samples = clock.measure(
            {key: repeated(functools.partial(stage, f, args)) for key, (f, args) in made.items()}
        )
        title = f"{depth} layers with BatchNorm, {title}"
        found.add_table(title, samples, labels, HAND)
    found.add_goal(f"{title}, storax to by hand", 1.3, samples, "storax", HAND)


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _as_function(form: Form) -> Call:
    leaves, call = flat(form)
    xs = jax.random.normal(jax.random.key(1), (8, WIDTH))
    return call, (leaves, form.state, xs)


# A function of its own each time is one that JAX can't have traced before.


def _trace(f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return jax.jit(lambda *args: f(*args)).trace(*args)


def _lower(f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return jax.jit(lambda *args: f(*args)).lower(*args)
