"""States that lie in JAX arrays, where programs of `storax.jit` work on them in place.

A state is in the store's memory at first. A large one is lent to the programs that use it, as are all
states of programs over several devices: it then is a tuple of arrays, which a program takes, donated,
and gives back. Whatever else wants the state reads those arrays, replaces them, or calls them back
into the store's memory.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _core, _jax
from ._slot import laid_out_as, type_parts

__all__ = ["LARGE", "lend", "lend_arrays", "read", "recall", "write"]

# From so many bytes on a donated buffer costs a call less than two copies.
LARGE = 1 << 15


def _copy(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Of no weak type: a state has none."""
    return tuple(jnp.array(x, x.dtype) if x.weak_type else jnp.copy(x) for x in leaves)


def is_on_one_device(leaves: Sequence[Any]) -> bool:
    return all(len(x.sharding.device_set) == 1 for x in leaves)


def cpu_device(leaves: Sequence[Any]) -> Any:
    """The CPU device that arrays lie on; None if they are spread over several, or on no such one."""
    devices = {d for x in leaves for d in x.sharding.device_set} or {jax.local_devices()[0]}
    if len(devices) > 1:
        return None
    (device,) = devices
    return device if device.platform == "cpu" else None


def _home(leaves: Sequence[Any]) -> int:
    """The ordinal of that device, or -1."""
    device = cpu_device(leaves)
    return -1 if device is None else _jax.device_ordinal(device)


def lend_arrays(slot: Any, type_id: int, leaves: Sequence[Any], version: int = -1) -> bool:
    """Makes arrays that nobody else has the state. The caller holds the LoanLock.

    With a version, only if the state is still that one.
    """
    return _core.lend(slot, _home(leaves), type_id, tuple(leaves), version)


@functools.cache
def _make_empty(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def lend(slot: Any, sharding: Any = None) -> bool:
    """Lends a state that is in the store's memory. The caller holds the LoanLock.

    By default its arrays stay on the state's device.
    False if the state has just changed, or has to stay in place.
    """
    if slot.is_pinned or not slot.has_memory:
        return False
    parts = type_parts(slot.type)
    version, ordinal = slot.version, slot.device
    device = _jax.local_device(ordinal)
    one = jax.sharding.SingleDeviceSharding(device) if _jax.is_committed(device) else None
    with _jax.eval_off_mesh():
        # Programs write in these in place: they must be XLA's own, and nobody else's.
        leaves = [
            _make_empty(shape, kind.stored, one)()
            for shape, kind in zip(parts.shapes, parts.structure.kinds, strict=True)
        ]
        addresses = [_jax.buffer_address(x.block_until_ready()) for x in leaves]
        slot.copy_out(slot.type, ordinal, addresses)
        if sharding is not None:
            leaves = [jax.device_put(x, sharding) for x in leaves]
    return not slot.is_pinned and lend_arrays(slot, slot.type, leaves, version)


def read(slot: Any, type_id: int) -> list[Any] | None:
    """A copy of a lent state, laid out as this type; None if it is not lent."""
    with _core.LoanLock([slot]), _jax.eval_off_mesh():
        leaves = _core.loan(slot)
        if leaves is None:
            return None
        found = laid_out_as(type_id, slot.type, leaves)
        if found is None:
            raise RuntimeError(slot.explain_get(type_id, slot.device))
        try:
            copies = list(_copy(found))
            jax.block_until_ready(copies)
        except RuntimeError:
            slot.lose()
            raise RuntimeError(slot.explain_get(type_id, slot.device)) from None
        _core.count_lent_get(slot)
        return copies


def write(slot: Any, type_id: int, leaves: Sequence[Any], masks: Sequence[Any] | None) -> bool:
    """Replaces a lent state, where the masks are true if there are any. False if it is not lent."""
    with _core.LoanLock([slot]), _jax.eval_off_mesh():
        old = _core.loan(slot)
        if old is None:
            return False
        if masks is not None:
            kinds = type_parts(type_id).structure.kinds
            before = laid_out_as(type_id, slot.type, old)
            if before is None:
                raise RuntimeError(slot.explain_set(type_id, slot.device))
            leaves = [
                jnp.where(m.reshape(*m.shape, *[1] * len(k.trailing)), x, o)
                for m, x, o, k in zip(masks, leaves, before, kinds, strict=True)
            ]
        new = laid_out_as(slot.type, type_id, leaves)
        if new is None or (slot.device >= 0 and _home(new) != slot.device):
            raise RuntimeError(slot.explain_set(type_id, _home(leaves)))
        if is_on_one_device(new) and not (new and all(x.committed for x in new)):
            new = [jax.device_put(x, o.sharding) for x, o in zip(new, old, strict=True)]
        copies = _copy(new)
        if [x.sharding for x in copies] == [x.sharding for x in old]:
            _core.replace_loan(slot, copies)
        else:
            lend_arrays(slot, slot.type, copies)
        return True


def set_spread(slot: Any, type_id: int, leaves: Sequence[Any]) -> None:
    """Makes arrays that are spread over several devices, or not on a CPU, the state."""
    with _core.LoanLock([slot]), _jax.eval_off_mesh():
        if slot.is_pinned:
            raise NotImplementedError(
                f"storax.set_state of {slot.name}: the arrays lie on several devices, or not on a CPU, "
                "and programs of plain `jax.jit` use this state, which keeps it on one CPU device. Use "
                "`storax.jit` in their place, or move the arrays there with `jax.device_put`."
            )
        new = list(leaves)
        if slot.type:
            found = laid_out_as(slot.type, type_id, leaves)
            if found is None:
                raise RuntimeError(slot.explain_set(type_id, slot.device))
            new, type_id = found, slot.type
        lend_arrays(slot, type_id, _copy(new))


def recall(slots: Sequence[Any], op: str) -> None:
    """Brings states back into the store's memory, for programs that need them in place."""
    with _core.LoanLock(slots), _jax.eval_off_mesh():
        for slot in slots:
            if (leaves := _core.loan(slot)) is not None:
                _end_loan(slot, leaves, op)


def _end_loan(slot: Any, leaves: Sequence[Any], op: str) -> None:
    if slot.device < 0:
        raise NotImplementedError(
            f"storax.{op} of {slot.name}: its state is spread over several devices, or not on a "
            "CPU, as `storax.jit` keeps it. Use `storax.jit` for this program too; get and set it outside "
            "of a `shard_map` or `pmap`, in which each device would have a state of its own."
        )
    try:
        addresses = [_jax.buffer_address(x.block_until_ready()) for x in leaves]
    except RuntimeError:
        slot.lose()
        return
    slot.reclaim(addresses)
