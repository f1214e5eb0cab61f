"""Timing of contenders side by side.

The machine may be shared and noisy, so only ratios within one run mean anything: contenders take
turns, in an order that changes with each round, and are compared round by round. How far a contender
strays from its own twin says how far to trust the rest.
"""

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

__all__ = ["AGAIN", "Clock", "Samples", "Spread", "repeated", "without_old_objects"]

# What the baseline's twin is called.
AGAIN = "again"

# Does a call so many times, and returns once all that it started is done.
Run = Callable[[int], object]


@dataclass(frozen=True)
class Spread:
    """A median, with the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        return cls(*(float(q) for q in np.quantile(values, [0.25, 0.5, 0.75])))


class Samples:
    """Seconds per call, of each contender in each round."""

    def __init__(self, seconds: Mapping[str, Any]):
        self.seconds = {name: np.asarray(values) for name, values in seconds.items()}

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Spread:
        return Spread.of(self.seconds[name] / self.seconds[to])


@dataclass(frozen=True)
class Clock:
    """How long to measure: so many rounds, in each of which a contender runs for about so long."""

    rounds: int
    seconds: float
    at_most: float = 15.0  # seconds for all rounds, after which there are fewer

    def measure(self, runs: Mapping[str, Run]) -> Samples:
        """Runs the contenders in turn. They have run before: nothing is left to be compiled."""
        best = {name: self._roughly(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        order = list(runs)
        shuffle = random.Random(0).shuffle
        warm_up = -(-self.rounds // 10)
        start = time.perf_counter()
        with _collecting_between_rounds() as collect:
            for i in range(warm_up + self.rounds):
                if i > warm_up + 4 and time.perf_counter() - start > self.at_most:
                    break
                shuffle(order)
                collect()
                for name in order:
                    # Waiting for the last call costs too, so contenders of one speed must make as
                    # many calls: by their best times, which others' load doesn't touch.
                    calls = max(1, round(self.seconds / best[name]))
                    taken = _timed(runs[name], calls) / calls
                    best[name] = min(best[name], taken)
                    if i >= warm_up:
                        seconds[name].append(taken)
        return Samples(seconds)

    def _roughly(self, run: Run) -> float:
        calls = 1
        while (taken := _timed(run, calls)) < self.seconds:
            calls *= 2
        return taken / calls


def _timed(run: Run, calls: int) -> float:
    start = time.perf_counter()
    run(calls)
    return time.perf_counter() - start


@contextlib.contextmanager
def _collecting_between_rounds() -> Iterator[Callable[[], object]]:
    """Keeps Python's garbage collector out of the measurements; it may run where this is called."""
    gc.collect()
    gc.freeze()  # so that collecting takes no time to speak of
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def without_old_objects() -> Iterator[None]:
    """Python's garbage collector runs as ever, but not over what others have left."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def repeated(call: Callable[[], object]) -> Run:
    """Makes calls one after the other without waiting in between, as a training loop does."""

    def run(calls: int) -> None:
        out = None
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)

    return run
