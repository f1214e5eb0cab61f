"""Hoisting: turning a traced program's gets and sets into values carried through it.

`uses` says what a jaxpr does with which slots; `run` evaluates it with their states as values, a
dict from slot id to stored leaves, through every kind of control flow. States are laid out as the
slots have them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from . import _core, _jax
from ._primitives import (
    OPERATIONS,
    arrays,
    get_p,
    masked_update,
    operation_type,
    set_masked_p,
    set_p,
    split_row,
)
from ._slot import laid_out_as

__all__ = ["NotHoistableError", "Use", "run", "uses"]

State = dict[int, list[Any]]


def flag_of(slot: int) -> int:
    """Where a `State` has whether the slot has been set, if that depends on what the program does."""
    return ~slot


class NotHoistableError(Exception):
    """The program has to run as plain `jax.jit` runs it, which raises whatever is wrong with it.

    Where plain `jax.jit` can't run it either, `as_error()` is what to raise.
    """

    def __init__(self, text: str, error: type[Exception] = NotImplementedError):
        super().__init__(text)
        self._error = error

    def as_error(self) -> Exception:
        return self._error(str(self))


# --- What a program does ---------------------------------------------------------------------------


@dataclasses.dataclass
class Use:
    """What a program does with one slot."""

    operations: list[tuple[int, bool]]  # the type of each, and whether it is a get
    needs_value: bool = False  # a state from before, since not all begins with a set of the whole
    is_set: bool = False
    is_always_set: bool = False

    @property
    def types(self) -> list[int]:
        return [type_id for type_id, _ in self.operations]


def _type_of(eqn: Any) -> int:
    """The type of the state that a get or set is on."""
    others = (eqn.primitive is set_masked_p) + (eqn.params["rows"] is not None)
    return operation_type([v.aval for v in eqn.invars[others:]], **eqn.params)


def uses(jaxpr: Any) -> dict[int, Use]:
    """Which slots a closed jaxpr uses, and how. Raises `NotHoistableError` where `run` has no rule.

    A state per device is not among them: its operations stay where they are, in the mapped function.
    """
    if _jax.open_jaxpr(jaxpr).is_high:
        raise NotHoistableError(
            "storax: a primitive that JAX expands only later may use state, too."
        )
    found: dict[int, Use] = {}
    mapped: set[int] = set()
    _collect(_jax.open_jaxpr(jaxpr), found, mapped, once=True, always=True)
    if both := mapped & found.keys():
        names = ", ".join(sorted(_core.share_slot(slot).name for slot in both))
        raise NotHoistableError(
            f"storax: {names} is used inside of a `shard_map` or `pmap`, as a state per device, and "
            "outside of it in the same program. Use a StateIndex for each."
        )
    return found


def _collect(jaxpr: Any, found: dict[int, Use], mapped: set[int], once: bool, always: bool) -> None:
    """`always`: whether the jaxpr runs for certain; `once`: and no more than once."""
    for eqn in jaxpr.eqns:
        if not _jax.has_state(eqn):
            continue
        if eqn.primitive in OPERATIONS:
            use = found.get(eqn.params["slot"])
            whole = eqn.primitive is set_p and eqn.params["rows"] is None
            if use is None:
                use = found[eqn.params["slot"]] = Use([], needs_value=not (whole and once))
            use.operations.append((_type_of(eqn), eqn.primitive is get_p))
            use.is_set |= eqn.primitive is not get_p
            use.is_always_set |= eqn.primitive is set_p and always
        elif eqn.primitive.name in _RULES:
            name = eqn.primitive.name
            runs = name not in ("while", "cond") and eqn.params.get("length") != 0
            for inner in _jax.inner_jaxprs(eqn):
                _collect(inner, found, mapped, once and runs and name != "scan", always and runs)
        else:
            mapped |= _mapped_slots(eqn)


def _mapped_slots(eqn: Any) -> set[int]:
    """The slots of an equation in which all state is per device."""
    slots = set()
    for jaxpr in _jax.inner_jaxprs(eqn):
        for inner in jaxpr.eqns:
            if inner.primitive in OPERATIONS and inner.params["mesh"]:
                slots.add(inner.params["slot"])
            elif inner.primitive in OPERATIONS:
                raise NotHoistableError(
                    f"storax: state inside `{_jax.name_of(eqn)}` is not supported over several "
                    "devices, or elsewhere than on a CPU. Move the get and set out of it."
                )
            elif _jax.has_state(inner):
                slots |= _mapped_slots(inner)
    return slots


# --- States as values ------------------------------------------------------------------------------


def _moved(leaves: Sequence[Any], to: int, source: int) -> list[Any]:
    moved = laid_out_as(to, source, leaves)
    if moved is None:
        raise NotHoistableError("storax: a state has another type than when its program was made.")
    return moved


def _like(leaves: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    return [_jax.as_sharded(_jax.as_strong(x), a) for x, a in zip(leaves, avals, strict=True)]


def _get(types: dict[int, int], eqn: Any, ins: list[Any], state: State) -> list[Any]:
    slot, rows = eqn.params["slot"], eqn.params["rows"]
    leaves = _moved(state[slot], _type_of(eqn), types[slot])
    if rows is not None:
        leaves = [lax.dynamic_index_in_dim(x, ins[0], 0, keepdims=False) for x in leaves]
    return _like(leaves, [v.aval for v in eqn.outvars])


def _set(types: dict[int, int], eqn: Any, ins: list[Any], state: State) -> None:
    params = eqn.params
    slot, rows = params["slot"], params["rows"]
    mask = None
    if eqn.primitive is set_masked_p:
        mask, *ins = ins
    row, new = split_row(ins, rows)
    asked, held = _type_of(eqn), types[slot]
    if row or mask is not None:
        old = _moved(state[slot], asked, held)
        part = [lax.dynamic_index_in_dim(x, row[0], 0, keepdims=False) for x in old] if row else old
        if mask is not None:
            new = masked_update(
                mask, new, part, params["structure"], params["levels"], params["mask_axes"]
            )
        if row:
            new = [
                lax.dynamic_update_index_in_dim(o, _jax.as_strong(x), row[0], 0)
                for o, x in zip(old, new, strict=True)
            ]
    new = [_jax.as_strong(x) for x in _moved(new, held, asked)]
    if slot in state:
        new = _like(new, [jax.typeof(x) for x in state[slot]])
    state[slot] = new
    if flag_of(slot) in state:
        before = state[flag_of(slot)][0]
        state[flag_of(slot)] = [np.array(True) if mask is None else before | mask.any()]


# What runs the user's own code, which may raise.
_FALLIBLE = ("pure_callback", "io_callback", "debug_callback", "ffi_call")


def _may_fail(eqn: Any) -> bool:
    if eqn.primitive in OPERATIONS:
        return bool(eqn.params["mesh"])  # the others become values
    return eqn.primitive.name in _FALLIBLE or any(
        _may_fail(inner) for jaxpr in _jax.inner_jaxprs(eqn) for inner in jaxpr.eqns
    )


# --- Evaluation ------------------------------------------------------------------------------------


class _Run:
    """One hoisting. `types` are those of the slots' states."""

    def __init__(self, types: dict[int, int]):
        self.types = types
        self._jitted: dict[Any, Callable[..., Any]] = {}
        self._uses: dict[int, tuple[Any, dict[int, Use]]] = {}

    def __call__(
        self, jaxpr: Any, state: State, args: Sequence[Any], fallible: list[Any] | None = None
    ) -> list[Any]:
        """Evaluates a closed jaxpr; `state` is brought up to date in place."""
        fallible = [] if fallible is None else fallible
        inner = _jax.open_jaxpr(jaxpr)
        env = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
        env.update(zip(inner.invars, args, strict=True))
        for eqn in inner.eqns:
            has_state = _jax.has_state(eqn)
            outs = None if has_state else _jax.stage_again(eqn, env)
            if outs is None:
                outs = self._equation(eqn, env, state, has_state)
            if _may_fail(eqn):
                fallible += outs
            env.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, _jax.Literal) else env[v] for v in inner.outvars]

    def _equation(self, eqn: Any, env: dict[Any, Any], state: State, has_state: bool) -> list[Any]:
        ins = [v.val if isinstance(v, _jax.Literal) else env[v] for v in eqn.invars]
        if eqn.primitive is get_p:
            return _get(self.types, eqn, ins, state)
        if eqn.primitive in (set_p, set_masked_p):
            _set(self.types, eqn, arrays(ins), state)
            return []
        with _jax.equation_context(eqn):
            rule = _RULES.get(eqn.primitive.name) if has_state else None
            return rule(self, eqn, ins, state) if rule else _jax.bind_equation(eqn, ins)

    def uses(self, jaxpr: Any) -> dict[int, Use]:
        inner = _jax.open_jaxpr(jaxpr)
        if id(inner) not in self._uses:
            found: dict[int, Use] = {}
            _collect(inner, found, set(), once=False, always=False)
            self._uses[id(inner)] = inner, found  # holds it, and so its id
        return self._uses[id(inner)][1]

    def written(self, *jaxprs: Any) -> frozenset[int]:
        """The slots that these set. What they only read they may close over."""
        return frozenset(
            slot for jaxpr in jaxprs for slot, use in self.uses(jaxpr).items() if use.is_set
        )


def run(
    jaxpr: Any, types: dict[int, int], state: State, args: Sequence[Any], fallible: list[Any]
) -> list[Any]:
    """Evaluates a closed jaxpr with states as values: its results; `state` is then as it leaves it.

    `types` are those of the slots' states. What the program's equations that may fail come to is
    added to `fallible`.
    """
    return _Run(types)(jaxpr, state, args, fallible)


def _carried(state: State, slots: Iterable[int]) -> State:
    """The part of a state that is of these slots."""
    keys = [key for slot in slots for key in (slot, flag_of(slot))]
    return {key: state[key] for key in sorted(keys) if key in state}


def _inline(key: str) -> Callable[..., list[Any]]:
    return lambda run, eqn, ins, state: run(eqn.params[key], state, ins)


def _jit(run, eqn, ins, state):
    params = eqn.params
    if _jax.is_inlined(params):
        return run(params["jaxpr"], state, ins)
    # JAX gives several jits of one function the same jaxpr.
    key = id(params["jaxpr"]), params["in_shardings"], params["out_shardings"]
    call = run._jitted.get(key)
    if call is None:
        # One for all calls of the same function, which JAX then lowers once.
        def inner(state, *args):
            state = dict(state)
            return run(params["jaxpr"], state, args), state

        inner.__name__ = params["name"]
        call = run._jitted[key] = _jax.jit_like(inner, params)
    outs, new = call(_carried(state, run.uses(params["jaxpr"])), *ins)
    state.update(new)
    return outs


def _scan(run, eqn, ins, state):
    params = eqn.params
    consts, init, xs = _jax.split_scan(params, ins)
    slots = run.written(params["jaxpr"])

    def body(carry, x):
        inner, carry = {**state, **carry[0]}, carry[1]
        outs = run(params["jaxpr"], inner, [*consts, *carry, *x])
        return (_carried(inner, slots), outs[: len(init)]), outs[len(init) :]

    (new, carry), ys = lax.scan(
        body,
        (_carried(state, slots), init),
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    state.update(new)
    return [*carry, *ys]


def _while(run, eqn, ins, state):
    params = eqn.params
    cond_consts, body_consts, init = _jax.split_while(params, ins)
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    slots = run.written(cond, body)

    def check(inner, carry):
        return run(cond, inner, [*cond_consts, *carry])[0]

    def step(inner, carry):
        return run(body, inner, [*body_consts, *carry])

    if not run.written(cond):

        def one_round(carry):
            inner = {**state, **carry[0]}
            outs = step(inner, carry[1])
            return _carried(inner, slots), outs

        new, outs = lax.while_loop(
            lambda carry: check({**state, **carry[0]}, carry[1]),
            one_round,
            (_carried(state, slots), init),
        )
    else:
        # The condition sets state: it is part of a round, after the body but in the first one. To
        # trace it once before the loop and once in it would take time exponential in the nesting.
        def round_with_check(carry):
            _, first, new, values = carry

            def after_first(new, values):
                inner = {**state, **new}
                return step(inner, values), _carried(inner, slots)

            values, new = lax.cond(first, lambda n, v: (v, n), after_first, new, values)
            inner = {**state, **new}
            goes_on = check(inner, values)
            return goes_on, False, _carried(inner, slots), values

        _, _, new, outs = lax.while_loop(
            lambda carry: carry[0], round_with_check, (True, True, _carried(state, slots), init)
        )
    state.update(new)
    return outs


def _cond(run, eqn, ins, state):
    index, *operands = ins
    branches = eqn.params["branches"]
    slots = run.written(*branches)

    def branch(jaxpr, new, *operands):
        inner = {**state, **new}
        return run(jaxpr, inner, operands), _carried(inner, slots)

    if "branches_platforms" in eqn.params:
        used = {slot for jaxpr in branches for slot in run.uses(jaxpr)}
        outs, new = _each_for_its_platform(eqn, branch, ins, _carried(state, used))
        state.update(new)
        return outs

    outs, new = lax.switch(
        index, [functools.partial(branch, b) for b in branches], _carried(state, slots), *operands
    )
    state.update(new)
    return outs


def _each_for_its_platform(eqn, branch, ins, used):
    """A `lax.platform_dependent`: what is for another platform may not lower for this one."""
    index, *operands = ins
    flat, tree = jax.tree.flatten((used, operands))
    out_tree = None

    def close(jaxpr):
        def call(*flat):
            nonlocal out_tree
            used, operands = tree.unflatten(flat)
            leaves, out_tree = jax.tree.flatten(branch(jaxpr, used, *operands))
            return leaves

        return jax.make_jaxpr(call)(*flat)

    params = {**eqn.params, "branches": tuple(map(close, eqn.params["branches"]))}
    return jax.tree.unflatten(out_tree, lax.cond_p.bind(index, *flat, **params))


_RULES: dict[str, Callable[..., list[Any]]] = {
    "jit": _jit,
    "pjit": _jit,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    # Nothing is differentiated any more where state is hoisted.
    "checkpoint": _inline("jaxpr"),
    "remat2": _inline("jaxpr"),
    "custom_jvp_call": _inline("call_jaxpr"),
    "custom_vjp_call": _inline("call_jaxpr"),
    "closed_call": _inline("call_jaxpr"),
    "core_call": _inline("call_jaxpr"),
    "eval_jaxpr": lambda run, eqn, ins, state: run(
        eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"], state, ins
    ),
}
