"""storax.jit: `jax.jit` for functions with state."""

import functools
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from . import _core, _hoist, _jax, _store
from ._aot import Traced
from ._install import install
from ._packed import NeedsPureError
from ._specialise import Specialised, is_array

__all__ = ["jit"]

# How XLA's errors start. JAX's C++ dispatch raises them as ValueError.
_XLA_ERROR = re.compile(
    "(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|"
    "RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|"
    "DATA_LOSS|UNAUTHENTICATED): "
)

_core.set_jax(*_jax.call_path())


def jit(
    fun: Callable[..., Any] | None = None,
    *,
    pack: bool | None = None,
    donate: bool = True,
    **options: Any,
) -> Any:
    """Compiles a function with state; faster than threading the state through it by hand.

    It gives what `jax.jit` of the same function gives, errors included. But the gets and sets in
    it become values of the compiled program, carried through its control flow: small states are
    loaded by one call and stored by one, large ones are updated in place. Under another
    transformation (`jax.grad`, `jax.vmap`, an outer `jax.jit`) it leaves the operations to that one.

    **Arguments:**

    - `fun`: the function. Leaves of its arguments that are not arrays (strings, functions, Python
      numbers, ...) are static, as in `equinox.filter_jit`: they must be hashable, and another value
      is compiled anew. So `equinox.Module`s can be passed, and methods wrapped. It may return
      anything. Without it, `jit` is a decorator: `@storax.jit(donate_argnums=0)`.
    - `pack`: if `False`, compiles to the pure form: without custom calls, each state an argument and
      a result. Programs over several devices take that form by themselves; it can be exported, and
      found in JAX's persistent compilation cache. If `True`, never takes it.
    - `donate`: if `False`, a large state is not updated in place. That takes time and memory, and the
      state outlives a program that fails.
    - `options`: what `jax.jit` takes: `static_argnums`, `static_argnames`, `donate_argnums`,
      `donate_argnames`, `in_shardings`, `out_shardings`, `keep_unused`, `inline`,
      `compiler_options`, ...

    **Returns:** a function with the methods `lower`, `trace`, `eval_shape` and `clear_cache` of those
    that `jax.jit` returns.

    **Raises:** (when called)

    - what `get_state` and `set_state` raise. If a call fails, no small state has changed. A large one
      that was updated in place is lost if the program failed while it ran; the error names it.
    - `TypeError` if a leaf that is not an array can't be hashed.
    """
    if fun is None:
        return functools.partial(jit, pack=pack, donate=donate, **options)
    if not callable(fun):
        raise TypeError(f"storax.jit: the first argument must be callable, not {fun!r}.")
    return Jitted(fun, pack, donate, options)


class Jitted(_core.Dispatcher):
    """What `storax.jit` returns."""

    # Not in `__dict__`, which `functools.wraps` copies to whatever wraps this.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_clearing",
        "_donated",
        "_form",
        "_fun",
        "_given",
        "_options",
        "_specialised",
        "_static_argnames",
        "_static_argnums",
    )

    def __init__(self, fun: Callable[..., Any], pack: bool | None, donate: bool, options: dict):
        install()
        for name, flag in (("pack", pack), ("donate", donate)):
            if not isinstance(flag, bool) and (name, flag) != ("pack", None):
                raise TypeError(f"storax.jit: `{name}` must be a bool, not {flag!r}.")
        jax.jit(fun, **options)  # whatever is wrong with the options is raised here
        self._given = options
        options = dict(options)
        static = [options.pop(f"static_{kind}", None) for kind in ("argnums", "argnames")]
        donated = [options.pop(f"donate_{kind}", None) for kind in ("argnums", "argnames")]
        argnums, argnames = _jax.infer_static(fun, *static)
        super().__init__((_hoist.NotHoistableError, NeedsPureError), list(argnums), tuple(argnames))
        self._static_argnums, self._static_argnames = argnums, argnames
        self._donated = _jax.infer_static(fun, *donated)
        self._fun = fun
        self._options = options
        self._form = {"pack": pack, "donate": donate}
        self._specialised: dict[Any, Specialised] = {}
        self._clearing = threading.RLock()
        functools.update_wrapper(self, fun)

    def __repr__(self) -> str:
        return f"<storax.jit of {self._fun!r}>"

    def __reduce__(self) -> Any:
        return _rebuild, (self._fun, self._form, self._given)

    # --- Calls ---

    def specialise(self, args: tuple, kwargs: dict) -> tuple[Any, Specialised, list[Any]]:
        """The key of a call's static part, what is specialised to it, and the arrays."""
        key, arrays, statics, treedef, whole = self._analyse(args, kwargs)  # type: ignore[attr-defined]
        try:
            made = self._specialised.get(key)
        except TypeError:
            self._raise_not_hashable(args, kwargs)
        if made is None:
            call = functools.partial(_call, self._fun, treedef, statics, whole)
            names, options = self._names(args, kwargs), self._flat_options(args, kwargs)
            made = Specialised(call, self._fun, names, options, **self._form)
            made = self._specialised.setdefault(key, made)
        return key, made, arrays

    @_jax.api_boundary
    def _call_cold(self, args: tuple, kwargs: dict) -> Any:
        if _store.forked:
            _store.check_process()
        made = self._specialised
        key, specialised, arrays = self.specialise(args, kwargs)
        if not _jax.no_trace() or jax.config.jax_disable_jit:
            return specialised.plain(*arrays)

        def publish(program):
            with self._clearing:
                if self._specialised is made:  # in which it is, and lives as long
                    self._add(key, program)  # type: ignore[attr-defined]

        try:
            return specialised.run(arrays, publish)
        except (RuntimeError, ValueError) as error:
            self._call_failed(error)

    def _call_failed(self, error: BaseException) -> NoReturn:
        """Raises the error; and says so where it cost a state."""
        message = str(error)
        lost = sorted({name for s in self._specialised.values() for name in s.lost()})
        if lost:
            raise RuntimeError(
                f"A program of storax.jit failed, and the state that it was updating in place is lost: "
                f"{', '.join(lost)}. Set it again. `storax.jit(..., donate=False)` works on a copy, so "
                f"that the state outlives a failure.\n{message}"
            ) from error
        if type(error) is ValueError and _XLA_ERROR.match(message):
            raise jax.errors.JaxRuntimeError(message) from error  # as JAX's Python dispatch does
        if type(error) is ValueError and message.startswith("Received incompatible devices"):
            raise RuntimeError(
                "storax.jit: a state that the program works on in place lives on another device than "
                "its arguments. A state lives where it was first set: run the program there, or use one "
                f"StateIndex per device.\n{message}"
            ) from error
        raise error

    def _raise_not_hashable(self, args: tuple, kwargs: dict) -> NoReturn:
        positions = set(self._static_positions(len(args)))
        for at, value in (*enumerate(args), *kwargs.items()):
            name = f"argument {at}" if isinstance(at, int) else f"the argument `{at}`"
            if at in positions or at in self._static_argnames:
                _check_hashable(value, f"{name} is static, and")
                continue
            for path, leaf in jax.tree_util.tree_leaves_with_path(value):
                if not is_array(leaf):
                    where = jax.tree_util.keystr(path)
                    part = f"{where} of {name}" if where else name
                    _check_hashable(leaf, f"{part} is not an array, and so static, and")
        raise TypeError("storax.jit: the structure of an argument can't be hashed.")

    # --- Options of arguments as options of their arrays ---

    def _names(self, args: tuple, kwargs: dict) -> list[str]:
        """What the arrays among the arguments' leaves are called in the function."""
        names = [f"args[{i}]" for i in range(len(args))]
        try:
            parameters = list(inspect.signature(self._fun).parameters.values())
        except (ValueError, TypeError):
            parameters = []
        for i, p in enumerate(parameters[: len(args)]):
            if p.kind is inspect.Parameter.VAR_POSITIONAL:
                names[i:] = [f"{p.name}[{k}]" for k in range(len(args) - i)]
                break
            names[i] = p.name
        static = {*self._static_positions(len(args))}
        given = [
            (n, x) for i, (n, x) in enumerate(zip(names, args, strict=True)) if i not in static
        ]
        given += sorted((n, x) for n, x in kwargs.items() if n not in self._static_argnames)
        return [
            name + jax.tree_util.keystr(path)
            for name, value in given
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if is_array(leaf)
        ]

    def _flat_options(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        static = set(self._static_positions(len(args)))
        kept = [None if i in static else x for i, x in enumerate(args)]
        options = dict(self._options)
        nums = {i % len(args) for i in self._donated[0] if -len(args) <= i < len(args)}
        names = self._donated[1]
        marks = [
            *(jax.tree.map(lambda _, i=i: i in nums, x) for i, x in enumerate(kept)),
            {k: jax.tree.map(lambda _, k=k: k in names, x) for k, x in kwargs.items()},
        ]
        leaves = jax.tree.leaves((kept, kwargs))
        flat_marks = jax.tree.leaves(marks)
        donated = [m for m, x in zip(flat_marks, leaves, strict=True) if is_array(x)]
        if any(donated):
            options["donate_argnums"] = tuple(i for i, m in enumerate(donated) if m)
        if options.get("in_shardings") is not None:
            is_spec = lambda s: (
                s is None or isinstance(s, (jax.sharding.Sharding, jax.sharding.PartitionSpec))
            )
            spread = jax.tree.map(
                lambda s, sub: [s] * len([x for x in jax.tree.leaves(sub) if is_array(x)]),
                self._options["in_shardings"],
                tuple(x for i, x in enumerate(kept) if i not in static),
                is_leaf=is_spec,
            )
            options["in_shardings"] = tuple(jax.tree.leaves(spread, is_leaf=is_spec))
        return options

    def _static_positions(self, n: int) -> list[int]:
        return [i % n for i in self._static_argnums if -n <= i < n]

    # --- What else jax.jit has ---

    @_jax.api_boundary
    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Traces the function for arguments, or `jax.ShapeDtypeStruct`s in their place."""
        return Traced(self, *_with_shapes(self, args, kwargs))

    @_jax.api_boundary
    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Traces and lowers the function for arguments, or `jax.ShapeDtypeStruct`s in their place."""
        return self.trace(*args, **kwargs).lower()

    @_jax.api_boundary
    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes and dtypes of what it would return. No state is touched."""
        return self.trace(*args, **kwargs).out_info

    def clear_cache(self) -> None:
        """Forgets all compiled programs."""
        # What goes with them, of the user's, may come back to this function.
        with self._clearing:
            before, self._specialised = self._specialised, {}
            self._clear()  # type: ignore[attr-defined]
        before.clear()


def _check_hashable(value: Any, what: str) -> None:
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"storax.jit: {what} can't be hashed: {value!r}. Pass arrays (`jnp.asarray`), or a PyTree of "
            "them, as arguments that are not static; make others hashable, as a tuple is."
        ) from None


def _rebuild(fun: Any, form: dict, options: dict) -> Jitted:
    return Jitted(fun, form["pack"], form["donate"], options)


def _call(fun: Any, treedef: Any, statics: Sequence[Any], whole: Any, arrays: Sequence[Any]) -> Any:
    """The user's function, of the arrays among its arguments' leaves."""
    given = iter(arrays)
    args, kwargs = treedef.unflatten([next(given) if x is None else x for x in statics])
    args = list(args)
    for at, value in whole:
        if isinstance(at, str):
            kwargs[at] = value
        else:
            args[at] = value
    return fun(*args, **kwargs)


def _with_shapes(jitted: Jitted, args: tuple, kwargs: dict) -> tuple[Any, Specialised, list[Any]]:
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    shapes = [x for x in jax.tree.leaves((args, kwargs)) if is_shape(x) or is_array(x)]
    args, kwargs = jax.tree.map(lambda x: np.zeros(()) if is_shape(x) else x, (args, kwargs))
    key, specialised, arrays = jitted.specialise(args, kwargs)
    return key, specialised, shapes if len(shapes) == len(arrays) else arrays
