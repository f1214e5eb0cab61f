"""`trace`, `lower` and `compile` of functions under storax.jit: JAX's own objects, called as ours."""

from collections.abc import Sequence
from typing import Any

from . import _core
from ._hoist import NotHoistableError
from ._lowering import needs_hoisting
from ._packed import NeedsPureError
from ._placement import Placement
from ._specialise import Specialised

__all__ = ["Compiled", "Lowered", "Traced"]


class _Wrapper:
    """Has what JAX's object has, but for what is defined here."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __repr__(self) -> str:
        return f"storax {self._inner!r}"


class Traced(_Wrapper):
    """A traced function. Of a hoisted one, JAX's object is of a function that takes states first."""

    def __init__(self, jitted: Any, key: Any, specialised: Specialised, arrays: Sequence[Any]):
        trace = specialised.trace(arrays, with_jaxpr=True)
        self._jitted, self._key, self._specialised = jitted, key, specialised
        self._trace, self._user_jaxpr, self._arrays = trace, trace.jaxpr, arrays
        self._placement, self._call, states = specialised.prepare(trace, arrays)
        super().__init__(self._call.trace(*states, *arrays))

    @property
    def jaxpr(self) -> Any:
        """The jaxpr of the function as it is written, with its gets and sets."""
        return self._user_jaxpr

    @property
    def out_info(self) -> Any:
        return _of_user(self._inner.out_info, self._placement)

    def lower(self, **kwargs: Any) -> Any:
        try:
            lowered = self._inner.lower(**kwargs)
        except NeedsPureError:
            self._specialised.make_pure()
            return Traced(self._jitted, self._key, self._specialised, self._arrays).lower(**kwargs)
        except NotImplementedError as error:
            if needs_hoisting(error):
                try:
                    self._specialised.place(self._trace)
                except NotHoistableError as reason:
                    raise reason.as_error() from None
            raise
        return Lowered(lowered, self._jitted, self._key, self._specialised, self._placement)


def _of_user(out_info: Any, placement: Placement | None) -> Any:
    """What is known of the results of the user's function, from what is of the compiled one's."""
    hoisted = placement is not None and placement.returns_states
    return _core.restore(out_info[1] if hoisted else out_info)


class Lowered(_Wrapper):
    def __init__(self, inner: Any, *rest: Any):
        super().__init__(inner)
        self._rest = rest

    @property
    def out_info(self) -> Any:
        return _of_user(self._inner.out_info, self._rest[-1])

    def compile(self, compiler_options: Any = None) -> "Compiled":
        return Compiled(self._inner.compile(compiler_options), *self._rest)


class Compiled(_Wrapper):
    """A compiled function: called with the arguments of the user's, for which it was compiled."""

    def __init__(
        self,
        inner: Any,
        jitted: Any,
        key: Any,
        specialised: Specialised,
        placement: Placement | None,
    ):
        super().__init__(inner)
        self._jitted, self._key = jitted, key
        self._specialised, self._placement = specialised, placement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, _, arrays = self._jitted.specialise(args, kwargs)
        if not (key == self._key):  # of a PyTreeDef and a tuple, JAX says neither == nor !=
            raise TypeError(
                "storax: a compiled function was called with arguments of another structure, or with "
                "other static leaves, than it was compiled for. Call the function that `storax.jit` "
                "returned, or compile it for these."
            )
        if self._placement is None:
            return _core.restore(self._inner(*arrays))
        try:
            return self._specialised.run_compiled(self._inner, self._placement, arrays)
        except (RuntimeError, ValueError) as error:
            self._jitted._call_failed(error)
