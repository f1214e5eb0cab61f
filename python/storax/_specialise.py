"""One function of storax.jit, specialised to one structure of its arguments and their static leaves.

It is traced once for each set of abstract values. Where all state that a trace uses is there, and of
the right type, the program is hoisted: its operations become values (`_hoist`), small states are
loaded by one call and stored by one (`_packed`), large ones are lent to it (`_loans`). In the pure
form, which programs over several devices take, all are lent. Anything else runs as `jax.jit` runs it.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import _core, _hoist, _jax, _loans, _packed, _placement, _store
from ._hoist import NotHoistableError
from ._index import any_of_slots, slots_made
from ._lowering import needs_hoisting
from ._packed import NeedsPureError
from ._placement import Placement
from ._slot import type_parts

__all__ = ["Specialised"]


def is_array(x: Any) -> bool:
    return isinstance(x, _jax.ARRAYS)


def _as_arrays(result: Any) -> Any:
    """A result that a compiled program can return; `_core.restore` is the way back."""
    leaves, treedef = jax.tree.flatten(result)
    if all(map(is_array, leaves)):
        return result
    template = _core.Template(treedef, [None if is_array(x) else x for x in leaves])
    return {template: tuple(x for x in leaves if is_array(x))}


def _alive(this: "weakref.ref[Specialised]") -> "Specialised":
    specialised = this()
    assert specialised is not None  # whoever traces has it
    return specialised


@dataclasses.dataclass
class Trace:
    """What is known of the program for one set of abstract values."""

    uses: dict[int, _hoist.Use] | NotHoistableError
    jaxpr: Any  # until it is compiled
    out_tree: Any


class Specialised:
    def __init__(
        self,
        call: Callable[..., Any],
        user: Callable[..., Any],
        names: Sequence[str],
        options: dict[str, Any],
        **form: Any,
    ):
        """`call(arrays)` is the user's function, in which these have names. `form`: pack, donate."""
        self._call = call
        self._in_the_name = functools.partial(_jax.in_the_name_of, user, names)
        self._name = getattr(user, "__name__", type(user).__name__)
        self._options = options
        self._pure = form["pack"] is False
        self._packed_only = form["pack"] is True
        self._donate = form["donate"]
        # What is compiled must not hold this, which holds it.
        self._this = weakref.ref(self)
        self._forget()

    def _forget(self) -> None:
        this = self._this
        self._traces: dict[Any, Trace] = {}
        self._compiled: dict[tuple[Any, ...], Any] = {}  # by Placement.key
        self._program: Any = None  # what the call path runs
        self._returns_new_indices = False
        self._plain = self._jit(lambda *arrays: _alive(this)._returning_arrays(*arrays))

    def plain(self, *arrays: Any) -> Any:
        """The call as `jax.jit` does it, or a transformation that is at work around it."""
        result = _core.restore(self._plain(*arrays))
        if self._returns_new_indices:
            self._forget()
        return result

    # --- Tracing ---

    def _returning_arrays(self, *arrays: Any) -> Any:
        with slots_made() as made:
            result = self._call(arrays)
        if made and any_of_slots(result, made):
            # The next call is to make others, and so is traced anew.
            self._returns_new_indices = True
        return _as_arrays(result)

    def _jit(self, f: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
        def named(*args):
            return f(*args)

        named.__name__ = named.__qualname__ = self._name  # for HLO and profiles
        self._in_the_name(named)
        return jax.jit(named, **{**self._options, **changes})

    def trace(self, arrays: Sequence[Any], with_jaxpr: bool) -> Trace:
        key = _jax.configuration(), *(jax.typeof(x) for x in arrays)
        trace = self._traces.get(key)
        if trace is not None and (trace.jaxpr is not None or not with_jaxpr):
            return trace
        out_tree = None

        def flat(*arrays):
            nonlocal out_tree
            leaves, out_tree = jax.tree.flatten(self._returning_arrays(*arrays))
            return leaves

        self._in_the_name(flat)
        jaxpr = jax.make_jaxpr(flat)(*arrays)
        uses: Any
        try:
            uses = _hoist.uses(jaxpr)
        except NotHoistableError as e:
            uses = e
        trace = self._traces[key] = Trace(uses, jaxpr, out_tree)
        return trace

    # --- Placing ---

    def place(self, trace: Trace) -> Placement:
        """Where the states are, or are to be. Raises `NotHoistableError`."""
        if isinstance(trace.uses, NotHoistableError):
            raise trace.uses
        self._pure = self._pure or _placement.any_spread(trace.uses)
        return _placement.place(trace.uses, self._pure)

    # --- The hoisted function ---

    def compiled(self, placement: Placement) -> Any:
        made = self._compiled.get(placement.key)
        if made is None:
            made = self._compiled.setdefault(placement.key, self._make(placement))
        return made

    def _make(self, placement: Placement) -> Callable[..., Any]:
        this = self._this

        def hoisted(*args):
            lent: dict[int, Any] = {}
            arrays: Sequence[Any] = args
            if placement.takes_states:
                donated, others, *arrays = args
                lent.update(zip(placement.donated, donated, strict=True))
                lent.update(zip((*placement.kept, *placement.read), others, strict=True))
            return _alive(this)._hoisted(placement, lent, arrays)

        shift = 2 if placement.takes_states else 0
        changes: dict[str, Any] = {}
        donated = [i + shift for i in self._options.get("donate_argnums", ())]
        if placement.donated and self._donate:
            donated.append(0)
            changes["keep_unused"] = True  # a state that is not read is still worked on in place
        changes["donate_argnums"] = tuple(donated)
        if "in_shardings" in self._options and shift:
            changes["in_shardings"] = (None, None, *self._options["in_shardings"])
        out = self._options.get("out_shardings")
        if placement.returns_states and (
            out is not None or any(s is not None for s in placement.shardings)
        ):
            states = [*placement.shardings, *[None] * len(placement.born)]
            changes["out_shardings"] = (tuple(states), out)
        return self._jit(hoisted, **changes)

    def _hoisted(self, placement: Placement, lent: dict[int, Any], arrays: Sequence[Any]) -> Any:
        if jax.config.jax_disable_jit:
            raise NotHoistableError("jit is disabled")
        jaxpr = None
        while jaxpr is None:  # another thread may have taken it
            trace = self.trace(arrays, with_jaxpr=True)
            jaxpr = trace.jaxpr
        now, uses = self.place(trace), trace.uses
        if isinstance(uses, NotHoistableError) or now.key != placement.key:
            raise NotHoistableError("storax: other states than those of the program.")
        trace.jaxpr = None
        state = {slot_id: list(leaves) for slot_id, leaves in lent.items()}
        others: list[Any] = []
        if now.loaded:
            ticket, states = _packed.load(now.loaded)
            state.update(states)
            others.append(ticket)
        for slot_id, _ in now.stored:
            if not uses[slot_id].is_always_set:
                state[_hoist.flag_of(slot_id)] = [np.array(False)]
        outs = _hoist.run(jaxpr, dict(now.types), state, arrays, others)
        if now.stored:
            effects = tuple(e for e in jaxpr.effects if _jax.is_ordered(e) and e != _jax.STATE)
            _packed.store(now.stored, others, state, effects)
        result = jax.tree.unflatten(trace.out_tree, outs)
        if not placement.returns_states:
            return result
        written = (*placement.changed, *placement.born)
        return tuple(tuple(state[s]) for s in written), result

    # --- Running ---

    def run(self, arrays: Sequence[Any], publish: Callable[[Any], None]) -> Any:
        """A call that the call path doesn't know how to do; `publish` tells it, for the next one."""
        if any(len(x.sharding.device_set) > 1 for x in arrays if isinstance(x, jax.Array)):
            self.make_pure()
        while True:
            trace = self.trace(arrays, with_jaxpr=False)
            jaxpr = trace.jaxpr
            try:
                placement = self.place(trace)
            except NotHoistableError as reason:
                return self._run_plain(reason, arrays)
            call = self.compiled(placement)
            try:
                with _core.LoanLock([_core.share_slot(s) for s in placement.lent]):
                    borrowed = self._lend(placement, arrays)
                    if borrowed is None:
                        continue  # placed anew: something has changed
                    result, settled = self.execute(call, placement, borrowed, arrays)
                    if self._returns_new_indices:
                        self._forget()
                    elif settled:
                        self._publish(call, placement, publish)
                return result
            except NeedsPureError:
                trace.jaxpr = jaxpr
                self.make_pure()
            except NotHoistableError:
                continue

    def _run_plain(self, reason: NotHoistableError, arrays: Sequence[Any]) -> Any:
        if self._program is not None:
            self._program.set_ready(-1)
        try:
            return self.plain(*arrays)
        except NotImplementedError as error:
            if needs_hoisting(error):
                raise reason.as_error() from None
            raise

    def _publish(self, call: Any, placement: Placement, publish: Callable[[Any], None]) -> None:
        groups = placement.donated, placement.kept, placement.read
        lent = ([_core.share_slot(s) for s in slots] for slots in groups)
        self._program = _core.Program(call, *lent)
        self._program.set_ready(_core.layout_epoch())
        publish(self._program)

    def _lend(self, placement: Placement, arrays: Sequence[Any]) -> dict[int, Any] | None:
        """Lends what is to be lent. Comes back with copies of what has to stay where it is."""
        borrowed: dict[int, Any] = {}
        spread = self._spread_like(arrays)
        for slot_id in placement.lent:
            slot = _core.share_slot(slot_id)
            if _core.loan(slot) is not None:
                continue
            if slot.is_pinned:
                leaves = _store.read_stored(slot)[1]
                borrowed[slot_id] = (
                    [jax.device_put(x, spread) for x in leaves] if spread else leaves
                )
            elif not _loans.lend(slot, spread):
                return None
        return borrowed

    def _spread_like(self, arrays: Sequence[Any]) -> Any:
        """How states are to lie beside these arrays: whole, on each device, if there are several."""
        for x in arrays:
            sharding = getattr(x, "sharding", None)
            if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.device_set) > 1:
                return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return None

    def execute(
        self, call: Any, placement: Placement, borrowed: dict[int, Any], arrays: Sequence[Any]
    ) -> tuple[Any, bool]:
        """Runs a program, and whether it may be run again just so. The caller holds the LoanLock."""
        slots = {s: _core.share_slot(s) for s in (*placement.lent, *placement.born)}
        versions = {s: slots[s].version for s in borrowed}

        def leaves(slot_id):
            return tuple(borrowed[slot_id]) if slot_id in borrowed else _core.loan(slots[slot_id])

        states: tuple[Any, ...] = ()
        if placement.takes_states:
            states = (
                tuple(leaves(s) for s in placement.donated),
                tuple(leaves(s) for s in (*placement.kept, *placement.read)),
            )
        working = [slots[s] for s in placement.changed if s not in borrowed]
        for slot in working:
            _core.work(slot, 1)
        try:
            result = call(*states, *arrays)
        finally:
            for slot in working:
                _core.work(slot, -1)
        if not placement.returns_states:
            return _core.restore(result), not borrowed
        new, result = result
        settled = not borrowed and not placement.born
        types = dict(placement.types)
        for slot_id, now in zip((*placement.changed, *placement.born), new, strict=True):
            slot = slots[slot_id]
            before = None if slot_id in placement.born else leaves(slot_id)
            if slot_id in borrowed:
                # What another thread or a callback has set meanwhile stays, if this program may have set
                # nothing.
                jax.block_until_ready(now)
                if slot_id in placement.always or slot.version == versions[slot_id]:
                    _write_back(slot, types[slot_id], now)
            elif before is not None and [x.sharding for x in now] == [x.sharding for x in before]:
                _core.replace_loan(slot, now)
            elif slot_id in placement.born and slot.has_memory:  # something else has set it by now
                _write_back(slot, types[slot_id], now)
                settled = False
            else:
                _loans.lend_arrays(slot, types[slot_id], now)
                settled = False
        return _core.restore(result), settled

    # --- Ahead of time ---

    def prepare(
        self, trace: Trace, arrays: Sequence[Any]
    ) -> tuple[Placement | None, Any, tuple[Any, ...]]:
        """Where a program has its states, the function to be compiled, and states as shapes."""
        try:
            placement = self.place(trace)
        except NotHoistableError:
            return None, self._plain, ()
        if not placement.takes_states:
            return placement, self.compiled(placement), ()
        types, spread = dict(placement.types), self._spread_like(arrays)

        def shapes(slot_id):
            leaves = _core.loan(_core.share_slot(slot_id))
            if leaves is not None:
                return tuple(
                    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves
                )
            parts = type_parts(types[slot_id])
            return tuple(
                jax.ShapeDtypeStruct(s, k.stored, sharding=spread)
                for s, k in zip(parts.shapes, parts.structure.kinds, strict=True)
            )

        others = (*placement.kept, *placement.read)
        states = tuple(tuple(map(shapes, ids)) for ids in (placement.donated, others))
        return placement, self.compiled(placement), states

    def make_pure(self) -> None:
        if self._packed_only:
            raise NotImplementedError(
                "storax.jit(..., pack=True): the program is spread over several devices, or does not "
                "run on the CPU. Leave `pack` out."
            )
        self._pure = True

    def run_compiled(self, call: Any, placement: Placement, arrays: Sequence[Any]) -> Any:
        """Runs what was compiled ahead of time."""
        slots = [_core.share_slot(s) for s in (*placement.lent, *placement.born)]
        types = dict(placement.types)
        while True:
            with _core.LoanLock(slots):
                for slot_id in placement.lent:
                    slot = _core.share_slot(slot_id)
                    if not slot.has_memory and _core.loan(slot) is None:
                        raise RuntimeError(slot.explain_get(types[slot_id], slot.device))
                borrowed = self._lend(placement, arrays)
                if borrowed is not None:
                    return self.execute(call, placement, borrowed, arrays)[0]

    # --- Failures ---

    def lost(self) -> list[str]:
        """The names of the slots whose state a failed program has taken with it."""
        names = []
        for slot_id in {s for donated, kept, *_ in self._compiled for s in (*donated, *kept)}:
            try:
                slot = _core.share_slot(slot_id)
            except RuntimeError:
                continue
            with _core.LoanLock([slot]):
                leaves = _core.loan(slot)
                if leaves is not None and not all(_is_usable(x) for x in leaves):
                    slot.lose()
                    names.append(slot.name)
        return sorted(names)


def _is_usable(x: Any) -> bool:
    if x.is_deleted():
        return False
    try:
        x.block_until_ready()
    except RuntimeError:
        return False
    return True


def _write_back(slot: Any, type_id: int, leaves: Sequence[Any]) -> None:
    device = _jax.local_device(slot.device)
    here = [jax.device_put(x, device) for x in leaves]
    _store.run_set(slot, type_id, slot.device, here)
