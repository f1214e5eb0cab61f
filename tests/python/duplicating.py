"""The ways to make a model with the same state: copies, pickles, and files of Equinox."""

import copy
import io
import pickle
import re

import cloudpickle
import equinox as eqx
import jax
import pytest

import storax


def is_index(x):
    return isinstance(x, storax.StateIndex)


def unset(tree):
    """The same tree with indices that were never set, shared alike."""
    made = {}

    def replace(x):
        if not is_index(x):
            return x
        fresh = made.setdefault(x._slot.id, storax.StateIndex(name=f"fresh {len(made)}"))
        index = copy.copy(x)
        index._slot = fresh._slot
        index._freeze(x.inference is True, None)
        return index

    return jax.tree.map(replace, tree, is_leaf=is_index)


def save(tree, module=eqx, **kwargs):
    file = io.BytesIO()
    module.tree_serialise_leaves(file, tree, **kwargs)
    return file.getvalue()


def load(data, like, module=eqx, **kwargs):
    return module.tree_deserialise_leaves(io.BytesIO(data), like, **kwargs)


def causes(error):
    """What is written under `raise ... from`, innermost last."""
    found = []
    while error is not None:
        found.append(str(error))
        error = error.__cause__
    return "\n".join(found)


def contents(tree):
    """Slots, what they hold and how often they were set."""
    indices = [x for x in jax.tree.leaves(tree, is_leaf=is_index) if is_index(x)]
    return [(i._slot.id, i._slot.core.version, i._slot.core.type) for i in indices]


def fails(data, like, match, module):
    """Loading raises what matches, and nothing changes."""
    before = contents(like)
    with pytest.raises(RuntimeError) as raised:
        load(data, like, module)
    text = str(raised.value) if module is storax else causes(raised.value)
    assert re.search(match, text), text
    assert contents(like) == before


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda tree: pickle.loads(pickle.dumps(tree)),
    "cloudpickle": lambda tree: cloudpickle.loads(cloudpickle.dumps(tree)),
    "file": lambda tree: load(save(tree), tree),
    "file, into what was never set": lambda tree: load(save(tree), unset(tree)),
    "file, by storax": lambda tree: load(save(tree, storax), unset(tree), storax),
}
