"""BatchNorm: normalisation by statistics over the batch, whose running averages are state."""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .._index import StateIndex
from .._operations import get_state, set_state
from ._state import in_inference, index_holding, like_held

__all__ = ["BatchNorm"]


class BatchNorm(eqx.Module):
    r"""Normalises each channel over the batch and the spatial dimensions, and optionally applies a
    channelwise affine transformation afterwards.

    Given an input $x = [x_1, ..., x_C]$ of $C$ channels, this computes

    $$\frac{x_i - \mu_i}{\sqrt{\sigma^2_i + \varepsilon}} * \gamma_i + \beta_i$$

    where $\gamma$ and $\beta$ have shape $(C,)$; without `channelwise_affine` they are 1 and 0.

    The layer is called with a single example; the batch is an axis of `jax.vmap`, named
    `axis_name`. The statistics of a batch are the mean $\mathbb{E}[x_i]$ and the biased variance
    $\mathbb{E}[(x_i - \mathbb{E}[x_i])^2]$ over that axis and all dimensions of $x_i$. A training
    call moves the running statistics towards them,
    `running = momentum * running + (1 - momentum) * batch`, as a side effect. What $\mu$ and
    $\sigma^2$ are depends on `mode`:

    - `"ema"`, in training: the running statistics *after* that update. The first training call sets
      them to those of its batch. This is what `equinox.experimental.BatchNorm` did.
    - `"batch"`, in training: the statistics of the batch, as in Ioffe and Szegedy (2015) and most
      other libraries. The running statistics start from mean 0 and variance 1.
    - either, in inference: the running statistics as they are. They are mean 0 and variance 1 if
      the layer has never been trained.

    In training, gradients flow through the statistics of the batch. What is remembered of former
    batches is a constant.

    Whether the layer is in training or in inference is toggled with `equinox.nn.inference_mode`.
    That also freezes its state: the running statistics become an input of the compiled program.

    !!! example

        ```python
        norm = storax.BatchNorm(input_size=3, axis_name="batch")
        images = jnp.ones((8, 3, 32, 32))

        @jax.jit
        def train(images):
            return jax.vmap(norm, axis_name="batch")(images)

        train(images)
        frozen = eqx.nn.inference_mode(norm)
        frozen(images[0])
        ```

    !!! warning

        The running statistics belong to the whole batch, so `axis_name` must name every `jax.vmap`
        that `x` is batched by. An axis that has another name, or none, gives each of its lanes
        statistics of its own, and these are not what the layer holds: `RuntimeError`.

        Under `jax.shard_map` and `jax.pmap` every device has a state of its own. They are all the
        same, that of the whole batch, if `axis_name` names the mesh's axes too. If it does not, they
        are those of each device's part of the batch.

    ??? cite

        [Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift](https://arxiv.org/abs/1502.03167)

        ```bibtex
        @inproceedings{ioffe2015batch,
            author={Sergey Ioffe and Christian Szegedy},
            title={Batch Normalization: Accelerating Deep Network Training by Reducing Internal
                   Covariate Shift},
            booktitle={International Conference on Machine Learning},
            year={2015},
            eprint={1502.03167},
            archivePrefix={arXiv},
        }
        ```
    """

    state_index: StateIndex
    first_time_index: StateIndex | None
    weight: jax.Array | None
    bias: jax.Array | None
    inference: bool
    axis_name: Hashable = eqx.field(static=True)
    input_size: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    mode: Literal["ema", "batch"] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable],
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        *,
        mode: Literal["ema", "batch"] = "ema",
        dtype: Any = None,
    ):
        """**Arguments:**

        - `input_size`: the number of channels of the input.
        - `axis_name`: the name of the batch axis, as passed to `axis_name` of `jax.vmap`. A tuple
          or a list of names for statistics over several axes. `None` for statistics over the
          dimensions of the input alone.
        - `eps`: added to the variance, for numerical stability.
        - `channelwise_affine`: whether there are a learnable `weight` and `bias` for each channel.
        - `momentum`: the weight of the old running statistics in the new ones, between 0 and 1.
        - `inference`: if true, the running statistics are used and not updated.
        - `mode`: `"ema"` or `"batch"`: by which statistics to normalise in training; see above.
        - `dtype`: the dtype of the running statistics, the weight and the bias. Defaults to
          `jax.numpy.float32`, or `jax.numpy.float64` if JAX is in 64-bit mode.

        **Raises:**

        - `TypeError` if `input_size` is not an integer.
        - `ValueError` if `mode` is neither `"ema"` nor `"batch"`, `momentum` is not between 0 and
          1, or `dtype` is not a real floating-point dtype.
        """
        if not hasattr(input_size, "__index__"):
            raise TypeError(
                "BatchNorm: `input_size`, the number of channels, must be an integer, not "
                f"{input_size!r}."
            )
        if mode not in ("ema", "batch"):
            raise ValueError(f"BatchNorm: `mode` must be 'ema' or 'batch', not {mode!r}.")
        if not 0 <= momentum <= 1:
            raise ValueError(f"BatchNorm: `momentum` must be between 0 and 1, not {momentum!r}.")
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"BatchNorm: `dtype` must be a real floating-point one, not {dtype}.")
        zeros, ones = jnp.zeros((input_size,), dtype), jnp.ones((input_size,), dtype)
        self.state_index = index_holding((zeros, ones), inference=inference)
        self.first_time_index = (
            index_holding(jnp.array(True), inference=inference) if mode == "ema" else None
        )
        self.weight = ones if channelwise_affine else None
        self.bias = zeros if channelwise_affine else None
        self.inference = inference
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.input_size = input_size
        self.eps = eps
        self.channelwise_affine = channelwise_affine
        self.momentum = momentum
        self.mode = mode
        self.dtype = dtype

    @jax.named_scope("storax.BatchNorm")
    def __call__(
        self, x: jax.Array, *, key: jax.Array | None = None, inference: bool | None = None
    ) -> jax.Array:
        """**Arguments:**

        - `x`: a JAX array of shape `(input_size, dim_1, ..., dim_N)`, real.
        - `key`: ignored; for compatibility with the rest of the Equinox API. (Keyword only
          argument.)
        - `inference`: if `True` or `False`, takes priority over `self.inference`. (Keyword only
          argument.)

        **Returns:**

        A JAX array of the shape of `x`, and of its dtype if that is a floating-point one; else of
        dtype `self.dtype`. Whatever the dtypes, 32 bits at least are used in between.

        **Raises:**

        - `ValueError` if `x` is complex, or its leading dimension is not `input_size`.
        - `TypeError` if the layer was passed as an argument to plain `jax.jit` or the like, which
          makes a tracer of its `inference`.
        - `NameError`, in training, if there is no `jax.vmap` of name `axis_name` around the call.
        - `RuntimeError` at trace time if it is called with `inference=False`, but frozen by
          `equinox.nn.inference_mode`.
        - `RuntimeError` when the call runs, in training, if `x` is batched by a `jax.vmap` that
          `axis_name` does not name.
        """
        del key
        _check(self, x)
        inference = in_inference(self, inference)
        dtype = jnp.promote_types(jnp.promote_types(x.dtype, self.dtype), jnp.float32)
        out_dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else self.dtype
        x = _cast(x, dtype)
        mean, var = _running(self, dtype) if inference else _train(self, x)

        # One multiplication per channel, and one per element.
        scale = lax.rsqrt(var + self.eps)
        weight, bias, axes = self.weight, self.bias, tuple(range(1, x.ndim))
        if weight is not None:
            scale = scale * _cast(weight, dtype)
        out = (x - _along_channels(mean, axes)) * _along_channels(scale, axes)
        if bias is not None:
            out = out + _along_channels(_cast(bias, dtype), axes)
        return _cast(out, out_dtype)


# Functions, as an access to a method of a module costs more than most operations that are traced.


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else x.astype(dtype)


def _along_channels(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return lax.expand_dims(x, axes) if axes else x


def _check(norm: BatchNorm, x: jax.Array) -> None:
    if x.ndim == 0 or x.shape[0] != norm.input_size:
        raise ValueError(
            f"BatchNorm: `x` must be of shape (channels, ...) with {norm.input_size} channels, "
            f"but it is of shape {x.shape}. The layer takes one example: `jax.vmap(norm, "
            f"axis_name={norm.axis_name!r})` applies it to a batch."
        )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"BatchNorm: `x` must be real, but it is of dtype {x.dtype}.")


def _running(norm: BatchNorm, dtype: Any) -> tuple[jax.Array, jax.Array]:
    # Not made from `x`: the state is not batched, whatever `x` is.
    like = lax.full((norm.input_size,), 0, norm.dtype)
    mean, var = get_state(norm.state_index, like_held(norm.state_index, (like, like)))
    return _cast(mean, dtype), _cast(var, dtype)


def _train(norm: BatchNorm, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Updates the running statistics, and returns those to normalise by."""
    batch = _statistics(x, norm.axis_name)
    old, momentum, first_time_index = _running(norm, x.dtype), norm.momentum, norm.first_time_index
    new = [momentum * r + (1 - momentum) * b for r, b in zip(old, batch, strict=True)]
    if first_time_index is not None:
        first_time = get_state(first_time_index, like=jnp.array(False))
        first_time = jnp.broadcast_to(first_time, (norm.input_size,))
        new = [lax.select(first_time, b, n) for b, n in zip(batch, new, strict=True)]
    # What is remembered is a record: no gradient reaches this step through later ones.
    kept = tuple(_cast(lax.stop_gradient(n), norm.dtype) for n in new)
    set_state(norm.state_index, kept)
    if first_time_index is not None:
        # After the statistics: where these are refused, the first time is still to come.
        set_state(first_time_index, jnp.array(False))
    mean, var = new if norm.mode == "ema" else batch
    return mean, var


def _statistics(x: jax.Array, axis_name: Any) -> tuple[jax.Array, jax.Array]:
    """Mean and variance, in two passes.

    E[x²] - E[x]² would need one, but cancels where the mean is large against the deviation,
    even to less than zero.
    """
    axes = tuple(range(1, x.ndim))
    mean = _pmean(jnp.mean(x, axes), axis_name)
    centred = x - _along_channels(mean, axes)
    return mean, _pmean(jnp.mean(centred * centred, axes), axis_name)


def _pmean(x: jax.Array, axis_name: Any) -> jax.Array:
    if axis_name is None or axis_name == ():
        return x
    try:
        return lax.pmean(x, axis_name)
    except NameError as e:
        raise NameError(
            f"BatchNorm: in training it takes statistics over the axis {axis_name!r}, but "
            "there is no such axis around this call. Use `jax.vmap(..., axis_name="
            f"{axis_name!r})`, or freeze the layer by `equinox.nn.inference_mode`."
        ) from e
