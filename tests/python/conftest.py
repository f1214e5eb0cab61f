"""Settings every test runs under, and what tests of several subjects share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import gc

import jax
import pytest

import storax


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
