"""
storax's engine: slots, their types, and XLA FFI handlers. Not for direct use.
"""

from collections.abc import Callable, Sequence

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

    def get(self, type: int, device: int) -> list:
        """
        Each leaf's bytes in fresh memory. RuntimeError if the slot holds another type.
        """

    def set(self, type: int, device: int, addresses: Sequence[int]) -> None:
        """
        Copies the leaves at these addresses in. RuntimeError if the slot holds another type.
        """

    def set_masked(
        self, type: int, device: int, mask_addresses: Sequence[int], addresses: Sequence[int]
    ) -> None:
        """Like set, where the masks are true."""

    def watch(self, capacity: int) -> None:
        """Keeps the next `capacity` events."""

    def events(self) -> list:
        """(kind, version, first bytes of the first leaf) per event."""

def create_slot(name: str) -> Slot: ...
def share_slot(id: int) -> Slot:
    """The live slot of that id. KeyError if it is gone."""

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
def share_type() -> dict: ...
