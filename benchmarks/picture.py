"""Pictures of what was found."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from report import Findings, Goal, number, seconds

__all__ = ["draw"]

INK = "#222222"
FAINT = "#8a8a8a"
MET = "#1b7f4d"
MISSED = "#c8401f"
# By the part of a contender's key before its first hyphen.
COLOURS = {
    "hand": INK,
    "storax": "#d1495b",
    "storax.jit": "#8f1d5c",
    "ref": "#3a7ca5",
    "eqx": "#2a9d8f",
    "nnx": "#b58900",
    "io_callback": FAINT,
}
STYLES = {
    "ref-passed": "--",
    "eqx-jax.jit": "--",
    "nnx-tree": "--",
    "nnx-cached": ":",
    "nnx-partial": "-.",
}


def draw(findings: Sequence[Findings], folder: Path) -> list[Path]:
    """Draws what there is something to draw of; the files."""
    drawn = []
    named = {f.name: f for f in findings}
    if "slots" in named:
        drawn.append(_save(_draw_slots(named["slots"]), folder / "slots.png"))
    if any(f.goals for f in findings):
        drawn.append(_save(_draw_goals(findings), folder / "goals.png"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    # Without a date, so that the same results make the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", length=0, labelcolor=INK)


# --- Slots ----------------------------------------------------------------------------------------


def _draw_slots(found: Findings) -> Figure:
    tables = found.tables
    counts = [table.at["slots"] for table in tables]
    labels = {row.key: row.label for table in tables for row in table.rows if row.key != "again"}
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    ax = figure.subplots()
    ends = {}
    for key in labels:
        points = [(n, row.time) for n, t in zip(counts, tables, strict=True) if (row := t.row(key))]
        ours = key.startswith("storax")
        colour = COLOURS[key if ours else key.split("-")[0]]
        x = [n for n, _ in points]
        ax.fill_between(
            x,
            [t.low for _, t in points],
            [t.high for _, t in points],
            color=colour,
            alpha=0.08,
            lw=0,
        )
        ax.plot(
            x,
            [t.median for _, t in points],
            STYLES.get(key, "-"),
            color=colour,
            lw=2.6 if ours or key == "hand" else 1.4,
            marker="o",
            ms=5 if ours or key == "hand" else 3,
            zorder=3 if ours else 2,
        )
        at_100 = [t.median for n, t in points if n == 100]
        ends[key] = (at_100[0] if at_100 else points[-1][1].median, colour)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(counts, [f"{n:,}" for n in counts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _round_seconds(y)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", color="#e6e6e6", lw=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("states of f32[128], each read and written once per call", color=INK)
    ax.set_title("Time of a call", loc="left", color=INK, fontsize=13, fontweight="bold")
    _tidy(ax)
    _label_ends(ax, ends, labels, x=100 if max(counts) == 100 else max(counts))
    return figure


def _label_ends(
    ax: Axes, ends: dict[str, tuple[float, str]], labels: dict[str, str], x: float
) -> None:
    """Names lines at the right, beside where they end, but never two names on one line."""
    step = 1.27
    positions: dict[str, float] = {}
    floor = 0.0
    for key, (y, _) in sorted(ends.items(), key=lambda item: item[1][0]):
        floor = positions[key] = max(y, floor * step)
    for key, y in positions.items():
        end, colour = ends[key]
        ours = key.startswith("storax") or key == "hand"
        ax.annotate(
            f"{labels[key]}  {seconds(end)}",
            (x, end),
            (x * 1.25, y),
            color=colour,
            fontsize=9,
            fontweight="bold" if ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 4},
        )


def _round_seconds(x: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if x >= 0.999 * size:
            return f"{x / size:.0f} {unit}"
    return f"{x / 1e-9:.0f} ns"


# --- Goals ----------------------------------------------------------------------------------------


def _draw_goals(findings: Sequence[Findings]) -> Figure:
    groups = [f for f in findings if f.goals]
    lines = sum(len(f.goals) + 1.2 for f in groups)
    figure = Figure(figsize=(11, 0.6 + 0.27 * lines), layout="constrained")
    ax = figure.subplots()
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for f in groups:
        ax.text(0.0, y, f.title, transform=ax.get_yaxis_transform(), fontweight="bold", va="center")
        for goal in f.goals:
            y += 1
            _draw_goal(ax, y, goal)
            ticks.append((y, goal.text))
        y += 1.2
    ax.axvline(1, color=INK, lw=1)
    ax.set(xscale="log", ylim=(y - 0.4, -0.8))
    ax.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8.5)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(
        "measured, as a part of what the goal allows: left of the line it is met", color=INK
    )
    ax.grid(axis="x", color="#ececec", lw=0.8)
    ax.set_axisbelow(True)
    _tidy(ax)
    return figure


def _draw_goal(ax: Axes, y: float, goal: Goal) -> None:
    def part(x: float) -> float:
        return goal.limit / x if goal.at_least else x / goal.limit

    colour = MET if goal.met else MISSED
    low, high = sorted((part(goal.found.low), part(goal.found.high)))
    ax.plot([low, high], [y, y], color=colour, lw=5, alpha=0.3, solid_capstyle="butt")
    ax.plot([part(goal.found.median)], [y], "o", color=colour, ms=5.5)
    sign = "≥" if goal.at_least else "≤"
    text = f"{number(goal.found.median)} {goal.unit}   {sign} {goal.limit:.3g}"
    ax.text(
        1.01, y, text, transform=ax.get_yaxis_transform(), color=colour, fontsize=8.5, va="center"
    )
