"""
storax's engine: slots, their types, and XLA FFI handlers. Not for direct use.
"""

from collections.abc import Callable, Sequence
from typing import Any

class Bytes:
    """Memory, as a buffer."""

class Slot:
    """A share in the life of one slot."""

    @property
    def id(self) -> int:
        """What programs name the slot by."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> int:
        """The type's id; 0 until the first set."""

    @property
    def device(self) -> int:
        """
        The device's ordinal; -1 until the first set, or if mapped over a mesh.
        """

    @property
    def devices(self) -> list[int]: ...
    @property
    def version(self) -> int:
        """Grows with every set."""

    @property
    def mesh_order(self) -> int:
        """
        In which order its devices stand in their mesh: a number of the caller's, 0 if unknown.
        """

    @mesh_order.setter
    def mesh_order(self, arg: int, /) -> None: ...
    @property
    def num_gets(self) -> int: ...
    @property
    def num_sets(self) -> int: ...
    @property
    def num_programs(self) -> int:
        """How many operations in compiled programs name the slot."""

    def rests_at(self, version: int) -> bool:
        """
        Whether the state is of this version, no compiled program names the slot, and no failure is to be raised.
        """

    def accepts(self, type: int) -> bool:
        """Whether an operation of this type would agree with the state."""

    def reads_as(self, type: int) -> bool:
        """
        Whether a get of this type, outside of any mapped program, would succeed.
        """

    def get(self, type: int, device: int) -> object:
        """
        Each leaf's bytes in fresh memory; None if the state is lent out. RuntimeError if the slot holds another type.
        """

    def set(self, type: int, device: int, addresses: Sequence[int]) -> bool:
        """
        Copies the leaves at these addresses in; False if the state is lent out. RuntimeError if the slot holds another type.
        """

    def set_masked(
        self, type: int, device: int, mask_addresses: Sequence[int], addresses: Sequence[int]
    ) -> bool:
        """Like set, where the masks are true."""

    @property
    def has_memory(self) -> bool:
        """Whether there is a state, and it is not lent out."""

    @property
    def is_pinned(self) -> bool:
        """
        Whether the state must stay in place, as programs may run operations on it.
        """

    def copy_out(self, type: int, device: int, addresses: Sequence[int]) -> bool:
        """Copies the leaves to these addresses; False if the state is lent out."""

    def explain_get(self, asked: int, device: int) -> str:
        """Why a get of this type fails."""

    def explain_set(self, asked: int, device: int) -> str:
        """Why a set of this type fails."""

    def reclaim(self, addresses: Sequence[int]) -> bool:
        """
        Ends a loan: copies the leaves at these addresses in. False if nothing is lent, or the state is spread over several devices. The caller holds the LoanLock.
        """

    def lose(self) -> None:
        """Ends a loan whose state is lost. The caller holds the LoanLock."""

    def watch(self, capacity: int) -> None:
        """Keeps the next `capacity` events."""

    def events(self) -> list:
        """(kind, version, first bytes of the first leaf) per event."""

def create_slot(name: str) -> Slot: ...
def share_slot(id: int) -> Slot:
    """The live slot of that id. RuntimeError if it is gone."""

def intern_type(
    leaves: Sequence[tuple[str, int, Sequence[int]]],
    structure: int,
    structure_text: str,
    levels: Sequence[tuple[Sequence[int], bool]],
    mesh: Sequence[tuple[str, int]],
) -> int:
    """
    The id of a type. leaves: (dtype, bytes per element, dims); levels: (axis per leaf or -1, moved); mesh: (axis name, size).
    """

class Pin:
    """
    Keeps a slot's state in place, never lent out, for as long as it lives.
    """

    def __init__(self, slot: Slot) -> None: ...

def type_moves(to: int, source: int) -> list[list[int]] | None:
    """
    How to transpose each leaf of a state of type `source` into one of type `to`: its axes, or an empty list if they stay as they are. None if the types do not agree; an empty list if they are the same.
    """

def type_bytes(type: int) -> int: ...
def type_text(type: int) -> str: ...
def record_failure(text: str) -> None: ...
def acknowledge_failure(text: str) -> None:
    """Forgets the recorded failure whose message is part of `text`."""

def pending_failures() -> int: ...
def take_failures() -> list[str]: ...
def usage() -> tuple[int, int, int]:
    """
    (live slots, bytes of their states, operations on them in compiled programs)
    """

def num_programs() -> int: ...
def passes_fence(dispatch: Callable) -> bool:
    """
    Whether a fence has run, on this thread, by the time that `dispatch()` has returned.
    """

def process_nonce() -> int: ...
def handlers() -> dict: ...
def handler_types() -> dict: ...

class IndexAux:
    """The static part of a StateIndex as a PyTree node."""

    def __init__(
        self,
        slot: object,
        slot_id: int,
        held: object | None,
        rows: object | None,
        was: object | None,
        weak: bool,
    ) -> None: ...
    @property
    def slot(self) -> Any: ...
    @property
    def slot_id(self) -> int: ...
    @property
    def held(self) -> Any: ...
    @property
    def rows(self) -> Any: ...
    @property
    def was(self) -> Any: ...
    def __eq__(self, arg: object | None, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

def set_index(
    type: object, on_the_way: Sequence[object], serialise: object, jit_code: object | None
) -> None: ...
def flatten_index(index: object) -> object: ...
def unflatten_index(aux: object | None, children: object | None) -> object: ...
def work(slot: Slot, n: int) -> None:
    """Says that `n` more programs work on the lent state in place."""

class LoanLock:
    """Holds the loan mutexes of slots."""

    def __init__(self, slots: Sequence[object]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

def lend(slot: Slot, device: int, type: int, leaves: tuple, version: int) -> bool:
    """
    Makes these arrays the state; its memory is freed. False if its version is another, and `version` is not -1. The caller holds the LoanLock.
    """

def count_lent_get(slot: Slot) -> None: ...
def loan(slot: Slot) -> tuple | None:
    """The arrays that are the state; None if it is not lent out."""

def replace_loan(slot: Slot, leaves: tuple) -> None:
    """Makes these arrays the lent state instead."""

class Program:
    """A compiled program, and the states that are lent to it."""

    def __init__(
        self,
        call: object,
        donated: Sequence[object],
        kept: Sequence[object],
        read: Sequence[object],
    ) -> None: ...
    def set_ready(self, epoch: int) -> None:
        """
        Says that, at this layout_epoch(), the states are where the program expects them.
        """

class Dispatcher:
    """The call path of storax.jit."""

    def __call__(self, /, *args, **kwargs):
        """Call self as a function."""

    def __get__(self, instance, owner=None, /):
        """Return an attribute of instance, which is of type owner."""

    def __init__(
        self, retry: object, static_argnums: Sequence[int], static_argnames: object
    ) -> None: ...

def layout_epoch() -> int: ...
def set_jax(flatten: object, array: object, arrays: object, ordinary: Sequence[object]) -> None: ...

class Template:
    """A result with leaves that are not arrays."""

    def __init__(self, treedef: object, leaves: list) -> None: ...

def restore(result: object | None) -> object:
    """
    What the user's function returned, if a program returned `result`: an array in the place of each None of the template, if it is `{template: arrays}`.
    """
