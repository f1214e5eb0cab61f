"""State for JAX programs: save and load JAX arrays as a side effect of JAX operations, even under JIT."""

from ._index import StateIndex, get_state, set_state
from ._layers import BatchNorm, SpectralNorm
from ._store import barrier

__all__ = ["BatchNorm", "SpectralNorm", "StateIndex", "barrier", "get_state", "set_state"]
__version__ = "0.1.0"
