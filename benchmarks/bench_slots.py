"""One read-modify-write of each of N states per call: what state costs the caller of a program."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from contenders import CONTENDERS, HAND, SHAPE, Contender, Slots
from report import Findings
from timing import AGAIN, Clock, repeated

GOALS = {
    "storax": {1: 1.2, 10: 0.6, 100: 0.35},
    "storax.jit": {1: 1.15, 10: 1 / 2, 100: 1 / 8, 1000: 1 / 9},
}
# storax.jit against its peers, with 100 slots.
PEERS = {"ref": 30, "eqx": 30, "nnx": 30}


def measure(quick: bool, large: bool) -> Findings:
    found = Findings(
        "slots",
        "One read-modify-write of each of N states per call",
        "A call of a jitted function adds its argument to each of N states of f32[128], and returns "
        "a sum. Calls follow one another without waiting for the results, as in a training loop. "
        "The first call traces and compiles.",
    )
    made_before: set[str] = set()
    for n in (1, 10, 100, *([1000] if large else [])):
        _measure(found, n, quick, made_before)
    return found


def _measure(found: Findings, n: int, quick: bool, unavailable: set[str]) -> None:
    contenders = [c for c in CONTENDERS if c.many or n < 1000]
    first_calls: dict[str, list[float]] = {}
    slots: dict[str, Slots] = {}
    for _ in range(1 if quick else 3):
        for c in contenders:
            if c.key not in unavailable and not _first_call(c, n, slots, first_calls):
                unavailable.add(c.key)
                found.notes.append(f"Left out: {c.label}.")
    hand = next(c for c in contenders if c.key == HAND)
    slots[AGAIN] = hand.make(n)

    x = jnp.ones(SHAPE)
    counted = {key: _Counted(s, x) for key, s in slots.items()}
    for each in counted.values():
        each.check(calls=3)
    clock = Clock(rounds=20, seconds=0.0005) if quick else Clock(rounds=300, seconds=0.0005)
    if n >= 1000:
        clock = Clock(clock.rounds // 5, clock.seconds)
    samples = clock.measure({key: repeated(each) for key, each in counted.items()})
    for each in counted.values():
        each.check()

    labels = {c.key: c.label for c in contenders}
    title = f"{n:,} state{'s' * (n > 1)}"
    found.add_table(title, samples, labels, HAND, first_calls, slots=n)
    for key, limits in GOALS.items():
        if n in limits:
            text = f"{labels[key]} to by hand, {title}"
            found.add_goal(text, limits[n], samples, key, HAND)
    if n == 100:
        for key, limit in PEERS.items():
            text = f"{labels[key]} to storax.jit, {title}"
            found.add_goal(text, limit, samples, key, "storax.jit", at_least=True, baseline=HAND)


def _first_call(
    c: Contender, n: int, slots: dict[str, Slots], first_calls: dict[str, list[float]]
) -> bool:
    """Makes a contender anew and calls it once; False if it isn't installed, or not there yet."""
    try:
        slots[c.key] = c.make(n)
    except (ImportError, AttributeError) as e:
        print(f"Left out: {c.label} ({e})", flush=True)
        return False
    x = jnp.zeros(SHAPE)
    start = time.perf_counter()
    jax.block_until_ready(slots[c.key].step(x))
    first_calls.setdefault(c.key, []).append(time.perf_counter() - start)
    return True


class _Counted:
    """Calls a contender, and knows what its slots must hold after that."""

    def __init__(self, slots: Slots, x: jax.Array):
        self.slots = slots
        self.x = x
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
