"""What the maker of a program knows at some point of it."""

import dataclasses

from .syntax import Slot

NONE: frozenset[str] = frozenset()


def union(sets) -> frozenset[str]:
    return NONE.union(*sets)


@dataclasses.dataclass(frozen=True)
class Variable:
    """What is known of a variable, or of an expression."""

    name: str = ""
    vector: bool = False
    lanes: frozenset[str] = NONE  # vmaps between whose lanes it may differ
    active: frozenset[str] = NONE  # derivatives that it may take part in

    def but(self, **changes):
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a statement may use."""

    variables: tuple[Variable, ...]
    slots: tuple[Slot, ...]
    vmaps: tuple[tuple[str, int], ...] = ()
    bound: tuple[tuple[str, str], ...] = ()  # (slot, vmap), outermost first
    parted: frozenset[str] = NONE  # vmaps of which only some lanes may be here
    locked: frozenset[str] = NONE  # slots that another branch uses
    forward: frozenset[str] = NONE  # derivatives being taken
    backward: frozenset[str] = NONE
    # Inside custom_jvp and custom_vjp JAX takes all arguments for differentiated if any is.
    all_active: bool = False
    in_jvp_rule: bool = False

    @property
    def lanes(self):
        return frozenset(name for name, _ in self.vmaps)

    def bound_to(self, slot: Slot):
        return frozenset(v for s, v in self.bound if s == slot.name)

    def usable(self, lanes=None):
        """Slots that can be used here, with parts for lanes of no other than these vmaps."""
        return [
            s
            for s in self.slots
            if len(self.bound_to(s)) == len(s.levels)
            and s.name not in self.locked
            and (lanes is None or self.bound_to(s) <= lanes)
        ]

    def waiting(self):
        """Slots that need more vmaps, and the number of lanes of the next one."""
        bound = {s.name: len(self.bound_to(s)) for s in self.slots}
        return {
            s.name: s.levels[bound[s.name]].size
            for s in self.slots
            if bound[s.name] < len(s.levels) and s.name not in self.locked
        }

    def but(self, **changes):
        return dataclasses.replace(self, **changes)

    def plus(self, *variables):
        return self.but(variables=(*variables, *self.variables))

    def without(self, derivatives):
        """Only the variables that take no part in these derivatives."""
        return self.but(variables=tuple(v for v in self.variables if not v.active & derivatives))

    def custom(self, how):
        """Inside custom_jvp or custom_vjp."""
        jvp = how.startswith("custom_jvp")
        inner = self if jvp else self.without(self.forward)
        active = union(v.active for v in inner.variables)
        variables = tuple(v.but(active=active) for v in inner.variables)
        return inner.but(
            variables=variables,
            all_active=self.all_active or bool(active),
            in_jvp_rule=self.in_jvp_rule or jvp,
        )

    def has_checkpointed_loops(self):
        """Equinox's have no derivative in forward mode, and no second one."""
        return not (self.forward or self.in_jvp_rule or len(self.backward) > 1)
