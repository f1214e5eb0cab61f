"""Settings every test runs under, and what tests of several subjects share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import functools
import gc
import sys

import jax
import pytest

import storax

# STORAX_JIT=packed or pure: where a test says `jax.jit`, `storax.jit` takes its place.
_FORM = os.environ.get("STORAX_JIT")
_HERE = os.path.dirname(os.path.abspath(__file__))
_jax_jit = jax.jit


@functools.wraps(jax.jit)
def _storax_jit(fun=None, **options):
    of_a_test = sys._getframe(1).f_code.co_filename.startswith(_HERE)
    if not of_a_test or fun is None:
        return _jax_jit(fun, **options) if fun is not None else _jax_jit(**options)
    return storax.jit(fun, pack={"packed": None, "pure": False}[_FORM], **options)


if _FORM:
    jax.jit = _storax_jit

# Tests of what only plain `jax.jit` does, and why storax.jit does not.
_OF_PLAIN_JIT = {
    "argument_of_plain_jit": "storax.jit takes an index as an argument",
    "test_more_than_one_device_under_plain_jit": "storax.jit runs over several devices",
    "test_a_state_on_more_than_one_device_under_plain_jit": "storax.jit runs over several devices",
    "test_program_order": "watches each operation of a program, and a hoisted one has none",
    "test_a_while_loop_is_not_run_again": "counts operations, and a hoisted program has none",
    "test_no_state_is_torn": "counts operations, and a hoisted program has none",
    "test_equinox_loops": "counts operations, and a hoisted program has none",
    "test_increments_of_many_threads": "counts operations, and a hoisted program has none",
    "test_what_is_in_flight_is_waited_for": "a state on loan is a future, and no program names it",
    "test_one_wait_for_each_flattening": "a state on loan is a future, and no program names it",
    "test_at_the_next_eager_operation": "a state on loan is a future, and no program names it",
    "test_another_device": "it is JAX that says so where a state is an argument",
    "test_plain_jit_says_what_to_do": "storax.jit runs over several devices",
    "kept_after_a_failure": "a failed call of storax.jit changes no small state",
    "test_random_programs.py": "runs programs in each form, and under plain jit, by itself",
    "test_nesting.py": "runs nestings in each form, and under plain jit, by itself",
    "test_export": "says that plain jit's custom calls can't be exported",
}


def pytest_collection_modifyitems(items):
    for item in items if _FORM else ():
        for name, reason in _OF_PLAIN_JIT.items():
            if name in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test may leave a failure that nobody was told about."""
    yield
    storax.barrier()


@pytest.fixture
def fresh_caches():
    """For tests that count what is alive."""
    jax.clear_caches()
    gc.collect()
    yield
    jax.clear_caches()
    gc.collect()
