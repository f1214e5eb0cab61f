"""A convolutional network with BatchNorm, and its training on handwritten digits.

The running statistics are state, a side effect: the network is a plain function of an image, and
nothing but parameters passes through the training step.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import storax


class Data(NamedTuple):
    images: np.ndarray  # (n, 1, 8, 8), from 0 to 1
    labels: np.ndarray  # (n,)


def load() -> tuple[Data, Data]:
    """scikit-learn's 1,797 digits: three quarters to train on, one quarter held out."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 16
    labels = labels.astype(np.int32)
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, held_out_images, train_labels, held_out_labels = split
    return Data(train_images, train_labels), Data(held_out_images, held_out_labels)


class ConvNet(eqx.Module):
    layers: eqx.nn.Sequential

    def __init__(self, key: jax.Array):
        key1, key2, key3, key4 = jax.random.split(key, 4)
        self.layers = eqx.nn.Sequential(
            [
                *conv_block(1, 16, key1),
                *conv_block(16, 32, key2),
                eqx.nn.MaxPool2d(kernel_size=2, stride=2),
                *conv_block(32, 64, key3),
                eqx.nn.AdaptiveAvgPool2d(2),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(64 * 2 * 2, 10, key=key4),
            ]
        )

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.layers(image)


def conv_block(in_channels: int, out_channels: int, key: jax.Array) -> list[eqx.Module]:
    return [
        eqx.nn.Conv2d(in_channels, out_channels, 3, padding=1, use_bias=False, key=key),
        storax.BatchNorm(out_channels, axis_name="batch", momentum=0.9, mode="batch"),
        eqx.nn.Lambda(jax.nn.relu),
    ]


# --- Training -------------------------------------------------------------------------------------


def loss_fn(model: ConvNet, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jax.vmap(model, axis_name="batch")(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(
    model: ConvNet,
    data: Data,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    after_step: Callable[[ConvNet, float], None] = lambda model, loss: None,
    after_epoch: Callable[[ConvNet], None] = lambda model: None,
) -> ConvNet:
    """Trains with AdamW, in a new random order in each epoch."""
    steps_per_epoch = len(data.labels) // batch_size
    schedule = optax.cosine_decay_schedule(learning_rate, epochs * steps_per_epoch)
    optimiser = optax.adamw(schedule, weight_decay=1e-2)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state, images, labels):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, images, labels)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, loss

    rng = np.random.default_rng(0)
    with tqdm(total=epochs * steps_per_epoch, desc="  training", unit="step") as bar:
        for _ in range(epochs):
            order = rng.permutation(len(data.labels))
            for batch in order[: steps_per_epoch * batch_size].reshape(-1, batch_size):
                images, labels = data.images[batch], data.labels[batch]
                model, opt_state, loss = step(model, opt_state, images, labels)
                after_step(model, float(loss))
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
            after_epoch(model)
    return model


# --- State ----------------------------------------------------------------------------------------


def batch_norms(model: ConvNet) -> list[storax.BatchNorm]:
    is_norm = lambda x: isinstance(x, storax.BatchNorm)
    return list(filter(is_norm, jax.tree.leaves(model, is_leaf=is_norm)))


def get_statistics(norm: storax.BatchNorm) -> tuple[jax.Array, jax.Array]:
    """The running mean and variance of each channel."""
    like = jnp.zeros(norm.input_size)
    return storax.get_state(norm.state_index, like=(like, like))


def set_statistics(norm: storax.BatchNorm, mean: jax.Array, var: jax.Array) -> None:
    storax.set_state(norm.state_index, (mean, var))


# --- Evaluation -----------------------------------------------------------------------------------


@eqx.filter_jit
def predict(model: ConvNet, images: jax.Array) -> jax.Array:
    """Logits, by a model in inference mode."""
    return jax.vmap(model)(images)


def accuracy(model: ConvNet, data: Data) -> float:
    return float((predict(model, data.images).argmax(axis=1) == data.labels).mean())
