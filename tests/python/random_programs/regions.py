"""The half of the maker of programs that makes statements with blocks in them."""

from .scope import NONE, Variable, union
from .syntax import (
    Binding,
    Block,
    Branch,
    Call,
    Carry,
    Fori,
    Grad,
    Mapped,
    Scan,
    Unmapped,
    Var,
    Vmap,
    While,
)

CALLS = (
    "jit",
    "checkpoint",
    "custom_jvp",
    "custom_vjp",
    "checkpoint_dots",
    "checkpoint_everything",
    "checkpoint_nothing",
    "custom_jvp_symbolic",
    "custom_vjp_symbolic",
    "jit_inline",
    "closure_convert",
)
# Ways to take a derivative, by whether they go forward or backward; `linearize` does both.
FORWARD = ("jvp", "jacfwd", "linearize")
BACKWARD = ("value_and_grad", "pullback", "jacrev", "linearize")


class Regions:
    def outs(self, known):
        """Variables for results of which something is known, scalars or vectors."""
        return [v.but(name=self.name("v"), vector=self.flag()) for v in known]

    @staticmethod
    def bindings(variables):
        return tuple(Binding(v.name, v.vector) for v in variables)

    def make_call(self, scope, deep):
        how = self.pick(CALLS + ("checkpoint",) * 4 * bool(scope.backward))
        if how.startswith("custom_vjp") and scope.forward and scope.all_active:
            how = "jit"  # JAX would take its arguments for differentiated, and it has no such derivative
        custom = how.startswith("custom")
        inner = scope.custom(how) if custom else scope
        closes_over = not custom and self.flag()
        body, known = self.free_block(inner, deep, self.number(0, 2))
        if custom:
            active = union(v.active for v in inner.variables)
            known = [v.but(active=active | v.active) for v in known]
        outs = self.outs(known)
        return [Call(how, closes_over, self.bindings(outs), body)], scope.plus(*outs)

    # Loops

    def carries(self, scope, inner, lanes):
        """Starting values of loop carries, and what is known of them in the loop and after it."""
        made, known = [], []
        active = union(v.active for v in inner.variables)
        for _ in range(self.pick([1, 2, 0])):
            start, v = self.expr(inner)
            more_lanes = lanes | (scope.lanes if self.flag() else NONE)
            more_active = active if self.flag() else NONE
            vector = self.flag()
            v = Variable(self.name("c"), vector, v.lanes | more_lanes, v.active | more_active)
            made.append(Carry(v.name, start, v.vector))
            known.append(v)
        return tuple(made), known

    def make_scan(self, scope, deep):
        carries, known = self.carries(scope, scope, NONE)
        active = [v for v in scope.variables if v.active & scope.backward]
        if active and self.flag():
            v = self.pick(active)
            known.append(v.but(name=self.name("c")))
            carries += (Carry(known[-1].name, Var(v.name), v.vector),)
        item = Variable(self.name("i"))
        made, inner = self.statements(scope.plus(item, *known), deep)
        results = self.results(inner, known)
        ys = self.free_results(inner, self.number(0, 1))
        outs = [v.but(name=self.name("v")) for v in known] + self.outs([v for _, v in ys])
        body = Block(made, (*results, *[e for e, _ in ys]))
        length, unroll = self.pick([2, 1, 3, 2, 3, 0]), self.pick([1, 1, 1, 2])
        checkpointed = length > 0 and scope.has_checkpointed_loops() and self.number(0, 3) == 3
        bound = self.bindings(outs)
        loop = Scan(length, self.flag(), unroll, checkpointed, item.name, carries, bound, body)
        return [loop], scope.plus(*outs)

    @staticmethod
    def in_loop(scope, lanes):
        """Inside a loop that lanes may leave one by one, and that can't be differentiated backward."""
        return scope.without(scope.backward).but(parted=scope.parted | lanes)

    def after_loop(self, scope, known):
        outs = [v.but(name=self.name("v")) for v in known]
        return self.bindings(outs), scope.plus(*outs)

    def make_fori(self, scope, deep):
        if self.flag():
            count, v = self.decider(scope.without(scope.backward))
            lanes, inner = v.lanes, self.in_loop(scope, v.lanes)
        else:
            count, lanes, inner = self.pick([2, 1, 3, 2, 3, 0]), NONE, scope
        carries, known = self.carries(scope, inner, lanes)
        # The counter is a carry to JAX: where lanes leave the loop one by one, each has its own.
        item = Variable(self.name("i"), False, lanes)
        body = self.block(inner.plus(item, *known), deep, known)
        outs, after = self.after_loop(scope, known)
        return [Fori(count, item.name, carries, outs, body)], after

    def make_while(self, scope, deep):
        lanes = frozenset(v for v in sorted(scope.lanes) if self.number(0, 2))
        inner = self.in_loop(scope, lanes)
        carries, known = self.carries(scope, inner, lanes)
        inner = inner.plus(*known)
        limit = self.pick([2, 1, 3, 2, 3, 0])
        test = self.test(inner, lanes)
        body = self.block(inner, deep, known)
        outs, after = self.after_loop(scope, known)
        kind = ""
        # Equinox runs the condition more often than JAX.
        if limit and not test.statements and self.flag():
            kinds = ["lax", "bounded"] + ["checkpointed"] * 2 * scope.has_checkpointed_loops()
            kind = self.pick(kinds)
        return [While(limit, kind, test, carries, outs, body)], after

    def test(self, scope, lanes):
        """A loop's condition, which may read and write state."""
        made = []
        for _ in range(self.pick([0, 1, 1, 2])):
            slots = scope.usable(lanes)
            if not slots:
                break
            statement = self.make_get if self.number(0, 2) else self.make_bump
            new, scope = statement(scope.but(slots=tuple(slots)))
            made += new
        return Block(tuple(made), (self.decider(scope, lanes)[0],))

    # Branches

    def make_branch(self, scope, deep):
        how = self.pick(["cond", "switch"])
        index, v = self.decider(scope)
        n = 2 if how == "cond" else self.pick([2, 3, 1])
        inner = scope.but(parted=scope.parted | v.lanes)
        shared = [s.name for s in scope.slots if not v.lanes <= scope.bound_to(s)]
        owner = {name: self.number(0, n - 1) for name in shared}
        count = self.number(0, 2)
        blocks, known = [], []
        for k in range(n):
            locked = inner.locked | {name for name in shared if owner[name] != k}
            below = deep if k == 0 else self.number(0, deep)
            block, results = self.free_block(inner.but(locked=locked), below, count)
            blocks.append(block)
            known.append(results)
        outs = self.outs(
            Variable(
                lanes=v.lanes | union(r.lanes for r in column),
                active=union(r.active for r in column),
            )
            for column in zip(*known, strict=True)
        )
        return [Branch(how, index, self.bindings(outs), tuple(blocks))], scope.plus(*outs)

    # vmap and grad

    def make_vmap(self, scope, deep):
        axis, waiting = self.name("b"), scope.waiting()
        size = self.pick([*waiting.values()] or [2, 3])
        binds = tuple(s for s, n in waiting.items() if n == size and self.number(0, 5) != 5)
        inner = scope.but(
            vmaps=(*scope.vmaps, (axis, size)), bound=(*scope.bound, *[(s, axis) for s in binds])
        )
        mapped, known = [], []
        for _ in range(self.pick([1, 2, 1, 2, 0])):
            start, v = self.expr(scope, depth=1)
            v = Variable(self.name("m"), self.flag(), v.lanes | {axis}, v.active)
            mapped.append(Mapped(v.name, start, v.vector, self.axis(v)))
            known.append(v)
        body, results = self.free_block(inner.plus(*known), deep, self.number(0, 2))
        after = self.outs(v.but(lanes=v.lanes - {axis}) for v in results)
        outs = tuple(
            Unmapped(v.name, v.vector, self.axis(v), self.pick([None, *range(size)])) for v in after
        )
        return [Vmap(axis, size, tuple(mapped), binds, outs, body)], scope.plus(*after)

    def axis(self, variable):
        return self.pick([0, 1, -1, -2] if variable.vector else [0, -1])

    def make_grad(self, scope, deep):
        how = self.pick(self.pick([BACKWARD, FORWARD]))
        at, v = self.expr(scope, depth=1)
        t = Variable(self.name("t"), False, v.lanes, v.active)
        inner = scope.plus(t.but(active=t.active | {t.name}))
        if how in FORWARD:
            inner = inner.but(forward=inner.forward | {t.name})
        if how in BACKWARD:
            inner = inner.but(backward=inner.backward | {t.name})
        if how in BACKWARD and self.flag():
            # JAX takes loops in a checkpoint apart, and leaves out what nothing uses.
            self.planned = ["call", "scan", self.pick(["call", "branch", "scan", "fori"])]
            deep, self.left = max(deep, len(self.planned)), self.left + len(self.planned)
        body, (result,) = self.free_block(inner, deep, 1)
        # The slope may depend on whatever the body has seen.
        seen = (*inner.variables, result)
        slope = Variable(lanes=scope.lanes, active=union(w.active for w in seen) - {t.name})
        known = (Variable(lanes=result.lanes, active=result.active - {t.name}), slope)
        outs = [w.but(name=self.name("v")) for w in known]
        return [Grad(how, t.name, at, self.bindings(outs), body)], scope.plus(*outs)
