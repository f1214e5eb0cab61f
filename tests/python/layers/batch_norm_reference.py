"""What the tests of BatchNorm share: the layer in NumPy, data, and a look at its state."""

import jax
import jax.numpy as jnp
import numpy as np

import storax

MODES = ["ema", "batch"]
LIKE = (jnp.zeros(3), jnp.zeros(3))


class Reference:
    """The same layer on a whole batch of shape (batch, channels, ...), in NumPy and 64 bits."""

    def __init__(self, channels, mode, momentum, eps=1e-5):
        self.mode, self.momentum, self.eps = mode, momentum, eps
        self.first_time = mode == "ema"
        self.running = np.zeros(channels), np.ones(channels)

    def train(self, x):
        x = np.asarray(x, np.float64)
        axes = (0, *range(2, x.ndim))
        batch = x.mean(axes), x.var(axes)
        momentum = 0 if self.first_time else self.momentum
        self.first_time = False
        self.running = tuple(
            momentum * r + (1 - momentum) * b for r, b in zip(self.running, batch, strict=True)
        )
        return self.normalise(x, *(self.running if self.mode == "ema" else batch))

    def normalise(self, x, mean, var):
        shape = (-1, *(1,) * (x.ndim - 2))
        return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + self.eps)


def batches(n, *shape, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(i, 1 + i, shape), jnp.float32) for i in range(n)]


def running(norm, like=LIKE):
    """The running statistics; asks for unbatched ones, so it fails if they are not."""
    return storax.get_state(norm.state_index, like=like)


def assert_close(actual, expected, atol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol), actual, expected
    )


def apply(norm, x):
    return jax.vmap(norm, axis_name="batch")(x)


def trained(mode="ema", **kwargs):
    norm = storax.BatchNorm(3, "batch", momentum=0.9, mode=mode, **kwargs)
    reference = Reference(3, mode, 0.9)
    for x in batches(3, 6, 3, 4):
        apply(norm, x)
        reference.train(x)
    return norm, reference
