"""State inside a library that knows nothing of it: a vector field that counts its own calls.

diffrax calls the vector field deep inside a loop in a loop. No counter is threaded through the
solver: the field keeps it as state, along with the arguments of its last call.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from tqdm import tqdm

import storax

FIRST_STEP = 0.001


class Calls(NamedTuple):
    """What the vector field remembers: how often it was called, and its last arguments."""

    count: jax.Array
    t: jax.Array
    y: jax.Array


class VanDerPol(eqx.Module):
    """Oscillators x'' = mu (1 - x^2) x' - x, one for each mu."""

    mu: jax.Array
    calls: storax.StateIndex

    def __init__(self, mu: jax.Array):
        self.mu = mu
        self.calls = storax.StateIndex()
        self.reset()

    @property
    def start(self) -> jax.Array:
        return jnp.stack([2 * jnp.ones_like(self.mu), jnp.zeros_like(self.mu)])

    @property
    def no_calls(self) -> Calls:
        return Calls(count=jnp.array(0), t=jnp.array(0.0), y=self.start)

    def reset(self) -> None:
        storax.set_state(self.calls, self.no_calls)

    def last_calls(self) -> Calls:
        return storax.get_state(self.calls, like=self.no_calls)

    def __call__(self, t, y, args):
        storax.set_state(self.calls, Calls(self.last_calls().count + 1, t, y))
        x, v = y
        return jnp.stack([v, self.mu * (1 - x**2) * v - x])


@eqx.filter_jit
def solve(field: VanDerPol, t1: jax.Array) -> diffrax.Solution:
    """Integrates from 0 to `t1`, in steps as long as the tolerance allows."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=t1,
        dt0=FIRST_STEP,
        y0=field.start,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        max_steps=1_000_000,
    )


def calls_of(solution: diffrax.Solution) -> int:
    """How often diffrax, by its own account, has called the vector field.

    Tsit5 has seven stages, and reuses the last of an accepted step as the first of the next: six
    calls a step, and one to begin with. (The first step is too short to be rejected.)
    """
    return 6 * int(solution.stats["num_steps"]) + 1


def solve_and_count(field: VanDerPol, t1: float) -> tuple[diffrax.Solution, Calls]:
    """Solves, and returns also what the vector field remembers of it."""
    field.reset()
    solution = solve(field, jnp.array(t1))
    return solution, field.last_calls()


def solve_and_watch(field: VanDerPol, t1: float) -> tuple[diffrax.Solution, Calls, int]:
    """The same in another thread, while this one reads the state and shows how far it is.

    Returns also how often it was seen on its way.
    """
    field.reset()
    glances = 0
    bar_format = "  {desc} {percentage:3.0f}% |{bar:30}| t = {n:,.0f} of {total:,.0f}{postfix}"
    with ThreadPoolExecutor(1) as pool, tqdm(total=t1, bar_format=bar_format) as bar:
        solving = pool.submit(lambda: jax.block_until_ready(solve(field, jnp.array(t1))))
        running = True
        while running:
            running = bool(wait([solving], timeout=0.02).not_done)
            calls = field.last_calls()
            bar.n = float(calls.t)
            glances += 0 < bar.n < t1
            bar.set_postfix_str(f"{int(calls.count):,} calls")
    return solving.result(), calls, glances
