"""One read-modify-write of each of N states per call: what state costs the caller of a program."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from contenders import CONTENDERS, HAND, SHAPE, Contender, Slots, on_cpu, why_missing
from report import Findings, Goal
from timing import AGAIN, Clock, Spread, repeated, without_old_objects

GOALS = {
    "storax": {1: 1.2, 10: 0.6, 100: 0.35},
    "storax.jit": {1: 1.15, 10: 1 / 2, 100: 1 / 8, 1000: 1 / 9},
}
# That storax.jit is to be 30 times as fast as, with 100 slots.
PEERS = ("ref", "eqx", "nnx")
# The least a call takes. XLA runs a program of more than 1,000 operations on a thread of its own,
# and what starting it there takes is most of what a call with 10 states does.
STATELESS = "stateless"


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "slots",
        "One read-modify-write of each of N states per call",
        "A call of a jitted function adds its argument to each of N states of f32[128], and returns "
        "a sum. Calls follow one another without waiting for the results, as in a training loop. "
        "The first call traces and compiles. A call without state, of as many additions, shows what "
        "any call costs here: XLA runs programs of more than 1,000 operations on another thread.",
    )
    contenders = []
    for c in CONTENDERS:
        if why := why_missing(c):
            found.leave_out(c.label, why)
        else:
            contenders.append(c)
    for n in (1, 10) if quick else (1, 10, 100, 1000):
        _measure(found, n, contenders, quick)
    if large and not quick:
        _measure(found, 10_000, [c for c in contenders if c.many], quick)
    return found


def _measure(found: Findings, n: int, contenders: Sequence[Contender], quick: bool) -> None:
    first_calls: dict[str, list[float]] = {c.key: [] for c in contenders}
    slots: dict[str, Slots] = {}
    for k in range(1 if quick or n > 1000 else 11 if n == 1000 else 3):
        for c in contenders:
            if n == 1000 and k > 0 and c.key not in (HAND, "storax.jit"):
                continue  # seconds each, and no goal
            slots[c.key] = c.make(n)
            first_calls[c.key].append(_first_call(slots[c.key]))
    hand = next(c for c in contenders if c.key == HAND)
    slots[AGAIN] = hand.make(n)

    counted = {key: _Counted(each) for key, each in slots.items()}
    for each in counted.values():
        each.check(calls=3)
    rounds = 20 if quick else 300 if n < 1000 else 60 if n == 1000 else 12
    # Several calls of each in a row: the first of them finds what the others have left in the caches.
    samples = Clock(rounds, seconds=0.001 if n < 1000 else 0.02).measure(
        {key: repeated(each) for key, each in (counted | {STATELESS: _stateless(n)}).items()}
    )
    for each in counted.values():
        each.check()

    labels = {c.key: c.label for c in contenders}
    labels[STATELESS] = "no state: the same additions, to one array"
    title = f"{n:,} state{'s' * (n > 1)}"
    found.add_table(title, samples, labels, HAND, first_calls, slots=n)
    if not on_cpu():
        return
    for key, limits in GOALS.items():
        if n in limits and key in labels:
            text = f"{labels[key]} to by hand, {title}"
            found.add_goal(text, limits[n], samples, key, HAND)
    if n == 1000:
        ours, hand = (np.array(first_calls[key]) for key in ("storax.jit", HAND))
        again = Spread.of(hand / np.roll(hand, 1))
        text = f"first call, {labels['storax.jit']} to by hand, {title}"
        found.goals.append(Goal(text, 1.3, Spread.of(ours / hand), again=again))
    if n == 100 and "storax.jit" in labels:
        for key in PEERS:
            if key in labels:
                text = f"{labels[key]} to storax.jit, {title}"
                found.add_goal(text, 30, samples, key, "storax.jit", at_least=True, baseline=HAND)


def _first_call(slots: Slots) -> float:
    x = jnp.zeros(SHAPE)  # leaves the states as they are
    with without_old_objects():
        start = time.perf_counter()
        jax.block_until_ready(slots.step(x))
        return time.perf_counter() - start


def _stateless(n: int) -> Callable[[], jax.Array]:
    """A call of a jitted function that does as many additions, with nothing to remember."""
    program, x = jax.jit(lambda x: x + 1), jnp.zeros((n, *SHAPE))
    program(x)
    return lambda: program(x)


class _Counted:
    """Calls a contender, and knows what its slots must hold after that."""

    def __init__(self, slots: Slots):
        self.slots = slots
        self.x = jnp.ones(SHAPE)
        self.calls = 0

    def __call__(self) -> jax.Array:
        self.calls += 1
        return self.slots.step(self.x)

    def check(self, calls: int = 1) -> None:
        for _ in range(calls):
            out = self()
        expected = np.full(SHAPE, self.calls, np.float32)
        np.testing.assert_array_equal(out, expected.sum())
        for value in self.slots.read():
            np.testing.assert_array_equal(value, expected)
