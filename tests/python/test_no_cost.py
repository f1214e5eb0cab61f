"""No cost without state: with storax imported and at work, JAX makes the same of programs without state."""

import difflib
import functools
import json
import subprocess
import sys

import pytest

import stateless


@functools.cache
def made(before):
    """Each program's jaxpr and StableHLO, from a process of its own that did this before."""
    done = subprocess.run(
        [sys.executable, stateless.__file__, before],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("before", ["import", "work"])
def test_programs_are_the_same(before):
    without, with_storax = made("nothing"), made(before)
    assert len(without) > 30 and without.keys() == with_storax.keys()
    for name in without:
        for a, b in zip(without[name], with_storax[name], strict=True):
            lines = difflib.unified_diff(a.splitlines(), b.splitlines(), "without", "with storax")
            assert a == b, "\n".join([name, *lines])


def test_a_difference_would_be_noticed():
    """In each of the programs, in both texts."""
    without, spoilt = made("nothing"), made("spoil")
    assert without.keys() == spoilt.keys()
    for name in without:
        for a, b in zip(without[name], spoilt[name], strict=True):
            assert a != b, name
