"""SpectralNorm: a weight divided by its largest singular value, whose estimate is state."""

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._index import StateIndex
from .._operations import get_state, set_state
from ._state import in_inference, index_holding, like_held

__all__ = ["SpectralNorm"]

_Layer = TypeVar("_Layer")

# Enough for an estimate to start from; each training call improves it.
_INITIAL_ITERATIONS = 15


class SpectralNorm(eqx.Module, Generic[_Layer]):
    r"""Applies spectral normalisation to a parameter of a layer.

    Given a weight matrix $W$ with largest singular value $\sigma(W)$, this calls the layer with
    $W / \sigma(W)$ in its place. A weight of more than two dimensions is seen as a matrix of shape
    `(weight.shape[0], -1)`.

    Made of a weight alone, as in `equinox.experimental`, it takes the place of that weight: in an
    operator between it and a JAX array, as in `weight @ x`, it is $W / \sigma(W)$. That is enough for an
    `equinox.nn.Linear`. For most functions `jax.numpy.asarray(weight)` has to come first, which is a call
    like any other; JAX's own, and so convolutions, take arrays only. Where that is not to be had, wrap
    the layer.

    The estimate of $\sigma(W)$ is $u^\top W v$. Each training call improves $u$ and $v$ by [power
    iteration](https://en.wikipedia.org/wiki/Power_iteration), and remembers them, as a side effect;
    in inference they are used as they are. They are constants in differentiation: gradients reach
    $W$ through both $W$ and $\sigma(W)$, as in Miyato et al. (2018).

    Whether the layer is in training or in inference is toggled with `equinox.nn.inference_mode`.

    !!! example

        ```python
        linear = eqx.nn.Linear(3, 4, key=key1)
        linear = storax.SpectralNorm(linear, "weight", key=key2)
        jax.vmap(linear)(jnp.ones((8, 3)))
        ```

    !!! example

        ```python
        linear = eqx.nn.Linear(3, 4, key=key1)
        weight = storax.SpectralNorm(linear.weight, key=key2)
        linear = eqx.tree_at(lambda l: l.weight, linear, weight)
        jax.vmap(linear)(jnp.ones((8, 3)))
        ```

    ??? cite

        [Spectral Normalization for Generative Adversarial
        Networks](https://arxiv.org/abs/1802.05957)

        ```bibtex
        @inproceedings{miyato2018spectral,
            author={Takeru Miyato and Toshiki Kataoka and Masanori Koyama and Yuichi Yoshida},
            title={Spectral Normalization for Generative Adversarial Networks},
            booktitle={International Conference on Learning Representations},
            year={2018},
            eprint={1802.05957},
            archivePrefix={arXiv},
        }
        ```
    """

    layer: _Layer
    uv_index: StateIndex
    inference: bool
    weight_name: str | None = eqx.field(static=True)
    num_power_iterations: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self,
        layer: _Layer,
        weight_name: str | None = None,
        num_power_iterations: int = 1,
        eps: float = 1e-12,
        inference: bool = False,
        *,
        key: jax.Array,
    ):
        """**Arguments:**

        - `layer`: the layer to wrap, for example an `equinox.nn.Linear` or `equinox.nn.Conv2d`; or
          the weight to take the place of.
        - `weight_name`: the name of the attribute of `layer` to normalise: a JAX array of at least
          two dimensions. None if `layer` is the weight itself.
        - `num_power_iterations`: how many power iterations a training call makes.
        - `eps`: the least norm, and the least size of a singular value, to divide by.
        - `inference`: if true, no power iterations are made.
        - `key`: a PRNG key, for the vectors to start from. (Keyword only argument.)

        The state is a pair of vectors of shapes `(weight.shape[0],)` and
        `(weight.size // weight.shape[0],)`, of the dtype of the weight, or `float32` if that has
        fewer bits.

        **Raises:**

        - `TypeError` if there is a `weight_name`, but `layer` is an array, or the other way round.
        - `ValueError` if the weight is not a real floating-point JAX array of at least two
          dimensions, or `num_power_iterations` is negative.
        """
        if isinstance(layer, jax.Array) != (weight_name is None):
            raise TypeError(
                "SpectralNorm: it is made of a layer and the name of its weight, `SpectralNorm(layer, "
                '"weight", key=key)`, or of a weight alone, `SpectralNorm(weight, key=key)`, all else '
                f"by name; not of a {type(layer).__name__} and {weight_name!r}."
            )
        if num_power_iterations < 0:
            raise ValueError(
                f"SpectralNorm: `num_power_iterations` is {num_power_iterations}; it must not be "
                "negative."
            )
        weight: Any = layer if weight_name is None else getattr(layer, weight_name)
        if (
            not isinstance(weight, jax.Array)
            or weight.ndim < 2
            or not jnp.issubdtype(weight.dtype, jnp.floating)
        ):
            name = "layer" if weight_name is None else f"{type(layer).__name__}.{weight_name}"
            raise ValueError(
                f"SpectralNorm: `{name}` must be a real floating-point JAX array of at least two "
                f"dimensions, but it is {_describe(weight)}."
            )
        matrix = _as_matrix(weight)
        u_key, v_key = jax.random.split(key)
        u = jax.random.normal(u_key, matrix.shape[:1], matrix.dtype)
        v = jax.random.normal(v_key, matrix.shape[1:], matrix.dtype)
        for _ in range(_INITIAL_ITERATIONS):
            u, v = _power_iteration(matrix, v, eps)
        self.layer = layer
        self.uv_index = index_holding((u, v), inference=inference)
        self.inference = inference
        self.weight_name = weight_name
        self.num_power_iterations = num_power_iterations
        self.eps = eps

    @property
    def weight(self) -> jax.Array:
        """The parameter, before it is normalised."""
        if self.weight_name is None:
            return self.layer  # type: ignore[return-value]
        return getattr(self.layer, self.weight_name)

    @classmethod
    def withkey(cls, key: jax.Array) -> Callable[..., "SpectralNorm"]:
        """The class with this `key`, for `equinox.tree_at(..., replace_fn=SpectralNorm.withkey(key))`."""
        return functools.partial(cls, key=key)

    def __call__(
        self, x: jax.Array, *, key: jax.Array | None = None, inference: bool | None = None
    ) -> Any:
        """**Arguments:**

        - `x`: a JAX array, of the shape and dtype that `layer` takes.
        - `key`: ignored; for compatibility with the rest of the Equinox API. (Keyword only
          argument.)
        - `inference`: if `True` or `False`, takes priority over `self.inference`. (Keyword only
          argument.)

        **Returns:**

        The output of `layer(x)`, with its weight normalised in its own dtype.

        **Raises:**

        - `TypeError` if the layer was passed as an argument to plain `jax.jit` or the like, which
          makes a tracer of its `inference`.
        - `TypeError` if it is made of a weight alone.
        - `RuntimeError` at trace time if it is called with `inference=False`, but frozen by
          `equinox.nn.inference_mode`.
        - `RuntimeError` when the call runs if the weight is not of the shape, or not batched by
          `jax.vmap` as it was when the layer was made.
        """
        del key
        name = self.weight_name
        if name is None:
            raise TypeError(
                "SpectralNorm: made of a weight alone, it can't be called: put it in the place of the "
                "weight. Or wrap the layer: `SpectralNorm(layer, weight_name, key=key)`."
            )
        weight = _normalise(self, in_inference(self, inference))
        layer: Any = eqx.tree_at(lambda x: getattr(x, name), self.layer, weight)
        return layer(x)

    def __jax_array__(self) -> jax.Array:
        if self.weight_name is not None:
            raise TypeError(
                "SpectralNorm: made of a layer, it is no array: call it, `norm(x)`. To stand in the place "
                "of a weight it is made of that alone: `SpectralNorm(weight, key=key)`."
            )
        if isinstance(self.inference, jax.Array):
            raise TypeError(
                "SpectralNorm: a function under `jax.jit`, as most of `jax.numpy` are, was given one in the "
                "place of an array. Give it `jnp.asarray(norm)`; or close over it, or use "
                "`equinox.filter_jit` or `storax.jit`, if the function is your own."
            )
        return _normalise(self, in_inference(self, None))

    # What JAX asks an array for, without a call of the layer.
    shape = property(lambda self: self.weight.shape)
    ndim = property(lambda self: self.weight.ndim)
    dtype = property(lambda self: self.weight.dtype)


# Functions, as an access to a method of a module costs more than most operations that are traced.


@jax.named_scope("storax.SpectralNorm")
def _normalise(norm: SpectralNorm, inference: bool) -> jax.Array:
    weight = norm.weight
    matrix = _as_matrix(weight)
    # Made from the weight, to be batched where that is: as one of several models.
    like = like_held(norm.uv_index, (matrix[:, 0], matrix[0]))
    u, v = (x.astype(matrix.dtype) for x in get_state(norm.uv_index, like))
    if not inference:
        constant = lax.stop_gradient(matrix)
        for _ in range(norm.num_power_iterations):
            u, v = _power_iteration(constant, v, norm.eps)
        set_state(norm.uv_index, (u, v))
    sigma = u @ matrix @ v
    # Nothing but a matrix of (nearly) zeros gets here with less.
    sigma = jnp.where(jnp.abs(sigma) > norm.eps, sigma, norm.eps)
    return (weight / sigma).astype(weight.dtype)


def _describe(x: Any) -> str:
    return str(jax.typeof(x)) if isinstance(x, jax.Array) else repr(x)


def _as_matrix(weight: jax.Array) -> jax.Array:
    # Norms over- and underflow in 16 bits; `eps` isn't even a number there.
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    return jnp.reshape(weight, (weight.shape[0], -1)).astype(dtype)


def _power_iteration(matrix: jax.Array, v: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    u = _normalised(matrix @ v, eps)
    return u, _normalised(matrix.T @ u, eps)


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), eps)
