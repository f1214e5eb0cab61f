"""Random programs that only lanes that take a branch can stand. `make soak` runs many more."""

import os
import time

import pytest

from random_programs.singular import (
    DERIVATIVES,
    Node,
    check,
    random_program,
    shrink,
    stands,
)

# Programs in each of so many tests, which workers share.
EACH, TESTS = (50, 10) if os.environ.get("STORAX_ALL") == "1" else (12, 4)
# Seconds for making a failing program smaller.
LIMIT = 60


@pytest.mark.timeout(600, method="thread")  # XLA hears of no signal
@pytest.mark.parametrize("seed", range(TESTS))
def test_singular_programs(seed):
    for number in range(EACH):
        program = random_program(f"{seed}/{number}")
        problem = check(program)
        if problem:
            end = time.monotonic() + LIMIT
            kind = problem[:12]
            fails = lambda p, end=end, kind=kind: (
                time.monotonic() < end and (check(p) or "").startswith(kind)
            )
            program = shrink(program, fails)
            pytest.fail(f"{program}\n\n{check(program)}\n\n{program!r}")


def test_programs_stand_and_differ():
    programs = [random_program(f"made/{number}") for number in range(200)]
    assert all(stands(p.piece) for p in programs)
    singular = [p for p in programs if p.piece.has(lambda n: n.kind == "singular")]
    assert len(set(map(str, singular))) > 100
    assert {p.derivative for p in programs} == set(DERIVATIVES)


def test_what_does_not_stand():
    root, loop = Node("singular", ("sqrt", "x")), Node("singular", ("loop", "x"))
    bump = Node("bump", ("zero", "1", True), (loop,))
    branch = lambda piece: Node("branch", ("x", "cond", False), (piece, Node("smooth")))
    assert not stands(root)
    assert stands(branch(root))
    assert not stands(branch(loop))  # it is JAX's
    assert stands(branch(bump))
    assert not stands(branch(Node("vmap", (1, 0, {"x": (0.0, 1.0)}), (root,))))


def test_a_failing_program_is_made_smaller():
    """One in which something takes a square root."""
    program = next(
        p
        for p in (random_program(f"made/{number}") for number in range(1000))
        if p.piece.has(lambda n: n.how == ("sqrt", "y")) and str(p).count("\n") > 8
    )
    less = shrink(program, lambda p: p.piece.has(lambda n: n.how == ("sqrt", "y")))
    assert str(less).count("\n") <= 4
    assert stands(less.piece)
