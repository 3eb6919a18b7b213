"""The quarantine: what is there is shown, whatever somebody has made of its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import wbfuse
from wbfuse.writeback import quarantine
from wbfuse.writeback.log import Log


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Path(quarantine.default_directory())


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "[" * 100_000, '{"ranges": 1}', "{broken"])
def test_an_entry_that_is_none_hides_no_other(home: Path, manifest: str) -> None:
    name = quarantine.keep(str(home), "source", 5, "/a\nb\x1b", 3, [])
    (home / "20990101T000000-5-000000").mkdir()
    (home / "20990101T000000-5-000000/manifest.json").write_text(manifest)
    (kept,) = quarantine.entries(str(home))
    assert kept.name == name
    said = wbfuse("recover", check=True)
    assert "/a\\nb\\x1b in source" in said.stdout
    assert "not an entry of the quarantine" in said.stderr


def test_a_log_that_was_changed_since_it_was_kept_is_told(home: Path, tmp_path: Path) -> None:
    log_ = Log(4 << 20, 1 << 18)
    name = quarantine.keep_log(str(home), "source", {"log": log_.fd, "journal": log_.fd})
    (kept,) = quarantine.entries(str(home))
    assert kept.sound()
    assert "damaged" not in wbfuse("recover", name).stdout
    with open(kept.path + "/log", "r+b") as f:
        f.seek(1 << 20)
        f.write(b"something else")
    assert not kept.sound()
    assert "damaged since it was kept" in wbfuse("recover", name).stdout
    os.truncate(kept.path + "/journal", 1)
    said = wbfuse("recover", name)
    assert "Traceback" not in said.stderr
    os.unlink(kept.path + "/journal")
    said = wbfuse("recover", name)
    assert said.returncode
    assert "No such file" in said.stderr
    assert "Traceback" not in said.stderr
    assert json.loads(Path(kept.path, "manifest.json").read_text())["source"] == "source"
