"""How long `import storax` takes, beyond JAX and Equinox."""

import os
import subprocess
import sys

import numpy as np
from report import Findings, Goal, seconds
from timing import AGAIN, Samples, Spread

PEERS_ONLY = "without"
LABELS = {PEERS_ONLY: "import jax, equinox", "with": "import jax, equinox, storax"}
# Prints seconds: for the peers, for storax after them, and for the first index after that.
PROGRAM = """
import gc, sys, time
gc.disable()
times = [time.perf_counter()]
import jax, equinox
times.append(time.perf_counter())
if sys.argv[1] == "with":
    import storax
    times.append(time.perf_counter())
    storax.StateIndex()
    times.append(time.perf_counter())
print(*[after - before for before, after in zip(times, times[1:])])
"""


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "import",
        "Importing storax",
        "Each in a process of its own, in turn. Every file has been read, and compiled to bytecode, "
        "before. Python's garbage collector is off: a full collection takes longer than all of "
        "storax, and in whose import it falls is chance.",
    )
    totals: dict[str, list[float]] = {PEERS_ONLY: [], AGAIN: [], "with": []}
    of_storax, of_index = [], []
    _import("with")
    for _ in range(1 if quick else 9):
        for key, total in totals.items():
            parts = _import("with" if key == "with" else "without")
            total.append(sum(parts[:2]))
            if key == "with":
                of_storax.append(parts[1])
                of_index.append(parts[2])
    samples = Samples(totals)
    found.add_table("Time to import", samples, LABELS, PEERS_ONLY)
    noise = Spread.of(np.abs(samples.seconds[AGAIN] - samples.seconds[PEERS_ONLY]))
    found.notes.append(
        f"Two imports of JAX and Equinox differ by {seconds(noise.median)} (median of "
        f"{len(of_storax)} pairs). The first index, which teaches JAX about state, takes another "
        f"{seconds(Spread.of(np.array(of_index)).median)}."
    )
    spread = Spread.of(1e3 * np.array(of_storax))
    found.goals.append(Goal("import storax, after jax and equinox", 50, spread, unit="ms"))
    return found


def _import(which: str) -> list[float]:
    command = [sys.executable, "-c", PROGRAM, which]
    # What is installed has its bytecode beside it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [float(word) for word in done.stdout.split()]
