"""Layers with state: `equinox.Module`s on top of StateIndex, get_state and set_state alone."""

from ._batch_norm import BatchNorm
from ._spectral_norm import SpectralNorm

__all__ = ["BatchNorm", "SpectralNorm"]
