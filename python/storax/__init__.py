"""State for JAX programs: save and load JAX arrays as a side effect of JAX operations, even under JIT."""

from ._index import StateIndex
from ._jit import jit
from ._layers import BatchNorm, SpectralNorm
from ._operations import get_state, set_state
from ._serialise import tree_deserialise_leaves, tree_serialise_leaves
from ._stack import stack
from ._store import barrier

__all__ = [
    "BatchNorm",
    "SpectralNorm",
    "StateIndex",
    "barrier",
    "get_state",
    "jit",
    "set_state",
    "stack",
    "tree_deserialise_leaves",
    "tree_serialise_leaves",
]
__version__ = "0.1.0"
