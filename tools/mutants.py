"""Takes each rule, wrapper and check out of storax in turn, and names a test that notices: `make mutants`.

Each mutant is an edit of one file, in a copy of the tree; the text it replaces must be there exactly once.
The tests named with it run first; in the end, for those that none of them noticed, the whole suite. What
nothing notices is a test that is missing, or code that is not needed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from mutants_list import MUTANTS, Mutant

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Seconds for the tests of one mutant: one that hangs is noticed too.
LIMIT = 300
# An editable install would bring in the tree it was made from, whatever is in PYTHONPATH; in the
# processes that tests start, too.
SITE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""
RUN = """
import importlib.util, sys
import pytest
assert importlib.util.find_spec("storax").origin.startswith(sys.argv[1])
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
"""


def copy_tree(to: str) -> None:
    """The package, with its extension, and the tests."""
    import storax._core

    for folder in ("python", "tests", "tools", "examples", "docs", "benchmarks"):
        shutil.copytree(
            os.path.join(ROOT, folder),
            os.path.join(to, folder),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(os.path.join(ROOT, name), to)
    shutil.copy(storax._core.__file__, os.path.join(to, "python", "storax"))
    with open(os.path.join(to, "python", "sitecustomize.py"), "w") as f:
        f.write(SITE)


def run_tests(tree: str, selection: list[str], limit: int = LIMIT) -> str | None:
    """The first test that fails, or how else the tests went wrong."""
    paths = [os.path.join(tree, p) for p in ("python", "tests/python")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, tree, *selection]
    try:
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"more than {limit} s"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py\S*)", done.stdout, re.MULTILINE)
    if found:
        return found[1]
    if done.returncode in (4, 5):  # pytest found no such test
        raise SystemExit(f"{selection}: {done.stdout}{done.stderr}")
    return f"the tests end with {done.returncode}: {(done.stdout + done.stderr)[-200:]!r}"


def pytest_arguments(tests: str) -> list[str]:
    """From "masked jit/calls -k while": files of tests/python, and options."""
    files, *options = re.split(r" (?=-)", tests)
    parts = [os.path.split(name) for name in files.split()]
    return [
        *(os.path.join("tests", "python", folder, f"test_{name}.py") for folder, name in parts),
        *(part for option in options for part in option.split(" ", 1)),
    ]


def run_mutant(tree: str, mutant: Mutant, selection: list[str], limit: int = LIMIT) -> str | None:
    """The test that notices, if one does."""
    path = os.path.join(tree, "python", "storax", mutant.file)
    with open(path) as f:
        original = f.read()
    if original.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} has {original.count(mutant.old)} times:\n{mutant.old}"
        )
    with open(path, "w") as f:
        f.write(original.replace(mutant.old, mutant.new))
    try:
        return run_tests(tree, selection, limit)
    finally:
        with open(path, "w") as f:
            f.write(original)


def run_all(tree: str, mutants: list[Mutant], whole_suite: bool) -> list[Mutant]:
    """Those that nothing notices."""
    known_to_pass, alive = set(), []
    for mutant in mutants:
        selection = pytest_arguments(mutant.tests)
        if mutant.tests not in known_to_pass:
            if failed := run_tests(tree, selection):
                raise SystemExit(f"{mutant.tests}: {failed}, without any mutant")
            known_to_pass.add(mutant.tests)
        noticed_by = run_mutant(tree, mutant, selection)
        if noticed_by is None:
            alive.append(mutant)
        else:
            print(f"{mutant.name:<64} {noticed_by}", flush=True)
    if not whole_suite:
        return alive
    unnoticed = []
    for mutant in alive:
        noticed_by = run_mutant(tree, mutant, ["tests/python"], 3600)
        print(f"{mutant.name:<64} {noticed_by or 'NOTHING'}", flush=True)
        if noticed_by is None:
            unnoticed.append(mutant)
    return unnoticed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only the mutants whose names match this expression")
    parser.add_argument("--quick", action="store_true", help="without the whole suite")
    args = parser.parse_args()
    import jax

    version = jax.__version_info__[:2]
    mutants = [m for m in MUTANTS if re.search(args.k, m.name) and version >= m.since]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as tree:
        tree = os.path.realpath(tree)
        copy_tree(tree)
        alive = run_all(tree, mutants, not args.quick)
    minutes = (time.monotonic() - started) / 60
    print(f"{len(mutants) - len(alive)} of {len(mutants)} noticed, {minutes:.0f} min")
    for mutant in alive:
        print(f"Nothing notices: {mutant.name}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
