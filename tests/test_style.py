"""Rules that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

SOURCES = sorted((Path(__file__).parent.parent / "src").rglob("*.py"))


def test_no_descriptor_number_is_taken_from_a_temporary() -> None:
    """`f(x()).n`: the Fd may close itself, and its number go to another file, before the number is used."""
    assert SOURCES
    bad = [
        f"{p.name}: {line.strip()}"
        for p in SOURCES
        for line in p.read_text().splitlines()
        if re.search(r"\)\.n\b", line)
    ]
    bad = [line for line in bad if "`" not in line]
    assert not bad


def test_each_file_says_what_it_is() -> None:
    assert all(p.read_text().startswith('"""') for p in SOURCES)
