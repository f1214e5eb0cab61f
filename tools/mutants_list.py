"""The mutants that tools/mutants.py makes of storax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in python/storax
    old: str
    new: str
    tests: str  # those to run first: files of tests/python, without test_ and .py, and options
    since: tuple[int, int] = (0, 10)  # the JAX version that needs what is taken out


def _without(name, file, line, tests, since=(0, 10)):
    return Mutant(f"without {name}", file, line, "", tests, since)


def _never(name, file, condition, tests, also=""):
    """A condition that is never met."""
    keyword = condition.split()[0]
    return Mutant(f"never {name}", file, condition + also, f"{keyword} False:" + also, tests)


MUTANTS = [
    # --- What storax changes in JAX ---
    _without("token in the module", "_jax.py", '    ("jit", _keep_token_in_module),\n', "failures"),
    _without("state kept in scan", "_jax.py", '    ("grad", _keep_state_in_scan),\n', "grad"),
    _without("state kept in while", "_jax.py", '    ("grad", _keep_state_in_while),\n', "grad"),
    _without(
        "delay of the fast path", "_jax.py", '    ("jit", _delay_fast_path),\n', "errors failures"
    ),
    _without(
        "calls kept", "_jax.py", '    ("jit", _compile_with_care),\n', "control_flow", (0, 11)
    ),
    Mutant(
        "a single result is left to XLA",
        "_jax.py",
        "            _keep_single_result(hlo)",
        "            pass",
        "control_flow",
    ),
    Mutant(
        "the token is the executable's",
        "_jax.py",
        "view.ordered_effects = _WithoutState(_effects.ordered_effects)",
        "view.ordered_effects = _effects.ordered_effects",
        "failures",
    ),
    _never("keeps state from leaving a scan", "_jax.py", "if has_state(jaxpr_known):", "grad"),
    Mutant(
        "remat's partial evaluation of a scan moves state",
        "_jax.py",
        "        with _entering(hoisting=True):",
        "        with contextlib.nullcontext():",
        "unused",
    ),
    Mutant(
        "never waits before a mesh",
        "_store.py",
        "    if _runs_alone(kept):\n        _wait_for_devices()",
        "    pass",
        "order",
    ),
    _never("waits after a mesh", "_store.py", "if _runs_alone(kept):", "order", "  # asked"),
    Mutant(
        "fast paths are kept",
        "_store.py",
        "            _jax.forget_fast_paths()",
        "            pass",
        "order",
    ),
    Mutant(
        "never waits for a mesh before it compiles",
        "_store.py",
        "            _finish(token)",
        "            pass",
        "order",
    ),
    Mutant(
        "waits for this thread's mesh only",
        "_store.py",
        "for token in list(_last_tokens.values()):",
        "for token in filter(None, [_last_tokens.get(threading.get_ident())]):",
        "order",
    ),
    Mutant(
        "a program ahead of time leaves out its token",
        "_jax.py",
        "        if MESH_STATE in getattr(self.unsafe_call",
        "        if None in getattr(self.unsafe_call",
        "order",
    ),
    Mutant(
        "a shard_map needs no devices",
        "_jax.py",
        "if same and (new.invars or new.outvars or new.primitive is remat):",
        "if same:",
        "unused",
    ),
    Mutant(
        "what remat does not need is needed",
        "_jax.py",
        "if same and (new.invars or new.outvars or new.primitive is remat):",
        "if same and (new.invars or new.outvars):",
        "unused",
        (0, 12),
    ),
    _never(
        "keeps a remat that needs no inputs",
        "_jax.py",
        "if new is None and eqn.primitive is remat and has_state(eqn):",
        "unused",
    ),
    _never(
        "runs a branch that devices wait for each other in",
        "_control_flow.py",
        "if _jax.has_collective(branch) and (pure or _jax.manual_mesh_axes()):",
        "devices -k collectives_in_a_mask",
    ),
    Mutant(
        "what devices share is summed where not all are",
        "_control_flow.py",
        "    operands = [_jax.make_varying(x, varying) for x in operands]\n",
        "",
        "devices -k share_in_a_mask",
    ),
    Mutant(
        "a value is made to vary twice",
        "_control_flow.py",
        "has_primitive(eqn, *_OWN, _jax.PVARY, *_jax.RULES)",
        "has_primitive(eqn, *_OWN, *_jax.RULES)",
        "devices -k share_in_a_mask",
    ),
    Mutant(
        "nothing is known of a nested mesh",
        "_jax.py",
        '    ("jit", _know_mesh_of_nested_shard_map),\n',
        "",
        "devices -k within_the_other",
        (0, 11),
    ),
    Mutant(
        "state is left to remat's backward pass",
        "_jax.py",
        "    _pe.partial_eval_jaxpr_custom = with_all_state_known\n",
        "",
        "unused",
    ),
    Mutant(
        "a state that may become mapped can't fail",
        "_store.py",
        "return not may_be_mapped and",
        "return",
        "order",
    ),
    _never(
        "waits for what a state becomes",
        "_operations.py",
        "if slot.id in _store.mesh_slots:",
        "order",
    ),
    Mutant(
        "a stack is made of what is in flight",
        "_stack.py",
        "    _store.settle(slot.core)  # a program may be about to set it\n",
        "",
        "stack",
    ),
    _never(
        "keeps a forward rule of which nothing is used",
        "_jax.py",
        "if has_state(eqn) or (new is not None and has_state(new)):",
        "unused",
    ),
    _without("unused remat kept", "_jax.py", '    ("grad", _keep_unused_state),\n', "unused"),
    _never(
        "refuses to linearize while",
        "_jax.py",
        "if body.consts or any(unknown[k] for k in kept):",
        "grad",
    ),
    Mutant(
        "axes that JAX moved are like others",
        "_jax.py",
        '    return _marked(axis_data, "moved")',
        "    return axis_data",
        "vmap",
    ),
    Mutant(
        "a state per device is one",
        "_jax.py",
        "    if mesh.empty:\n        return ()",
        "    if True:\n        return ()",
        "devices",
    ),
    Mutant(
        "a get under shard_map does not vary",
        "_jax.py",
        "    if not names or not _config._check_vma.value:",
        "    if True:",
        "devices",
    ),
    _without(
        "forgetting failed tokens",
        "_jax.py",
        "    tokens.current_tokens, tokens.output_runtime_tokens = kept, {}\n",
        "devices",
    ),
    Mutant(
        "a failure that JAX has raised is not noted", "_jax.py", "told(args[0])", "pass", "failures"
    ),
    # --- The primitives ---
    *[
        _without(f"batching of {p}", "_primitives.py", f"    _jax.define_batching({line}\n", tests)
        for p, line, tests in [
            ("get", "get_p, _batch_get)", "vmap"),
            ("set", "set_p, _batch_set)", "vmap"),
            ("masked set", "set_masked_p, _batch_set_masked)", "masked"),
            ("frozen get", "frozen_p, _batch_frozen)", "index"),
        ]
    ],
    *[
        _without(f"derivative of {p}", "_primitives.py", f"    _jax.define_jvp({line}\n", tests)
        for p, line, tests in [
            ("get", "get_p, _jvp_of_get(get_p))", "nesting"),
            ("frozen get", "frozen_p, _jvp_of_get(frozen_p))", "index"),
            ("set", "set_p, _jvp_of_set(set_p))", "grad"),
            ("masked set", "set_masked_p, _jvp_of_set(set_masked_p))", "grad"),
        ]
    ],
    _never(
        "drops a level that nothing is batched at",
        "_primitives.py",
        "if all(d is None for d in dims):",
        "vmap",
    ),
    Mutant(
        "a shared state is written if the first lane takes the branch",
        "_primitives.py",
        "mask = lax.reduce_or(mask, (mask_dim,))",
        "mask = lax.index_in_dim(mask, 0, mask_dim, False)",
        "masked",
    ),
    Mutant(
        "a leaf without a level is written if the first lane is active",
        "_primitives.py",
        "mask = lax.reduce_or(mask, tuple(reduced))",
        "mask = mask[tuple(0 if k in reduced else slice(None) for k in range(mask.ndim))]",
        "masked",
    ),
    Mutant(
        "inner axes stay where they were",
        "_primitives.py",
        "positions = [p if p is None or p < axis else p + 1 for p in positions]",
        "pass",
        "masked",
    ),
    Mutant(
        "a tangent may reach the state",
        "_primitives.py",
        "        if any(type(t) is not _jax.Zero for t in tangents):",
        "        if False:",
        "grad",
    ),
    _never("compares a frozen state with like", "_primitives.py", "if not agree:", "index"),
    Mutant(
        "effects over devices are not ordered",
        "_primitives.py",
        "return {_jax.MESH_STATE if mesh else _jax.STATE}",
        "return {_jax.STATE}",
        "devices",
    ),
    _never("refuses a vmap inside stacked layers", "_primitives.py", "if levels:", "stack"),
    Mutant(
        "a masked row is written in all lanes",
        "_primitives.py",
        "        row = jnp.where(lanes, row, rows)  # out of bounds: dropped",
        "        pass",
        "stack",
    ),
    Mutant(
        "an unknown JAX is trusted with grad",
        "_primitives.py",
        '            _unknown_jax.require("grad")',
        "            pass",
        "unknown_jax",
    ),
    # --- Lowering ---
    _never("refuses several devices", "_lowering.py", "if devices not in (None, 1):", "errors"),
    _never("refuses partly manual meshes", "_lowering.py", "if auto_axes:", "devices -k partly"),
    _never(
        "refuses to export", "_lowering.py", "if _jax.is_export(ctx):", "takes_a_function -k export"
    ),
    Mutant(
        "an unknown JAX is trusted with jit",
        "_lowering.py",
        '    _unknown_jax.require("jit")\n',
        "",
        "unknown_jax",
    ),
    _without(
        "programs that keep slots alive",
        "_lowering.py",
        "    _jax.keep_alive(ctx, _store.Operation(slot, type_id, bool(mesh)))\n",
        "lifetime",
    ),
    Mutant(
        "programs of another process are taken for ours",
        "_lowering.py",
        "_core.process_nonce()",
        "0",
        "takes_a_function -k persistent",
    ),
    _never(
        "looks for types of the store's making", "_slot.py", "if number not in _parts:", "devices"
    ),
    Mutant(
        "never notes the order of a mesh",
        "_lowering.py",
        '_jax.mesh_ordinals(ctx) if mesh and op == "set_state" else ()',
        "()",
        "devices",
    ),
    Mutant(
        "what barrier catches counts as told",
        "_store.py",
        'if getattr(_catching, "now", False):',
        "if False:",
        "devices -k nobody",
    ),
    _without(
        "check of a frozen state in a program",
        "_lowering.py",
        "    check_frozen(ctx.avals_in[:n], ctx.avals_in[n:], **params)\n",
        "index",
    ),
    # --- Masks ---
    *[
        Mutant(
            f"without the mask of {name}",
            "_control_flow.py",
            f'    "{name}": ',
            f'    "no {name}": ',
            tests,
        )
        for name, tests in {
            "set_state": "masked",
            "set_state_masked": "masked",
            "scan": "masked",
            "jit": "masked",
            "remat2": "masked",
            "custom_jvp_call": "masked",
            "custom_vjp_call": "masked",
            "cond": "masked",
            "while": "masked",
        }.items()
    ],
    _without(
        "the mask of calls",
        "_control_flow.py",
        '    **dict.fromkeys(("closed_call", "eval_jaxpr"), _mask_call),\n',
        "masked",
    ),
    *[
        Mutant(
            f"without our batching of {name}",
            "_control_flow.py",
            f"    _jax.wrap_batching(lax.{name}_p, _wrap_{name})\n",
            "",
            tests,
        )
        for name, tests in {"scan": "vmap", "cond": "masked", "while": "masked"}.items()
    ],
    Mutant(
        "a masked set is a set",
        "_control_flow.py",
        '    return set_masked_p.bind(mask, *ins, mask_axes=(None,) * len(params["levels"]), **params)',
        "    return set_masked_p.bind(\n"
        "        mask | True, *ins, mask_axes=(None,) * len(params['levels']), **params\n"
        "    )",
        "masked",
    ),
    Mutant(
        "a mask in a mask replaces it",
        "_control_flow.py",
        "lax.bitwise_and(inner, jnp.broadcast_to(mask, inner.shape))",
        "inner",
        "masked takes_a_function",
    ),
    Mutant(
        "a cond in a mask forgets the mask",
        "_control_flow.py",
        "lanes = takes_it if every else takes_it & active",
        "lanes = takes_it",
        "masked",
    ),
    Mutant(
        "a branch runs that no lane takes",
        "_control_flow.py",
        "taken = lax.convert_element_type(_any_lane(lanes), np.int32)",
        "taken = np.int32(1)",
        "masked",
    ),
    Mutant(
        "other lanes go through a branch with what they have",
        "_control_flow.py",
        "        out = _masked_and_filled(branch, mask, args)",
        "        out = masked(branch, mask, args, fills=True)",
        "other_lanes",
    ),
    Mutant(
        "other lanes get their own state",
        "_control_flow.py",
        "if eqn.primitive is get_p or eqn.primitive.name in _OWN:",
        "if eqn.primitive.name in _OWN:",
        "other_lanes",
    ),
    Mutant(
        "other lanes get their own number",
        "_control_flow.py",
        "if eqn.primitive is get_p or eqn.primitive.name in _OWN:",
        "if eqn.primitive is get_p:",
        "other_lanes",
    ),
    Mutant(
        "other lanes get their own number in a jit",
        "_control_flow.py",
        "_jax.has_primitive(eqn, *_OWN, _jax.PVARY, *_jax.RULES)",
        "_jax.has_primitive(eqn, _jax.PVARY, *_jax.RULES)",
        "other_lanes",
    ),
    Mutant(
        "a collective hears of no inactive lanes",
        "_control_flow.py",
        "every = active is None or (pure and not fills)",
        "every = active is None",
        "other_lanes -k collective",
    ),
    Mutant(
        "other lanes go through a loop with what they have",
        "_control_flow.py",
        "            return _masked_and_filled(jaxpr, mask, args)",
        "            return masked(jaxpr, mask, args, fills=True)",
        "other_lanes",
    ),
    Mutant(
        "an outer vmap does not know a branch for ours",
        "_control_flow.py",
        "return fill(mask, out, filled=False) if pure else out",
        "return out",
        "other_lanes",
    ),
    Mutant(
        "what is differentiated is not filled",
        "_guard.py",
        "axes=axes, filled=(True,) * len(filled), **params)",
        "axes=axes, filled=filled, **params)",
        "other_lanes",
    ),
    Mutant(
        "what a loop goes by is not filled",
        "_guard.py",
        "filled = _among(_reaching(jaxpr, _deciding), jaxpr.invars)",
        "filled = (False,) * len(operands)",
        "other_lanes -k hangs",
    ),
    Mutant(
        "what a get depends on gets the mask's axes",
        "_guard.py",
        " and own[0] is not None and not keeps_axes[k]:",
        " and own[0] is not None:",
        "masked random_programs -k some_levels",
    ),
    Mutant(
        "what lanes share of an outer vmap keeps its axes",
        "_guard.py",
        " and own[0] is not None and not keeps_axes[k]:",
        " and False:",
        "other_lanes -k lanes_of_lanes",
    ),
    Mutant(
        "what state depends on is all that there is",
        "_control_flow.py",
        "args, for_state = fill_operands(jaxpr, mask, args)",
        "args, for_state = [*fill_operands(jaxpr, mask, args)[1].values()], {}",
        "other_lanes masked",
    ),
    Mutant(
        "state depends on what has been filled by every vmap",
        "_control_flow.py",
        "            if any(v in into_state for v in eqn.outvars):",
        "            if False:",
        "other_lanes masked",
    ),
    Mutant(
        "derivatives of operands see every lane",
        "_guard.py",
        "    if axes[0] is None or type(t) is _jax.Zero:\n",
        "    if True:\n",
        "masked other_lanes",
    ),
    Mutant(
        "never goes under the mesh of lanes",
        "_jax.py",
        "if axis_data.explicit_mesh_axis is None or not",
        "if True or not",
        "jit/meshes -k part_company",
    ),
    Mutant(
        "a collective is of what has been filled",
        "_control_flow.py",
        "fills = fills and not _jax.has_collective(*branches)",
        "fills = fills",
        "other_lanes -k collective",
    ),
    Mutant(
        "a collective in a loop is of what has been filled",
        "_control_flow.py",
        "fills = fills and has_loop and not _jax.has_collective(cond, body)",
        "fills = fills and has_loop",
        "other_lanes -k collective",
    ),
    _never(
        "spreads what is not of the mesh",
        "_jax.py",
        "if axis is None and name is not None:",
        "jit/meshes -k part_company",
    ),
    Mutant(
        "slices lanes that are spread",
        "_jax.py",
        "    if spec[axis] is None:",
        "    if True:",
        "jit/meshes -k part_company",
    ),
    Mutant(
        "a skipped branch forgets how its results are spread",
        "_control_flow.py",
        "_jax.make_varying(_jax.as_sharded(zeros, aval), ",
        "_jax.make_varying(zeros, ",
        "jit/meshes -k part_company",
    ),
    Mutant(
        "checkify runs a condition twice",
        "_control_flow.py",
        "    _jax.wrap_check_of_while(_while_with_predicate)\n",
        "",
        "takes_a_function -k checkify",
    ),
    _never(
        "refuses experiments of JAX",
        "_refused.py",
        "if flags := _jax.experiments():",
        "takes_a_function -k experiments",
    ),
    Mutant(
        "a Python number is held constant",
        "_equinox.py",
        "        differentiated = jax.tree.map(jnp.asarray, differentiated)\n",
        "",
        "takes_a_function -k python_number",
    ),
    Mutant(
        "a finished lane starts again",
        "_control_flow.py",
        "return [running & run(cond, running, [*c, *merge(f, new)])[0], *new]",
        "return [run(cond, running, [*c, *merge(f, new)])[0], *new]",
        "masked",
    ),
    Mutant(
        "a loop in a mask forgets the mask",
        "_control_flow.py",
        "return [mask & run(cond, mask, [*c, *merge(f, carry)])[0]]",
        "return [run(cond, mask, [*c, *merge(f, carry)])[0]]",
        "masked",
    ),
    Mutant(
        "a condition is not masked",
        "_control_flow.py",
        "return [running & run(cond, running, [*c, *merge(f, new)])[0], *new]",
        "return [running & _jax.call_jaxpr(cond, *c, *merge(f, new))[0], *new]",
        "masked",
    ),
    Mutant(
        "a finished lane's carry goes on",
        "_control_flow.py",
        "            lax.select(jnp.broadcast_to(running, x.shape), x, y)",
        "            x",
        "masked",
    ),
    Mutant(
        "a fixed carry gets the mask's axes",
        "_control_flow.py",
        "fixed = [v is open_body.invars[n_body + k] for k, v in enumerate(open_body.outvars)]",
        "fixed = [False for _ in open_body.outvars]",
        "masked random_programs",
    ),
    _never(
        "asks JAX for a loop in step",
        "_control_flow.py",
        "if mask is None:",
        "masked",
        "\n            return None  # JAX's own rule",
    ),
    Mutant(
        "a loop in step forgets the mask",
        "_control_flow.py",
        "closed = _close(lambda m, *a: masked(jaxpr, m, a, fills=fills), avals)",
        "closed = _close(lambda m, *a: _jax.call_jaxpr(jaxpr, *a), avals)",
        "masked",
    ),
    Mutant(
        "a cond in step forgets the mask",
        "_control_flow.py",
        "lambda m, *a, b=b: masked(b, m, a, fills=fills), avals",
        "lambda m, *a, b=b: _jax.call_jaxpr(b, *a), avals",
        "masked",
    ),
    Mutant(
        "what can't be masked is not refused",
        "_control_flow.py",
        "    if rule is None:\n",
        "    if rule is None:\n        return _jax.bind_equation(eqn, ins)\n",
        "takes_a_function -k refused",
    ),
    Mutant(
        "an unknown JAX is trusted with vmap of cond",
        "_control_flow.py",
        '        _unknown_jax.require("vmap of control flow")\n        if dims[0] is None',
        "        if dims[0] is None",
        "unknown_jax",
    ),
    Mutant(
        "an unknown JAX is trusted with vmap of while",
        "_control_flow.py",
        '        _unknown_jax.require("vmap of control flow")\n        with _jax',
        "        with _jax",
        "unknown_jax",
    ),
    Mutant(
        "rules of custom derivatives are not masked",
        "_masked_custom.py",
        "    closed = jax.make_jaxpr(f)(*args)\n    return masked(closed, mask, args)",
        "    return f(*args)",
        "masked",
    ),
    _never(
        "notices rules of parted lanes",
        "_primitives.py",
        "if self is not get_p and _jax.in_parted_rule():",
        "masked -k backward",
    ),
    Mutant(
        "values of an outer trace are staged as they are",
        "_jax.py",
        "return type(x) is _pe.DynamicJaxprTracer and x._trace is trace",
        "return type(x) is _pe.DynamicJaxprTracer",
        "control_flow",
    ),
    Mutant(
        "lanes that have moved are no longer known to have parted",
        "_jax.py",
        "_axis_data_class(_marks(axis_data) | {mark})",
        "_axis_data_class(frozenset({mark}))",
        "masked -k rule_in_a_rule",
    ),
    Mutant(
        "a masked set in a rule of parted lanes is let through",
        "_primitives.py",
        "if self is not get_p and _jax.in_parted_rule():",
        "if self is set_p and _jax.in_parted_rule():",
        "masked -k rule_in_a_rule",
    ),
    # --- Where JAX runs functions in other ways ---
    _without(
        "refusal of reductions",
        "_install.py",
        '        ("reductions", _refused.install_reductions),\n',
        "takes_a_function -k reductions",
    ),
    _without(
        "refusal to start a loop again",
        "_install.py",
        '        ("disable_jit", _refused.install_while_loop),\n',
        "takes_a_function -k starts_again",
    ),
    Mutant(
        "an unknown JAX is trusted without jit",
        "_refused.py",
        '        _unknown_jax.require("disable_jit")',
        "        pass",
        "unknown_jax",
    ),
    # --- Operations ---
    _never("notices that it was forked", "_operations.py", "if _store.forked:", "fork"),
    _never(
        "asks for an index", "_operations.py", "if not isinstance(index, StateIndex):", "errors"
    ),
    _never(
        "asks for a flag", "_operations.py", "if not isinstance(index.inference, bool):", "errors"
    ),
    _never(
        "asks for arrays",
        "_operations.py",
        "if not _jax.is_literal(leaf):",
        "errors",
    ),
    _never(
        "notices an escaped tracer",
        "_operations.py",
        "if _jax.no_trace():",
        "errors",
        "\n        _store.check",
    ),
    Mutant(
        "a frozen index that was never set may be read",
        "_operations.py",
        "if (held is None and not slot.core.type) or held is NOTHING_HELD:",
        "if False:",
        "errors index",
    ),
    _never(
        "forbids to set a frozen index",
        "_operations.py",
        "if index.inference:",
        "errors",
        "\n        raise",
    ),
    _never("compares a frozen structure", "_operations.py", "if kept is not structure:", "index"),
    Mutant(
        "an eager get takes like for what it was last time",
        "_operations.py",
        "if quick is not None and x.aval == quick[0] and _jax.no_trace():",
        "if quick is not None and _jax.no_trace():",
        "errors",
    ),
    Mutant(
        "an eager get is planned for good before it is known to be right",
        "_operations.py",
        "if slot.core.accepts(type_id):  # what it holds, and where, is then settled",
        "if True:",
        "errors",
    ),
    _never("refuses stacked layers in shard_map", "_operations.py", "if mesh:", "stack"),
    _never(
        "notices a row that is none",
        "_operations.py",
        "if not isinstance(row, jax.Array):",
        "stack",
    ),
    # --- The store ---
    _never("sees that arrays are spread", "_loans.py", "if len(devices) > 1:", "errors"),
    _never(
        "waits before an eager operation", "_store.py", "if slot.num_programs:", "order threads"
    ),
    _never(
        "raises an earlier failure",
        "_store.py",
        "if _core.pending_failures():",
        "failures",
        "\n        raise_failures",
    ),
    _without(
        "report at exit", "_store.py", "    atexit.register(_report_at_exit)\n", "failures -k exit"
    ),
    Mutant(
        "an eager set may be of a NumPy array",
        "_store.py",
        "    if not all(isinstance(x, _jax.Array) for x in state):",
        "    if False:",
        "masked vmap",
    ),
    # --- Indices ---
    Mutant(
        "an index in a program's arguments is kept alive",
        "_index.py",
        "weak = caller.f_code is _FLATTEN_FOR_JIT",
        "weak = False",
        "lifetime",
    ),
    Mutant(
        "a frozen state's version is part of the structure",
        "_index.py",
        "            and self.levels == other.levels\n        )",
        "            and (self.levels, self.version) == (other.levels, other.version)\n        )",
        "index",
    ),
    Mutant(
        "flattening inside a trace looks the state up",
        "_index.py",
        "return all(isinstance(x, jax.Array) and not isinstance(x, _jax.Tracer) for x in leaves)",
        "return True",
        "index",
    ),
    Mutant(
        "an index is hashable",
        "_index.py",
        "    __hash__ = None  # type: ignore[assignment]",
        "    __hash__ = object.__hash__",
        "index",
    ),
    Mutant(
        "a first set is not waited for",
        "_index.py",
        "            _store.settle(core)  # a program may be about to set it",
        "            pass",
        "index copies",
    ),
    _never(
        "refuses to run a loop in Python while staging",
        "_refused.py",
        "if staged:",
        "takes_a_function",
    ),
    Mutant(
        "without the mask of shard_map",
        "_control_flow.py",
        '    "shard_map": _mask_shard_map,\n',
        "",
        "devices",
    ),
    # --- Rules of custom derivatives that hide state ---
    _never(
        "parts the lanes of a loop with rules",
        "_control_flow.py",
        "if _parts_lanes_with_rules(axis_data, args, dims, params):",
        "masked",
    ),
    Mutant(
        "rules within what shows no state are not masked",
        "_control_flow.py",
        "if not (has_state or _jax.has_primitive(eqn, *_OWN, _jax.PVARY, *_jax.RULES)):",
        "if not (has_state or _jax.has_primitive(eqn, *_OWN, _jax.PVARY)):",
        "masked",
    ),
    # --- Stacked layers ---
    _never("refuses to stack inside a trace", "_stack.py", "if not _jax.no_trace():", "stack"),
    _never(
        "refuses to stack batched states", "_stack.py", "if len(parts.levels) > differs:", "stack"
    ),
    Mutant(
        "any batched state is taken for one that differs from layer to layer",
        "_stack.py",
        "differs = slot.id in differ_in_stack",
        "differs = bool(parts.levels)",
        "stack",
    ),
    # --- storax.jit ---
    *(
        _without(f"hoisting of {name}", "_hoist.py", f"    {line}\n", "jit/programs")
        for name, line in {
            "jit": '"jit": _jit,',
            "scan": '"scan": _scan,',
            "while": '"while": _while,',
            "cond": '"cond": _cond,',
            "checkpoint": '"remat2": _inline("jaxpr"),',
            "custom_jvp": '"custom_jvp_call": _inline("call_jaxpr"),',
            "custom_vjp": '"custom_vjp_call": _inline("call_jaxpr"),',
        }.items()
    ),
    Mutant(
        "a hoisted condition that sets state is not part of a round",
        "_hoist.py",
        "    if not run.written(cond):",
        "    if True:",
        "jit/transformations",
    ),
    Mutant(
        "a state that a loop sets first needs no value",
        "_hoist.py",
        'once and runs and name != "scan"',
        "once",
        "jit/programs jit/transformations nesting",
    ),
    _never(
        "orders the store after what may fail", "_hoist.py", "if _may_fail(eqn):", "jit/failures"
    ),
    _never(
        "notes whether a set has run",
        "_specialise.py",
        "if not uses[slot_id].is_always_set:",
        "jit/threads",
    ),
    _never(
        "leaves what does not match to plain jit",
        "_placement.py",
        "if _core.type_moves(asked, type_id) is None:",
        "jit/failures jit/programs jit/calls",
    ),
    _never(
        "leaves an unset state to plain jit",
        "_placement.py",
        "if use.needs_value and not is_there:",
        "jit/failures jit/programs jit/calls",
    ),
    _never(
        "leaves debug_nans to plain jit",
        "_placement.py",
        "if _jax.debugs_values():",
        "jit/transformations jit/failures jit/programs jit/calls jit/meshes",
    ),
    _never(
        "notices a state used inside and outside of shard_map",
        "_hoist.py",
        "if both := mapped & found.keys():",
        "jit/meshes",
    ),
    Mutant(
        "what plain jit can't run is told by its own error",
        "_specialise.py",
        "if needs_hoisting(error):",
        "if False:",
        "jit/meshes",
    ),
    Mutant(
        "a donated state that is not read is dropped",
        "_specialise.py",
        'changes["keep_unused"] = True',
        'changes["keep_unused"] = False',
        "jit/programs jit/calls jit/meshes jit/aliasing",
    ),
    Mutant(
        "shardings of states are left to XLA",
        "_specialise.py",
        "states = [*placement.shardings, *[None] * len(placement.born)]",
        "states = [None] * len((*placement.donated, *placement.born))",
        "jit/meshes",
    ),
    Mutant(
        "the packed form over several devices",
        "_packed.py",
        "    if devices not in (None, 1) or auto_axes or",
        "    if",
        "jit/meshes",
    ),
    Mutant(
        "the store may come before ordered effects",
        "_packed.py",
        "tokens = [ctx.tokens_in.get(e) for e in after]",
        "tokens = []",
        "jit/failures jit/threads",
    ),
    _without(
        "recall of what is lent",
        "_lowering.py",
        "    _loans.recall([slot], op)\n",
        "jit/programs jit/threads",
    ),
    Mutant(
        "an eager get is the state that is lent",
        "_loans.py",
        "copies = list(_copy(found))",
        "copies = list(found)",
        "jit/aliasing jit/calls",
    ),
    Mutant(
        "an eager set lends the user's array",
        "_loans.py",
        "        copies = _copy(new)\n",
        "        copies = tuple(new)\n",
        "jit/aliasing jit/calls",
    ),
    Mutant(
        "a call under another transformation is a call of its own",
        "_jit.py",
        "if not _jax.no_trace() or jax.config.jax_disable_jit:",
        "if False:",
        "jit/transformations",
    ),
    _never("says which states are lost", "_jit.py", "if lost:", "jit/failures"),
    Mutant(
        "small states are donated",
        "_placement.py",
        "(donated if _is_large(slot, type_id) else kept).append(slot_id)",
        "donated.append(slot_id)",
        "jit/failures",
    ),
    Mutant(
        "a state may be of a weak type",
        "_loans.py",
        "jnp.array(x, x.dtype) if x.weak_type else jnp.copy(x)",
        "jnp.copy(x)",
        "jit/aliasing",
    ),
    _never(
        "traces anew what makes indices",
        "_specialise.py",
        "if made and any_of_slots(result, made):",
        "jit/calls",
    ),
    # --- State that is hidden from JAX ---
    _without(
        "the check for hidden state",
        "_jax.py",
        '    ("jit", _refuse_hidden_state),\n',
        "takes_a_function -k hidden",
    ),
    Mutant(
        "state is hidden in a parameter",
        "_jax.py",
        "_TELL_LATER and _holds_state(params):",
        "_TELL_LATER and False:",
        "takes_a_function -k hidden",
    ),
    Mutant(
        "state is hidden deep in a parameter",
        "_jax.py",
        "any(_holds_state(getattr(x, f.name, None)) for f in dataclasses.fields(x))",
        "False",
        "takes_a_function -k index_maps",
    ),
    Mutant(
        "what a linear solve does not run is refused",
        "_jax.py",
        "primitive.name not in _TELL_LATER and ",
        "",
        "takes_a_function -k linear_solve",
    ),
    _never(
        "looks at what is traced for a shape",
        "_jax.py",
        "if _here.evaluated is not None and has_state(jaxpr):",
        "takes_a_function -k hidden",
    ),
    Mutant(
        "state is hidden in a partial evaluation",
        "_jax.py",
        "                _here.evaluated = primitive\n                break",
        "                break",
        "takes_a_function -k backward_pass",
    ),
    _never(
        "looks for hidden state in what is lowered",
        "_jax.py",
        "if effect not in _here.effects or isinstance(self._tokens, _Untold) or not in_main():",
        "takes_a_function -k lowered",
    ),
    Mutant(
        "a hoisted program tells of state that is left in it",
        "_packed.py",
        "{_jax.STORE, *after}",
        "{_jax.STATE, *after}",
        "takes_a_function -k lowered",
    ),
    _never(
        "leaves primitives that JAX expands later to plain jit",
        "_hoist.py",
        "if _jax.open_jaxpr(jaxpr).is_high:",
        "takes_a_function -k expands",
    ),
    _without(
        "the check of noinline's shapes",
        "_equinox.py",
        "    _noinline.filter_eval_shape = filter_eval_shape\n",
        "takes_a_function -k noinline",
    ),
    _without(
        "the check of noinline's callbacks",
        "_equinox.py",
        "    _noinline._get_callback = get_callback_and_look\n",
        "takes_a_function -k noinline",
    ),
    _never(
        "raises what failed of others on several devices",
        "_store.py",
        "if others:",
        "devices -k others",
    ),
    Mutant(
        "tokens change while JAX goes over them",
        "_jax.py",
        "tokens.current_tokens, tokens.output_runtime_tokens = kept, {}",
        "tokens.current_tokens.pop(MESH_STATE, None)",
        "devices -k by_jax_too",
        (0, 12),
    ),
    # --- Equinox's loops ---
    _without(
        "lanes and gradients of Equinox's loops",
        "_install.py",
        '        ("grad", _equinox.install),\n',
        "takes_a_function -k loop",
    ),
    Mutant(
        "lanes that have left a loop of Equinox run on",
        "_equinox.py",
        "return _Masked(body, makes_false_steps) if _has_state(body) else body",
        "return body",
        "random_programs -k found",
    ),
    Mutant(
        "a bounded loop takes a step that it does not take",
        "_equinox.py",
        "common._select_if_vmap(running, True, False, self.makes_false_steps)",
        "common._select_if_vmap(running, True, False, False)",
        "random_programs -k found",
    ),
    Mutant(
        "a checkpointed loop runs its steps again",
        "_equinox.py",
        "            return original(vjp_arg, *args)\n        return run_loop(",
        "            return original(vjp_arg, *args)\n        return original(",
        "takes_a_function -k loop",
    ),
    _never(
        "refuses the gradient of an endless loop",
        "_equinox.py",
        "if max_steps is None:",
        "takes_a_function -k loop",
    ),
    _never(
        "refuses the gradient of a loop whose condition sets state",
        "_equinox.py",
        "if any(map(_sets_state, _jaxprs(cond_fun))):",
        "takes_a_function -k loop",
    ),
    Mutant(
        "tangents that a while loop does not use stand in its way",
        "_jax.py",
        "if k < first or used[k - first]]",
        "]",
        "grad -k closes_over",
    ),
]
