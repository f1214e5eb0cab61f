"""Shows what storax does, and checks each claim as it goes: `python examples/demo.py`.

Prints one line for each claim, draws `demo.png`, and exits with status 1 if any claim isn't so.
"""

import contextlib
import sys
import time
import traceback
from pathlib import Path

import counting_sampler
import counting_solver
import diffrax
import digits
import equinox as eqx
import faster
import jax
import jax.numpy as jnp
import manual
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

PICTURE = Path("demo.png")
EPOCHS = 15


class Report:
    """Collects what was claimed, whether it was so, and how long each section took."""

    def __init__(self):
        self.sections: list[tuple[str, float]] = []
        self.claims: list[tuple[str, bool]] = []

    def check(self, claim: str, holds: bool) -> None:
        self.claims.append((claim, bool(holds)))
        print(f"  {'✓' if holds else '✗'} {claim}", flush=True)

    @contextlib.contextmanager
    def section(self, title: str):
        print(f"\n{title}\n{'─' * len(title)}", flush=True)
        start = time.perf_counter()
        try:
            yield
        except Exception as e:
            traceback.print_exc()
            self.check(f"ran to its end, without {type(e).__name__}", False)
        self.sections.append((title, time.perf_counter() - start))

    def finish(self) -> int:
        """Prints a summary; the exit status."""
        failed = [claim for claim, holds in self.claims if not holds]
        print("\nSummary\n───────")
        for title, seconds in self.sections:
            print(f"  {title:<62} {seconds:5.1f} s")
        print(f"  {'Total':<62} {sum(s for _, s in self.sections):5.1f} s")
        print(f"\n  {len(self.claims) - len(failed)} of {len(self.claims)} claims hold.")
        for claim in failed:
            print(f"  ✗ {claim}")
        return 1 if failed else 0


def show_manual(report: Report) -> None:
    out = manual.count_in_a_scan()
    report.check(f"a scan without a carry counts: {out}", out.tolist() == [1, 2, 3, 4, 5])
    same, by_lane = manual.state_under_vmap()
    report.check(
        f"under vmap, state is kept for each lane: {by_lane}, or for all: {same}",
        by_lane.tolist() == [1.0, 2.0] and same.tolist() == [0, 0],
    )


# --- Digits ---------------------------------------------------------------------------------------


class History:
    """What is seen of a training run, from outside."""

    def __init__(self, held_out: digits.Data):
        self.held_out = held_out
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.means: list[np.ndarray] = []
        self.vars: list[np.ndarray] = []

    def after_step(self, model: digits.ConvNet, loss: float) -> None:
        mean, var = digits.get_statistics(digits.batch_norms(model)[0])
        self.losses.append(loss)
        self.means.append(np.asarray(mean))
        self.vars.append(np.asarray(var))

    def after_epoch(self, model: digits.ConvNet) -> None:
        frozen = eqx.nn.inference_mode(model)
        self.accuracies.append(digits.accuracy(frozen, self.held_out))


def show_digits(report: Report) -> None:
    training, held_out = digits.load()
    history = History(held_out)
    model = digits.train(
        digits.ConvNet(jax.random.key(0)),
        training,
        epochs=EPOCHS,
        after_step=history.after_step,
        after_epoch=history.after_epoch,
    )
    draw(history)
    print(f"  drawn: {PICTURE}")

    # Its state is frozen: get only, and an input of the compiled program.
    frozen = eqx.nn.inference_mode(model)
    accuracy = digits.accuracy(frozen, held_out)
    report.check(
        f"state frozen, {accuracy:.1%} of {len(held_out.labels)} held-out images are recognised "
        "(at least 97%)",
        accuracy >= 0.97,
    )

    images = held_out.images[:100]
    batched = digits.predict(frozen, images)
    classify = eqx.filter_jit(frozen)
    single = jnp.stack([classify(image) for image in images])
    report.check(
        "images classified one at a time get the same logits as in a batch",
        jnp.allclose(batched, single, rtol=1e-4, atol=1e-4),
    )

    show_that_state_matters(report, model, frozen, held_out)

    training_hlo = eqx.filter_jit(digits.loss_fn).lower(model, *held_out).as_text()
    frozen_hlo = digits.predict.lower(frozen, images).as_text()
    in_training, in_inference = (x.count("custom_call") for x in (training_hlo, frozen_hlo))
    report.check(
        f"custom calls in the network's program: {in_training} in training, {in_inference} frozen",
        in_training > 0 and in_inference == 0,
    )


def show_that_state_matters(
    report: Report, model: digits.ConvNet, frozen: digits.ConvNet, held_out: digits.Data
) -> None:
    """Sets the state of the trained model, whose frozen copy sees it."""
    before = digits.accuracy(frozen, held_out)
    norms = digits.batch_norms(model)
    statistics = [digits.get_statistics(norm) for norm in norms]
    for norm in norms:
        digits.set_statistics(norm, jnp.zeros(norm.input_size), jnp.ones(norm.input_size))
    reset = digits.accuracy(frozen, held_out)
    for norm, (mean, var) in zip(norms, statistics, strict=True):
        digits.set_statistics(norm, mean, var)
    restored = digits.accuracy(frozen, held_out)
    report.check(
        f"with the running statistics reset to mean 0 and variance 1: {reset:.1%}",
        reset <= before - 0.1,
    )
    report.check(f"with the running statistics restored: {restored:.1%}", restored == before)


def draw(history: History) -> None:
    steps = np.arange(1, len(history.losses) + 1)
    epochs = np.arange(1, len(history.accuracies) + 1) * (len(steps) / len(history.accuracies))
    channels = mpl.colormaps["viridis"](np.linspace(0, 0.9, history.means[0].size))

    style = {
        "axes.grid": True,
        "axes.prop_cycle": mpl.cycler(color=channels),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "grid.alpha": 0.3,
        "lines.linewidth": 1.2,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 7), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        (loss, accuracy), (mean, var) = figure.subplots(2, 2, sharex=True)
        loss.semilogy(steps, history.losses)
        loss.set_title("Training loss")
        loss.set_ylabel("cross-entropy")
        accuracy.plot(epochs, 100 * np.array(history.accuracies), "o-", markersize=4)
        accuracy.set_ylim(top=101)
        accuracy.axhline(97, color="0.5", linestyle="--", linewidth=1)
        accuracy.annotate("97%", (steps[-1], 97), xytext=(0, 3), textcoords="offset points")
        accuracy.yaxis.set_major_locator(MultipleLocator(5))
        accuracy.yaxis.set_major_formatter("{x:.0f}%")
        accuracy.set_title("Accuracy on held-out images, state frozen")
        mean.plot(steps, history.means)
        mean.set_title("State: running means of the first BatchNorm")
        mean.set_ylabel("one line for each channel")
        mean.set_xlabel("step")
        var.semilogy(steps, history.vars)
        var.set_title("State: running variances of the first BatchNorm")
        var.set_xlabel("step")
        figure.savefig(PICTURE, dpi=150)


# --- State inside of libraries --------------------------------------------------------------------


def show_solver(report: Report) -> None:
    field = counting_solver.VanDerPol(mu=jnp.linspace(1, 5, 2000))
    solution, calls = counting_solver.solve_and_count(field, t1=20.0)
    report_solution(report, solution, calls)
    print("\n  A longer one in another thread, watched from this one through its state:")
    solution, calls, glances = counting_solver.solve_and_watch(field, t1=1000.0)
    report_solution(report, solution, calls)
    report.check(f"the running solver was seen on its way {glances} times", glances > 0)


def report_solution(
    report: Report, solution: diffrax.Solution, calls: counting_solver.Calls
) -> None:
    steps, rejected = (int(solution.stats[f"num_{x}"]) for x in ("steps", "rejected_steps"))
    expected = counting_solver.calls_of(solution)
    print(f"  diffrax reports {steps:,} steps, {rejected:,} of them rejected: {expected:,} calls")
    report.check(f"the vector field counted {int(calls.count):,}", calls.count == expected)
    report.check(
        f"its last call was at t = {calls.t:g}, with the solution for an argument",
        calls.t == solution.t1 and jnp.array_equal(calls.y, solution.ys[-1]),
    )


def show_sampler(report: Report) -> None:
    counted, reported = counting_sampler.sample_and_count(num_chains=4)
    print(f"  blackjax reports  {reported}\n  we counted        {counted}")
    report.check("each of four chains under one vmap counted its own", (counted == reported).all())


# --- Speed ----------------------------------------------------------------------------------------


def show_speed(report: Report) -> None:
    training, _ = digits.load()
    runs = faster.race(training, steps=400)
    ours = runs[faster.STORAX_JIT]
    for name, run in runs.items():
        micros = 1e6 * faster.typical(run)
        print(f"  {name:<30} {micros:6.0f} us a step, loss {run.losses[-1]:.5f}")
    for name in (faster.PLAIN_JIT, faster.EQUINOX):
        times = faster.typical(runs[name]) / faster.typical(ours)
        report.check(f"storax.jit is {times:.1f} times as fast as {name}", times > 1)
    agree = np.allclose(ours.losses, runs[faster.PLAIN_JIT].losses, rtol=1e-3, atol=1e-4)
    report.check(f"all {len(ours.losses)} losses agree with those of plain jit", agree)


def main() -> int:
    report = Report()
    with report.section("1. The manual page's examples, with `import storax as eqxe`"):
        show_manual(report)
    with report.section("2. Handwritten digits: BatchNorm, Equinox and optax"):
        show_digits(report)
    with report.section("3. State in a diffrax solve: calls of the vector field"):
        show_solver(report)
    with report.section("4. State in blackjax chains: calls of the log-density"):
        show_sampler(report)
    with report.section("5. storax.jit: the same training step, faster"):
        show_speed(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
