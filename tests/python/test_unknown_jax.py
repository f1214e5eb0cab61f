"""A JAX newer than any tested: storax imports, says so once, and refuses only what it can't verify."""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import warnings
import jax, jax.numpy as jnp
from jax import lax
import storax, storax._jax
storax._jax.VERSION = (99, 0)
"""

USE = """
def bump(x):
    s = storax.get_state(index, jnp.float32(0))
    storax.set_state(index, s + 1)
    return x * s

def run(f):
    try:
        f()
        return "ok"
    except NotImplementedError as e:
        assert "JAX" in str(e) and "0.12" in str(e), e
        return "refused"

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    index = storax.StateIndex()
    storax.StateIndex()
said = [str(w.message) for w in said if "storax" in str(w.message)]
assert len(said) == 1 and "tested on JAX 0.10" in said[0], said
storax.set_state(index, jnp.float32(0))
xs = jnp.arange(3.0)
while_loop = lambda x: lax.while_loop(lambda x: x < 2, lambda x: x + 1 + 0 * bump(x), x)
print(run(lambda: jax.jit(bump)(1.0)),
      run(lambda: jax.jit(jax.grad(bump))(1.0)),
      run(lambda: jax.jit(jax.vmap(lambda x: lax.cond(x > 1, bump, lambda x: x, x)))(xs)),
      run(lambda: jax.jit(jax.vmap(while_loop))(xs)),
      run(lambda: jax.jit(jax.grad(lambda x: jnp.sin(x)))(1.0)), end=" ")
with jax.disable_jit():
    print(run(lambda: jax.vmap(lambda _: storax.set_state(index, jnp.float32(1)))(xs)))
"""

BREAKS = {
    "nothing": ("", "ok ok ok ok ok ok"),
    "the fix for scans": (
        "storax._jax.PATCHES = tuple(p for p in storax._jax.PATCHES if p[0] != 'grad')",
        "ok refused ok ok ok ok",
    ),
    "a name that grad needs": (
        "storax._jax._loops = storax._jax._Missing('jax._src.lax.control_flow.loops')",
        "ok refused ok ok ok refused",
    ),
    "masking": (
        "storax._masked._masked_equation = lambda eqn, ins, *_: storax._jax.bind_equation(eqn, ins)",
        "ok ok refused refused ok ok",
    ),
    "a name that vmap needs": (
        "storax._jax.wrap_batching = lambda *args: storax._jax._Missing('jax._src.x').y",
        "ok ok refused refused ok refused",
    ),
    "a name that jit needs": (
        "storax._jax._pxla = storax._jax._Missing('jax._src.interpreters.pxla')",
        "refused refused refused refused ok ok",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_only_what_cannot_be_verified_is_refused(what):
    how, want = BREAKS[what]
    program = textwrap.dedent(PRELUDE) + how + textwrap.dedent(USE)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == want


def test_tested_versions_are_not_checked():
    program = PRELUDE.replace("storax._jax.VERSION = (99, 0)", "") + (
        "import sys\n"
        "warnings.simplefilter('error')\n"
        "storax.StateIndex()\n"
        "import storax._unknown_jax as u\n"
        "assert not u._refused\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
