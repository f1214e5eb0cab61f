"""A program for one lane, under the scalar mask of whether the lane counts.

Every set in it happens only where the mask is true. What the other lanes compute is one of three things,
see `Others`; it is selected away.
"""

import collections
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _jax
from ._masked_custom import mask_custom_jvp, mask_custom_vjp
from ._other_lanes import fill, fill_operands, of_own_lanes, reaching_state
from ._primitives import OPERATIONS, get_p, set_masked_p

__all__ = [
    "Others",
    "close",
    "masked",
    "masked_and_filled",
    "masked_cond_p",
    "masked_while_p",
    "select",
]

# A per-lane cond or while under a mask. These live only between `masked` and the batching of what it
# returns, which turns them into ordinary control flow.
masked_cond_p = _jax.Primitive("masked_cond")
masked_while_p = _jax.Primitive("masked_while")
for _p in (masked_cond_p, masked_while_p):
    _p.multiple_results = True


class _Params(dict):
    """An equation's parameters as one hashable parameter."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@masked_cond_p.def_effectful_abstract_eval
def _(mask, index, *operands, params, others):
    return list(params["branches"][0].out_avals), _jax.state_effects(*params["branches"])


@masked_while_p.def_effectful_abstract_eval
def _(mask, *operands, params, others):
    effects = _jax.state_effects(params["cond_jaxpr"], params["body_jaxpr"])
    return list(params["body_jaxpr"].out_avals), effects


class Others(enum.Enum):
    """What lanes compute with in a branch that they don't take, or after they have ended."""

    FILLED = "what a lane has that takes it"
    OWN = "what they have"  # all that they compute is selected away
    HEARD = "what they have, of which a collective may hear"


# What differs from lane to lane of itself.
_OWN = ("axis_index",)


def close(f: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """Traces a function of flat arguments to a closed jaxpr."""
    return jax.make_jaxpr(f)(*avals)


def select(lanes: Any, axes: Sequence[int], x: Any, y: Any) -> Any:
    """`x` where `lanes` is true, which has these axes of theirs, else `y`."""
    return lax.select(_jax.broadcast_like(lanes, axes, x), x, y)


# --- Masking a per-lane program -------------------------------------------------------------------


def masked(jaxpr: Any, mask: Any, args: Sequence[Any], others: Others) -> list[Any]:
    """Evaluates a closed jaxpr for one lane so that it sets state only where `mask` is true.

    If the others are filled, a lane of which it is not true gets the state, and the number, of another.
    """
    return _masked(_jax.open_jaxpr(jaxpr), getattr(jaxpr, "consts", ()), mask, args, others)


def masked_and_filled(
    jaxpr: Any, mask: Any, args: Sequence[Any], others: Others = Others.FILLED, takes: Any = None
) -> list[Any]:
    """The same, and such a lane gets what another has of `args` too.

    If the others are heard, one that `takes` is not true of has no derivative by them instead.
    """
    heard = others is Others.HEARD
    args, for_state = fill_operands(jaxpr, takes if heard else mask, args, own_values=heard)
    consts = getattr(jaxpr, "consts", ())
    return _masked(_jax.open_jaxpr(jaxpr), consts, mask, args, others, for_state)


def _masked(jaxpr, consts, mask, args, others, for_state=None):
    """`for_state` are other values of some inputs, for what leads to operations on state."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    env_of_state = dict(for_state or {})
    own = collections.ChainMap(env_of_state, env)
    into_state = reaching_state(jaxpr) if env_of_state else ()
    looked: dict[int, Any] = {}

    def run(eqn, env):
        ins = [v.val if isinstance(v, _jax.Literal) else env[v] for v in eqn.invars]
        with eqn.ctx.manager:
            outs = _masked_equation(eqn, ins, mask, others)
        return zip(eqn.outvars, outs, strict=True)

    for eqn in jaxpr.eqns:
        variables = [v for v in eqn.invars if not isinstance(v, _jax.Literal)]
        if not any(v in env_of_state for v in variables):
            env.update(run(eqn, env))
            continue
        leads = any(v in into_state for v in eqn.outvars)
        rules = _jax.look_into_rules(eqn, looked)
        acts = _jax.acts(eqn) or rules.act
        if _jax.has_state(eqn) or rules.have_state or (leads and acts):  # it is to happen once
            ins = {v: own[v] for v in variables}
            if others is Others.HEARD and eqn.primitive not in OPERATIONS:
                ins = of_own_lanes(mask, ins, _jax.name_of(eqn))
            env.update(run(eqn, ins))
        else:
            if leads:
                env_of_state.update(run(eqn, own))
            env.update(run(eqn, env))
    return [v.val if isinstance(v, _jax.Literal) else env[v] for v in jaxpr.outvars]


def _masked_equation(eqn, ins, mask, others):
    # What is pure may still have rules with state in them.
    has_state = _jax.has_state(eqn)
    if eqn.primitive is get_p or eqn.primitive.name in _OWN:
        outs = _jax.bind_equation(eqn, ins)
        return fill(mask, outs) if others is Others.FILLED else outs
    if eqn.primitive.name == _jax.PVARY:
        return [_jax.make_varying(x, frozenset(eqn.params["axes"])) for x in ins]
    if not (has_state or _jax.has_primitive(eqn, *_OWN, _jax.PVARY, *_jax.RULES)):
        return _jax.bind_equation(eqn, ins)
    rule = _masked_rules.get(eqn.primitive.name)
    if rule is None and not has_state:
        return _jax.bind_equation(eqn, ins)
    if rule is None:
        raise NotImplementedError(
            f"storax: state inside `{_jax.name_of(eqn)}`, in a branch or loop whose predicate is "
            "batched by `jax.vmap`, is not supported. Move the get and set out of it, or make the "
            "predicate independent of the batch."
        )
    return rule(eqn.params, ins, mask, others)


def _mask_set(params, ins, mask, _):
    return set_masked_p.bind(mask, *ins, mask_axes=(None,) * len(params["levels"]), **params)


def _mask_set_masked(params, ins, mask, _):
    inner, *state = ins
    return set_masked_p.bind(
        lax.bitwise_and(inner, jnp.broadcast_to(mask, inner.shape)), *state, **params
    )


def _mask_scan(params, ins, mask, others):
    consts, init, xs = _jax.split_scan(params, ins)

    def body(carry, x):
        out = masked(params["jaxpr"], mask, [*consts, *carry, *x], others)
        return out[: len(init)], out[len(init) :]

    carry, ys = lax.scan(
        body, init, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys]


def _mask_jit(params, ins, mask, others):
    inner = jax.jit(lambda mask, *args: masked(params["jaxpr"], mask, args, others))
    return inner(mask, *ins)


def _mask_checkpoint(params, ins, mask, others):
    prevent_cse = params["prevent_cse"]
    if isinstance(prevent_cse, tuple):  # for each operand
        prevent_cse = (True, *prevent_cse)
    inner = jax.checkpoint(
        lambda mask, *args: masked(params["jaxpr"], mask, args, others),
        prevent_cse=prevent_cse,
        policy=params["policy"],
    )
    return inner(mask, *ins)


def _mask_shard_map(params, ins, mask, others):
    inner = _jax.shard_map_like(
        lambda mask, *args: _masked(_jax.open_jaxpr(params["jaxpr"]), (), mask, args, others),
        params,
    )
    return inner(mask, *ins)


def _mask_call(params, ins, mask, others):
    return masked(params["call_jaxpr"], mask, ins, others)


def _mask_with_rules(mask_custom):
    def rule(params, ins, mask, others):
        return mask_custom(functools.partial(masked, others=others), params, ins, mask)

    return rule


def _mask_cond(params, ins, mask, others):
    return masked_cond_p.bind(mask, *ins, params=_Params(params), others=others)


def _mask_while(params, ins, mask, others):
    if params["cond_jaxpr"].out_avals[0].shape:
        params, ins = _with_one_predicate(params, ins)
    return masked_while_p.bind(mask, *ins, params=_Params(params), others=others)


def _with_one_predicate(params, operands):
    """The same loop, without state, that JAX has batched: it has a predicate for each lane."""
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    cond_consts = operands[: params["cond_nconsts"]]
    n_cond = len(cond_consts)
    n_consts = n_cond + params["body_nconsts"]

    def goes_on(*args):
        (pred,) = _jax.call_jaxpr(cond, *args)
        return [lax.reduce_or(pred, range(pred.ndim))]

    def step(*args):
        carry = args[n_consts:]
        (pred,) = _jax.call_jaxpr(cond, *args[:n_cond], *carry)
        new = _jax.call_jaxpr(body, *args[n_cond:])
        return [select(pred, range(pred.ndim), x, y) for x, y in zip(new, carry, strict=True)]

    avals = [jax.typeof(x) for x in operands]
    params = {
        **params,
        "cond_jaxpr": close(goes_on, [*avals[:n_cond], *avals[n_consts:]]),
        "body_jaxpr": close(step, avals),
        "body_nconsts": n_consts,
    }
    return params, [*cond_consts, *operands]  # the body has the condition's constants too


_masked_rules: dict[str, Callable[..., Any]] = {
    "set_state": _mask_set,
    "set_state_masked": _mask_set_masked,
    "scan": _mask_scan,
    "jit": _mask_jit,
    "remat2": _mask_checkpoint,
    "shard_map": _mask_shard_map,
    "custom_jvp_call": _mask_with_rules(mask_custom_jvp),
    "custom_vjp_call": _mask_with_rules(mask_custom_vjp),
    # What JAX makes of a scan under checkpoint, and the like; the latter since 0.11.
    **dict.fromkeys(("closed_call", "eval_jaxpr"), _mask_call),
    "cond": _mask_cond,
    "while": _mask_while,
}
