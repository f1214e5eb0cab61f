"""Every example of the README and of docs/ does what the page says; pages.py says how they are run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import pages
import storax

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages.run(page)


def test_before_and_after():
    """Pairs: the one without storax, the other with it; `test_examples` has run both to one output."""
    pairs = list(pages.examples_of(ROOT / "docs" / "coming-from-elsewhere.md"))
    assert len(pairs) >= 6
    for pair in pairs:
        before, after = pair.examples
        assert "storax" not in before.code and "import storax" in after.code


def test_the_readme_names_all_there_is():
    _, there_is = (ROOT / "README.md").read_text().split("## What there is")
    assert re.findall(r"`(\w+)\(", there_is) == sorted(storax.__all__, key=there_is.index)


def test_what_to_mind_about_jax_ref():
    """Should JAX lift one of these limits, the page is to say so."""

    def bump(ref):
        ref[...] += 1
        return ref[...]

    make = lambda: jax.new_ref(jnp.array(0))
    ref = make()
    with pytest.raises(ValueError, match="only one reference"):
        lax.while_loop(lambda x: ref[...] < 9, lambda x: x + bump(ref), 0)
    with pytest.raises(NotImplementedError, match="vmap-of-cond"):
        jax.vmap(lambda x: lax.cond(x > 1, lambda: bump(ref), lambda: 0))(jnp.arange(3))
    with pytest.raises(Exception, match="unbatched array reference"):
        jax.vmap(lambda x: ref.__setitem__(..., x))(jnp.arange(3))
    f = lambda ref: lambda x: jnp.sin(x * bump(ref))
    ref, checkpointed = make(), make()
    grads = jax.grad(f(ref))(1.0), jax.grad(jax.checkpoint(f(checkpointed)))(1.0)
    assert ref[...] == 1 and checkpointed[...] == 2
    assert grads[0] != grads[1]


# --- What pages.py itself promises ---

EXAMPLE = "```python\n{}\n```\n"
OUTPUT = "```text\n{}\n```\n"
GOOD = {
    "names are shared": [EXAMPLE.format("x = 1; print(x)"), OUTPUT.format(1)]
    + [EXAMPLE.format("print(x + 1)"), OUTPUT.format(2)],
    "an exception": [EXAMPLE.format("print(1)\n1 / 0"), OUTPUT.format("1\nZeroDivisionError: ...")],
    "versions start from the same names": [EXAMPLE.format("x = 1; print(x)"), OUTPUT.format(1)]
    + [EXAMPLE.format("x += 1; print(x)")] * 2
    + [OUTPUT.format(2)],
}
BAD = {
    "no output": ([EXAMPLE.format("print(1)")], "page.md:2: no output follows"),
    "nothing is checked": (
        [EXAMPLE.format("x = 1"), EXAMPLE.format("print(1)"), OUTPUT.format(1)],
        ":2: it prints",
    ),
    "another output": ([EXAMPLE.format("print(1)"), OUTPUT.format(2)], "it prints\n1\n"),
    "an exception nobody expects": (
        [EXAMPLE.format("1 / 0"), OUTPUT.format(1)],
        "it prints\nZeroDiv",
    ),
    "one version differs": (
        [EXAMPLE.format("print(1)"), "or\n", EXAMPLE.format("print(2)"), OUTPUT.format(1)],
        ":6: it prints\n2\n",
    ),
    "an output of nothing": ([OUTPUT.format(1)], "the output of no example"),
}


@pytest.mark.parametrize("what", GOOD)
def test_pages_that_pass(what, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(GOOD[what]))
    pages.run(page)


@pytest.mark.parametrize("what", BAD)
def test_pages_that_fail(what, tmp_path):
    blocks, message = BAD[what]
    page = tmp_path / "page.md"
    page.write_text("".join(blocks))
    with pytest.raises(AssertionError, match=message):
        pages.run(page)
