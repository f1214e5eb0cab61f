"""Running operations at once: between JAX's arrays and the C++ store, and what must be waited for."""

import atexit
import builtins
import contextlib
import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _core, _jax, _loans
from ._slot import from_stored, type_parts

__all__ = ["GET", "SET", "SET_MASKED", "barrier", "get", "register_handlers", "set"]

GET = "storax.get_state"
SET = "storax.set_state"
SET_MASKED = "storax.set_state_masked"
GET_ROW = "storax.get_row"
SET_ROW = "storax.set_row"
SET_ROW_MASKED = "storax.set_row_masked"
LOAD = "storax.load_states"
STORE = "storax.store_states"
_TARGETS = {
    GET: "get",
    SET: "set",
    SET_MASKED: "set_masked",
    GET_ROW: "get_row",
    SET_ROW: "set_row",
    SET_ROW_MASKED: "set_row_masked",
    LOAD: "load",
    STORE: "store",
}

_pid = os.getpid()
forked = False


def _note_fork() -> None:
    global forked
    forked = True


# Asking for the process id in every operation would cost more than the check is worth.
os.register_at_fork(after_in_child=_note_fork)


class Operation:
    """One operation of a program; programs hold these, and so keep their slots alive, and in place."""

    def __init__(self, slot: Any, type_id: int, over_mesh: bool):
        self.slot = slot
        self.type_id = type_id
        self.over_mesh = over_mesh
        self._pin = _core.Pin(slot)

    def cannot_fail(self) -> bool:
        """Whether the state is there, and of the right type, as it then is for ever."""
        may_be_mapped = not self.over_mesh and self.slot.id in mesh_slots
        return not may_be_mapped and self.slot.accepts(self.type_id)


@functools.cache
def register_handlers() -> None:
    """Gives XLA our handlers; called when the first program with state is lowered."""
    # XLA wants a platform's types before its handlers, which JAX sees to only once the platform's
    # back end exists.
    jax.local_devices(backend="cpu")
    for name, registration in _core.handler_types().items():
        jax.ffi.register_ffi_type(name, registration, platform="cpu")
    handlers = _core.handlers()
    for target, handler in _TARGETS.items():
        made = "instantiate_packed" if target in (LOAD, STORE) else "instantiate"
        stages = {"instantiate": handlers[made], "execute": handlers[handler]}
        jax.ffi.register_ffi_target(target, stages, platform="cpu")
    jax.ffi.register_ffi_target(_jax.FENCE, handlers["fence"], platform="cpu")
    jax.ffi.register_ffi_target(_jax.COPY, handlers["copy"], platform="cpu")
    # A failure that JAX itself has raised need not be raised again.
    _jax.on_runtime_error(_told)
    _jax.around_mesh_programs(_before_mesh, _after_mesh)
    atexit.register(_report_at_exit)


_catching = threading.local()


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """What JAX raises in here is told to nobody yet."""
    _catching.now = True
    try:
        yield
    finally:
        _catching.now = False


def _told(message: str) -> None:
    """JAX has just raised this to somebody."""
    if getattr(_catching, "now", False):
        return
    _core.acknowledge_failure(message)
    if _is_ours(message):
        _jax.forget_failed_tokens()


def _is_ours(message: str) -> bool:
    return "storax." in message


def check_process() -> None:
    if os.getpid() != _pid:
        raise RuntimeError(
            "storax: this process was forked from one that had imported JAX and storax, and neither "
            "works in such a child. Start processes with "
            "`multiprocessing.get_context('spawn')`, or fork before importing them."
        )


def raise_failures() -> None:
    """Raises what failed in programs that nobody has blocked on, once."""
    if _core.pending_failures():
        messages = _core.take_failures()
        if messages:
            raise RuntimeError(
                "An earlier program failed while it ran, and nothing had raised it yet.\n"
                + "\n".join(messages)
            )


# Slots that programs over a mesh have named, and those that programs on one device have. XLA orders
# neither after the other: where a slot is in both, the former run alone.
mesh_slots: builtins.set[int] = builtins.set()
_device_slots: builtins.set[int] = builtins.set()
# The token of the program over a mesh that each thread has dispatched last.
_last_tokens: dict[int, Any] = {}


def note_program(slots: Sequence[Any], over_mesh: bool) -> None:
    """Notes that a program names these slots, when it is lowered.

    Where some are of both kinds from now on, nothing that was dispatched before, by whatever thread, is
    left to run; and calls of the programs on one device, which may fail now, take the Python path.
    """
    ids = {slot.id for slot in slots}
    if over_mesh:
        newly_both = not _device_slots.isdisjoint(ids - mesh_slots)
        mesh_slots.update(ids)
        if newly_both:
            _jax.forget_fast_paths()
        return
    newly_both = not mesh_slots.isdisjoint(ids - _device_slots)
    _device_slots.update(ids)
    if newly_both:
        for token in list(_last_tokens.values()):
            _finish(token)


def _runs_alone(kept: Sequence[Any]) -> bool:
    return any(isinstance(k, Operation) and k.slot.id in _device_slots for k in kept)


def _before_mesh(kept: Sequence[Any]) -> None:
    if _runs_alone(kept):
        _wait_for_devices()


def _after_mesh(kept: Sequence[Any], token: Any) -> None:
    _last_tokens[threading.get_ident()] = token
    if _runs_alone(kept):  # asked again: another thread may have lowered a program meanwhile
        _finish(token)


def settle(slot: Any, waited: builtins.set[int] | None = None) -> None:
    """Lets this thread's earlier programs finish, if they may use this slot.

    A program that runs, or is still to run, keeps its executable alive; with none alive that names the
    slot, there is nothing to wait for. Nor is there on the devices in `waited`; others are added.
    """
    if forked:
        check_process()
    if slot.num_programs:
        _wait_for_programs(slot, waited)
    if _core.pending_failures():
        raise_failures()


def is_at_rest(slot: Any, version: int) -> bool:
    """Whether the state is of that version, and there is nothing to wait for."""
    return not forked and slot.rests_at(version)


def _wait_for_programs(slot: Any, waited: builtins.set[int] | None) -> None:
    ordinal = slot.device
    if ordinal >= 0:
        if waited is None:
            _jax.wait_for_this_thread(ordinal)
        elif ordinal not in waited:
            _jax.wait_for_this_thread(ordinal)
            waited.add(ordinal)
    else:  # on several devices, or to be set first by a program that may be on any
        _wait_for_devices()
    if mesh_slots and slot.id in mesh_slots:
        _wait_for_meshes()


def _wait_for_devices() -> None:
    for device in jax.local_devices(backend="cpu"):
        _jax.wait_for_this_thread(_jax.device_ordinal(device))


def _finish(token: Any) -> None:
    """Waits for a program over a mesh. What fails in it is raised later, as of any asynchronous program."""
    with _untold(), contextlib.suppress(RuntimeError, ExceptionGroup):
        token.block_until_ready()


def _wait_for_meshes() -> None:
    """What fails of ours is in the record. What fails of others is raised: nobody else may wait for it."""
    try:
        with _untold():
            jax.effects_barrier()
    except (RuntimeError, ExceptionGroup) as e:
        _jax.forget_failed_tokens()
        failed = e.exceptions if isinstance(e, ExceptionGroup) else (e,)
        others = [x for x in failed if not _is_ours(str(x))]
        if others:
            raise others[0] from None


def barrier() -> None:
    """Waits for every program that this thread has dispatched, and raises what failed in them.

    **Raises:** `RuntimeError` if a `get_state` or `set_state` failed in a program, and nothing has
    raised that failure yet; or what else `jax.effects_barrier` raises, which it calls. Programs of
    other threads are not waited for.
    """
    check_process()
    if register_handlers.cache_info().currsize:
        _wait_for_devices()
        _wait_for_meshes()
    raise_failures()


def _report_at_exit() -> None:
    if os.getpid() != _pid:
        return
    try:
        barrier()
    except RuntimeError as e:
        print(f"storax: {e}", file=sys.stderr)


def check_no_tracers(leaves: Sequence[Any], op: str, slot: Any) -> None:
    """With no trace active, a tracer is one that got away."""
    for x in leaves:
        if isinstance(x, _jax.Tracer):
            raise jax.errors.UnexpectedTracerError(
                f"storax.{op} of {slot.name}: an array is a tracer of a function that JAX has "
                f"finished tracing, {jax.typeof(x)}. It escaped through a side effect: return it "
                "from that function instead, or use set_state inside it."
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that getting a state of some type from some device takes; made once."""

    type_id: int
    ordinal: int
    device: Any
    # dtype and shape as stored, abstract value, sharding
    leaves: tuple[tuple[Any, tuple[int, ...], Any, Any], ...]
    committed: bool
    default_device: Any  # of JAX, by which the results are committed to theirs or not


def plan_get(slot: Any, type_id: int, kinds: Sequence[Any], avals: Sequence[Any]) -> Plan:
    if slot.device < 0:
        settle(slot)  # a program may be about to set it
    ordinal = max(slot.device, 0)
    device = _jax.local_device(ordinal)
    sharding = jax.sharding.SingleDeviceSharding(device)
    leaves = tuple(
        (kind.stored, aval.shape, _jax.strong(aval), sharding)
        for kind, aval in zip(kinds, avals, strict=True)
    )
    default = jax.config.jax_default_device
    return Plan(type_id, ordinal, device, leaves, _jax.is_committed(device), default)


def run_get(slot: Any, plan: Plan) -> list[Any]:
    """The state as fresh arrays, as the store keeps them."""
    settle(slot)
    buffers = slot.get(plan.type_id, plan.ordinal)
    if buffers is None:
        lent = _loans.read(slot, plan.type_id)
        return run_get(slot, plan) if lent is None else lent
    device, committed = plan.device, plan.committed
    if jax.config.jax_default_device is not plan.default_device:
        committed = _jax.is_committed(device)
    leaves = []
    for buffer, (dtype, shape, aval, sharding) in zip(buffers, plan.leaves, strict=True):
        x = np.ndarray(shape, dtype, buffer)
        leaves.append(_jax.array_from_host(x, aval, sharding, device, committed))
    return leaves


def get(slot: Any, structure: Any, like: Sequence[Any], levels: tuple, mesh: tuple) -> list[Any]:
    type_id = structure.type_id(tuple(x.shape for x in like), levels, mesh)
    return run_get(
        slot,
        plan_get(slot, type_id, structure.kinds, [_jax.shaped(x.shape, x.dtype) for x in like]),
    )


# Of meshes that programs were lowered for: the ordinals of their devices in the mesh's order, and the
# numbers that slots know them by. 0 is for none.
_mesh_orders: list[tuple[int, ...]] = [()]


def mesh_order_number(order: tuple[int, ...]) -> int:
    if order not in _mesh_orders:
        _mesh_orders.append(order)
    return _mesh_orders.index(order)


def mesh_order(slot: Any) -> tuple[int, ...] | None:
    """The ordinals of a mapped state's devices in the order of the mesh, if a program has set it."""
    return _mesh_orders[slot.mesh_order] or None


def get_mapped(slot: Any, parts: Any) -> list[np.ndarray]:
    """A state per device as one array per leaf, with the mapped mesh axes in front."""
    settle(slot)
    sizes = tuple(size for _, size in parts.mesh)
    order = mesh_order(slot) or range(int(np.prod(sizes)))
    rows = [slot.get(slot.type, ordinal) for ordinal in order]
    return [
        np.stack([np.asarray(row[k]) for row in rows]).view(kind.stored).reshape(*sizes, *shape)
        for k, (kind, shape) in enumerate(zip(parts.structure.kinds, parts.shapes, strict=True))
    ]


def read_stored(slot: Any) -> tuple[int, list[Any]]:
    """The state as fresh arrays, as the store keeps them, whatever its type; and that type.

    A state per device is read as one if it is the same everywhere, else with mesh axes in front.
    """
    type_id = slot.type
    parts = type_parts(type_id)
    kinds = parts.structure.kinds
    if parts.mesh:
        type_id = parts.structure.type_id(parts.shapes, parts.levels, ())
        if not slot.reads_as(type_id):
            leaves = [jnp.asarray(x) for x in get_mapped(slot, parts)]
            shapes = tuple(x.shape for x in leaves)
            return parts.structure.type_id(shapes, (), ()), leaves
    avals = [_jax.shaped(s, k.stored) for s, k in zip(parts.shapes, kinds, strict=True)]
    return type_id, run_get(slot, plan_get(slot, type_id, kinds, avals))


def read_all(slot: Any) -> tuple[int, list[Any]]:
    """The same, of the user's dtypes."""
    with _jax.eval_now():
        type_id, leaves = read_stored(slot)
        kinds = type_parts(type_id).structure.kinds
        return type_id, [from_stored(x, k) for x, k in zip(leaves, kinds, strict=True)]


def set(
    slot: Any,
    structure: Any,
    state: Sequence[Any],
    levels: tuple,
    mesh: tuple,
    masks: Sequence[Any] | None = None,
) -> tuple[int, int]:
    """Copies arrays into the store, those elements where the masks, if given, are true.

    Returns the type's number, and the device's ordinal; -1 if they are spread over several.
    """
    if not all(isinstance(x, _jax.Array) for x in state):
        # Under an eager vmap a NumPy argument gets here as it is.
        with _jax.eval_now():
            state = [x if isinstance(x, _jax.Array) else jnp.asarray(np.asarray(x)) for x in state]
    type_id = structure.type_id(tuple(x.shape for x in state), levels, mesh)
    device = _loans.cpu_device(state)
    if device is None:
        _loans.set_spread(slot, type_id, state)
        return type_id, -1
    ordinal = _jax.device_ordinal(device)
    run_set(slot, type_id, ordinal, state, masks)
    return type_id, ordinal


def run_set(
    slot: Any, type_id: int, ordinal: int, state: Sequence[Any], masks: Sequence[Any] | None = None
) -> None:
    """The same, of arrays as the store keeps them."""
    settle(slot)
    addresses = [_address(x) for x in state]
    if masks is None:
        done = slot.set(type_id, ordinal, addresses)
    else:
        done = slot.set_masked(type_id, ordinal, [_address(m) for m in masks], addresses)
    if not done and not _loans.write(slot, type_id, state, masks):
        run_set(slot, type_id, ordinal, state, masks)  # it was lent a moment ago


def _address(x: Any) -> int:
    return _jax.buffer_address(x.block_until_ready())
