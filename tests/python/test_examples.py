"""The examples, the quick parts of them: `examples/demo.py` checks the rest as it runs."""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def test_manual():
    import manual

    assert manual.count_in_a_scan().tolist() == [1, 2, 3, 4, 5]
    same, by_lane = manual.state_under_vmap()
    assert same.tolist() == [0, 0]
    assert by_lane.tolist() == [1.0, 2.0]


def test_solver_counts_its_calls():
    for library in ("diffrax", "tqdm"):
        pytest.importorskip(library)
    import counting_solver

    def check(solution, calls, t1):
        assert calls.count == counting_solver.calls_of(solution)
        assert calls.t == t1
        assert jnp.array_equal(calls.y, solution.ys[-1])

    field = counting_solver.VanDerPol(mu=jnp.linspace(1, 5, 2000))
    for t1 in (0.5, 20.0):
        solution, calls = counting_solver.solve_and_count(field, t1)
        check(solution, calls, t1)
    assert solution.stats["num_rejected_steps"] > 0
    solution, calls, glances = counting_solver.solve_and_watch(field, 400.0)
    check(solution, calls, 400.0)
    assert glances > 0


@pytest.mark.parametrize("adjoint", ["RecursiveCheckpointAdjoint", "DirectAdjoint"])
def test_gradients_of_a_solve_with_state(adjoint):
    """Of as many Euler steps in each lane as it asks for, on a state of its own."""
    diffrax = pytest.importorskip("diffrax")
    calls, lengths = storax.StateIndex(), jnp.array([1.0, 2.0, 4.0])
    jax.vmap(lambda x: storax.set_state(calls, x))(0 * lengths)

    def field(t, y, args):
        n = storax.get_state(calls, 0 * y) + 1
        storax.set_state(calls, jax.lax.stop_gradient(n))
        return y * n

    def solve(y, length):
        term, how = diffrax.ODETerm(field), getattr(diffrax, adjoint)()
        solution = diffrax.diffeqsolve(term, diffrax.Euler(), 0.0, length, 1.0, y, adjoint=how)
        return solution.ys[-1]

    end, slope = jax.jit(jax.vmap(jax.value_and_grad(solve)))(jnp.full(3, 2.0), lengths)
    assert slope.tolist() == [2, 2 * 3, 2 * 3 * 4 * 5]
    assert end.tolist() == [2 * x for x in slope.tolist()]
    assert jax.vmap(lambda x: storax.get_state(calls, x))(0 * lengths).tolist() == [1, 2, 4]


def test_sampler_counts_its_calls():
    pytest.importorskip("blackjax")
    import counting_sampler

    counted, reported = counting_sampler.sample_and_count(num_chains=2)
    assert len(set(reported.tolist())) == 2
    assert jnp.array_equal(counted, reported)


def test_digits():
    for library in ("optax", "sklearn", "tqdm"):
        pytest.importorskip(library)
    import digits

    training, held_out = digits.load()
    training = digits.Data(*(x[:256] for x in training))
    statistics = []

    def after_step(model, loss):
        assert np.isfinite(loss)
        statistics.append(digits.get_statistics(digits.batch_norms(model)[0]))

    model = digits.ConvNet(jax.random.key(0))
    before = digits.accuracy(eqx.nn.inference_mode(model), held_out)
    model = digits.train(model, training, epochs=5, batch_size=32, after_step=after_step)
    frozen = eqx.nn.inference_mode(model)
    assert digits.accuracy(frozen, held_out) > max(0.6, before)
    assert len(statistics) == 5 * 8
    means = np.stack([mean for mean, _ in statistics])
    assert np.all(np.any(np.diff(means, axis=0) != 0, axis=1))  # every step moved them

    norms = digits.batch_norms(model)
    assert len(norms) == 3
    mean, var = digits.get_statistics(norms[0])
    logits = digits.predict(frozen, held_out.images)
    digits.set_statistics(norms[0], 0 * mean, 0 * var + 1)
    assert not jnp.allclose(digits.predict(frozen, held_out.images), logits)
    digits.set_statistics(norms[0], mean, var)
    assert jnp.array_equal(digits.predict(frozen, held_out.images), logits)
