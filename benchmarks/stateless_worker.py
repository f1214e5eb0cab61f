"""A process that traces and calls programs without state, when asked to, with or without storax.

Reads lines `what calls` from its standard input, and answers each with a line once it is done. With
the argument `with-storax` it first imports storax, and runs a program that has state.
"""

import gc
import sys

import jax
import jax.numpy as jnp

WIDTH = 32
LAYERS = 50


def layer(x, w):
    x = x @ w + 1
    x = (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-5)
    return jnp.where(x > 0, x, 0.1 * x)


def deep(weights, x):
    for w in weights:
        x = layer(x, w)
    return x.sum()


def nested(weights, x):
    """Takes every rule of JAX's that storax wraps."""

    def step(x, w):
        x = jax.lax.cond(x[0] > 0, layer, lambda x, w: x, x, w)
        return jax.lax.fori_loop(0, 2, lambda i, x: x + i, x), None

    for w in weights:
        x, _ = jax.lax.scan(jax.checkpoint(step), x, jnp.stack([w, w]))
    return x.sum()


def lower(f, weights, x):
    # A function of its own each time, which JAX can't have traced before.
    return jax.jit(lambda w, x: jax.value_and_grad(f)(w, x)).lower(weights, x)


def main() -> None:
    if sys.argv[1:] == ["with-storax"]:
        import storax

        index = storax.StateIndex()
        program = jax.jit(lambda: storax.set_state(index, jnp.array(1)))
        program()
        if int(storax.get_state(index, like=jnp.array(0))) != 1:
            raise AssertionError("the program did not set its state")

    weights = [jnp.eye(WIDTH) for _ in range(LAYERS)]
    x = jnp.arange(1.0, WIDTH + 1)
    xs = jnp.stack([x, x])
    add = jax.jit(jnp.add)
    work = {
        "deep": lambda: lower(deep, weights, x),
        "nested": lambda: lower(
            lambda w, xs: jax.vmap(nested, (None, 0))(w, xs).sum(), weights[:5], xs
        ),
        "dispatch": lambda: add(x, x),
    }
    for each in work.values():
        each()
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        what, calls = line.split()
        for _ in range(int(calls)):
            out = work[what]()
        jax.block_until_ready(out)
        print("done", flush=True)


if __name__ == "__main__":
    main()
