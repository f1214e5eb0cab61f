"""What becomes of states when a program under storax.jit fails."""

import contextlib
import re
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import storax
from jit.counting import counter


def failing(x, when):
    def callback(x, when):
        if when:
            raise ValueError("the user's own")
        return x

    return jax.pure_callback(callback, jax.ShapeDtypeStruct(x.shape, x.dtype), x, when)


@pytest.mark.parametrize("feeds", [True, False])
def test_small_states_stay(jit, feeds):
    _, count, state = counter(1)
    _, other, other_state = counter(1)

    @jit
    def f(x, when):
        y = failing(x, when)
        return y + count(y if feeds else 1) + other()

    f(jnp.float32(1), jnp.array(False))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="the user's own"):
            jax.block_until_ready(f(jnp.float32(1), jnp.array(True)))
        assert (state(), other_state()) == (2, 2)
    f(jnp.float32(1), jnp.array(False))
    assert (state(), other_state()) == (3, 3)


def test_small_states_stay_if_a_loop_fails(jit):
    _, count, state = counter(1)

    @jit
    def f(when):
        def body(c, k):
            return c + failing(k, when & (k == 3)) + count(), None

        return jax.lax.scan(body, jnp.float32(0), jnp.arange(5.0))[0]

    f(jnp.array(False))
    assert state() == 6
    with pytest.raises(RuntimeError, match="the user's own"):
        jax.block_until_ready(f(jnp.array(True)))
    assert state() == 6


def test_small_states_stay_if_an_ordered_callback_without_results_fails():
    from jax.experimental import io_callback

    _, count, state = counter(1)

    def callback(when):
        if when:
            raise ValueError("the user's own")

    @storax.jit
    def f(when):
        io_callback(callback, None, when, ordered=True)
        return count()

    f(jnp.array(False))
    assert state() == 2
    with pytest.raises(RuntimeError, match="the user's own"):
        jax.block_until_ready(f(jnp.array(True)))
    with contextlib.suppress(RuntimeError):
        jax.effects_barrier()
    assert state() == 2


def test_large_states_are_lost_and_named():
    lost, count, _ = counter(1, 20_000)
    kept, _, kept_state = counter(1, 20_000)
    _, small, small_state = counter(1)

    @storax.jit
    def f(x, when):
        like = jnp.zeros(20_000)
        y = failing(x, when)
        return y + count(y)[0] + storax.get_state(kept, like)[0] + small()

    f(jnp.float32(1), jnp.array(False))
    with pytest.raises(RuntimeError, match=r"the user's own|is lost"):
        jax.block_until_ready(f(jnp.float32(1), jnp.array(True)))
    with pytest.raises(RuntimeError, match=r"'counter'.*is lost.*donate=False"):
        storax.get_state(lost, jnp.zeros(20_000))
    assert kept_state() == 1
    assert small_state() == 2
    with pytest.raises(RuntimeError, match="is lost"):
        jax.block_until_ready(f(jnp.float32(1), jnp.array(False)))
    storax.set_state(lost, jnp.zeros(20_000))
    assert f(jnp.float32(1), jnp.array(False)) == 1 + 1 + 1 + 3


def test_error_of_the_call_names_exactly_what_is_lost():
    index = storax.StateIndex(name="lost one")
    other = storax.StateIndex(name="other one")
    for i in (index, other):
        storax.set_state(i, jnp.zeros(20_000))

    @storax.jit
    def f(when):
        like = jnp.zeros(20_000)
        y = failing(jnp.float32(0), when)
        storax.set_state(index, storax.get_state(index, like) + y)
        return y + storax.get_state(other, like)[0]

    f(jnp.array(False))
    messages = []
    for _ in range(2):
        try:
            jax.block_until_ready(f(jnp.array(True)))
        except RuntimeError as e:
            messages.append(str(e))
    try:
        storax.get_state(index, jnp.zeros(20_000))
    except RuntimeError as e:
        messages.append(str(e))
    assert any("lost one" in m and "is lost" in m for m in messages), messages
    assert not any("other one" in m for m in messages)


def test_an_error_at_the_call_says_what_is_lost():
    index, count, _ = counter(1, 20_000)
    f = storax.jit(lambda x, when: count()[0] + failing(x, when))
    for compiled in (False, True):
        if compiled:  # and called by the C++ path
            storax.set_state(index, jnp.zeros(20_000))
            f(jnp.float32(1), jnp.array(False))
        try:
            out = f(jnp.float32(1), jnp.array(True))
        except RuntimeError as e:
            message = str(e)
        else:  # it was still running
            with pytest.raises(RuntimeError, match="the user's own"):
                jax.block_until_ready(out)
            continue
        assert "is lost: StateIndex 'counter'. Set it again." in message


def test_the_store_comes_after_what_may_fail_and_after_ordered_effects():
    """Even where no value leads from there to what is stored."""
    _, count, _ = counter(1)

    def operands(f, *args):
        text = storax.jit(f).lower(*args).as_text()
        (call,) = re.findall(r"@storax.store_states.*? : \((.*?)\) ->", text)
        return call.split(", ")

    x, when = jnp.float32(1), jnp.array(True)
    plain = operands(lambda: count())
    assert plain == ["tensor<i32>", "tensor<f32>"]

    def unused(x, when):
        failing(jnp.stack([x, x]), when)
        return count()

    assert "tensor<2xf32>" in operands(unused, x, when)
    in_loop = lambda x, when: jax.lax.map(lambda y: failing(y, when), jnp.stack([x, x])) + count()
    assert "tensor<2xf32>" in operands(in_loop, x, when)

    def ordered(x):
        jax.debug.callback(print, x, ordered=True)
        return count()

    assert "!stablehlo.token" in operands(ordered, x)


def test_without_donation_large_states_stay():
    _, count, state = counter(1, 20_000)

    @(lambda f: storax.jit(f, donate=False))
    def f(x, when):
        y = failing(x, when)
        return y + count(y)[0]

    f(jnp.float32(1), jnp.array(False))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the user's own"):
            jax.block_until_ready(f(jnp.float32(1), jnp.array(True)))
        assert state() == 2
    np.testing.assert_array_equal(f(jnp.float32(1), jnp.array(False)), 4)
    assert state() == 3


def test_tracebacks_and_messages_are_of_the_users_code():
    """As under `jax.jit`: no frames of storax, and the function and its arguments by their names."""
    _, count, _ = counter()

    def half(x):
        if x > 0:
            return x
        return x / 2

    def user(model, x, *rest, scale):
        count()
        return half(model["w"]), half(x), half(rest[0]), half(scale)

    for at, name in enumerate(("model['w']", "x", "rest[0]", "scale")):
        # Python numbers are static.
        w, x, rest, scale = [1.0] * at + [jnp.ones(())] * (4 - at)
        for run in (storax.jit(user), storax.jit(user).lower):
            with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
                run({"name": "a static leaf", "w": w}, x, rest, scale=scale)
            frames = traceback.extract_tb(caught.value.__traceback__)
            assert not [f for f in frames if "storax" in Path(f.filename).parent.name]
            assert [f.name for f in frames][-2:] == ["user", "half"]
            assert "tracing the function user at" in str(caught.value)
            assert f"the value of the argument {name}." in str(caught.value)
