"""Programs without state, and a process that prints what JAX makes of them, for test_no_cost.py.

Run with what the process does before that: `nothing`; `import` storax; put it to `work`, on these same
programs with state in them; or `spoil` two of JAX's operations, for the comparison to notice.
"""

import json
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import stateless_worker

X, XS = jnp.float32(0.5), jnp.arange(4.0)


def programs(step):
    """Programs that take every rule and every class of JAX's that storax wraps, and their arguments."""

    def scan(x):
        return lax.scan(lambda c, x: (step(c) + x, step(x)), x, XS)

    def cond(x):
        return lax.cond(x > 0, step, lambda x: x, x)

    def switch(x):
        return lax.switch(jnp.int32(x), [step, jnp.cos, lambda x: x], x)

    def while_loop(x):
        return lax.while_loop(lambda x: step(x) < 3, lambda x: step(x) + 1, x)

    def checkpoint(x):
        # Part of the inner one is constant, and JAX takes it out of the scan.
        inner = jax.checkpoint(step)
        body = lambda c, x: (inner(c) * x * inner(XS[1]), None)
        return jax.checkpoint(lambda x: lax.scan(body, x, XS)[0])(x)

    custom_jvp = jax.custom_jvp(step)
    custom_jvp.defjvp(lambda primals, tangents: (step(*primals), tangents[0] * step(*primals)))
    custom_vjp = jax.custom_vjp(step)
    custom_vjp.defvjp(lambda x: (step(x), x), lambda x, ct: (ct * step(x),))

    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("d")

    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec)
    def shard_map(x):
        return lax.psum(step(x).sum(), "d") * step(x)

    model = eqx.nn.MLP(1, 1, 8, 2, activation=step, key=jax.random.key(0))
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, axis_name="b", mode="batch")

    def equinox(x):
        out, _ = jax.vmap(lambda x: norm(model(x[None]), state), axis_name="b", out_axes=(0, None))(
            x
        )
        return jnp.sum(out**2)

    def ordered_callback(x):
        jax.debug.callback(lambda x: None, x, ordered=True)
        return step(x)

    def ref(x):
        cell = jax.new_ref(x)
        cell[...] = step(cell[...])
        return cell[...]

    scalar = {f.__name__: f for f in (scan, cond, switch, while_loop, checkpoint)}
    scalar |= {"custom_jvp": custom_jvp, "custom_vjp": custom_vjp}
    scalar["jit"] = lambda x: step(jax.jit(step)(x))
    made = {name: (f, X) for name, f in scalar.items()}
    made |= {f"vmap of {name}": (jax.vmap(f), XS) for name, f in scalar.items()}
    scalar["scan"] = lambda x: scan(x)[0]
    del scalar["while_loop"]  # JAX has no gradient of it
    made |= {f"grad of {name}": (jax.grad(f), X) for name, f in scalar.items()}
    made |= {f"vmap of grad of {name}": (jax.vmap(jax.grad(f)), XS) for name, f in scalar.items()}
    made["shard_map"] = (shard_map, XS)
    made["grad of shard_map"] = (jax.grad(lambda x: shard_map(x).sum()), XS)
    made["equinox"] = (jax.value_and_grad(equinox), XS)
    made["ordered callback"] = (ordered_callback, X)
    made["ref"] = (ref, X)
    return made


def benchmarked():
    """Those that the benchmarks time."""
    weights = [jnp.eye(4)] * 2
    made = {}
    for f in (stateless_worker.deep, stateless_worker.nested):
        made[f.__name__] = (lambda x, f=f: jax.value_and_grad(f)(weights, x), XS)
        made[f"vmap of {f.__name__}"] = (jax.vmap(made[f.__name__][0]), jnp.eye(4))
    return made


def texts(f, x):
    made = [str(jax.make_jaxpr(f)(x)), jax.jit(f).lower(x).as_text()]
    return [re.sub(r"0x[0-9a-f]+", "0x", text) for text in made]  # addresses of functions


def put_to_work():
    import storax

    index = storax.StateIndex()
    storax.set_state(index, jnp.float32(0))

    def step(x):
        n = storax.get_state(index, like=jnp.float32(0)) + 1
        storax.set_state(index, n)
        return jnp.sin(x) * n

    for f, x in programs(step).values():
        jaxpr, _ = texts(f, x)
        if "set_state" not in jaxpr:
            raise AssertionError(f"no state in {jaxpr}")
    jax.block_until_ready(jax.jit(step)(X))


def main(before):
    if before == "import":
        import storax  # noqa: F401
    elif before == "work":
        put_to_work()
    elif before == "spoil":
        jnp.sin = jnp.cos
        lax.rsqrt = lax.sqrt  # of which the benchmarks' programs make use
    if ("storax" in sys.modules) != (before in ("import", "work")):
        raise AssertionError("storax was imported when it should not have been, or the reverse")
    made = programs(lambda x: jnp.sin(x)) | benchmarked()
    json.dump({name: texts(f, x) for name, (f, x) in made.items()}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
