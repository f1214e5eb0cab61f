"""What a benchmark found, as tables in Markdown and as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timing import AGAIN, Samples, Spread

__all__ = ["Findings", "Goal", "Row", "Table", "goals_as_markdown", "number", "seconds"]


@dataclass
class Row:
    """A contender in a table. Its ratio is to the table's baseline, round by round."""

    key: str
    label: str
    time: Spread  # in seconds
    ratio: Spread
    first_call: Spread | None = None  # tracing, compiling and running, in seconds


@dataclass
class Table:
    title: str
    rows: list[Row]
    at: dict[str, Any] = field(default_factory=dict)  # how it differs from the group's other tables

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)


@dataclass
class Goal:
    """A bound, and what was measured."""

    text: str
    limit: float
    found: Spread
    at_least: bool = False  # a lower bound
    unit: str = ""
    again: Spread | None = None  # the baseline's twin to the baseline

    @property
    def met(self) -> bool:
        median = self.found.median
        return median >= self.limit if self.at_least else median <= self.limit


@dataclass
class Findings:
    """All that one benchmark found."""

    name: str
    title: str
    about: str
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def leave_out(self, contender: str, why: str) -> None:
        print(f"Left out: {contender}: {why}.", flush=True)
        self.notes.append(f"Left out: {contender}: {why}.")

    def add_table(
        self,
        title: str,
        samples: Samples,
        labels: Mapping[str, str],
        baseline: str,
        first_calls: Mapping[str, Sequence[float]] | None = None,
        **at: Any,
    ) -> None:
        rows = [
            Row(
                key,
                f"{labels[baseline]}, again" if key == AGAIN else labels[key],
                samples.time(key),
                samples.ratio(key, baseline),
                Spread.of(first_calls[key]) if first_calls and key in first_calls else None,
            )
            for key in samples.seconds
        ]
        self.tables.append(Table(title, rows, at))

    def add_goal(
        self,
        text: str,
        limit: float,
        samples: Samples,
        name: str,
        to: str,
        *,
        at_least: bool = False,
        baseline: str | None = None,
    ) -> None:
        """A bound on the ratio of two contenders. The twin is that of `baseline`, or of `to`."""
        again = samples.ratio(AGAIN, baseline or to)
        self.goals.append(Goal(text, limit, samples.ratio(name, to), at_least, again=again))

    def as_markdown(self) -> str:
        """All but the goals."""
        parts = [f"## {self.title}", self.about]
        for table in self.tables:
            parts += [f"### {table.title}", _rows_as_markdown(table.rows)]
        parts += [f"*{note}*" for note in self.notes]
        return "\n\n".join(parts)

    def save(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / f"{self.name}.json").write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> "Findings":
        parts = json.loads(path.read_text())
        tables = [
            Table(t["title"], [_row(r) for r in t["rows"]], t["at"]) for t in parts.pop("tables")
        ]
        goals = [
            Goal(**{**g, "found": Spread(**g["found"]), "again": _spread(g["again"])})
            for g in parts.pop("goals")
        ]
        return cls(**parts, tables=tables, goals=goals)


def _spread(parts: dict[str, float] | None) -> Spread | None:
    return None if parts is None else Spread(**parts)


def _row(parts: dict[str, Any]) -> Row:
    spreads = {key: _spread(parts[key]) for key in ("time", "ratio", "first_call")}
    return Row(parts["key"], parts["label"], **spreads)


# --- Markdown -------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Three significant digits."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def seconds(x: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if x >= size:
            return f"{number(x / size)} {unit}"
    return f"{number(x / 1e-9)} ns"


def _with_quartiles(s: Spread) -> str:
    return f"{number(s.median)} [{number(s.low)}, {number(s.high)}]"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it reads well as plain text too; all but the first column to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"

    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _rows_as_markdown(rows: Sequence[Row]) -> str:
    header = ["", "time", "ratio [quartiles]"]
    cells = [[row.label, seconds(row.time.median), _with_quartiles(row.ratio)] for row in rows]
    if any(row.first_call for row in rows):
        header.append("first call")
        for row, line in zip(rows, cells, strict=True):
            line.append(seconds(row.first_call.median) if row.first_call else "")
    return _markdown_table(header, cells)


def goals_as_markdown(goals: Sequence[Goal]) -> str:
    header = ["", "goal", "measured [quartiles]", "A/A", ""]
    cells = [
        [
            goal.text,
            f"{'≥' if goal.at_least else '≤'} {goal.limit:.3g} {goal.unit}".rstrip(),
            _with_quartiles(goal.found),
            _with_quartiles(goal.again) if goal.again else "",
            "met" if goal.met else "MISSED",
        ]
        for goal in goals
    ]
    return _markdown_table(header, cells)
