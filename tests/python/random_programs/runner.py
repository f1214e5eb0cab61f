"""A program as JAX and storax run it: statements become JAX's own functions, as a user calls them."""

import functools

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

import storax

from .interpreter import first_state
from .syntax import (
    MODULUS,
    WIDTH,
    Block,
    Branch,
    Call,
    Const,
    Expr,
    Fori,
    Get,
    Grad,
    Less,
    Let,
    Op,
    Program,
    Psum,
    Scan,
    Set,
    Total,
    Var,
    Vmap,
    While,
    used_names,
)

# --- Where batch axes are -------------------------------------------------------------------------

# JAX leaves it open where the result of an operation is batched, and it is part of a state's type. So
# what is set gets the axes of a given array.
align_p = Primitive("align")
align_p.def_impl(lambda x, like: x)
align_p.def_abstract_eval(lambda x, like: x)
mlir.register_lowering(align_p, lambda ctx, x, like: [x])


def _align_batched(axis_data, args, dims):
    (x, like), (x_dim, like_dim) = args, dims
    if like_dim is None:
        assert x_dim is None, "lanes that share a state would set it to different values"
    else:
        x = batching.bdim_at_front(x, x_dim, axis_data.size)
        order = [*range(1, x.ndim)]
        order.insert(like_dim, 0)
        x = lax.transpose(x, order)
    return align_p.bind(x, like), like_dim


batching.fancy_primitive_batchers[align_p] = _align_batched


def physical_shape(slot):
    """The shape of all lanes' states together, and the axes of its levels, outermost first."""
    shape = [WIDTH] * slot.vector
    for level in reversed(slot.levels):
        shape.insert(level.axis, level.size)
    return tuple(shape)


def over_lanes(slot, f, out_axis=False):
    """Calls `f` for the slot's lanes, each with its part of a physical array."""
    for level in reversed(slot.levels):
        f = jax.vmap(f, in_axes=level.axis, out_axes=level.axis if out_axis else 0)
    return f


def to_physical(slot, x):
    """From an axis per level, outermost first, to where the levels' axes are."""
    order = list(range(len(slot.levels), np.ndim(x)))
    for k, level in reversed(list(enumerate(slot.levels))):
        order.insert(level.axis, k)
    return np.transpose(x, order), np.argsort(order)


# --- The runner -----------------------------------------------------------------------------------


# Of lax and not of jax.numpy, whose functions are jitted: run eagerly they are compiled each time.


def modulo(x):
    return lax.rem(x, lax.full_like(x, MODULUS))


def total(x, axis):
    return modulo(lax.reduce_sum(x, (axis % x.ndim,)))


def fit(x, vector):
    """A scalar is repeated, a vector summed."""
    if x.ndim == int(vector):
        return x
    return lax.broadcast(x, (WIDTH,)) if vector else total(x, 0)


def same_rank(x, y):
    vector = x.ndim > 0 or y.ndim > 0
    return fit(x, vector), fit(y, vector)


def true(x):
    x = fit(x, False)
    return lax.ne(x, lax.full_like(x, 0))


OPERATIONS = {"+": lax.add, "-": lax.sub, "*": lax.mul}


def _custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def _custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: jax.vjp(f, *args), lambda pullback, cts: pullback(cts))
    return g


def _custom_jvp_symbolic(f):
    """Differentiated by no more arguments than those that have a tangent."""

    def rule(primals, tangents):
        zero = [isinstance(t, SymbolicZero) for t in tangents]

        def of_others(*args):
            args = iter(args)
            return f(*[p if z else next(args) for p, z in zip(primals, zero, strict=True)])

        keep = lambda xs: [x for x, z in zip(xs, zero, strict=True) if not z]
        return jax.jvp(of_others, keep(primals), keep(tangents))

    g = jax.custom_jvp(f)
    g.defjvp(rule, symbolic_zeros=True)
    return g


def _custom_vjp_symbolic(f):
    g = jax.custom_vjp(f)
    g.defvjp(
        lambda *args: jax.vjp(f, *[a.value for a in args]),
        lambda pullback, cts: pullback(
            [jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c for c in cts]
        ),
        symbolic_zeros=True,
    )
    return g


def _closure_convert(f):
    def g(*args):
        converted, closed_over = jax.closure_convert(f, *args)
        return converted(*args, *closed_over)

    return g


def _checkpoint(policy):
    policy = getattr(jax.checkpoint_policies, policy)
    return functools.partial(jax.checkpoint, policy=policy)


CALLS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint_dots": _checkpoint("dots_saveable"),
    "checkpoint_everything": _checkpoint("everything_saveable"),
    "checkpoint_nothing": functools.partial(_checkpoint("nothing_saveable"), prevent_cse=False),
    "custom_jvp": _custom_jvp,
    "custom_jvp_symbolic": _custom_jvp_symbolic,
    "custom_vjp": _custom_vjp,
    "custom_vjp_symbolic": _custom_vjp_symbolic,
    "jit_inline": functools.partial(jax.jit, inline=True),
    "closure_convert": _closure_convert,
}


# Each returns the value of a function of a scalar, and its derivative.


def _jvp(f, at):
    return jax.jvp(f, (at,), (jnp.ones_like(at),))


def _linearize(f, at):
    value, tangent = jax.linearize(f, at)
    return value, tangent(jnp.ones_like(at))


def _pullback(f, at):
    """As a value that is passed to a function, and called twice."""
    value, pullback = jax.vjp(f, at)
    call = jax.jit(lambda pullback, x: pullback(x)[0])
    return value, call(pullback, jnp.ones_like(at) * 2) - call(pullback, jnp.ones_like(at))


def _jacobian(transformation):
    def derivative(f, at):
        def twice(t):
            value = f(t)
            return value, value

        slope, value = transformation(twice, has_aux=True)(at)
        return value, slope

    return derivative


DERIVATIVES = {
    "jvp": _jvp,
    "linearize": _linearize,
    "jacfwd": _jacobian(jax.jacfwd),
    "value_and_grad": lambda f, at: jax.value_and_grad(f)(at),
    "pullback": _pullback,
    "jacrev": _jacobian(jax.jacrev),
}


class Runner:
    """Runs one program on indices of its own."""

    def __init__(self, program: Program):
        self.program = program
        self.slots = {s.name: s for s in program.slots}
        self.indices = {s.name: storax.StateIndex(name=s.name) for s in program.slots}

    # The program

    def set_first(self, slot):
        value, _ = to_physical(slot, first_state(slot))
        set_it = lambda x: storax.set_state(self.indices[slot.name], x)
        over_lanes(slot, set_it)(jnp.asarray(value, jnp.float32))

    def preset(self):
        for slot in self.program.slots:
            if slot.preset:
                self.set_first(slot)

    def __call__(self, x, y):
        for slot in self.program.slots:
            if not slot.preset:
                self.set_first(slot)
        env = {"x": x, "y": y}
        # A slot's token is a zero with its batch axes, as soon as all of its lanes are there.
        env.update(
            {slot.name: jnp.zeros(physical_shape(slot), jnp.float32) for slot in self.program.slots}
        )
        return self.block(self.program.body, env)

    @staticmethod
    def inputs(program):
        x, *y = program.inputs
        return jnp.float32(x), jnp.array(y, jnp.float32)

    # What it left

    def counts(self):
        cores = {name: index._slot.core for name, index in self.indices.items()}
        return {name: (core.num_gets, core.num_sets) for name, core in cores.items()}

    def final_states(self):
        out = {}
        for slot in self.program.slots:
            get = functools.partial(storax.get_state, self.indices[slot.name])
            like = jnp.zeros(physical_shape(slot), jnp.float32)
            value = over_lanes(slot, get, out_axis=True)(like)
            _, back = to_physical(slot, first_state(slot))
            out[slot.name] = np.transpose(value, back)
        return out

    # Expressions

    def expr(self, e: Expr, env):
        match e:
            case Const(value):
                return jnp.float32(value)
            case Var(name):
                return env[name]
            case Op(symbol, left, right):
                pair = same_rank(self.expr(left, env), self.expr(right, env))
                return modulo(OPERATIONS[symbol](*pair))
            case Total(of):
                return fit(self.expr(of, env), False)
            case Less(left, right):
                pair = same_rank(self.expr(left, env), self.expr(right, env))
                return lax.convert_element_type(lax.lt(*pair), jnp.float32)
        raise TypeError(e)

    def integer(self, e, env):
        return lax.convert_element_type(fit(self.expr(e, env), False), jnp.int32)

    def fitted(self, outs, values):
        return [fit(v, o.vector) for o, v in zip(outs, values, strict=True)]

    def bind(self, env, outs, values):
        return {**env, **{o.name: v for o, v in zip(outs, values, strict=True)}}

    # Statements

    def block(self, block: Block, env):
        for s in block.statements:
            env = getattr(self, "do_" + type(s).__name__.lower())(s, env)
        return [self.expr(e, env) for e in block.results]

    def do_let(self, s: Let, env):
        return {**env, s.name: self.expr(s.value, env)}

    def do_get(self, s: Get, env):
        return {**env, s.name: storax.get_state(self.indices[s.slot], env[s.slot])}

    def do_set(self, s: Set, env):
        token = env[s.slot]
        value = fit(self.expr(s.value, env), self.slots[s.slot].vector)
        if s.stop:
            value, token = lax.stop_gradient((value, token))
        storax.set_state(self.indices[s.slot], align_p.bind(value, token))
        return env

    def do_psum(self, s: Psum, env):
        value = self.expr(s.value, env)
        if s.stop:
            value = lax.stop_gradient(value)
        return {**env, s.name: modulo(lax.psum(value, s.axis))}

    def do_call(self, s: Call, env):
        wrap = CALLS[s.how]
        if s.closes_over:
            outs = wrap(lambda: self.fitted(s.outs, self.block(s.body, env)))()
        else:
            names = sorted(used_names(s.body) & env.keys())

            def inner(*args):
                inner_env = dict(zip(names, args, strict=True))
                return self.fitted(s.outs, self.block(s.body, inner_env))

            outs = wrap(inner)(*[env[n] for n in names])
        return self.bind(env, s.outs, outs)

    def starts(self, s, env):
        return self.fitted(s.carries, [self.expr(c.start, env) for c in s.carries])

    def do_scan(self, s: Scan, env):
        n = len(s.carries)

        def body(carry, item):
            inner = {**self.bind(env, s.carries, carry), s.item: item}
            out = self.fitted(s.outs, self.block(s.body, inner))
            return out[:n], out[n:]

        items, starts = jnp.arange(s.length, dtype=jnp.float32), self.starts(s, env)
        if s.checkpointed:
            items = items[::-1] if s.reverse else items
            carry, ys = eqxi.scan(body, starts, items, kind="checkpointed", checkpoints=2)
        else:
            carry, ys = lax.scan(body, starts, items, reverse=s.reverse, unroll=s.unroll)
        return self.bind(env, s.outs, [*carry, *[total(y, 0) for y in ys]])

    def do_fori(self, s: Fori, env):
        def body(k, carry):
            inner = {
                **self.bind(env, s.carries, carry),
                s.item: lax.convert_element_type(k, jnp.float32),
            }
            return self.fitted(s.outs, self.block(s.body, inner))

        start, count = 0, s.count
        if not isinstance(count, int):
            start = jnp.int32(0)
            count = lax.clamp(start, self.integer(count, env), jnp.int32(3))
        return self.bind(env, s.outs, lax.fori_loop(start, count, body, self.starts(s, env)))

    def do_while(self, s: While, env):
        def test(carry):
            k, *carry = carry
            (more,) = self.block(s.test, self.bind(env, s.carries, carry))
            return true(more) & (k < s.limit)

        def body(carry):
            k, *carry = carry
            return [
                k + 1,
                *self.fitted(s.outs, self.block(s.body, self.bind(env, s.carries, carry))),
            ]

        loop = lax.while_loop
        if s.kind:
            loop = functools.partial(eqxi.while_loop, kind=s.kind, max_steps=s.limit, base=2)
        _, *out = loop(test, body, [jnp.int32(0), *self.starts(s, env)])
        return self.bind(env, s.outs, out)

    def do_branch(self, s: Branch, env):
        blocks = [lambda b=b: self.fitted(s.outs, self.block(b, env)) for b in s.blocks]
        if s.how == "cond":
            predicate = true(self.expr(s.index, env))
            return self.bind(env, s.outs, lax.cond(predicate, blocks[1], blocks[0]))
        return self.bind(env, s.outs, lax.switch(self.integer(s.index, env), blocks))

    def do_vmap(self, s: Vmap, env):
        arrays, axes = [], []
        for m in s.mapped:
            start = fit(self.expr(m.start, env), m.vector)
            axis = m.axis % (start.ndim + 1)
            lanes = [modulo(start + lax.full_like(start, k)) for k in range(s.size)]
            arrays.append(lax.concatenate([lax.expand_dims(x, [axis]) for x in lanes], axis))
            axes.append(m.axis)
        for name in s.binds:
            # The token's rank says how many levels are left, of which this is the outermost.
            slot = self.slots[name]
            left = env[name].ndim - slot.vector
            arrays.append(env[name])
            axes.append(slot.levels[len(slot.levels) - left].axis)
        names = [m.name for m in s.mapped] + list(s.binds)

        def body(args):
            inner = {**env, **dict(zip(names, args, strict=True))}
            return self.fitted(s.outs, self.block(s.body, inner))

        lanes = jax.vmap(
            body,
            in_axes=(axes,),
            out_axes=[o.axis for o in s.outs],
            axis_size=s.size,
            axis_name=s.axis_name,
        )(arrays)
        outs = [
            total(v, o.axis) if o.lane is None else lax.index_in_dim(v, o.lane, o.axis, False)
            for o, v in zip(s.outs, lanes, strict=True)
        ]
        return self.bind(env, s.outs, outs)

    def do_grad(self, s: Grad, env):
        def f(t):
            (out,) = self.block(s.body, {**env, s.name: t})
            return fit(out, False)

        at = fit(self.expr(s.at, env), False)
        value, slope = DERIVATIVES[s.how](f, at)
        return self.bind(env, s.outs, [value, modulo(slope)])
