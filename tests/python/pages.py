"""The Python examples of a Markdown page, run as its reader would run them, one after the other.

They share their names, as the cells of a notebook do. What one prints is in the ```text block after it,
where a ... stands for anything; an exception is printed as Python's last line about it. Examples that are
followed by one output are versions of one program: each starts with the same names, and each prints it.

An example that is marked ```python old is for Equinox 0.5 to 0.10. It runs as it stands, with storax in the
place of `equinox.experimental`, which is no more.
"""

import contextlib
import doctest
import io
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import storax

FENCED = re.compile(r"^```(\w*) ?(.*)\n((?s:.*?))^```$", re.MULTILINE)
CHECKER = doctest.OutputChecker()
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Example:
    code: str
    line: int  # of the page, where the code begins
    mark: str


@dataclass
class Versions:
    """Examples with the output that each of them has."""

    examples: list[Example]
    output: str


def examples_of(page: Path) -> Iterator[Versions]:
    text = page.read_text()
    waiting: list[Example] = []
    for fenced in FENCED.finditer(text):
        kind, mark, content = fenced.groups()
        line = text.count("\n", 0, fenced.start()) + 2
        if kind == "python":
            waiting.append(Example(content, line, mark))
        elif kind == "text":
            assert waiting, f"{page.name}:{line}: the output of no example"
            yield Versions(waiting, content)
            waiting = []
    assert not waiting, f"{page.name}:{waiting[0].line}: no output follows this example"


def run(page: Path) -> None:
    """Runs a page's examples, in the folder that is the current one."""
    names: dict[str, Any] = {"__name__": page.stem}
    for versions in examples_of(page):
        before = dict(names)
        for example in versions.examples:
            names.clear()  # and not another one: it is what functions look up their globals in
            names.update(before)
            _run(example, names, versions.output, page)


def _run(example: Example, names: dict[str, Any], output: str, page: Path) -> None:
    # Tracebacks then name the line of the page.
    code = compile("\n" * (example.line - 1) + example.code, page, "exec")
    raised = None
    with contextlib.redirect_stdout(io.StringIO()) as printed, _experimental(example.mark):
        try:
            exec(code, names)
        except Exception as e:
            raised = e
            print(traceback.format_exception_only(e)[0])  # without JAX's notes
    got = printed.getvalue()
    if not CHECKER.check_output(output, got, LENIENT):
        where = f"{page.name}:{example.line}"
        raise AssertionError(f"{where}: it prints\n{got}\nand not\n{output}") from raised


def _experimental(mark: str) -> contextlib.AbstractContextManager:
    if mark != "old":
        return contextlib.nullcontext()
    return mock.patch.dict(sys.modules, {"equinox.experimental": storax})
