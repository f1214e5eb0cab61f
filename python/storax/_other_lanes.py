"""Lanes that don't take a branch compute in it what one that does computes.

All lanes go through a branch that any lane takes. What the others have may be what the branch is there to
keep out: nothing times the infinite derivative of their values is NaN in the derivative by what the lanes
share (jax#1052), and a loop may never end. JAX selects, lane by lane, between an operand and the same
with its gradient stopped, also where lanes share it. But that gives each operand the mask's batch axes,
and what a get or set depends on must keep its own, as they are part of the state's type. So here the
other lanes get what a lane has that takes the branch: of operands, of states, of the lane's number.

That takes a copy, so operands are filled only where loops go by them, or once they are differentiated.

With a collective in the branch, the other lanes' own values count for those that take it. Then operands
stay what they are, and their derivative is stopped in the other lanes, as in JAX.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _jax

__all__ = [
    "OURS",
    "ends_by_state",
    "fill",
    "fill_operands",
    "install",
    "of_own_lanes",
    "reaching_state",
]

# One lane's values, as they are, under the mask of whether the lane counts. Of each: whether it must keep
# its batch axes, as state depends on it, and whether it is filled in any case. With `own_values` none is,
# also when differentiated.
fill_p = _jax.Primitive("fill")
# All lanes' values. The mask's axes are that of the lanes, and then outer vmaps'. For each value, `axes` are
# which of its own these are, None where it has none: then any lane along that axis may take the branch.
fill_lanes_p = _jax.Primitive("fill_lanes")
for _p in (fill_p, fill_lanes_p):
    _p.multiple_results = True
# What goes into a loop in a branch with state, or into a function with rules, which may have one. What a
# derivative takes off from that branch, to run in a backward pass, has no state, but the loop perhaps, which
# must not run for other lanes there either.
of_branch_p = _jax.Primitive("of_branch")
# What has these is a branch of ours.
OURS = (fill_p.name, fill_lanes_p.name, of_branch_p.name)


def fill(mask: Any, values: Sequence[Any], filled: bool = True) -> list[Any]:
    """One lane's values if its `mask` is true, or else those of some lane of which it is."""
    n = len(values)
    return fill_p.bind(
        mask, *values, keeps_axes=(True,) * n, filled=(filled,) * n, own_values=False
    )


def fill_operands(
    jaxpr: Any, mask: Any, operands: Sequence[Any], own_values: bool = False
) -> tuple[list[Any], dict[Any, Any]]:
    """The operands of a branch, or of a loop's body, in one lane; and those for state, by their variable.

    The latter keep the batch axes they have. For the rest that is not enough in nested vmaps, where a lane
    may take the branch with each of two operands, and none with both.
    """
    jaxpr = _jax.open_jaxpr(jaxpr)
    decides = set() if own_values else _reaching(jaxpr, _deciding)
    into_state = reaching_state(jaxpr)
    n = len(operands)
    params = {"filled": _among(decides, jaxpr.invars), "own_values": own_values}
    out = fill_p.bind(mask, *operands, keeps_axes=(False,) * n, **params)
    if into_state.isdisjoint(jaxpr.invars):
        return out, {}
    keeps = fill_p.bind(mask, *operands, keeps_axes=(True,) * n, **params)
    return out, {v: x for v, x in zip(jaxpr.invars, keeps, strict=True) if v in into_state}


def reaching_state(jaxpr: Any) -> set[Any]:
    """The variables of an open jaxpr that operations on state depend on."""
    return _reaching(jaxpr, lambda eqn: eqn.invars if _jax.has_state(eqn) else ())


def mark_branches(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a `cond`; if it has state, each of its loops is known to be of such a one."""
    branches = params["branches"]
    eqns = [e for branch in branches for e in _jax.open_jaxpr(branch).eqns]
    with_state = any(e.primitive is of_branch_p or _jax.has_state(e) for e in eqns)
    if not (with_state and any(map(_may_loop, eqns))):
        return params
    return {**params, "branches": tuple(map(_marked, branches))}


def _may_loop(eqn):
    return _jax.has_primitive(eqn, "while", *_jax.RULES, _jax.BACKWARD_RULE)


@_jax.remembered_by_jaxpr
def _marked(branch):
    return _jax.jaxpr_with_marks(branch, of_branch_p, _may_loop)


# --- What depends on what --------------------------------------------------------------------------


def _reaching(
    jaxpr: Any, targets: Callable[[Any], Iterable[Any]], outs: Iterable[Any] = ()
) -> set[Any]:
    """The variables that these results depend on, or the given operands of an equation."""
    found = set(filter(_is_variable, outs))
    for eqn in reversed(jaxpr.eqns):
        found.update(filter(_is_variable, targets(eqn)))
        if any(v in found for v in eqn.outvars):
            found.update(filter(_is_variable, eqn.invars))
    return found


def _among(found, variables):
    return tuple(v in found for v in variables)


def _is_variable(v):
    return not isinstance(v, _jax.Literal)


def _deciding(eqn):
    """The operands that say whether a loop ends."""
    if not _jax.has_primitive(eqn, "while"):
        return []
    if eqn.primitive.name != "while":
        return eqn.invars
    cond, body = _functions(eqn.params)
    in_cond, in_body, carries = _reaching_predicate(eqn.params, _deciding)
    flags = (
        *_among(in_cond, cond.invars[: eqn.params["cond_nconsts"]]),
        *_among(in_body, body.invars[: eqn.params["body_nconsts"]]),
        *carries,
    )
    return [v for v, decides in zip(eqn.invars, flags, strict=True) if decides]


def ends_by_state(params: dict[str, Any]) -> bool:
    """Whether a state that is got says whether a loop ends."""
    in_cond, in_body, _ = _reaching_predicate(params, lambda _: ())
    return any(
        v in found
        for jaxpr, found in zip(_functions(params), (in_cond, in_body), strict=True)
        for eqn in filter(_jax.has_state, jaxpr.eqns)
        for v in eqn.outvars
    )


def _functions(params):
    return [_jax.open_jaxpr(params[name]) for name in ("cond_jaxpr", "body_jaxpr")]


def _reaching_predicate(params, targets):
    """The variables of a loop's condition, and of its body, that go into any predicate; and which carries."""
    cond, body = _functions(params)
    in_cond = _reaching(cond, targets, cond.outvars)
    carries = _among(in_cond, cond.invars[params["cond_nconsts"] :])
    while True:
        outs = [v for v, decides in zip(body.outvars, carries, strict=True) if decides]
        in_body = _reaching(body, targets, outs)
        carried = _among(in_body, body.invars[params["body_nconsts"] :])
        new = tuple(a or b for a, b in zip(carries, carried, strict=True))
        if new == carries:
            return in_cond, in_body, carries
        carries = new


# --- One lane's values -----------------------------------------------------------------------------


def _batch_fill(axis_data, args, dims, *, keeps_axes, filled, own_values):
    (mask, *values), (mask_dim, *value_dims) = args, dims
    params = {"keeps_axes": keeps_axes, "filled": filled, "own_values": own_values}
    if mask_dim is None:
        return fill_p.bind(mask, *values, **params), value_dims
    if own_values:
        for k, (x, dim) in enumerate(zip(values, value_dims, strict=True)):
            if dim is None and not keeps_axes[k] and jnp.issubdtype(x.dtype, jnp.inexact):
                values[k], value_dims[k] = _jax.move_to_front(axis_data, x, None), 0
    out = fill_lanes_p.bind(mask, *values, axes=tuple((d,) for d in value_dims), **params)
    # What these lanes share may be the own of an outer vmap's.
    if shared := [k for k, d in enumerate(value_dims) if d is None]:
        of_shared = lambda flags: tuple(flags[k] for k in shared)
        same = fill_p.bind(
            lax.reduce_or(mask, (0,)),
            *[out[k] for k in shared],
            keeps_axes=of_shared(keeps_axes),
            filled=of_shared(filled),
            own_values=own_values,
        )
        for k, x in zip(shared, same, strict=True):
            out[k] = x
    return out, value_dims


def _jvp_of_fill(primals, tangents, **params):
    return fill_p.bind(*primals, **params), list(tangents[1:])


# --- All lanes' values -----------------------------------------------------------------------------


def _fill_lanes(mask, *values, axes, filled, **_):
    return [
        _fill_array(_mask_of(mask, a), x, a)
        if f and a[0] is not None and x.size and x.dtype != jax.dtypes.float0
        else x
        for x, a, f in zip(values, axes, filled, strict=True)
    ]


def _mask_of(mask, axes):
    """The mask over the axes that a value has."""
    missing = [k for k, a in enumerate(axes) if a is None]
    return lax.reduce_or(mask, missing) if missing else mask


def _fill_array(mask, x, axes):
    axes = tuple(a for a in axes if a is not None)
    if len(axes) == 1:
        (lanes,) = axes
        one = _jax.take_lane(x, lax.argmax(mask, 0, np.uint32), lanes)
        others = _jax.broadcast_like(one, [a for a in range(x.ndim) if a != lanes], x)
        return lax.select(_like(mask, axes, x), x, others)
    # Each lane of the outermost vmap by itself.
    rest = tuple(a - (a > axes[-1]) for a in axes[:-1])
    alone = functools.partial(_fill_array, axes=rest)
    return jax.vmap(alone, in_axes=(mask.ndim - 1, axes[-1]), out_axes=axes[-1])(mask, x)


def _like(mask, axes, x):
    """The mask over `x`, of which it has these axes."""
    order = sorted(range(mask.ndim), key=axes.__getitem__)
    return _jax.broadcast_like(lax.transpose(mask, order), sorted(axes), x)


def _batch_fill_lanes(axis_data, args, dims, *, axes, keeps_axes, **params):
    (mask, *values), (mask_dim, *value_dims) = args, dims
    new_axes = []
    for k, (x, dim) in enumerate(zip(values, value_dims, strict=True)):
        own = axes[k]
        if mask_dim is not None and dim is None and own[0] is not None and not keeps_axes[k]:
            values[k], value_dims[k] = _jax.move_to_front(axis_data, x, None), 0
        dim = value_dims[k]
        if dim is not None:
            own = tuple(a if a is None else a + (a >= dim) for a in own)
        new_axes.append(own if mask_dim is None else (*own, dim))
    if mask_dim is not None:
        mask = _jax.move_axis(axis_data, mask, mask_dim, mask.ndim - 1)
    out = fill_lanes_p.bind(mask, *values, axes=tuple(new_axes), keeps_axes=keeps_axes, **params)
    return out, value_dims


def _only_lanes(mask, t, axes):
    """A tangent, of the lanes that take the branch."""
    if axes[0] is None or type(t) is _jax.Zero:
        return t
    own = tuple(a for a in axes if a is not None)
    return lax.select(_like(_mask_of(mask, axes), own, t), t, lax.full_like(t, 0))


def _jvp_of_fill_lanes(primals, tangents, *, axes, own_values, **params):
    mask, *values = primals
    params = {**params, "filled": (not own_values,) * len(values), "own_values": own_values}
    out = fill_lanes_p.bind(mask, *values, axes=axes, **params)
    return out, [_only_lanes(mask, t, a) for t, a in zip(tangents[1:], axes, strict=True)]


# --- With a collective -----------------------------------------------------------------------------

# A value under the mask of the lanes that take a branch. `shared`: lanes share it.
own_p = _jax.Primitive("of_own_lanes")


def of_own_lanes(mask: Any, values: dict[Any, Any], where: str) -> dict[Any, Any]:
    """The same, but that a derivative by what lanes share is an error: it would be that of all lanes."""
    return {
        v: own_p.bind(mask, x, where=where, shared=False)
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else x
        for v, x in values.items()
    }


def _batch_own(axis_data, args, dims, *, shared, where):
    shared = shared or (dims[0] is not None and dims[1] is None)
    return own_p.bind(*args, shared=shared, where=where), dims[1]


def _jvp_of_own(primals, tangents, *, shared, where):
    if shared and type(tangents[1]) is not _jax.Zero:
        raise NotImplementedError(
            f"storax: a derivative by what lanes share, through a `{where}` with state in it, in a branch "
            "that has a collective and a predicate batched by `jax.vmap`, is not supported: it would be "
            f"that of all lanes. Get and set the state in the branch itself, outside of the `{where}`; or "
            "move the collective out of the branch."
        )
    return own_p.bind(*primals, shared=shared, where=where), tangents[1]


def install() -> None:
    of_value = lambda mask, x, **_: x
    own_p.def_impl(of_value)
    own_p.def_abstract_eval(of_value)
    _jax.define_batching(own_p, _batch_own)
    _jax.define_jvp(own_p, _jvp_of_own)
    _jax.define_lowering(own_p, lambda ctx, mask, x, **_: [x])
    _jax.define_identity(of_branch_p)
    same = lambda mask, *values, **_: list(values)
    fill_p.def_impl(same)
    fill_p.def_abstract_eval(same)
    _jax.define_batching(fill_p, _batch_fill)
    _jax.define_jvp(fill_p, _jvp_of_fill)
    _jax.define_lowering(fill_p, lambda ctx, mask, *values, **_: list(values))
    fill_lanes_p.def_impl(_fill_lanes)
    fill_lanes_p.def_abstract_eval(same)
    _jax.define_batching(fill_lanes_p, _batch_fill_lanes)
    _jax.define_jvp(fill_lanes_p, _jvp_of_fill_lanes)
    _jax.define_lowering(fill_lanes_p, _jax.lowering_of(_fill_lanes))
