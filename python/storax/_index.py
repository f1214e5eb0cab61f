"""StateIndex, get_state and set_state."""

import os
import sys
import weakref
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from equinox import _compile_utils as eqx_compile_utils

from . import _control_flow, _core, _jax, _store
from ._primitives import frozen_p, get_p, set_p
from ._slot import (
    Published,
    Slot,
    Structure,
    from_stored,
    structure_at,
    structure_of,
    to_stored,
    type_parts,
)

__all__ = ["StateIndex", "get_state", "set_state"]

T = TypeVar("T")

# Frames of these packages say nothing about where a user made an index.
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(module.__file__)) + os.sep for module in (eqx, jax, _core)
)


def _creation_site() -> str:
    frame = sys._getframe(2)
    inside = ""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and owner is not None:
            inside = f" in {type(owner).__name__}"
        frame = frame.f_back
    if frame is None:
        return "StateIndex"
    file = os.path.basename(frame.f_code.co_filename)
    function = frame.f_code.co_name
    where = "" if function == "<module>" else f", {function}"
    return f"StateIndex made at {file}:{frame.f_lineno}{where}{inside}"


class _Held:
    """What a frozen index carries across a JIT boundary besides its arrays.

    The version is left out of equality, so that a new value of the state is no reason to retrace.
    """

    __slots__ = ("levels", "structure", "version")

    def __init__(self, structure: int, levels: tuple, version: int):
        self.structure = structure
        self.levels = levels
        self.version = version

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Held)
            and self.structure == other.structure
            and self.levels == other.levels
        )

    def __hash__(self) -> int:
        return hash((self.structure, self.levels))


# Frozen before anything was set.
_NOTHING_HELD = _Held(-1, (), -1)


class _Aux:
    """The static part of an index as a PyTree node."""

    __slots__ = ("_slot", "held", "slot_id", "was")

    def __init__(self, slot: Slot, held: _Held | None, was: bool | None, weak: bool):
        self.slot_id = slot.id  # never reused
        self._slot = weakref.ref(slot) if weak else slot
        self.held = held
        # While `equinox.tree_at` is at work: the flag behind its placeholder. That is how a flag
        # that is toggled differs from one that a mask has taken the place of.
        self.was = was

    @property
    def slot(self) -> Slot:
        slot = self._slot() if isinstance(self._slot, weakref.ref) else self._slot
        if slot is None:
            raise RuntimeError(
                "storax: a StateIndex cannot be put together again, as no copy of it is left."
            )
        return slot

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aux) and self.slot_id == other.slot_id and self.held == other.held

    def __hash__(self) -> int:
        return hash((self.slot_id, self.held))

    def __repr__(self) -> str:
        slot = self._slot() if isinstance(self._slot, weakref.ref) else self._slot
        name = "no longer alive" if slot is None else slot.core.name
        return name if self.held is None else f"{name}, frozen"


# JAX keeps the PyTree structures of a program's arguments in global caches. The ones that
# `equinox.filter_jit` makes for that must not keep the state alive with them.
_FLATTEN_FOR_JIT = getattr(eqx_compile_utils.hashable_partition, "__code__", None)


def _is_for_a_jit_cache() -> bool:
    frame = sys._getframe(2).f_back  # the caller of jax.tree_util.tree_flatten
    return frame is not None and frame.f_code is _FLATTEN_FOR_JIT


def _flag_behind(leaf: Any) -> bool | None:
    if type(leaf).__module__ == eqx.tree_at.__module__:
        value = getattr(leaf, "value", None)
        return value if isinstance(value, bool) else None
    return None


@jtu.register_pytree_with_keys_class
class StateIndex:
    """A place to keep state: save and load JAX arrays there as a side effect, even under JIT.

    An index is a PyTree: treat it like a model parameter. Make it once, outside of `jax.jit`, and
    keep it in your model or close over it. Copies made by PyTree operations (`jax.tree.map`,
    `equinox.tree_at`, passing it through a JIT boundary) share the state; `copy.deepcopy` and
    pickling make an index of its own with the same state.

    **Arguments:**

    - `inference`: if true, the state can only be read. It is looked up when the index crosses the
      JIT boundary, and is an ordinary input of the compiled program. `equinox.nn.inference_mode`
      toggles it.
    - `name`: what error messages call this index. By default, where it was made.

    Pass an index to a function under `equinox.filter_jit`, or close over it; plain `jax.jit` would
    trace its `inference` flag.

    !!! example

        ```python
        index = storax.StateIndex()
        storax.set_state(index, jnp.array(0))

        @jax.jit
        def count():
            n = storax.get_state(index, like=jnp.array(0)) + 1
            storax.set_state(index, n)
            return n
        ```
    """

    __slots__ = ("__weakref__", "_held", "_leaves", "_slot", "inference")

    inference: bool
    _slot: Slot
    _held: _Held | None
    _leaves: tuple[Any, ...]

    def __init__(self, inference: bool = False, *, name: str | None = None):
        _install()
        self.inference = inference
        self._held = _NOTHING_HELD if inference else None
        self._slot = Slot(_creation_site() if name is None else f"StateIndex {name!r}")
        self._leaves = ()

    # --- PyTree ---

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        self._look_up()
        aux = _Aux(self._slot, self._held, _flag_behind(self.inference), weak=_is_for_a_jit_cache())
        return (self.inference, *self._leaves), aux

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], Any]:
        children, aux = self.tree_flatten()
        keys = [jtu.GetAttrKey("inference")]
        keys += [jtu.GetAttrKey(f"state[{i}]") for i in range(len(children) - 1)]
        return tuple(zip(keys, children, strict=True)), aux

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any, ...]) -> "StateIndex":
        self = object.__new__(cls)
        self._slot, self._held = aux.slot, aux.held
        self.inference, *leaves = children
        self._leaves = tuple(leaves)
        if aux.was is not None and self.inference is (not aux.was):
            self._toggle()
        return self

    def _toggle(self) -> None:
        """The flag has just changed: from here on the index carries its state, or no longer does."""
        self._held, self._leaves = None, ()
        if self.inference and _jax.no_trace():
            self._held = _NOTHING_HELD
            self._look_up()

    def _look_up(self) -> None:
        """Brings the arrays that a frozen index carries up to date."""
        if self._held is None or self.inference is not True:
            return
        if any(isinstance(x, _jax.Tracer) or not isinstance(x, jax.Array) for x in self._leaves):
            return  # inputs of a program, or whatever a PyTree operation has put there
        if not self._slot.core.type:
            return
        published = _published(self._slot)
        if self._held.version != published.version:
            parts = type_parts(published.type)
            self._held = _Held(parts.structure.number, parts.levels, published.version)
            self._leaves = published.leaves

    # --- Python ---

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, StateIndex):
            return NotImplemented
        return eqx.tree_equal(self, other)

    def __repr__(self) -> str:
        return f"StateIndex(inference={self.inference}, name={self._slot.core.name!r})"


def _install() -> None:
    _jax.install_patches()
    _control_flow.install()


def _published(slot: Slot) -> Published:
    core = slot.core
    _store.settle(_jax.local_device(max(core.device, 0)))
    version = core.version
    published = slot.published
    if published is None or published.version != version:
        leaves = _store.read_all(core)
        slot.published = published = Published(version, tuple(leaves), core.type)
    return published


_TRACED_INDEX = (
    "This StateIndex was passed as an argument to plain `jax.jit` (or `jax.vmap`, `jax.grad`, ...), "
    "which has turned its `inference` flag into a tracer. Use `equinox.filter_jit` (or "
    "`equinox.filter_vmap`, ...) or `storax.jit`, or close over the index instead of passing it."
)


def _check_index(index: Any, op: str) -> None:
    if not isinstance(index, StateIndex):
        raise TypeError(
            f"storax.{op}: the first argument must be a storax.StateIndex, not "
            f"{type(index).__module__}.{type(index).__qualname__}."
        )
    if not isinstance(index.inference, bool):
        if isinstance(index.inference, (_jax.Tracer, jax.Array)):
            raise TypeError(f"storax.{op} of {index._slot.core.name}: {_TRACED_INDEX}")
        raise TypeError(
            f"storax.{op} of {index._slot.core.name}: its `inference` flag has been replaced by "
            f"{index.inference!r}, as `equinox.partition` and the like do. Put the index together "
            "again, with `equinox.combine`, before using it."
        )


def _flatten_arrays(tree: Any, what: str, op: str, slot: Slot) -> tuple[list[Any], Any, Any]:
    """Leaves as the store keeps them, the structure, and the abstract values."""
    leaves, treedef = jtu.tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, jax.Array):
            _raise_not_array(tree, what, op, slot)
    if _jax.no_trace():
        _store.check_no_tracers(leaves, op, slot.core)
    structure = structure_of(treedef, leaves)
    if structure.widened:
        leaves = [to_stored(x, k) for x, k in zip(leaves, structure.kinds, strict=True)]
    return leaves, treedef, structure


def _raise_not_array(tree: Any, what: str, op: str, slot: Slot) -> None:
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):
            raise TypeError(
                f"storax.{op} of {slot.core.name}: `{what}` must be a PyTree of JAX arrays, but "
                f"`{what}{jtu.keystr(path)}` is {leaf!r} of type {type(leaf).__qualname__}. Wrap it "
                "in `jnp.asarray`."
            )


def get_state(index: StateIndex, like: T) -> T:
    """Loads the state that was last saved at `index`.

    It may be called anywhere: outside or inside of `jax.jit`, of `jax.lax.scan`, of `jax.vmap`, and
    so on. Under `jax.grad` the state is a constant.

    **Arguments:**

    - `index`: where to load from.
    - `like`: a PyTree of JAX arrays with the structure, shapes, dtypes and batch axes of the state;
      their values are not used.

    **Returns:** the state, of the same structure, shapes and dtypes as `like`.

    **Raises:**

    - `TypeError`, at trace time, if `like` is not a PyTree of JAX arrays.
    - `RuntimeError`, when the operation runs, if `like` differs from the state in structure, shape,
      dtype or batch axes, or if nothing has been saved yet.
    """
    _check_index(index, "get_state")
    slot = index._slot
    leaves, treedef, structure = _flatten_arrays(like, "like", "get_state", slot)
    held = index._held if index.inference else None
    if index.inference:
        index._look_up()
        held = index._held
        if (held is None and not slot.core.type) or held is _NOTHING_HELD:
            raise RuntimeError(
                f"storax.get_state of {slot.core.name}, frozen by `inference=True`: nothing has been "
                "set. Set it first, through a copy with `inference=False`."
            )
    if held is not None:
        out = _get_frozen(index, leaves, structure)
    elif _jax.no_trace():
        out = _get_now(slot, leaves, structure)
    else:
        mesh = _jax.manual_mesh_axes()
        params = {"slot": slot.id, "structure": structure.number, "levels": (), "mesh": mesh}
        out = get_p.bind(*leaves, **params)
    if structure.widened:
        out = [from_stored(x, k) for x, k in zip(out, structure.kinds, strict=True)]
    return jtu.tree_unflatten(treedef, out)


def _get_now(slot: Slot, like: list[Any], structure: Structure) -> list[Any]:
    """What the primitive would do, by a shorter way."""
    plan = slot.plan
    key = (structure, *[x.shape for x in like])
    if plan is None or plan[0] != key:
        type_id = structure.type_id(key[1:], (), ())
        avals = [jax.typeof(x) for x in like]
        plan = (key, _store.plan_get(slot.core, type_id, structure.kinds, avals))
        if slot.core.accepts(type_id):  # what it holds, and where, is then settled
            slot.plan = plan
    return _store.run_get(slot.core, plan[1])


def _get_frozen(index: StateIndex, like: list[Any], structure: Any) -> list[Any]:
    held = index._held
    assert held is not None
    name = index._slot.core.name
    # The arrays' own dtypes: a PyTree operation may have cast them.
    kept = structure_of(structure_at(held.structure).treedef, list(index._leaves))
    if kept is not structure:
        stored = tuple(
            (*x.shape, *k.trailing) for x, k in zip(index._leaves, kept.kinds, strict=True)
        )
        raise RuntimeError(
            f"storax.get_state of {name}, frozen by `inference=True`: it holds "
            f"{_core.type_text(kept.type_id(stored, held.levels, ()))}, but `like` is "
            f"{_core.type_text(structure.type_id(tuple(x.shape for x in like), (), ()))}. Get and "
            "set must agree in dtype, shape, PyTree structure and batch axes."
        )
    state = [jax.lax.stop_gradient(x) for x in index._leaves]
    if structure.widened:
        state = [to_stored(x, k) for x, k in zip(state, structure.kinds, strict=True)]
    return frozen_p.bind(
        *state, *like, structure=structure.number, levels=(), held_levels=held.levels, name=name
    )


def set_state(index: StateIndex, state: Any) -> None:
    """Saves `state` at `index`.

    It may be called anywhere: outside or inside of `jax.jit`, of `jax.lax.scan`, of `jax.vmap`, and
    so on. Operations on state run in program order, each exactly once.

    **Arguments:**

    - `index`: where to save to.
    - `state`: a PyTree of JAX arrays. The first call fixes its structure, shapes, dtypes and batch
      axes.

    **Returns:** `None`.

    **Raises:**

    - `TypeError`, at trace time, if `state` is not a PyTree of JAX arrays.
    - `RuntimeError`, at trace time, if `index.inference` is true.
    - `RuntimeError`, when the operation runs, if `state` differs from what this index held before in
      structure, shape, dtype or batch axes. Nothing is saved then.
    - `NotImplementedError`, at trace time, if `state` depends on what is being differentiated. Use
      `jax.lax.stop_gradient`.
    """
    _check_index(index, "set_state")
    slot = index._slot
    if index.inference:
        raise RuntimeError(
            f"storax.set_state of {slot.core.name}: its `inference` flag is true, so it can only be "
            "read. `equinox.nn.inference_mode(model, value=False)` makes a copy that can be set."
        )
    leaves, _, structure = _flatten_arrays(state, "state", "set_state", slot)
    if _jax.no_trace():
        _store.set(slot.core, structure, leaves, (), ())
        return
    mesh = _jax.manual_mesh_axes()
    set_p.bind(*leaves, slot=slot.id, structure=structure.number, levels=(), mesh=mesh)
