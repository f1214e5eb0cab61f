"""tools/mutants.py takes out what is there: a change of the code may not leave a mutant behind."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_mutant_has_its_place(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    from mutants_list import MUTANTS

    package = ROOT / "python" / "storax"
    stale = [m.name for m in MUTANTS if (package / m.file).read_text().count(m.old) != 1]
    assert len(MUTANTS) > 100
    assert stale == []
