"""Where a hoisted program has the states it uses: loaded and stored by one call each, or lent to it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from . import _core, _jax, _loans
from ._hoist import NotHoistableError, Use

__all__ = ["Placement", "any_spread", "place"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a hoisted program has the states it uses. Slots, by number, with their types' numbers."""

    types: tuple[tuple[int, int], ...]
    loaded: tuple[tuple[int, int], ...]
    stored: tuple[tuple[int, int], ...]
    donated: tuple[int, ...]  # lent, and given back: large ones, worked on in place
    kept: tuple[int, ...]  # lent, and another given back: small ones, which outlive a failure so
    read: tuple[int, ...]  # lent, and left alone
    born: tuple[int, ...]  # to be lent: the program makes their first state
    always: frozenset[int]  # of those that are set, those that are whatever happens
    shardings: tuple[Any, ...]  # of the changed ones' leaves, if they are spread over devices

    @property
    def key(self) -> tuple[Any, ...]:
        """What the compiled function depends on: the states that it takes and returns."""
        return self.donated, self.kept, self.read, self.born, self.shardings

    @property
    def changed(self) -> tuple[int, ...]:
        """Those that are lent, and given back."""
        return (*self.donated, *self.kept)

    @property
    def lent(self) -> tuple[int, ...]:
        return (*self.changed, *self.read)

    @property
    def takes_states(self) -> bool:
        return bool(self.lent)

    @property
    def returns_states(self) -> bool:
        return bool(self.changed or self.born)


def place(uses: dict[int, Use], pure: bool) -> Placement:
    """Where the states are, or are to be; all lent if `pure`. Raises `NotHoistableError`."""
    if _jax.debugs_values():
        raise NotHoistableError(
            "storax.jit: under `jax.debug_nans` and `jax.debug_infs`, programs with state run on one "
            "CPU device only."
        )
    types, loaded, stored, read, born = {}, [], [], [], []
    donated: list[int] = []
    kept: list[int] = []
    for slot_id, use in sorted(uses.items()):
        slot = _core.share_slot(slot_id)
        type_id = slot.type or use.types[0]
        for asked, is_get in use.operations:
            if _core.type_moves(asked, type_id) is None:
                raise _mismatch(slot, type_id, asked, is_get)
        leaves = _core.loan(slot)
        is_there = slot.has_memory or leaves is not None
        if use.needs_value and not is_there:
            raise _not_there(slot, *use.operations[0])
        types[slot_id] = type_id
        if pure or _is_large(slot, type_id):
            if not is_there:
                born.append(slot_id)
            elif use.is_set:
                (donated if _is_large(slot, type_id) else kept).append(slot_id)
            else:
                read.append(slot_id)
        else:
            if use.needs_value:
                loaded.append((slot_id, type_id))
            if use.is_set:
                stored.append((slot_id, type_id))
    return Placement(
        tuple(types.items()),
        tuple(loaded),
        tuple(stored),
        tuple(donated),
        tuple(kept),
        tuple(read),
        tuple(born),
        frozenset(s for s, use in uses.items() if use.is_always_set),
        tuple(map(_shardings, (*donated, *kept))),
    )


def any_spread(slots: Iterable[int]) -> bool:
    """Whether the state of any of these slots is spread over devices."""
    return any(_is_spread(_core.share_slot(slot_id)) for slot_id in slots)


def _is_spread(slot: Any) -> bool:
    return slot.device < 0 and _core.loan(slot) is not None


def _shardings(slot_id: int) -> tuple[Any, ...] | None:
    slot = _core.share_slot(slot_id)
    return tuple(x.sharding for x in _core.loan(slot) or ()) if _is_spread(slot) else None


def _is_large(slot: Any, type_id: int) -> bool:
    return not slot.is_pinned and _core.type_bytes(type_id) >= _loans.LARGE


def _mismatch(slot: Any, held: int, asked: int, is_get: bool) -> NotHoistableError:
    if not slot.type:
        texts = " and ".join(map(_core.type_text, (held, asked)))
        return NotHoistableError(
            f"storax: {slot.name} is used as a state of {texts} in one program. Get and set must agree "
            "in dtype, shape, PyTree structure and batch axes.",
            RuntimeError,
        )
    explain = slot.explain_get if is_get else slot.explain_set
    return NotHoistableError(explain(asked, slot.device), RuntimeError)


def _not_there(slot: Any, asked: int, is_get: bool) -> NotHoistableError:
    if slot.type or is_get:
        return NotHoistableError(slot.explain_get(asked, slot.device), RuntimeError)
    return NotHoistableError(
        f"storax.set_state of {slot.name}: this is the first set, and it is in a branch or a loop, or "
        "covers only some lanes or rows. Over several devices, or elsewhere than on a CPU, `storax.jit` "
        "has to know that there is a state: set it before the program, or at its start."
    )
