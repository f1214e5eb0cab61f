"""How a layer makes the state it starts with."""

from typing import Any

import equinox as eqx

from .._index import StateIndex, set_state

__all__ = ["index_holding"]


def index_holding(state: Any, *, inference: bool) -> StateIndex:
    """Makes an index that holds `state`, frozen if `inference` is true.

    A frozen index cannot be set, so it is set first and frozen after: that is what lets a layer be
    constructed with `inference=True`.
    """
    index = StateIndex()
    set_state(index, state)
    return eqx.tree_at(lambda i: i.inference, index, inference)
