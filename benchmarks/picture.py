"""Pictures of what was found."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from report import Findings, Goal, number, seconds
from timing import AGAIN

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
    "stateless": "#c4c4c4",
}
STYLES = {
    "stateless": ":",
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
    if "sizes" in named:
        drawn.append(_save(_draw_sizes(named["sizes"]), folder / "sizes.png"))
    if any(f.goals for f in findings):
        drawn.append(_save(_draw_goals(findings), folder / "goals.png"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    # Without matplotlib's version, so that the same results make the same file.
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    return path


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", length=0, labelcolor=INK)


# --- What grows ----------------------------------------------------------------------------------------


def _draw_slots(found: Findings) -> Figure:
    return _draw_growth(
        found,
        "slots",
        lambda n: f"{n:,}",
        "states of f32[128], each read and written once per call",
        "Time of a call, by how state is kept",
    )


def _draw_sizes(found: Findings) -> Figure:
    return _draw_growth(
        found,
        "bytes",
        lambda n: f"{n} B" if n < 1024 else f"{n >> 10} KiB" if n < 1 << 20 else f"{n >> 20} MiB",
        "size of a state of which each call updates one element",
        "Time of a call, by how large the state is",
    )


def _draw_growth(
    found: Findings, by: str, text: Callable[[int], str], xlabel: str, title: str
) -> Figure:
    """Lines of time over what grows, which is in each table's `at[by]`."""
    labels = {row.key: row.label for table in found.tables for row in table.rows}
    labels.pop(AGAIN, None)
    counts = [table.at[by] for table in found.tables]
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    ax = figure.subplots()
    ends = []
    for key, label in labels.items():
        rows = {table.at[by]: table.row(key) for table in found.tables}
        points = [(n, row.time.median) for n, row in rows.items() if row]
        ours = key.startswith("storax")
        strong = ours or key == "hand"
        colour = COLOURS[key if ours else key.split("-")[0]]
        ax.plot(
            *zip(*points, strict=True),
            STYLES.get(key, "-"),
            color=colour,
            lw=2.8 if strong else 1.5,
            marker="o",
            ms=5.5 if strong else 3.5,
            zorder=3 if strong else 2,
        )
        ends.append((points[-1], f"{label}  {seconds(points[-1][1])}", colour, strong))
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(counts, [text(n) for n in counts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: seconds(y).replace(".00", "").replace(".0", ""))
    )
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", color="#e6e6e6", lw=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel(xlabel, color=INK)
    ax.set_title(title, loc="left", color=INK, fontweight="bold")
    _tidy(ax)
    _label_ends(ax, ends, x=1.3 * max(counts))
    return figure


def _label_ends(ax: Axes, ends: list[tuple[tuple, str, str, bool]], x: float) -> None:
    """Names lines at the right, beside where they end, but never two names in one place."""
    low, high = ax.get_ylim()
    line = (high / low) ** 0.04  # the height of a line of text
    ends = sorted(ends, key=lambda item: item[0][1])
    heights: list[float] = []
    for end, *_ in ends:
        heights.append(max(end[1], heights[-1] * line if heights else low))
    ceiling = high
    for i in reversed(range(len(ends))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] / line
    for (end, text, colour, strong), height in zip(ends, heights, strict=True):
        ax.annotate(
            text,
            end,
            (x, height),
            color=colour,
            fontsize=9,
            fontweight="bold" if strong else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )


# --- Goals ----------------------------------------------------------------------------------------


def _draw_goals(findings: Sequence[Findings]) -> Figure:
    groups = [f for f in findings if f.goals]
    lines = sum(len(f.goals) + 1.5 for f in groups)
    figure = Figure(figsize=(11, 0.8 + 0.24 * lines), layout="constrained")
    ax = figure.subplots()
    beside = ax.get_yaxis_transform()  # x in parts of the picture, y in lines
    y = 0.0
    for f in groups:
        ax.text(-0.01, y, f.title, transform=beside, ha="right", va="center", fontweight="bold")
        for goal in f.goals:
            y += 1
            _draw_goal(ax, y, goal)
        y += 1.5
    ax.axvline(1, color=INK, lw=1)
    ax.set(xscale="log", ylim=(y - 0.7, -0.9), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("measured, as a part of the goal: left of the line it is met", color=INK)
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
    beside = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 9}
    ax.text(-0.01, y, goal.text, ha="right", color=INK, **beside)
    sign = "≥" if goal.at_least else "≤"
    ax.text(1.14, y, number(goal.found.median), ha="right", color=colour, **beside)
    ax.text(1.16, y, f"{sign} {goal.limit:.3g} {goal.unit}", color=FAINT, **beside)
