"""What storax.jit adds to the call of the compiled program, and what memory a large state takes."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from report import Findings, Goal
from timing import AGAIN, Clock, Spread, repeated

import storax

LABELS = {"inner": "the jax.jit call it makes", "storax.jit": "storax.jit", "plain": "jax.jit"}
# Prints the memory that a state of 512 MiB takes, in GiB.
MEMORY = Path(__file__).with_name("memory_worker.py")


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "call",
        "A call of storax.jit",
        "A call with one array, and one state of f32[128]: all of it, and the call of the compiled "
        "program within it; beside a call of `jax.jit` without state.",
    )
    x = jnp.ones(128)
    index = storax.StateIndex()
    storax.set_state(index, jnp.zeros(128))

    @storax.jit
    def count(x):
        s = storax.get_state(index, x) + x
        storax.set_state(index, s)
        return s.sum()

    for _ in range(3):
        count(x)
    (specialised,) = count._specialised.values()
    (inner,) = specialised._compiled.values()
    plain = jax.jit(lambda x: (x + x).sum())
    calls = {"inner": inner, AGAIN: inner, "storax.jit": count, "plain": plain}
    clock = Clock(rounds=20 if quick else 400, seconds=0.001)
    runs = {key: repeated(lambda call=call: call(x)) for key, call in calls.items()}
    samples = clock.measure(runs)
    found.add_table("One state of f32[128]", samples, LABELS, "inner")
    added = (samples.seconds["storax.jit"] - samples.seconds["inner"]) * 1e6
    again = (samples.seconds[AGAIN] - samples.seconds["inner"]) * 1e6
    text = "storax.jit beyond the jax.jit call it makes"
    found.goals.append(Goal(text, 0.5, Spread.of(added), unit="us", again=Spread.of(again)))
    if not quick:
        command = [sys.executable, MEMORY]
        peaks = [float(subprocess.check_output(command)) for _ in range(3)]
        text = "memory of a state of 0.5 GiB, made and updated 100 times"
        found.goals.append(Goal(text, 0.8, Spread.of(peaks), unit="GiB"))
    return found
