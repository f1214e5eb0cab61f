"""vmap of cond, switch and while with state inside: masked reads and writes.

JAX's rule for a batched predicate runs every branch, or a finished lane's body, for every lane, and
selects among the results: right for values, wrong for state. Ours transforms the per-lane program
first, so that every set in it happens only where a scalar mask is true, and then lets JAX batch it.
(Masking after batching could hang: a finished lane's inner loop might never end.) Each branch runs
only if some lane takes it.

JAX's rules also move batch axes to the front. Wherever they do, levels are marked as moved; see
`storax::BatchLevel`. Control flow without state goes to JAX's own rules, untouched.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _jax, _unknown_jax
from ._masked import (
    Others,
    close,
    masked,
    masked_and_filled,
    masked_cond_p,
    masked_while_p,
    select,
)
from ._other_lanes import OURS, ends_by_state, fill, mark_branches

__all__ = ["install"]

# --- Batching -------------------------------------------------------------------------------------


def _lane_avals(axis_data, args, dims):
    return [
        _jax.lane_aval(jax.typeof(x), axis_data.size, d) for x, d in zip(args, dims, strict=True)
    ]


def _has_primitive(jaxpr, *names):
    return any(_jax.has_primitive(e, *names) for e in _jax.open_jaxpr(jaxpr).eqns)


def _refuse_what_acts(kind, *jaxprs):
    """What acts on more than values acts for all lanes; JAX doesn't let it into a branch either."""
    what = _jax.acts_for_all_lanes(*jaxprs)
    if what is None:
        return
    name, instead = {
        "ref": (
            "a `jax.Ref`",
            "or keep what it holds in a StateIndex, or pass it along as a value.",
        ),
        "io": ("an `io_callback`", "or use `jax.debug.callback`, which is for all lanes."),
    }[what]
    raise NotImplementedError(
        f"storax: {name} in a {kind} with state, whose predicate is batched by `jax.vmap`, would also act "
        f"for the lanes that don't run the {kind}. Move it out of the {kind}, {instead}"
    )


def _any_lane(mask):
    return lax.reduce_or(mask, (0,))


def _zeros(aval):
    if aval.dtype == jax.dtypes.float0:
        return np.zeros(aval.shape, aval.dtype)
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        zeros = lax.broadcast(jax.random.key(0, impl=_jax.key_impl(aval.dtype)), aval.shape)
    else:
        zeros = lax.full(aval.shape, 0, aval.dtype)
    return _jax.make_varying(_jax.as_sharded(zeros, aval), _jax.varying_axes(aval))


def _common_out_axes(axis_data, jaxprs, in_dims):
    """The first axis for each result that is batched in any of the jaxprs."""
    axes = [_jax.batched_out_axes(j, axis_data, in_dims) for j in jaxprs]
    return [0 if any(a is not None for a in column) else None for column in zip(*axes, strict=True)]


def _batch_masked_cond(axis_data, args, dims, *, params, others=Others.FILLED):
    axis_data = _jax.as_masked(_jax.as_moved(axis_data))
    (mask, index, *operands), (mask_dim, index_dim, *operand_dims) = args, dims
    branches = params["branches"]
    _refuse_what_acts("branch", *branches)
    cond_params = {k: v for k, v in params.items() if k != "branches"}
    # What lanes learn of each other is the same whether or not they take the branch.
    heard = others is Others.HEARD
    of_branches = [
        Others.HEARD if heard or _jax.has_collective(branch) else Others.FILLED
        for branch in branches
    ]
    if index_dim is None:
        # All active lanes take the same branch.
        ins, in_dims = [mask, *operands], [mask_dim, *operand_dims]
        avals = _lane_avals(axis_data, ins, in_dims)
        closed = [
            close(lambda m, *a, b=b, o=o: masked(b, m, a, o), avals)
            for b, o in zip(branches, of_branches, strict=True)
        ]
        out_dims = _common_out_axes(axis_data, closed, in_dims)
        batched = tuple(_jax.batched_jaxpr(j, axis_data, in_dims, out_dims) for j in closed)
        return lax.cond_p.bind(index, *ins, branches=batched, **cond_params), out_dims

    index = _jax.move_to_front(axis_data, index, index_dim)
    active = None if mask is None else _jax.move_to_front(axis_data, mask, mask_dim)
    num_out = len(branches[0].out_avals)
    takes = [lax.eq(index, lax.full_like(index, k)) for k in range(len(branches))]
    outs = [
        _run_branch(axis_data, *each, active, operands, operand_dims, cond_params)
        for each in zip(branches, takes, of_branches, strict=True)
    ]
    results = list(outs[0])
    for k in range(1, len(branches)):
        results = [select(takes[k], [0], x, r) for x, r in zip(outs[k], results, strict=True)]
    return results, [0] * num_out


def _run_branch(axis_data, branch, takes, others, active, operands, operand_dims, cond_params):
    """A branch, for lanes that take it and are active; it runs if there is one."""
    # The jaxprs of a cond's branches have each other's effects.
    pure = not any(map(_jax.has_state, _jax.open_jaxpr(branch).eqns))
    lanes = takes if active is None else takes & active
    # A collective hears of the lanes that are not active too.
    runs = takes if others is Others.HEARD else lanes
    out_dims = [0] * len(branch.out_avals)
    # Or a derivative by what devices share is summed inside of the cond, which not all of them may take.
    varying = _jax.varying_axes(jax.typeof(lanes))
    operands = [_jax.make_varying(x, varying) for x in operands]
    ins, in_dims = [lanes, takes, *operands], [0, 0, *operand_dims]

    def one_lane(mask, takes, *args):
        out = masked_and_filled(branch, mask, args, others, takes)
        # By which an outer vmap knows it for ours.
        return fill(mask, out, filled=False) if pure and others is Others.FILLED else out

    closed = close(one_lane, _lane_avals(axis_data, ins, in_dims))
    run = _jax.batched_jaxpr(closed, axis_data, in_dims, out_dims)
    if _jax.has_collective_of_devices(branch) or (pure and _jax.has_collective(branch)):
        out = _jax.call_jaxpr(run, *ins)  # other devices, which may take it, wait for this one
    else:
        skip = close(lambda *_: [_zeros(a) for a in run.out_avals], [jax.typeof(x) for x in ins])
        taken = lax.convert_element_type(_any_lane(runs), np.int32)
        out = lax.cond_p.bind(taken, *ins, branches=(skip, run), **cond_params)
    return [_jax.spread_lanes(axis_data, x) for x in out]


def _batch_masked_while(axis_data, args, dims, *, params, others=Others.FILLED):
    mask, mask_dim = args[0], dims[0]
    axis_data = _jax.as_masked(_jax.as_moved(axis_data))
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    cond_consts, body_consts, init = _jax.split_while(params, args[1:])
    cond_dims, body_dims, init_dims = _jax.split_while(params, dims[1:])

    carry_dims = _batched_carry(axis_data, body, body_dims, init_dims)
    (pred_dim,) = _jax.batched_out_axes(cond, axis_data, [*cond_dims, *carry_dims])
    if pred_dim is None and mask is None:
        return None  # JAX's own rule is right
    _refuse_what_acts("loop", cond, body)
    if pred_dim is None:
        return _while_in_step(axis_data, args, dims, params, carry_dims, others)

    # Carries that the body returns as they came are not the lanes' own: they may stay unbatched.
    open_body = _jax.open_jaxpr(body)
    n_body = len(body_consts)
    fixed = [v is open_body.invars[n_body + k] for k, v in enumerate(open_body.outvars)]
    fixed_vals = [x for x, f in zip(init, fixed, strict=True) if f]
    fixed_dims = [d for d, f in zip(init_dims, fixed, strict=True) if f]
    moving = [
        _jax.move_to_front(axis_data, x, d)
        for x, d, f in zip(init, init_dims, fixed, strict=True)
        if not f
    ]
    merge = functools.partial(_merge, fixed)
    consts = [*cond_consts, *body_consts, *fixed_vals]
    const_dims = [*cond_dims, *body_dims, *fixed_dims]
    n_cond, n_fixed = len(cond_consts), len(fixed_vals)

    def split(args):
        c, b = args[:n_cond], args[n_cond : n_cond + n_body]
        f = args[n_cond + n_body : n_cond + n_body + n_fixed]
        return c, b, f, args[n_cond + n_body + n_fixed :]

    # What a lane that has ended computes is selected away, derivatives and all; but a loop in it might
    # not end.
    if _jax.has_collective(cond, body):
        others = Others.HEARD
    elif others is Others.FILLED and not any(_has_primitive(j, "while") for j in (cond, body)):
        others = Others.OWN

    def run(jaxpr, mask, args):
        evaluate = masked_and_filled if others is Others.FILLED else masked
        return evaluate(jaxpr, mask, args, others)

    def start(mask, *args):
        c, _, f, carry = split(args)
        return [mask & run(cond, mask, [*c, *merge(f, carry)])[0]]

    # As in JAX, a lane that has ended goes on again if it hears of another that it should.
    talks = _jax.has_collective(cond)

    def step(running, entered, *args):
        c, b, f, carry = split(args)
        new = run(body, running, [*b, *merge(f, carry)])
        new = [x for x, is_fixed in zip(new, fixed, strict=True) if not is_fixed]
        new = [
            lax.select(jnp.broadcast_to(running, x.shape), x, y)
            for x, y in zip(new, carry, strict=True)
        ]
        may_go_on = entered if talks else running
        return [may_go_on & run(cond, may_go_on, [*c, *merge(f, new)])[0], *new]

    if mask is None:
        mask, mask_dim = _jax.move_to_front(axis_data, jnp.array(True), None), 0
    ins = [mask, *consts, *moving]
    in_dims = [mask_dim, *const_dims, *[0] * len(moving)]
    closed = close(start, _lane_avals(axis_data, ins, in_dims))
    (running,) = _jax.call_jaxpr(_jax.batched_jaxpr(closed, axis_data, in_dims, [0]), *ins)
    ins, in_dims = [running, *ins], [0, *in_dims]
    closed = close(step, _lane_avals(axis_data, ins, in_dims))
    one_step = _jax.batched_jaxpr(closed, axis_data, in_dims, [0] * (1 + len(moving)))
    _, *moved = lax.while_loop(
        lambda carry: _any_lane(carry[0]),
        lambda carry: _jax.call_jaxpr(one_step, carry[0], mask, *consts, *carry[1:]),
        [running, *moving],
    )
    return merge(fixed_vals, moved), merge(fixed_dims, [0] * len(moved))


def _merge(fixed, fixed_vals, moving_vals):
    fixed_iter, moving_iter = iter(fixed_vals), iter(moving_vals)
    return [next(fixed_iter) if f else next(moving_iter) for f in fixed]


def _batched_carry(axis_data, body, body_dims, init_dims):
    """Which carries are batched in the end, if those at `init_dims` are at first."""
    carry_dims = [0 if d is not None else None for d in init_dims]
    while True:
        out = _jax.batched_out_axes(body, axis_data, [*body_dims, *carry_dims])
        new = [
            0 if a is not None or b is not None else None
            for a, b in zip(carry_dims, out, strict=True)
        ]
        if new == carry_dims:
            return carry_dims
        carry_dims = new


def _while_in_step(axis_data, args, dims, params, carry_dims, others):
    """A loop under a mask whose predicate is the same for all lanes."""
    mask, mask_dim = args[0], dims[0]
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    cond_consts, body_consts, init = _jax.split_while(params, args[1:])
    cond_dims, body_dims, init_dims = _jax.split_while(params, dims[1:])
    init = [
        x if new is None else _jax.move_to_front(axis_data, x, d)
        for x, d, new in zip(init, init_dims, carry_dims, strict=True)
    ]

    def batch(jaxpr, consts, const_dims, out_dims):
        in_dims = [mask_dim, *const_dims, *carry_dims]
        avals = _lane_avals(axis_data, [mask, *consts, *init], in_dims)
        closed = close(lambda m, *a: masked(jaxpr, m, a, others), avals)
        return _jax.batched_jaxpr(closed, axis_data, in_dims, out_dims)

    # Where no lane is to set it, a state may never end the loop. But others may wait for this device.
    ends = (
        others is Others.HEARD
        and ends_by_state(params)
        and not _jax.has_collective_of_devices(cond, body)
    )
    cond = batch(cond, cond_consts, cond_dims, [None])
    body = batch(body, body_consts, body_dims, carry_dims)
    any_lane = _any_lane(_jax.move_to_front(axis_data, mask, mask_dim)) if ends else None

    def goes_on(carry):
        (pred,) = _jax.call_jaxpr(cond, mask, *cond_consts, *carry)
        return pred & any_lane if ends else pred

    out = lax.while_loop(
        goes_on,
        lambda carry: _jax.call_jaxpr(body, mask, *body_consts, *carry),
        init,
    )
    return out, carry_dims


def _while_with_predicate(params, operands):
    """The same loop, of which the predicate is a carry: checkify would run a condition twice."""
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    cond_consts, body_consts, init = _jax.split_while(params, operands)

    def with_predicate(carry):
        return [*_jax.call_jaxpr(cond, *cond_consts, *carry), *carry]

    _, *out = lax.while_loop(
        lambda carry: carry[0],
        lambda carry: with_predicate(_jax.call_jaxpr(body, *body_consts, *carry[1:])),
        with_predicate(init),
    )
    return out


# --- Installation ---------------------------------------------------------------------------------


def _wrap_scan(original):
    def rule(axis_data, args, dims, **params):
        if _jax.has_state(params["jaxpr"]):
            axis_data = _jax.as_moved(axis_data)
        return original(axis_data, args, dims, **params)

    return rule


def _wrap_cond(original):
    def rule(axis_data, args, dims, **params):
        branches = params["branches"]
        if not _jax.has_state(*branches):
            if dims[0] is None:
                return original(axis_data, args, dims, **params)
            if not any(_has_primitive(b, *OURS) for b in branches):
                return original(_jax.as_parted(axis_data), args, dims, **params)
        _unknown_jax.require("vmap of control flow")
        if dims[0] is None or "branches_platforms" in params:
            return original(_jax.as_moved(axis_data), args, dims, **params)
        with _jax.mesh_of(axis_data, args):
            return _batch_masked_cond(axis_data, [None, *args], [None, *dims], params=params)

    return rule


def _parts_lanes_with_rules(axis_data, args, dims, params):
    """Whether the lanes of a pure loop end at different times, with custom rules in it."""
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    if not any(_has_primitive(j, *_jax.RULES, _jax.CUSTOM_VMAP) for j in (cond, body)):
        return False
    cond_dims, body_dims, init_dims = _jax.split_while(params, dims)
    carry_dims = _batched_carry(axis_data, body, body_dims, init_dims)
    (pred_dim,) = _jax.batched_out_axes(cond, axis_data, [*cond_dims, *carry_dims])
    return pred_dim is not None


def _wrap_while(original):
    def rule(axis_data, args, dims, **params):
        if not _jax.has_state(params["cond_jaxpr"], params["body_jaxpr"]):
            if _parts_lanes_with_rules(axis_data, args, dims, params):
                axis_data = _jax.as_parted(axis_data)
            return original(axis_data, args, dims, **params)
        _unknown_jax.require("vmap of control flow")
        with _jax.mesh_of(axis_data, args):
            out = _batch_masked_while(axis_data, [None, *args], [None, *dims], params=params)
        if out is None:
            return original(_jax.as_moved(axis_data), args, dims, **params)
        return out

    return rule


@functools.cache
def install() -> None:
    """Wraps JAX's batching rules for control flow, once."""
    _jax.wrap_batching(lax.scan_p, _wrap_scan)
    _jax.wrap_batching(lax.cond_p, _wrap_cond)
    _jax.wrap_batching(lax.while_p, _wrap_while)
    _jax.wrap_splitting(lax.cond_p, mark_branches)
    _jax.wrap_check_of_while(_while_with_predicate)
    _jax.define_batching(masked_cond_p, _batch_masked_cond)
    _jax.define_batching(masked_while_p, _batch_masked_while)
