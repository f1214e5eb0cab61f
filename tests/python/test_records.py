"""Records, the form that an index takes in a file, and docs/serialisation.md, which describes it."""

import io
import json
import re
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import storax
from duplicating import fails, save


@pytest.fixture(params=[eqx, storax], ids=["equinox", "storax"])
def module(request):
    return request.param


def rewritten(record, **changes):
    """A record with other members in its header."""
    start = 8 + 8
    size = int.from_bytes(record[8:start].tobytes(), "little")
    header = json.loads(record[start : start + size].tobytes())
    for path, new in changes.items():
        *parents, last = path.split("__")
        at = header
        for name in parents:
            at = at[int(name) if name.isdigit() else name]
        at[last] = new
    text = json.dumps(header).encode()
    return b"".join(
        [
            record[:8].tobytes(),
            len(text).to_bytes(8, "little"),
            text,
            record[start + size :].tobytes(),
        ]
    )


DAMAGES = {
    "a dtype": ({"state__leaves__0__dtype": "object"}, "no arrays of dtype 'object'"),
    "a shape": ({"state__leaves__0__shape": [1 << 40]}, "ends too early"),
    "a shorter one": ({"state__leaves__0__shape": [2]}, "4 bytes too many"),
    "no shape": ({"state__leaves__0__shape": [-1]}, "not a shape"),
    "the leaves": ({"state__leaves": []}, "do not make up"),
    "batch axes": ({"state__levels": [[[5], False]]}, "not a batch axis"),
    "devices": ({"state__devices": [0, 1]}, "cannot be on 2 devices"),
    "a mesh": ({"state__mesh": [["i", 9]], "state__devices": [9]}, "and this process has"),
    "the structure": ({"state__structure": ["set", ["*"]]}, "no kind of node"),
    "the state": ({"state": 3}, "cannot be loaded"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_record(what):
    index = storax.StateIndex(name="damaged")
    storax.set_state(index, jnp.arange(3.0))
    record = np.load(io.BytesIO(save(index)))
    changes, match = DAMAGES[what]
    file = io.BytesIO()
    np.save(file, np.frombuffer(rewritten(record, **changes), np.uint8))
    fails(file.getvalue(), index, match, storax)


def test_a_later_version_of_the_format(module):
    index = storax.StateIndex(name="new")
    record = np.load(io.BytesIO(save(index)))
    assert bytes(record[:8]) == b"storax\x00\x01"
    record[7] = 2
    file = io.BytesIO()
    np.save(file, record)
    fails(file.getvalue(), index, "'new' was saved in version 2 of the format", module)


# --- The documentation ---

PAGE = Path(__file__).parents[2] / "docs" / "serialisation.md"


def test_the_record_in_the_documentation():
    index = storax.StateIndex(name="n")
    storax.set_state(index, (jnp.int8(7), None))
    record = np.load(io.BytesIO(save(index))).tobytes()
    _, example = PAGE.read_text().rsplit("without the spaces:", 1)
    magic, size, *header, data = [line.strip() for line in example.strip().splitlines()]
    number = lambda line: bytes.fromhex(re.match(r"(?:[0-9a-f]{2} )*[0-9a-f]{2}(?= {3})", line)[0])
    text = json.loads("".join(header))
    text["slot"] = json.loads(record[16:-1])["slot"]
    text = json.dumps(text).encode()
    assert record == number(magic) + number(size) + text + number(data)
    assert len(text) == int.from_bytes(number(size), "little")
