"""Renames that wait, in the whole cached file system: what becomes of the replaced file, and of its successor."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.stage import Stage
from tests.test_promises import wait_until
from wbfuse.store.contract import ROOT_INO
from wbfuse.testing.store import fails_with
from wbfuse.wire.constants import FATTR_SIZE, RENAME_WHITEOUT
from wbfuse.wire.requests import Setattr


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr("wbfuse.writeback.engine._FIRST_RETRY", 0.0005)
    source = tmp_path / "source"
    source.mkdir()
    made = Stage(source, expire=3600, shared=True)
    yield made
    made.end()


def old_and_new(stage: Stage) -> tuple[int, int, int]:
    """`old` is in the store, `new` is not; answers both numbers, and the handle of `new`."""
    old, fh = stage.create(b"old")
    stage.write(old, fh, 0, b"the old one")
    stage.start()
    waits = stage.fsync(old, fh)
    assert waits is not None
    assert stage.reply(waits) == (None, 0)
    stage.fs.release(stage.request(old), fh, 0)
    new, fh = stage.create(b"new")
    stage.write(new, fh, 0, b"the new one")
    return old, new, fh


def rename(stage: Stage, flags: int = 0) -> None:
    stage.fs.rename(stage.request(ROOT_INO), b"new", ROOT_INO, b"old", flags)
    stage.fs.follow_renames()


def never(number: int) -> Callable[..., None]:
    def commit(*_: object) -> None:
        raise OSError(number, "by the test")

    return commit


def test_flags_that_the_store_does_not_know_are_refused_though_the_rename_would_wait(stage: Stage) -> None:
    old_and_new(stage)
    assert fails_with(errno.EINVAL, lambda: rename(stage, RENAME_WHITEOUT))


def test_a_file_that_is_not_replaced_after_all_has_its_link_again(stage: Stage) -> None:
    old, new, fh = old_and_new(stage)
    kept: list[int] = []
    stage.engine.keep = lambda ino, _size, _rounds: kept.append(ino)
    stage.store.before["commit"] = never(errno.EFBIG)
    reader = stage.fs.open(stage.request(old), os.O_RDWR, 0)  # so that the cache knows it
    rename(stage)
    assert stage.fs.getattr(stage.request(old), None).nlink == 0
    assert wait_until(lambda: kept == [new] and not stage.fs.renames.pending)
    assert stage.fs.getattr(stage.request(old), None).nlink == 1
    stage.fs.link(stage.request(ROOT_INO), old, b"another")
    assert stage.fs.getattr(stage.request(old), None).nlink == 2
    assert stage.stored("old") == b"the old one"
    stage.fs.release(stage.request(old), reader.fh, 0)
    stage.fs.release(stage.request(new), fh, 0)


def test_a_file_that_lost_what_was_written_to_it_replaces_none(stage: Stage) -> None:
    _, new, fh = old_and_new(stage)
    kept: list[int] = []
    stage.engine.keep = lambda ino, _size, _rounds: kept.append(ino)
    stage.store.before["commit"] = never(errno.EFBIG)
    waits = stage.fsync(new, fh)
    assert waits is not None
    assert stage.reply(waits)[1] == errno.EFBIG
    assert wait_until(lambda: kept == [new] and not stage.cache.files[new].core.generations)
    stage.fs.release(stage.request(new), fh, 0)
    stage.store.before.clear()
    assert fails_with(errno.EIO, lambda: rename(stage))
    assert stage.stored("old") == b"the old one"
    stage.fs.setattr(stage.request(new), Setattr(FATTR_SIZE, *[0] * 12))  # it is begun anew
    rename(stage)
    assert wait_until(lambda: stage.stored("old") == b"")


def test_who_follows_a_rename_of_a_clean_file_takes_it_for_this_mount(stage: Stage) -> None:
    """Else another host could, unseen by whoever opens it here while the rename waits."""
    _, new, fh = old_and_new(stage)
    waits = stage.fsync(new, fh)
    assert waits is not None
    assert stage.reply(waits) == (None, 0)
    stage.fs.release(stage.request(new), fh, 0)
    assert new not in stage.cache.files
    taken = stage.store.calls["acquire"]
    stage.store.before["rename"] = never(errno.EIO)
    rename(stage)
    assert stage.store.calls["acquire"] == taken + 1
    stage.store.before.clear()
    stage.fs.follow_renames()
    assert wait_until(lambda: stage.stored("old") == b"the new one")


def test_a_rename_whose_source_another_host_has_taken_is_carried_out_at_once(stage: Stage) -> None:
    """What was written to it here is durable, else it would be this mount's still."""
    _, new, fh = old_and_new(stage)
    waits = stage.fsync(new, fh)
    assert waits is not None
    assert stage.reply(waits) == (None, 0)
    stage.fs.release(stage.request(new), fh, 0)
    stage.store.before["acquire"] = never(errno.EBUSY)
    rename(stage)
    assert stage.stored("old") == b"the new one"
    assert not stage.fs.renames.pending
