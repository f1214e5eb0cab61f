"""State inside a library that knows nothing of it: a vector field that counts its own calls.

diffrax calls the vector field deep inside a `while_loop` in a `while_loop`. No counter is threaded
through the solver; the field keeps it as state, along with what it was last called with.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import storax
from jax.typing import ArrayLike
from tqdm import tqdm

DT0 = 0.01
Y0 = (2.0, 0.0)
BAR_FORMAT = "{desc} {percentage:3.0f}% |{bar:30}| t = {n:,.0f} of {total:,.0f}{postfix}"


class Calls(NamedTuple):
    """What the vector field remembers: the number of its calls, and the arguments of the last."""

    count: jax.Array
    t: jax.Array
    y: jax.Array


NO_CALLS = Calls(count=jnp.array(0), t=jnp.array(0.0), y=jnp.zeros(2))


class VanDerPol(eqx.Module):
    """The Van der Pol oscillator, x'' = mu (1 - x^2) x' - x."""

    mu: float
    calls: storax.StateIndex

    def __init__(self, mu: float):
        self.mu = mu
        self.calls = storax.StateIndex()
        storax.set_state(self.calls, NO_CALLS)

    def __call__(self, t, y, args):
        calls = storax.get_state(self.calls, like=NO_CALLS)
        storax.set_state(self.calls, Calls(calls.count + 1, t, y))
        x, v = y
        return jnp.stack([v, self.mu * (1 - x**2) * v - x])


@eqx.filter_jit
def solve(field: VanDerPol, t1: ArrayLike) -> diffrax.Solution:
    """Integrates from 0 to `t1` with steps as long as the tolerance allows."""
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=t1,
        dt0=DT0,
        y0=jnp.array(Y0),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        max_steps=None,
    )


def expected_calls(solution: diffrax.Solution) -> int:
    """How often diffrax, by its own account, has called the vector field.

    Tsit5 has seven stages, and the last of a step is the first of the next, accepted or not: six
    calls a step, and one more to begin with. (`DT0` is so short that the first step is accepted.)
    """
    return 6 * int(solution.stats["num_steps"]) + 1


def solve_and_count(field: VanDerPol, t1: float) -> tuple[diffrax.Solution, Calls]:
    """Solves, and returns also what the vector field remembers of it."""
    storax.set_state(field.calls, NO_CALLS)
    solution = solve(field, jnp.array(t1))
    return solution, storax.get_state(field.calls, like=NO_CALLS)


def solve_and_watch(field: VanDerPol, t1: float) -> tuple[diffrax.Solution, Calls, int]:
    """The same in another thread, while this one reads the state and shows how far it is.

    Returns also how often it was seen on its way.
    """
    storax.set_state(field.calls, NO_CALLS)
    glances = 0
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=t1, desc="  solving", bar_format=BAR_FORMAT) as bar,
    ):
        solving = pool.submit(lambda: jax.block_until_ready(solve(field, jnp.array(t1))))
        running = True
        while running:
            running = bool(wait([solving], timeout=0.05).not_done)
            calls = storax.get_state(field.calls, like=NO_CALLS)
            glances += 0 < calls.t < t1
            bar.n = float(calls.t)
            bar.set_postfix_str(f"{int(calls.count):,} calls")
    return solving.result(), calls, glances
