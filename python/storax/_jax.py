"""Everything storax uses of JAX's private names, behind names of our own.

A new JAX version should mean editing this file only. Each entry says why it is needed and since
which JAX version it has this form; where none is given, it is the same in all versions in TESTED.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._core import Pin, passes_fence


class _Missing:
    """Stands for a module that this JAX does not have; using it says so."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(f"JAX {jax.__version__} has no {self._name}")


def _private(name: str) -> Any:
    # On a JAX that has moved a module storax must still import: what can't be used is refused later.
    try:
        return importlib.import_module(f"jax._src.{name}")
    except ImportError:
        return _Missing(f"jax._src.{name}")


_ad_checkpoint = _private("ad_checkpoint")  # remat_p
_config = _private("config")  # whether shard_map checks varying axes; what traces depend on
_api_util = _private("api_util")  # static arguments
_core = _private("core")  # abstract values, the current trace
_custom = _private(
    "custom_derivatives"
)  # the rules inside of custom_jvp and custom_vjp; remat_opt_p
_custom_batching = _private("custom_batching")  # custom_vmap_p
_dispatch_module = _private("dispatch")  # the tokens between programs over several devices
_dtypes = _private("dtypes")  # short names
_effects = _private("effects")  # the registries of effects
_pjit = _private("pjit")  # when a call may take the C++ path
_shard_map = _private("shard_map")  # shard_map_p
_source_info = _private("source_info_util")  # equations that we stage ourselves
_traceback = _private("traceback_util")  # which frames a traceback leaves out
_util = _private("util")  # how abstract evaluation, and what is made of jaxprs, is remembered
_ad = _private("interpreters.ad")
_lu = _private("linear_util")  # wrap_init, for the rules of custom derivatives
_batching = _private("interpreters.batching")  # fancy_primitive_batchers, AxisData
_mesh = _private("mesh")  # the mesh of no devices
_mlir = _private("interpreters.mlir")  # tokens
_pe = _private("interpreters.partial_eval")
_pxla = _private("interpreters.pxla")  # what the dispatcher thinks of effects
_lax = _private("lax.lax")  # the functions of reductions
_control_flow = _private("lax.control_flow")  # while_loop's other name
_loops = _private("lax.control_flow.loops")  # _scan_known_hoisting
_lib = _private("lib")  # xla_client.batched_device_put

TESTED = ((0, 10), (0, 11), (0, 12))
VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])

Primitive = jax.extend.core.Primitive
Tracer = jax.core.Tracer
Array = _private("array").ArrayImpl  # what is really on a device, as jax.Array alone does not say
ARRAYS = (jax.Array, np.ndarray, np.generic)  # what a program takes as an array
Literal = _core.Literal  # jax.extend.core.Literal is the same class
Zero = _ad.Zero  # the tangent of a constant
abstract_token = _core.abstract_token
JaxRuntimeError = jax.errors.JaxRuntimeError


# --- Traces and abstract values ------------------------------------------------------------------


def no_trace() -> bool:
    """Whether no transformation is being traced: operations run at once, on concrete arrays."""
    return _core.trace_ctx.is_top_level()


def is_differentiation(trace: Any) -> bool:
    return type(trace).__name__ in ("JVPTrace", "LinearizeTrace", "JaxprTrace")


def is_staging() -> bool:
    """Whether operations go into a jaxpr, under whatever other transformations."""
    trace = _core.trace_ctx.trace
    while trace is not None:
        if isinstance(trace, _pe.DynamicJaxprTrace):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


class NotConcreteError(jax.errors.ConcretizationTypeError):
    """Tells JAX that Python can't run a function."""

    def __init__(self) -> None:
        TypeError.__init__(self, "storax: nothing is concrete while a function is being staged.")


def is_concrete(x: Any) -> bool:
    """Whether Python can look at the value."""
    return _core.is_concrete(x)


# Runs operations at once even while something is being traced. Like the public
# `jax.ensure_compile_time_eval`, but keeps no state of its own between uses.
eval_now = _core.eval_context


@contextlib.contextmanager
def eval_off_mesh() -> Iterator[None]:
    """The same, and outside of any `jax.set_mesh`, which would spread over the mesh what is made."""
    with eval_now():
        if jax.sharding.get_abstract_mesh().empty:
            yield
            return
        # As `jax.set_mesh` does, which refuses to where something is being traced.
        meshes = _mesh.empty_abstract_mesh, _mesh.empty_concrete_mesh
        contexts = [_of_mesh(n) for n in ("abstract_mesh_context_manager", "device_context")]
        before = [c.swap_local(m) for c, m in zip(contexts, meshes, strict=True)]
        try:
            yield
        finally:
            for context, mesh in zip(contexts, before, strict=True):
                context.set_local(mesh)


def _of_mesh(name: str) -> Any:
    # In `config` before 0.11, in `mesh` since.
    return getattr(_config, name, None) or getattr(_mesh, name)


def configuration() -> Any:
    """What a trace depends on besides its arguments: precision, whether there are 64 bits, ..."""
    return _config.trace_context()


def strong(aval: Any) -> Any:
    """The same abstract value, not weakly typed."""
    return aval.update(weak_type=False) if getattr(aval, "weak_type", False) else aval


def is_literal(x: Any) -> bool:
    """Whether JAX made this of a Python scalar or a NumPy array that was passed to `grad` and the like.

    `stop_gradient` of such an argument returns one, which is no `jax.Array`.
    """
    return type(x).__module__ == "jax._src.literals"


def shaped(shape: Sequence[int], dtype: Any) -> Any:
    return _core.ShapedArray(tuple(shape), np.dtype(dtype))


def lane_aval(aval: Any, size: int, axis: int | None) -> Any:
    """What one lane sees of an array that is batched along `axis`."""
    return aval if axis is None else _core.mapped_aval(size, axis, aval)


def short_dtype_name(dtype: Any) -> str:
    """JAX's notation: f32, bf16, i4, key<fry>."""
    return _dtypes.short_dtype_name(dtype)


def key_impl(dtype: Any) -> Any:
    """The implementation behind a PRNG key dtype, as `jax.random.wrap_key_data` takes it."""
    return dtype._impl.name


def manual_mesh_axes() -> tuple[tuple[str, int], ...]:
    """The mesh axes that a surrounding shard_map or pmap maps over, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return tuple(
        (str(name), mesh.shape[name]) for name in mesh.axis_names if name in mesh.manual_axes
    )


def varying_axes(aval: Any) -> frozenset[str]:
    """The mesh axes along which a value differs from device to device (shard_map's check_vma)."""
    manual = getattr(aval, "manual_axis_type", None)  # since 0.10; before, `vma`
    return manual.varying if manual is not None else getattr(aval, "vma", frozenset())


def vary_over_mesh(aval: Any) -> Any:
    """The same abstract value, differing from device to device over every manual mesh axis."""
    names = frozenset(name for name, _ in manual_mesh_axes())
    if not names or not _config._check_vma.value:
        return aval
    manual = getattr(aval, "manual_axis_type", None)
    if manual is None:
        return aval.update(vma=names)
    changes = {"manual_axis_type": manual.update(varying=names)}
    if aval.sharding is None or aval.sharding.mesh.empty:
        # An array from outside of the mesh, closed over.
        mesh = jax.sharding.get_abstract_mesh()
        spec = jax.sharding.PartitionSpec(*[None] * aval.ndim)
        changes["sharding"] = jax.sharding.NamedSharding(mesh, spec)
    return aval.update(**changes)


def as_strong(x: Any) -> Any:
    """The same value, not weakly typed."""
    if not jax.typeof(x).weak_type:
        return x
    return lax.convert_element_type(x, x.dtype)


def as_sharded(x: Any, aval: Any) -> Any:
    """The same value, sharded as the type of an Explicit mesh says."""
    wanted = getattr(aval, "sharding", None)
    if wanted is None or wanted.mesh.empty or jax.typeof(x).sharding == wanted:
        return x
    return jax.sharding.reshard(x, wanted)


def is_inlined(params: dict[str, Any]) -> bool:
    """Whether a jit equation asks to be inlined. Since 0.11 there is more than yes and no."""
    inline = params["inline"]
    return inline if isinstance(inline, bool) else inline.name.startswith("JAX")


def jit_like(f: Callable[..., Any], params: dict[str, Any]) -> Callable[..., Any]:
    """`jax.jit` of `f(first, *args) -> (results, last)`, `args` and `results` as a jit equation's."""

    def given(shardings):
        return [None if type(s).__name__ == "UnspecifiedValue" else s for s in shardings]

    ins, outs = given(params["in_shardings"]), given(params["out_shardings"])
    kwargs: dict[str, Any] = {}
    if any(s is not None for s in ins):
        kwargs["in_shardings"] = (None, *ins)
    if any(s is not None for s in outs):
        kwargs["out_shardings"] = (outs, None)
    return jax.jit(f, **kwargs)


def shard_map_like(f: Callable[..., Any], params: dict[str, Any]) -> Callable[..., Any]:
    """`jax.shard_map` of `f(first, *args)`, as a shard_map equation's; `first` is every device's."""
    return jax.shard_map(
        f,
        mesh=params["mesh"],
        in_specs=(jax.sharding.PartitionSpec(), *params["in_specs"]),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )


def make_varying(x: Any, names: frozenset[str]) -> Any:
    """The same value, marked as differing from device to device over these mesh axes too."""
    missing = tuple(n for n in names if n not in varying_axes(_core.typeof(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


# --- What is under way ---------------------------------------------------------------------------


class _Here(threading.local):
    """What of JAX's this thread is inside of."""

    evaluated: Any = None  # the primitive that is asked for its results' shapes
    in_parted_rule = ""  # see `as_parted`: which function the rule is of
    hoisting = False  # remat looks for what may leave a scan
    effects: Any = frozenset()  # of the function that is being lowered
    mesh: Any = None  # of the shard_map around the one that is being lowered


_here = _Here()


@contextlib.contextmanager
def _entering(**what: Any) -> Iterator[None]:
    before = {name: getattr(_here, name) for name in what}
    for name, value in what.items():
        setattr(_here, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_here, name, value)


# --- The effect ----------------------------------------------------------------------------------


class StateEffect(_effects.Effect):  # type: ignore[name-defined]
    """What an equation that gets or sets state does: JAX must neither drop nor reorder it."""

    __str__ = lambda self: "State"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))


class MeshStateEffect(StateEffect):
    """The same on a state per device, whose programs JAX must order among themselves too.

    On one device XLA runs a thread's programs in order. Over several it does not.
    """

    __str__ = lambda self: "MeshState"


class StoreEffect(StateEffect):
    """What storing all states at the end of a hoisted program does: no get or set is left in it."""

    __str__ = lambda self: "Store"


STATE = StateEffect()
MESH_STATE = MeshStateEffect()
STORE = StoreEffect()


def state_effects(*jaxprs: Any) -> set[StateEffect]:
    return {e for jaxpr in jaxprs for e in jaxpr.effects if isinstance(e, StateEffect)}


def has_state(*jaxprs: Any) -> bool:
    """Whether any of these jaxprs or equations gets or sets state."""
    for jaxpr in jaxprs:
        for e in jaxpr.effects:  # nearly always none
            if isinstance(e, StateEffect):
                return True
    return False


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one. Since 0.12 there is only one class, and this is the identity."""
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


# A function of a jaxpr, which remembers what it gave for it.
remembered_by_jaxpr = _util.weakref_lru_cache


# These run the jaxpr in them once, or each time.
_CALLS = ("jit", "remat2", "closed_call", "eval_jaxpr", "scan")


def jaxpr_with_marks(jaxpr: Any, mark: Any, where: Callable[[Any], bool]) -> Any:
    """A jaxpr with the primitive `mark`, an identity, on the operands of these equations.

    Also in the functions that it calls: what one hands to a loop in it may come from there alone.
    """
    body = open_jaxpr(jaxpr)
    eqns: list[Any] = []
    marked = set()
    for eqn in body.eqns:
        if eqn.primitive is mark:
            marked.update(eqn.outvars)
        if where(eqn):
            operands = []
            for v in eqn.invars:
                if (
                    not isinstance(v, Literal)
                    and v not in marked
                    and isinstance(v.aval, _core.ShapedArray)
                ):
                    out = _core.Var(v.aval)
                    eqns.append(_core.new_jaxpr_eqn([v], [out], mark, {}, set()))
                    v = out
                operands.append(v)
            eqn = eqn.replace(invars=operands)
            if eqn.primitive.name in _CALLS:
                name = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
                inner = jaxpr_with_marks(eqn.params[name], mark, where)
                eqn = eqn.replace(params={**eqn.params, name: inner})
        eqns.append(eqn)
    body = body.replace(eqns=eqns)
    return body if body.__class__ is jaxpr.__class__ else _core.ClosedJaxpr(body, jaxpr.consts)


def call_jaxpr(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluates a closed jaxpr."""
    return _core.eval_jaxpr(open_jaxpr(jaxpr), jaxpr.consts, *args)


def name_of(eqn: Any) -> str:
    """What users know an equation by: since 0.11 `custom_root` and others are one primitive, of classes."""
    made_by = eqn.params.get("_prim")
    return eqn.primitive.name if made_by is None else type(made_by).__name__


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters, opened."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, _core.Jaxpr) or type(x).__name__ == "ClosedJaxpr":
                found.append(open_jaxpr(x))
    return found


# Values of parameters that have nothing in them.
_PLAIN = frozenset((int, bool, float, str, type(None)))


def _holds_state(x: Any) -> bool:
    """Whether there is a jaxpr with state in a parameter's value, in whatever it keeps that."""
    kind = type(x)
    if kind in _PLAIN:
        return False
    if isinstance(x, _core.Jaxpr) or kind.__name__ == "ClosedJaxpr":
        return has_state(x)
    if isinstance(x, (tuple, list)):
        return any(map(_holds_state, x))
    if isinstance(x, dict):
        return any(map(_holds_state, x.values()))
    if isinstance(x, functools.partial):
        return _holds_state((x.func, x.args, x.keywords))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return any(_holds_state(getattr(x, f.name, None)) for f in dataclasses.fields(x))
    return False


# Marks what is the same on all devices as differing from device to device.
PVARY = "pvary"
# Functions with rules of their own for derivatives.
RULES = ("custom_jvp_call", "custom_vjp_call")
CUSTOM_VMAP = "custom_vmap_call"
BACKWARD_RULE = "custom_lin"  # what JAX has made of a custom_vjp that is to be transposed


def has_primitive(eqn: Any, *names: str) -> bool:
    """Whether an equation is, or contains, one of a primitive of these names."""
    return eqn.primitive.name in names or any(
        has_primitive(inner, *names) for jaxpr in inner_jaxprs(eqn) for inner in jaxpr.eqns
    )


def has_collective(*jaxprs: Any) -> bool:
    """Whether lanes, or devices, learn of each other in a jaxpr: `psum` and the like."""
    return any(_is_collective(e, frozenset()) for j in jaxprs for e in open_jaxpr(j).eqns)


def has_collective_of_devices(*jaxprs: Any) -> bool:
    """Whether the devices of a surrounding shard_map or pmap wait for each other in a jaxpr."""
    over = frozenset(name for name, _ in manual_mesh_axes())
    eqns = (e for j in jaxprs for e in open_jaxpr(j).eqns)
    return bool(over) and any(_is_collective(e, frozenset(), over) for e in eqns)


def _is_collective(
    eqn: Any, inner_axes: frozenset[Any], over: frozenset[str] | None = None
) -> bool:
    """`inner_axes` are those of a shard_map that the equation is in: over them nothing comes from outside.

    With `over`, whether it is over one of these axes.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "axis_index":
        return False
    if name == CUSTOM_VMAP:  # its rule has all lanes
        return True
    if inner := inner_jaxprs(eqn):
        if name == "shard_map":
            inner_axes |= frozenset(params["newly_manual_axes"])
        elif name == "xla_pmap":
            inner_axes |= {params["axis_name"]}
        return any(_is_collective(e, inner_axes, over) for j in inner for e in j.eqns)
    # `ppermute` and some others have no effect.
    axes = params.get("axis_name", ())
    names = {e.name for e in eqn.effects if isinstance(e, _core.NamedAxisEffect)}
    names.update(axes if isinstance(axes, (tuple, list)) else (axes,))
    names -= inner_axes
    return bool(names) if over is None else any(str(n) in over for n in names)


def acts(eqn: Any) -> bool:
    """Whether an equation does something in the world, such as to print, each time it runs."""
    return any(not isinstance(e, _core.NamedAxisEffect) for e in eqn.effects)


def acts_for_all_lanes(*jaxprs: Any) -> str | None:
    """What of a jaxpr acts, once it is batched, for lanes that are selected away too."""
    for effect in (e for j in jaxprs for e in j.effects):
        if isinstance(effect, _effects.JaxprInputEffect):
            return "ref"
        if "IOEffect" in type(effect).__name__:
            return "io"
    return None


def axes_here() -> tuple[tuple[Any, int], ...]:
    """The named axes, of vmaps and meshes, that a collective may be over, and their sizes."""
    return tuple(_core.get_axis_env().axis_sizes.items())


def with_axes(axes: tuple[tuple[Any, int], ...]) -> contextlib.AbstractContextManager[None]:
    """Where a rule is traced of which JAX knows the axes by the values it is given."""
    return _core.extend_axis_env_nd(axes)


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """Where an equation is evaluated again: under its own name scopes and configuration."""
    source = eqn.source_info
    stack = _source_info.current_name_stack() + source.name_stack
    with _source_info.user_context(source.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def bind_equation(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as it stands."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _direct_trace() -> Any:
    """The trace under way, if operations can be added to it directly; else None."""
    trace = _core.trace_ctx.trace
    return trace if VERSION in TESTED and type(trace) is _pe.DynamicJaxprTrace else None


def _is_of(x: Any, trace: Any) -> bool:
    return type(x) is _pe.DynamicJaxprTracer and x._trace is trace


def stage_again(eqn: Any, env: dict[Any, Any]) -> list[Any] | None:
    """Adds an equation of an earlier trace to the one under way, as it stands; None if that won't do.

    Gives what `bind_equation` gives, at a third of the cost, as no rule is asked again.
    """
    trace = _direct_trace()
    if (
        trace is None
        or eqn.effects
        or eqn.primitive in _pe.custom_staging_rules
        or eqn.primitive in _pe.forwarding_rules
        or eqn.primitive.is_high(*[v.aval for v in eqn.invars], **eqn.params)
        or _source_info.current_name_stack().stack
    ):
        return None
    tracers = []
    for v in eqn.invars:
        if isinstance(v, Literal):
            x = _pe.DynamicJaxprTracer(trace, v.aval, v, eqn.source_info)
        else:
            x = env[v]
            if not _is_of(x, trace) or x.aval != v.aval:
                return None
        tracers.append(x)
    avals = [v.aval for v in eqn.outvars]
    args = eqn.primitive, eqn.params, eqn.effects, eqn.source_info, eqn.ctx
    return trace.emit_eqn(tracers, avals, *args)


def stage(primitive: Any, args: Sequence[Any], params: dict[str, Any]) -> list[Any] | None:
    """Adds an operation on values of the trace under way to it; None if that won't do.

    Gives what `primitive.bind` gives, at half the cost: there is nothing to be converted or lifted.
    """
    trace = _direct_trace()
    if trace is None or not args:
        return None
    if not all(_is_of(x, trace) and x.aval.sharding.mesh.empty for x in args):
        return None
    avals, effects = primitive.abstract_eval(*[x.aval for x in args], **params)
    source_info = _source_info.current()
    return trace.emit_eqn(list(args), avals, primitive, params, effects, source_info)


def split_scan(params: dict[str, Any], args: Sequence[Any]) -> tuple[list, list, list]:
    """A scan equation's operands: constants, carry, scanned-over."""
    if "ft_in" in params:  # since 0.11: a tree instead of two counts
        parts = params["ft_in"].update(range(len(args))).unpack()
        num_consts, num_carry = len(list(parts[0])), len(list(parts[1]))
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    split = num_consts + num_carry
    return list(args[:num_consts]), list(args[num_consts:split]), list(args[split:])


def split_while(params: dict[str, Any], args: Sequence[Any]) -> tuple[list, list, list]:
    """A while equation's operands: the condition's constants, the body's, the carry."""
    a, b = params["cond_nconsts"], params["body_nconsts"]
    return list(args[:a]), list(args[a : a + b]), list(args[a + b :])


def custom_jvp_rule(params: dict[str, Any]) -> Callable[..., list[Any]]:
    """The rule of a custom_jvp equation: of flat primals, then tangents; returns the same of results."""
    _, jvp = _custom.custom_jvp_call_p.get_bind_params(params)["subfuns"]
    return jvp.call_wrapped


class Rules(NamedTuple):
    """What the rules of custom derivatives do that a function does not."""

    have_state: bool
    act: bool


# So often rules are traced to look into one function, and so often those of a function that its own call.
_LOOKS, _TURNS = 50, 3


def look_into_rules(eqn: Any, looked: dict[int, tuple[Any, Rules]]) -> Rules:
    """What is in the rules of an equation that is or contains functions with such: nothing but to trace them
    tells. `looked` has what is known of jaxprs, by their id; each call of one function has the same."""
    found = []
    for jaxpr in inner_jaxprs(eqn):
        if id(jaxpr) not in looked:
            looked[id(jaxpr)] = jaxpr, _either([look_into_rules(e, looked) for e in jaxpr.eqns])
        found.append(looked[id(jaxpr)][1])
    if eqn.primitive.name in RULES:
        found.append(_look(eqn, (), iter(range(_LOOKS))))
    return _either(found)


def _look(eqn: Any, within: tuple[Any, ...], looks: Iterator[int]) -> Rules:
    """`within` are the functions in whose rules the equation is."""
    found = [_look(e, within, looks) for j in inner_jaxprs(eqn) for e in j.eqns]
    if eqn.primitive.name in RULES:
        info = open_jaxpr(eqn.params["call_jaxpr"]).debug_info
        # The same function, or another made in the same place.
        this = info and info.func_src_info, tuple(str(v.aval) for v in eqn.invars)
        if within.count(this) < _TURNS:
            traced = None if next(looks, None) is None else _traced_rules(eqn)
            if traced is None:
                return Rules(True, True)  # as if they did: it is right but in some nested vmaps
            for e in (e for rule in traced for e in open_jaxpr(rule).eqns):
                found += [Rules(has_state(e), acts(e)), _look(e, (*within, this), looks)]
    return _either(found)


def _either(found: Sequence[Rules]) -> Rules:
    return Rules(any(r.have_state for r in found), any(r.act for r in found))


def _traced_rules(eqn: Any) -> list[Any] | None:
    """The rules as jaxprs, or None where only JAX knows how to call one."""
    avals = [v.aval for v in eqn.invars]
    make = jax.make_jaxpr
    if eqn.primitive.name == "custom_jvp_call":
        half = len(avals)

        def rule(*args):
            # What has no derivative has no tangent.
            tangents = [
                Zero(a.to_tangent_aval()) if t is None else t
                for a, t in zip(avals, args[half:], strict=True)
            ]
            return [
                x for x in custom_jvp_rule(eqn.params)(*args[:half], *tangents) if not is_zero(x)
            ]

        inexact = lambda a: jax.numpy.issubdtype(a.dtype, jax.numpy.inexact)
        try:
            return [make(rule)(*avals, *[a if inexact(a) else None for a in avals])]
        except Exception:
            return None
    forward, backward = custom_vjp_rules(eqn.params)
    try:
        fwd, (res, outs) = make(forward, return_shape=True)(*avals)
    except Exception:
        return None
    try:
        bwd = make(lambda res, cts: [c for c in backward(res, cts) if c is not None])(res, outs)
    except Exception:  # many a function has no derivative but says so; then it raises for JAX too
        return [fwd]
    return [fwd, bwd]


def custom_vjp_rules(params: dict[str, Any]) -> tuple[Callable, Callable]:
    """The rules of a custom_vjp equation, flat: args -> (residuals, results); (res, cts) -> cts."""
    _, fwd, bwd = _custom.custom_vjp_call_p.get_bind_params(params)["subfuns"]
    num_consts = params["num_consts"]

    def forward(*args):
        # Each operand comes with whether it is differentiated; what is closed over never is.
        pairs = [p for k, x in enumerate(args) for p in (x, k >= num_consts)]
        out = list(fwd.call_wrapped(*pairs))
        _, res_tree, forwarded = params["out_trees"]()
        num_res = res_tree.num_leaves - sum(f is not None for f in forwarded)
        made = iter(out[:num_res])
        return [next(made) if f is None else args[f] for f in forwarded], out[num_res:]

    def backward(res, cts):
        out = list(bwd.call_wrapped(*res, *cts))
        if out and isinstance(
            out[0], (list, tuple)
        ):  # since 0.11: the cotangents and one thing more
            out = list(out[0])
        return [None if ct is None or is_zero(ct) else ct for ct in out]

    return forward, backward


def is_zero(x: Any) -> bool:
    """Whether a tangent or cotangent is symbolically zero."""
    return isinstance(x, (Zero, jax.custom_derivatives.SymbolicZero))


# --- Rules for our primitives ---------------------------------------------------------------------


def define_batching(primitive: Any, rule: Callable[..., Any]) -> None:
    """`rule(axis_data, args, dims, **params)`; the public registry hides axis_data."""
    _batching.fancy_primitive_batchers[primitive] = rule


def define_jvp(primitive: Any, rule: Callable[..., Any]) -> None:
    _ad.primitive_jvps[primitive] = rule


def define_identity(primitive: Any) -> None:
    """An operation of one value, that it gives back: it is one on tangents and cotangents too.

    Remat does it again and saves its operand, whatever the policy.
    """

    def rule_in_remat(saveable, unknown_in, instantiate_in, eqn):
        if unknown_in[0]:
            return None, eqn, [True], [True], []
        saved = [] if instantiate_in[0] or isinstance(eqn.invars[0], Literal) else eqn.invars
        return eqn, eqn, [False], [True], saved

    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    _batching.defvectorized(primitive)
    _ad.deflinear2(primitive, lambda ct, _: [primitive.bind(ct)])
    _pe.partial_eval_jaxpr_custom_rules[primitive] = rule_in_remat
    define_lowering(primitive, lambda ctx, x: [x])


def zero_tangent(x: Any) -> Any:
    return Zero(_core.typeof(x).to_tangent_aval())


def define_lowering(primitive: Any, rule: Callable[..., Any], platform: str | None = None) -> None:
    # Hardly any two operations of a program are alike, and to cache a lowering costs as much again.
    _mlir.register_lowering(primitive, rule, platform=platform, cacheable=False)


def lowering_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that lowers as a traceable function of several results."""
    return _mlir.lower_fun(f, multiple_results=True)


def lower_inline(
    ctx: Any, f: Callable[..., Any], avals_in: Sequence[Any], avals_out: Sequence[Any], *args: Any
) -> list[Any]:
    """Lowers a traceable function of these operands in place; its results' IR values."""
    sub = ctx.replace(avals_in=list(avals_in), avals_out=list(avals_out), primitive=None)
    results = _mlir.lower_fun(f, multiple_results=True)(sub, *args)
    flat: list[Any] = []
    for r in results:  # 0.10 wraps each result in a list
        flat.extend(r if isinstance(r, (list, tuple)) else [r])
    return flat


def token(ctx: Any, effect: StateEffect) -> Any:
    """What the next operation of a module under construction comes after."""
    return ctx.tokens_in.get(effect)


def ordered_ffi_call(
    ctx: Any,
    effect: StateEffect,
    target: str,
    operands: Sequence[Any],
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    **attributes: Any,
) -> list[Any]:
    """Lowers to a custom call that runs after every earlier one of the module, and before later ones.

    The order is a token's, threaded through the module by JAX's own machinery for ordered effects.
    """
    after, *results = ffi_call(
        ctx,
        target,
        [token(ctx, effect), *operands],
        [abstract_token, *avals_in],
        [abstract_token, *avals_out],
        **attributes,
    )
    ctx.set_tokens_out(ctx.tokens_in.update_tokens(_mlir.TokenSet({effect: after})))
    return results


def ffi_call(
    ctx: Any,
    target: str,
    operands: Sequence[Any],
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    **attributes: Any,
) -> list[Any]:
    """Lowers to a custom call with a side effect; its results' IR values."""
    lower = jax.ffi.ffi_lowering(target, has_side_effect=True)
    return lower(
        ctx.replace(avals_in=list(avals_in), avals_out=list(avals_out)), *operands, **attributes
    )


def platforms(ctx: Any) -> tuple[str, ...]:
    """The platforms that a module is lowered for."""
    return tuple(ctx.platforms or ctx.module_context.platforms)


def keep_alive(ctx: Any, obj: Any) -> None:
    """Makes a module under construction, and the program compiled from it, hold `obj`."""
    ctx.module_context.add_keepalive(obj)


def module_devices(ctx: Any) -> tuple[int | None, tuple[str, ...]]:
    """How a module is spread: (number of devices if SPMD, mesh axes left to the partitioner)."""
    axis_context = ctx.module_context.axis_context
    kind = type(axis_context).__name__
    if kind == "ShardingContext":
        return axis_context.num_devices, ()
    if kind == "SPMDAxisContext":
        mesh = axis_context.mesh
        auto = [
            n for n in mesh.axis_names if n not in axis_context.manual_axes and mesh.shape[n] > 1
        ]
        return None, tuple(str(n) for n in auto)
    return None, ()


def is_export(ctx: Any) -> bool:
    """Whether a module under construction is to be run by another process."""
    return ctx.module_context.lowering_parameters.for_export


def mesh_ordinals(ctx: Any) -> tuple[int, ...]:
    """The devices' ordinals, in the order of the mesh that a module is mapped over; else nothing."""
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    if not isinstance(mesh, jax.sharding.Mesh):
        mesh = _here.mesh
    return () if mesh is None else tuple(d.local_hardware_id for d in mesh.devices.flat)


# --- Wrapped rules: batching of control flow ------------------------------------------------------


def batched_jaxpr(
    jaxpr: Any, axis_data: Any, in_axes: Sequence[int | None], out_axes: Sequence[int | None]
) -> Any:
    """A closed jaxpr under vmap, with the batch axes of its results moved to `out_axes`."""
    out = _batching.batch_jaxpr_axes(jaxpr, axis_data, tuple(in_axes), tuple(out_axes))
    return out[0] if isinstance(out, tuple) else out


def batched_out_axes(jaxpr: Any, axis_data: Any, in_axes: Sequence[int | None]) -> list[int | None]:
    """Where a closed jaxpr's results are batched if its operands are batched at `in_axes`."""
    return list(_batching.batch_jaxpr2(jaxpr, axis_data, tuple(in_axes))[1])


def move_to_front(axis_data: Any, x: Any, axis: int | None) -> Any:
    """`x` with its batch axis first; broadcast if it has none."""
    name = axis_data.explicit_mesh_axis
    if axis is None and name is not None:
        # JAX spreads nothing that comes from outside of the mesh.
        spec = jax.sharding.PartitionSpec(name, *_core.typeof(x).sharding.spec)
        sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        shape = axis_data.size, *np.shape(x)
        return lax.broadcast_in_dim(x, shape, range(1, len(shape)), out_sharding=sharding)
    return _batching.bdim_at_front(x, axis, axis_data.size, mesh_axis=name)


def move_axis(axis_data: Any, x: Any, source: int | None, target: int | None) -> Any:
    """`x` with its batch axis moved from `source` to `target`; broadcast if it has none."""
    return _batching.matchaxis(axis_data, source, target, x)


def spread_lanes(axis_data: Any, x: Any) -> Any:
    """`x`, which is batched along its first axis, spread over the Explicit mesh that lanes are."""
    name, sharding = axis_data.explicit_mesh_axis, _core.typeof(x).sharding
    if name is None or sharding.spec[0] is not None:
        return x
    spec = jax.sharding.PartitionSpec(name, *sharding.spec[1:])
    mesh = jax.sharding.get_abstract_mesh()
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))


def take_lane(x: Any, lane: Any, axis: int) -> Any:
    """What one lane has of an array that is batched along `axis`."""
    sharding = _core.typeof(x).sharding
    spec = list(sharding.spec)
    if spec[axis] is None:
        start = [np.uint32(0)] * x.ndim
        start[axis] = lane
        size = [1 if a == axis else n for a, n in enumerate(x.shape)]
        return lax.squeeze(lax.dynamic_slice(x, start, size), [axis])
    spec[axis] = None  # of an Explicit mesh, along whose axes nothing can be sliced
    whole = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    index = (*[slice(None)] * axis, lane[None])
    return lax.squeeze(x.at[index].get(out_sharding=whole), [axis])


def broadcast_like(x: Any, axes: Sequence[int], like: Any) -> Any:
    """`x`, of which the axes are these of `like`, repeated along the others."""
    return lax.broadcast_in_dim(x, like.shape, axes, out_sharding=_core.typeof(like).sharding)


@contextlib.contextmanager
def mesh_of(axis_data: Any, args: Sequence[Any]) -> Iterator[None]:
    """Under the Explicit mesh that lanes are spread over, if no `jax.set_mesh` has named it."""
    if axis_data.explicit_mesh_axis is None or not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    meshes = [_core.typeof(x).sharding.mesh for x in args if x is not None]
    with jax.sharding.use_abstract_mesh(next(m for m in meshes if not m.empty)):
        yield


@functools.cache
def _axis_data_class(marks: frozenset[str]) -> type:
    # A subclass compares unequal to its base, so JAX's caches of batched jaxprs keep the two apart.
    members = {"__slots__": (), "marks": marks}
    return type("MarkedAxisData", (_batching.AxisData,), members)


def _marks(axis_data: Any) -> frozenset[str]:
    return getattr(axis_data, "marks", frozenset())


def _marked(axis_data: Any, mark: str) -> Any:
    if mark in _marks(axis_data):
        return axis_data
    cls = _axis_data_class(_marks(axis_data) | {mark})
    return cls(**{f.name: getattr(axis_data, f.name) for f in dataclasses.fields(axis_data)})


def as_moved(axis_data: Any) -> Any:
    """Marks a vmap level as seen from inside control flow that JAX batched, where axes move."""
    return _marked(axis_data, "moved")


def is_moved(axis_data: Any) -> bool:
    return "moved" in _marks(axis_data)


def as_parted(axis_data: Any) -> Any:
    """Marks a vmap level as seen from inside a pure cond whose predicate is batched.

    JAX makes a select of it. Should a rule of custom derivatives or batching in it turn out to set state,
    later, nothing knows any more which lanes it is for: `in_parted_rule` says so then.
    """
    return _marked(axis_data, "parted")


def as_masked(axis_data: Any) -> Any:
    """Marks a vmap level as seen from inside what has been masked: rules of batching know of no mask."""
    return _marked(axis_data, "masked")


def in_parted_rule() -> str:
    """The kind of function whose rule is being run, if its lanes have parted."""
    return _here.in_parted_rule


def _mark_rules_of_parted_lanes() -> None:
    """Lets `in_parted_rule` know."""
    trace = _batching.BatchTrace

    def mark(rule, of):
        def run(*args):
            with _entering(in_parted_rule=of):
                return rule.call_wrapped(*args)

        return _lu.wrap_init(run, debug_info=rule.debug_info)

    def wrap(of, which):
        name = f"process_{of}_call"
        original = getattr(trace, name)

        def process(self, *args, **kwargs):
            if "parted" in _marks(self.axis_data):
                args = (*args[:which], mark(args[which], of), *args[which + 1 :])
            return original(self, *args, **kwargs)

        setattr(trace, name, process)

    wrap("custom_jvp", 2)  # prim, fun, jvp, tracers
    wrap("custom_vjp", 3)  # prim, fun, fwd, bwd, tracers

    def wrap_custom_vmap(original):
        def rule(axis_data, args, dims, **params):
            if _marks(axis_data).isdisjoint(("parted", "masked")):
                return original(axis_data, args, dims, **params)
            with _entering(in_parted_rule="custom_vmap"):
                return original(axis_data, args, dims, **params)

        return rule

    wrap_batching(_custom_batching.custom_vmap_p, wrap_custom_vmap)


def wrap_batching(primitive: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a JAX primitive's batching rule by `make(rule)`."""
    original = _batching.fancy_primitive_batchers[primitive]
    _batching.fancy_primitive_batchers[primitive] = functools.wraps(original)(make(original))


def wrap_splitting(primitive: Any, prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Where JAX splits a primitive, into what is differentiated and the rest, it splits `prepare(params)`."""
    linearize = _ad.primitive_linearizations[primitive]
    split_in_remat = _pe.partial_eval_jaxpr_custom_rules[primitive]

    def linearize_prepared(is_vjp, nonzeros, *primals, **params):
        return linearize(is_vjp, nonzeros, *primals, **prepare(params))

    def split_prepared_in_remat(saveable, unknown_in, instantiate_in, eqn):
        eqn = eqn.replace(params=prepare(eqn.params))
        return split_in_remat(saveable, unknown_in, instantiate_in, eqn)

    _ad.primitive_linearizations[primitive] = linearize_prepared
    _pe.partial_eval_jaxpr_custom_rules[primitive] = split_prepared_in_remat


def wrap_reductions(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces what traces the functions of reductions, `trace(...) -> (jaxpr, _)`, by `make(trace)`."""
    for name in ("_reduction_jaxpr", "_variadic_reduction_jaxpr"):
        setattr(_lax, name, make(getattr(_lax, name)))


def wrap_check_of_while(make: Callable[[dict[str, Any], Sequence[Any]], list[Any]]) -> None:
    """Has checkify look at `make(params, operands)` in the place of a loop with state in its condition."""
    checkify = _private("checkify")
    check = checkify.error_checks[lax.while_p]

    def check_made(*args, **params):
        if not has_state(params["cond_jaxpr"]):
            return check(*args, **params)
        first = len(args) - params["cond_nconsts"] - len(params["body_jaxpr"].in_avals)
        *context, error, enabled = args[:first]  # a context since 0.11
        operands = args[first:]
        jaxpr = jax.make_jaxpr(lambda *operands: make(params, operands))(*operands)
        return checkify.checkify_jaxpr(*context, jaxpr, enabled, error, *operands)

    checkify.error_checks[lax.while_p] = check_made


def wrap_while_loop(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces `jax.lax.while_loop`, and the names that JAX calls it by, by `make(while_loop)`."""
    made = make(_loops.while_loop)
    modules: tuple[Any, ...] = (_loops, _control_flow, lax)
    for module in modules:
        module.while_loop = made


# Of its functions, it tells of those that it runs; of the others once it runs them, under grad.
_TELL_LATER = ("custom_linear_solve",)


def _hidden_state(primitive: str = "primitive") -> NotImplementedError:
    return NotImplementedError(
        f"storax: state inside the function of a `{primitive}`, which does not tell JAX what its "
        "function does besides computing: JAX would leave it out, or run it out of order. Get and "
        "set the state outside of that function, and pass it in as an argument."
    )


def evaluating(primitive: Any) -> Any:
    """Within, a function with state that is traced is refused, as this primitive would hide it."""
    return _entering(evaluated=primitive)


def _refuse_hidden_state() -> None:
    """Raises an error where an equation would hide from JAX what its function does to state.

    Some have their function's jaxpr among their parameters, but not its effects; others trace it anew
    when they are asked for their results' shapes. JAX remembers what it has been told of those, so that
    all this costs next to nothing.
    """

    # Every operation that JAX traces comes by here: no context managers, then, which take as long.
    def abstract_eval(primitive, *avals, **params):
        before, _here.evaluated = _here.evaluated, primitive
        try:
            out, effects = primitive.abstract_eval(*avals, **params)
        finally:
            _here.evaluated = before
        told = effects and any(isinstance(e, StateEffect) for e in effects)
        if not told and primitive.name not in _TELL_LATER and _holds_state(params):
            raise _hidden_state(primitive.name)
        return out, effects

    _pe._cached_abstract_eval = _util.multi_weakref_lru_cache(abstract_eval)
    partially, to_jaxpr = _pe.JaxprTrace.default_process_primitive, _pe.JaxprStackFrame.to_jaxpr

    def partially_and_look(self, primitive, tracers, params):
        before = _here.evaluated
        for t in tracers:
            if type(t) is _pe.JaxprTracer and t._trace.tag is self.tag and not t.is_known():
                _here.evaluated = primitive
                break
        try:
            return partially(self, primitive, tracers, params)
        finally:
            _here.evaluated = before

    def to_jaxpr_and_look(self, *args, **kwargs):
        jaxpr, consts = to_jaxpr(self, *args, **kwargs)
        if _here.evaluated is not None and has_state(jaxpr):
            raise _hidden_state(_here.evaluated.name)
        return jaxpr, consts

    _pe.JaxprTrace.default_process_primitive = partially_and_look
    _pe.JaxprStackFrame.to_jaxpr = to_jaxpr_and_look


# --- Patches, installed with the first index ------------------------------------------------------


class _WithoutState:
    """JAX's set of ordered effects as the dispatcher sees it: without ours.

    An ordered effect costs ~150 us a dispatch and one failed program poisons all later ones
    (jax 0.4 to 0.12). Our token starts and ends inside the module, so the executable needs none.
    """

    def __init__(self, effect_types: Any):
        self._types = effect_types

    def filter_in(self, effects: Any) -> list[Any]:
        return [e for e in self._types.filter_in(effects) if self._keeps(e)]

    def filter_not_in(self, effects: Any) -> list[Any]:
        return [e for e in self._types.filter_not_in(effects) if self._keeps(e)]

    def contains(self, effect: Any) -> bool:
        return self._types.contains(effect) and self._keeps(effect)

    def _keeps(self, effect: Any) -> bool:
        return not isinstance(effect, StateEffect) or isinstance(effect, MeshStateEffect)


class _Untold(dict):
    """The tokens of an equation that has not told JAX of any state."""


def _register_effect() -> None:
    for effect_types in (
        _effects.ordered_effects,
        _effects.shardable_ordered_effects,
        _effects.lowerable_effects,
        _effects.control_flow_allowed_effects,
        _effects.remat_allowed_effects,
        _effects.custom_derivatives_allowed_effects,
    ):
        effect_types.add_type(StateEffect)


def _keep_token_in_module() -> None:
    # pxla reads `effects.ordered_effects` when it builds an executable: give it a view without ours.
    names = {k: getattr(_effects, k) for k in dir(_effects) if not k.startswith("__")}
    view = types.SimpleNamespace(**names)
    view.ordered_effects = _WithoutState(_effects.ordered_effects)
    _pxla.effects = view

    # With no token from outside, the first use inside the module's main function makes one. In another
    # function, or where nothing was told of state, it is hidden, and its place among others not known.
    lower_function, token_set = _mlir.lower_jaxpr_to_fun, _mlir.TokenSet
    get, subset, update = token_set.get, token_set.subset, token_set.update_tokens

    def lower_function_with_state(ctx, name, jaxpr, *args, **kwargs):
        with _entering(effects=jaxpr.effects):
            return lower_function(ctx, name, jaxpr, *args, **kwargs)

    def in_main():
        attributes = _mlir.ir.InsertionPoint.current.block.owner.attributes
        return "sym_name" in attributes and str(attributes["sym_name"]) == '"main"'

    def get_or_create(self, effect):
        if isinstance(effect, StateEffect) and effect not in self._tokens:
            if effect not in _here.effects or isinstance(self._tokens, _Untold) or not in_main():
                raise _hidden_state()
            self._tokens[effect] = _mlir.create_token()
        return get(self, effect)

    def subset_with_state(self, effects):
        if not effects:
            return token_set(_Untold())
        if any(isinstance(e, StateEffect) for e in effects):
            return token_set({e: self.get(e) for e in effects})
        return token_set(_Untold(subset(self, effects)._tokens))

    def update_with_state(self, tokens):
        if any(isinstance(e, StateEffect) for e, _ in tokens.items()):
            return token_set({**self._tokens, **dict(tokens.items())})
        return update(self, tokens)

    _mlir.lower_jaxpr_to_fun = lower_function_with_state
    _mlir._empty_token_set = token_set(_Untold())
    token_set.get = get_or_create
    token_set.subset = subset_with_state
    token_set.update_tokens = update_with_state


def _keep_state_in_scan() -> None:
    """JAX moves what is constant out of scans under grad and remat, effects and all (jax#16637).

    Where it looks for that in remat, it also loses effects whose results nothing uses. So a scan with
    state in it stays as it is.
    """
    known_hoisting = _loops._scan_known_hoisting

    def no_hoisting_of_state(
        jaxpr_known, known_consts, *num_res
    ):  # one count in 0.10, two since 0.11
        if has_state(jaxpr_known):
            return jaxpr_known, known_consts, [False] * num_res[0], []
        return known_hoisting(jaxpr_known, known_consts, *num_res)

    _loops._scan_known_hoisting = no_hoisting_of_state

    # Remat's partial evaluation of a scan finds what is constant by another partial evaluation. What that
    # calls in turn has its own scans, of which the same is true.
    scan_rule = _pe.partial_eval_jaxpr_custom_rules[lax.scan_p]
    partial_eval = _pe.partial_eval_jaxpr_nounits

    def scan_rule_with_state(*args, **kwargs):
        with _entering(hoisting=True):
            return scan_rule(*args, **kwargs)

    def without_hoisting_state(jaxpr, unknowns, instantiate):
        if not (_here.hoisting and has_state(jaxpr)):
            return partial_eval(jaxpr, unknowns, instantiate)
        # What comes before the loop is the identity on the constants. The loop keeps every equation, and
        # every result depends on it.
        body = open_jaxpr(jaxpr)
        consts = [v for v, unknown in zip(body.invars, unknowns, strict=True) if not unknown]
        names = body.debug_info.with_unknown_names()
        before = body.replace(
            constvars=[], invars=consts, outvars=consts, eqns=[], effects=set(), debug_info=names
        )
        loop = _pe.move_binders_to_front(jaxpr, [not unknown for unknown in unknowns])
        depends = [True] * len(body.outvars)
        return _pe.close_jaxpr(before), loop, depends, [v.aval for v in consts]

    _pe.partial_eval_jaxpr_custom_rules[lax.scan_p] = scan_rule_with_state
    _pe.partial_eval_jaxpr_nounits = without_hoisting_state


def _keep_unused_state() -> None:
    """An equation with effects that JAX would replace, as nothing uses its results, stays.

    JAX 0.10 and 0.11 leave out a remat that needs no inputs either. Two stay whole: a shard_map that needs
    no inputs keeps its effects, but tells JAX of no devices any more. And a forward rule of a custom_vjp
    with `optimize_remat=True` is replaced by the function, if nothing uses what it saves.
    """
    remat = _ad_checkpoint.remat_p

    def keeping_state(rule):
        # Since 0.12, what refs are live comes before the equation.
        def rule_with_state(used_outputs, *live_and_eqn):
            eqn = live_and_eqn[-1]
            used_inputs, new = rule(used_outputs, *live_and_eqn)
            if new is None and eqn.primitive is remat and has_state(eqn):
                left, used_inputs = _pe.dce_jaxpr(eqn.params["jaxpr"], used_outputs)
                params = {**eqn.params, "jaxpr": left}
                if isinstance(params["prevent_cse"], tuple):
                    params["prevent_cse"] = ()
                return used_inputs, eqn.replace(invars=[], outvars=[], params=params)
            same = new is not None and new.primitive is eqn.primitive
            if same and (new.invars or new.outvars or new.primitive is remat):
                return used_inputs, new
            if has_state(eqn) or (new is not None and has_state(new)):
                return [True] * len(eqn.invars), eqn
            return used_inputs, new

        return rule_with_state

    for primitive in (remat, _custom.remat_opt_p, _shard_map.shard_map_p):
        _pe.dce_rules[primitive] = keeping_state(_pe.dce_rules[primitive])


def _refuse_state_in_backward_pass() -> None:
    """Remat leaves to the backward pass what is differentiated and has no rule that takes it apart.

    That pass runs it late, or not at all if nothing is differentiated by its results.
    """
    partial_eval = _pe.partial_eval_jaxpr_custom

    def with_all_state_known(*args, **kwargs):
        known, staged, *rest = partial_eval(*args, **kwargs)
        if has_state(staged):
            primitive = next(e.primitive for e in open_jaxpr(staged).eqns if has_state(e))
            name = primitive.name
            if primitive is _custom.remat_opt_p:
                name = "custom_vjp` with `optimize_remat=True"
            raise NotImplementedError(
                f"storax: state inside a `{name}` that is differentiated inside of a "
                "`jax.checkpoint`: JAX would run it in the backward pass, or not at all. Get and set "
                "the state outside of that function, and pass it in as an argument; or leave out the "
                "checkpoint."
            )
        return known, staged, *rest

    _pe.partial_eval_jaxpr_custom = with_all_state_known


def _keep_state_in_while() -> None:
    """JAX can save nothing from inside a while loop: to linearize one, it runs it again.

    With state in it, a loop without tangents is run and its results are saved, as an operation's are.
    """

    def has_tangents() -> NotImplementedError:
        return NotImplementedError(
            "storax: a `while_loop` with state in it, through which a derivative goes, can't be "
            "linearized, or differentiated in reverse mode: JAX would run it again. Use `jax.jvp` "
            "or `jax.jacfwd`; or `jax.lax.scan`, or `fori_loop` with a fixed number of steps; or "
            "`jax.lax.stop_gradient` on what goes into the loop."
        )

    def with_known_only(params, unknown):
        """Which operands are left without those tangents that the body closes over and never uses."""
        n, first = len(unknown), params["cond_nconsts"]
        if not any(unknown):
            return range(n), params
        body, nconsts = params["body_jaxpr"], params["body_nconsts"]
        carried = n - first - nconsts
        keep = [False] * nconsts + [True] * carried
        jaxpr, used = _pe.dce_jaxpr(open_jaxpr(body), [True] * carried, keep)
        kept = [k for k in range(n) if k < first or used[k - first]]
        if body.consts or any(unknown[k] for k in kept):
            raise has_tangents()
        nconsts -= n - len(kept)
        return kept, {**params, "body_jaxpr": _pe.close_jaxpr(jaxpr), "body_nconsts": nconsts}

    while_p = lax.while_p
    rule = _pe.custom_partial_eval_rules[while_p]

    def rule_with_state(trace, *tracers, **params):
        jaxprs = params["cond_jaxpr"], params["body_jaxpr"]
        if not has_state(*jaxprs):
            return rule(trace, *tracers, **params)
        kept, params = with_known_only(params, [not t.is_known() for t in tracers])
        return trace.default_process_primitive(while_p, [tracers[k] for k in kept], params)

    _pe.custom_partial_eval_rules[while_p] = rule_with_state

    rule_in_remat = _pe.partial_eval_jaxpr_custom_rules[while_p]

    def rule_in_remat_with_state(saveable, unknown_in, instantiate_in, eqn):
        if not has_state(eqn):
            return rule_in_remat(saveable, unknown_in, instantiate_in, eqn)
        kept, params = with_known_only(eqn.params, unknown_in)
        eqn = eqn.replace(invars=[eqn.invars[k] for k in kept], params=params)
        return _known_and_saved(saveable, unknown_in, instantiate_in, eqn)

    _pe.partial_eval_jaxpr_custom_rules[while_p] = rule_in_remat_with_state


def _known_and_saved(saveable, unknown_in, instantiate_in, eqn):
    n = len(eqn.outvars)
    return eqn, None, [False] * n, [False] * n, []


def _know_mesh_of_nested_shard_map() -> None:
    """The mesh of a shard_map inside of another is abstract: it says nothing of the devices."""
    rule = _mlir._lowerings[_shard_map.shard_map_p].rule

    def lower_and_know_mesh(ctx, *args, **params):
        mesh = getattr(ctx.module_context.axis_context, "mesh", None)
        known = mesh if isinstance(mesh, jax.sharding.Mesh) else _here.mesh
        if known is not None and VERSION < (0, 11) and has_state(params["jaxpr"]):
            raise NotImplementedError(
                "storax: state inside of a `jax.shard_map` that is inside of another, in a compiled "
                "program: XLA aborts on it before JAX 0.11. Make one `jax.shard_map` of the two, over "
                "the axes of both."
            )
        with _entering(mesh=known):
            return rule(ctx, *args, **params)

    _mlir.register_lowering(_shard_map.shard_map_p, lower_and_know_mesh)


def forget_failed_tokens() -> None:
    """Lets programs over several devices run again after one has failed, and its token with it."""
    # New dicts: JAX may be in the middle of the old ones, as it raises what made us forget (0.12).
    tokens = _dispatch_module.runtime_tokens
    kept = {e: token for e, token in tokens.current_tokens.items() if e != MESH_STATE}
    tokens.current_tokens, tokens.output_runtime_tokens = kept, {}


def on_runtime_error(told: Callable[[str], None]) -> None:
    """Calls `told(message)` whenever JAX raises a JaxRuntimeError, in whatever way it comes about."""
    original = JaxRuntimeError.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if args and isinstance(args[0], str):
            told(args[0])

    JaxRuntimeError.__init__ = init


def around_mesh_programs(
    before: Callable[[list[Any]], None], after: Callable[[list[Any], Any], None]
) -> None:
    """Calls `before(kept)` and `after(kept, token)` when a program over a mesh is dispatched.

    `kept` is what the program keeps alive, see `keep_alive`; the token is there when the program ends.
    """
    executable = _pxla.ExecuteReplicated
    add_tokens, handle_tokens = executable._add_tokens_to_inputs, executable._handle_token_bufs

    def before_and_add_tokens(self, inputs):
        if MESH_STATE in self.ordered_effects:
            before(self.keepalive or [])
        return add_tokens(self, inputs)

    def handle_tokens_and_after(self, *tokens):
        handle_tokens(self, *tokens)
        if MESH_STATE in self.ordered_effects:
            after(self.keepalive or [], _dispatch_module.runtime_tokens.current_tokens[MESH_STATE])

    executable._add_tokens_to_inputs = before_and_add_tokens
    executable._handle_token_bufs = handle_tokens_and_after


_dispatch = threading.local()


def _delay_fast_path() -> None:
    """Errors at the call are RuntimeErrors only on JAX's Python path: its C++ path raises ValueError.

    So a program takes the C++ path once none of its operations on state can fail any more.
    """
    fast_path_data, rebuild = _pjit._get_fastpath_data, _pjit._need_to_rebuild_with_fdo

    def fast_path_data_if_safe(executable, *args, **kwargs):
        held = getattr(getattr(executable, "unsafe_call", None), "keepalive", None) or ()
        operations = [k for k in held if hasattr(k, "cannot_fail")]
        _dispatch.unsafe = not all(k.cannot_fail() for k in operations)
        return fast_path_data(executable, *args, **kwargs)

    def rebuild_if_unsafe(profiler):
        # True keeps the C++ path from remembering this call: the next one asks again.
        return getattr(_dispatch, "unsafe", False) or rebuild(profiler)

    _pjit._get_fastpath_data = fast_path_data_if_safe
    _pjit._need_to_rebuild_with_fdo = rebuild_if_unsafe


def _keep_token_ahead_of_time() -> None:
    """Programs over a mesh compiled ahead of time take a C++ path that leaves out their tokens."""
    executable = _pxla.MeshExecutable
    create = executable.create_cpp_call

    def create_without_tokens(self, *args, **kwargs):
        if MESH_STATE in getattr(self.unsafe_call, "ordered_effects", ()):
            return None
        return create(self, *args, **kwargs)

    executable.create_cpp_call = create_without_tokens


def forget_fast_paths() -> None:
    """Has every jitted function ask again, at its next call, whether it may take JAX's C++ path.

    Those compiled ahead of time don't ask.
    """
    _pjit._jax.PjitFunctionCache.clear_all()


def _compile_with_care() -> None:
    """What XLA gets wrong in programs with state.

    Its nullary-function-wrap-inliner (since jaxlib 0.11) aborts on calls whose operands are all tokens:
    it gives the inlined constants control dependencies, which a later pass refuses to remove. Without
    that pass the ordinary inliner does the work.
    """
    from_hlo = _pxla.UnloadedMeshExecutable.from_hlo
    name, flag = "nullary-function-wrap-inliner", "xla_disable_hlo_passes"

    def from_hlo_with_state(hlo_name, hlo, *args, keepalive, compiler_options_kvs, **kwargs):
        kept = keepalive or ()
        if any(isinstance(k, Pin) or hasattr(k, "cannot_fail") for k in kept):
            _keep_single_result(hlo)
        if VERSION >= (0, 11) and any(hasattr(k, "cannot_fail") for k in kept):
            options = dict(compiler_options_kvs)
            options[flag] = ",".join(filter(None, [options.get(flag), name]))
            compiler_options_kvs = tuple(options.items())
        return from_hlo(
            hlo_name,
            hlo,
            *args,
            keepalive=keepalive,
            compiler_options_kvs=compiler_options_kvs,
            **kwargs,
        )

    _pxla.UnloadedMeshExecutable.from_hlo = staticmethod(from_hlo_with_state)


COPY = "storax.copy"


def _keep_single_result(module: Any) -> None:
    """Has a program return a copy, if it has a single result and a conditional.

    If that result is also what a loop inside of the conditional starts from, XLA (jaxlib 0.10 to 0.12)
    lets the loop work on it in place: nothing but the program's end is left to use it, which XLA
    forgets. Without side effects such a conditional would not be there any more.
    """
    (main,) = (
        op for op in module.body if getattr(op, "sym_name", None) and op.sym_name.value == "main"
    )
    last = list(main.regions[0].blocks[0])[-1]
    if len(last.operands) != 1:
        return
    ir, (result,) = _mlir.ir, last.operands
    try:
        shaped = ir.RankedTensorType(result.type)
    except ValueError:
        return  # a token
    found = []

    def look(op):
        if op.name in ("stablehlo.case", "stablehlo.if"):
            found.append(op)
            return ir.WalkResult.INTERRUPT
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    if not found:
        return
    layout = list(range(shaped.rank))[::-1]
    with module.context, ir.Location.unknown(), ir.InsertionPoint(last):
        # XLA tells a handler a wrong size for arrays of less than a byte an element.
        wide = _in_bytes(shaped.element_type)
        if wide is not None:
            result = _mlir.hlo.convert(ir.RankedTensorType.get(shaped.shape, wide), result)
        copy = _mlir.custom_call(
            COPY,
            result_types=[result.type],
            operands=[result],
            backend_config={},
            operand_layouts=[layout],
            result_layouts=[layout],
        ).results[0]
        last.operands[0] = copy if wide is None else _mlir.hlo.convert(shaped, copy)


def _in_bytes(element: Any) -> Any:
    """A type of whole bytes with every value of this one; None if it is of whole bytes."""
    ir, bits = _mlir.ir, re.match(r"(ui|i|f)(\d+)", str(element))
    if not bits or int(bits[2]) >= 8 or str(element) == "i1":
        return None
    if bits[1] == "f":
        return ir.BF16Type.get()
    return ir.IntegerType.get_unsigned(8) if bits[1] == "ui" else ir.IntegerType.get_signless(8)


# Each patch, and which of our features needs it.
PATCHES: tuple[tuple[str, Callable[[], None]], ...] = (
    ("jit", _register_effect),
    ("jit", _keep_token_in_module),
    ("jit", _know_mesh_of_nested_shard_map),
    ("grad", _keep_state_in_scan),
    ("grad", _keep_unused_state),
    ("grad", _refuse_state_in_backward_pass),
    ("grad", _keep_state_in_while),
    ("vmap", _mark_rules_of_parted_lanes),
    ("jit", _refuse_hidden_state),
    ("jit", _delay_fast_path),
    ("jit", _keep_token_ahead_of_time),
    ("jit", _compile_with_care),
)


# --- The call path of storax.jit -------------------------------------------------------------------


def api_boundary(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose exceptions have no frames of JAX, nor of storax, in their tracebacks."""
    return getattr(_traceback, "api_boundary", lambda f: f)(f)


def hide_frames() -> None:
    """Leaves storax out of the tracebacks of what fails under a JAX transformation."""
    hide = getattr(_traceback, "register_exclusion", lambda path: None)
    hide(os.path.dirname(os.path.abspath(__file__)) + os.sep)


class _ArgumentNames(inspect.Signature):
    """Stands for a signature where a function takes some of another's arguments' leaves."""

    def __init__(self, names: Sequence[str]):
        super().__init__([inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)])
        self._names = names

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        names = [*(f"states[{i}]" for i in range(len(args) - len(self._names))), *self._names]
        return types.SimpleNamespace(arguments=dict(zip(names, args, strict=True)))


def in_the_name_of(user: Callable[..., Any], names: Sequence[str], f: Callable[..., Any]) -> None:
    """Has JAX's messages speak of a user's function, and of what these leaves are called there.

    `f` takes the leaves, after others perhaps. It doesn't keep the user's function alive.
    """
    while isinstance(user, functools.partial):
        user = user.func
    user = inspect.unwrap(user)
    call = getattr(type(user), "__call__", None)  # noqa: B004
    code = getattr(user, "__code__", None) or getattr(call, "__code__", None)
    if code is not None:
        name = getattr(user, "__name__", type(user).__name__)
        f.__wrapped__ = types.SimpleNamespace(__code__=code, __name__=name)  # type: ignore[attr-defined]
    f.__signature__ = _ArgumentNames(names)  # type: ignore[attr-defined]


def call_path() -> tuple[Any, ...]:
    """What `_core.set_jax` takes: how to flatten, what an array is, and what is out of the ordinary.

    The latter is a list of configurations, each followed by the value it ordinarily has.
    """
    ordinary = [
        *(_core.trace_state_strong_ref, _core.eval_trace),
        *(_core.axis_env_state, _core.top_axis_env),
        *(_config.debug_nans, False),
        *(_config.debug_infs, False),
    ]
    return jax.tree_util.default_registry.flatten, Array, ARRAYS, ordinary


def infer_static(
    f: Callable[..., Any], argnums: Any, argnames: Any
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of arguments, each completed by the other, as `jax.jit` does."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        as_tuple = lambda x, kind: () if x is None else (x,) if isinstance(x, kind) else tuple(x)
        return as_tuple(argnums, int), as_tuple(argnames, str)
    return _api_util.infer_argnums_and_argnames(signature, argnums, argnames)


_EXPERIMENTS = [
    f for f in (getattr(_config, n, None) for n in ("remat3", "scan3")) if f is not None
]


def experiments() -> list[str]:
    """Flags that are on, and with which JAX takes code that it does not yet stand by (since 0.10)."""
    return [f"`{flag._name}`" for flag in _EXPERIMENTS if flag.value]


def is_ordered(effect: Any) -> bool:
    return _effects.ordered_effects.contains(effect)


def debugs_values() -> bool:
    """Whether a program whose results are not finite is to be run again, to find out where."""
    return bool(jax.config.jax_debug_nans or jax.config.jax_debug_infs)


# --- Running things now ---------------------------------------------------------------------------


FENCE = "storax.fence"


@functools.cache
def _fence(ordinal: int) -> Callable[[], Any]:
    """Dispatches a program that does nothing but to note that it runs."""

    def fence():
        jax.ffi.ffi_call(FENCE, (), has_side_effect=True)()

    with eval_off_mesh(), jax.default_device(local_device(ordinal)):
        compiled = jax.jit(fence).lower().compile()
    try:
        # What is behind a compiled function: no Python, and no matter what is being traced.
        return functools.partial(compiled._executable.xla_executable.execute_sharded, [])
    except AttributeError:
        return lambda: None  # a JAX that has moved it: no fence is ever passed


@functools.cache
def _noop(ordinal: int) -> Callable[[], None]:
    with eval_off_mesh():
        x = jax.device_put(jnp.zeros(()), local_device(ordinal))
        run = jax.jit(lambda x: x + 1)
        run(x).block_until_ready()
    return lambda: run(x).block_until_ready()


def wait_for_this_thread(ordinal: int) -> None:
    """Waits for the programs that this thread has dispatched to the device of that ordinal.

    A thread's programs on a device run in order, so a program that does nothing ends after them.
    XLA runs a small one at once, within its dispatch, unless there is something to wait for: if the
    fence has run on this very thread, nothing is left that was dispatched before it.
    """
    if passes_fence(_fence(ordinal)):
        return
    with eval_off_mesh():
        _noop(ordinal)()


def local_device(ordinal: int, platform: str = "cpu") -> Any:
    """The device with XLA's ordinal within this process."""
    return _local_devices(platform)[ordinal]


@functools.cache
def _local_devices(platform: str) -> dict[int, Any]:
    return {d.local_hardware_id: d for d in jax.local_devices(backend=platform)}


def device_ordinal(device: Any) -> int:
    return device.local_hardware_id


def array_from_host(
    buffer: np.ndarray, aval: Any, sharding: Any, device: Any, committed: bool
) -> jax.Array:
    """An array of these bytes, which nobody writes any more, on one device; no copy if XLA can do so."""
    return _lib.xla_client.batched_device_put(aval, sharding, [buffer], [device], committed)


def is_committed(device: Any) -> bool:
    """Whether arrays there are to be committed to their device: if it is not where they go anyway."""
    return device != _default_device()


def _default_device() -> Any:
    device = jax.config.jax_default_device
    return device if device is not None and not isinstance(device, str) else jax.local_devices()[0]


def buffer_address(x: jax.Array) -> int:
    """Where a ready single-device array lies in memory."""
    return x.unsafe_buffer_pointer()
