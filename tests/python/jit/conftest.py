"""In which forms storax.jit is tested."""

import functools

import pytest

import storax

FORMS = {"packed": {}, "pure": {"pack": False}, "kept": {"donate": False}}


@pytest.fixture(params=FORMS)
def jit(request):
    return functools.partial(storax.jit, **FORMS[request.param])
