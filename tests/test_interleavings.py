"""Interleavings that a real mount hits once in a million, forced: the real file system, cache, engine and store, with a
hook before or after any call of the store. No mount, so the test itself may act for the kernel.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.stage import MIB, PATIENCE, Stage, wait_for
from tests.test_promises import wait_until
from wbfuse.filesystem.api import Lent, WouldBlock
from wbfuse.store.contract import ROOT_INO, Change, FencedError
from wbfuse.store.directory import DirectoryStore
from wbfuse.wire.constants import FATTR_MTIME
from wbfuse.wire.requests import Setattr
from wbfuse.writeback import quarantine
from wbfuse.writeback.cleaner import clean
from wbfuse.writeback.drain import drain
from wbfuse.writeback.engine import _TRIES


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def stage(source: Path) -> Iterator[Stage]:
    made = Stage(source)
    yield made
    made.end()


def test_whoever_begins_to_wait_during_a_commit_gets_a_sync_of_its_own(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    stage.write(ino, fh, 0, b"x" * 4096)
    waiting: list[int | None] = []
    stage.engine.before_finish = lambda: waiting.append(stage.fsync(ino, fh))
    stage.start()
    stage.engine.wait_until(1)
    assert waiting[0] is not None
    assert stage.reply(waiting[0]) == (None, 0)
    assert stage.store.calls["sync"] == 1


def test_a_commit_during_sync_all_is_not_taken_for_durable(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    stage.start()

    def somebody_writes() -> None:
        stage.write(ino, fh, 0, b"y")
        stage.engine.wait_until(1)

    stage.store.once_after("sync_all", somebody_writes)
    assert drain(stage.cache, lambda _left: None, lambda: False) == []
    unique = stage.fsync(ino, fh)
    assert unique is not None, "what came after sync_all is not durable"
    assert stage.reply(unique) == (None, 0)
    assert stage.store.calls["sync"] == 1


def test_no_round_begins_while_the_store_copies_into_the_file(stage: Stage) -> None:
    source, fh_in = stage.create(b"from")
    target, fh_out = stage.create(b"to")
    os.write(fd := os.open(stage.source / "from", os.O_WRONLY), b"S" * 8192)
    os.close(fd)

    waiting: list[int | None] = []

    def somebody_writes() -> None:
        stage.write(target, fh_out, 0, b"new")
        waiting.append(stage.fsync(target, fh_out))
        cache = stage.cache
        with cache.lock:
            assert not any(target in queue for queue in (cache.dirty, cache.full, cache.urgent))

    stage.store.once_after("copy_range", somebody_writes)
    stage.start()
    done = stage.fs.copy_file_range(stage.request(source), fh_in, 0, target, fh_out, 4096, 8192, 0)
    assert done == 8192
    assert waiting[0] is not None
    assert stage.reply(waiting[0]) == (None, 0)
    assert stage.stored("to") == b"new" + bytes(4093) + b"S" * 8192


@pytest.mark.parametrize("dirty", ["from", "to"])
def test_the_store_does_not_copy_what_is_not_committed(stage: Stage, dirty: str) -> None:
    source, fh_in = stage.create(b"from")
    target, fh_out = stage.create(b"to")
    ino, fh = (source, fh_in) if dirty == "from" else (target, fh_out)
    stage.write(ino, fh, 0, b"not yet there")
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        stage.fs.copy_file_range(stage.request(source), fh_in, 0, target, fh_out, 0, 100, 0)
    assert stage.store.calls["copy_range"] == 0


def test_bytes_lent_to_a_reply_stay_until_it_is_sent(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    other, other_fh = stage.create(b"g")
    for n in range(4):
        stage.write(ino, fh, n * MIB, b"F" * MIB)
    lent = stage.fs.read(stage.request(ino, blocking=False), fh, 0, 4096, 0)
    assert isinstance(lent, Lent)
    stage.start()
    stage.engine.wait_until(1)  # the round has ended: nothing but the reply needs its segment
    for n in range(24):
        stage.fs.write(stage.request(other), other_fh, n * MIB, memoryview(b"G" * MIB), 0, 0)
    assert bytes(lent[0]) == b"F" * 4096
    free = stage.cache.log.free_segments
    lent.release()
    assert stage.cache.log.free_segments > free


@pytest.mark.parametrize("how", ["open", "lookup"])
def test_attributes_read_before_a_commit_are_not_adopted_after_it(stage: Stage, how: str) -> None:
    """Between the store's answer and its use somebody else opens, writes, commits and closes."""
    ino, fh = stage.create(b"f")
    stage.fs.release(stage.request(ino), fh, 0)

    def a_whole_life() -> None:
        opened = stage.fs.open(stage.request(ino), os.O_RDWR, 0)
        stage.write(ino, opened.fh, 0, b"z" * 100_000)
        stage.fs.release(stage.request(ino), opened.fh, 0)
        stage.engine.wait_until(1)

    stage.start()
    if how == "open":
        stage.store.once_after("getattr", a_whole_life)
        opened = stage.fs.open(stage.request(ino), os.O_RDWR, 0)
        stage.write(ino, opened.fh, 0, b"1")
        unique = stage.fsync(ino, opened.fh)
        assert unique is not None
        assert stage.reply(unique) == (None, 0)
        assert len(stage.stored("f")) == 100_000
    else:
        stage.store.once_after("lookup", a_whole_life)
        assert stage.fs.lookup(stage.request(ROOT_INO), b"f").attr.size == 100_000


def test_a_mode_set_during_a_commit_is_shown(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    stage.store.once_after("getattr", lambda: stage.fs.changed(ino, stage.store.setattr(ino, Change(mode=0o600))))
    stage.write(ino, fh, 0, b"z")
    stage.start()
    stage.engine.wait_until(1)
    assert stat.S_IMODE(stage.fs.getattr(stage.request(ino), None).mode) == 0o600


def test_a_lookup_keeps_its_node_though_an_older_one_is_forgotten(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    stage.fs.release(stage.request(ino), fh, 0)
    stage.start()
    stage.store.once_after("lookup", lambda: stage.fs.forget(stage.request(ino, blocking=False), 1))
    entry = stage.fs.lookup(stage.request(ROOT_INO), b"f")
    assert entry.nodeid == ino
    opened = stage.fs.open(stage.request(entry.nodeid), os.O_RDONLY, 0)  # ESTALE if the node had gone
    stage.fs.release(stage.request(ino), opened.fh, 0)
    assert stage.fs.getattr(stage.request(ino), None).nlink == 1


def test_a_file_opened_while_it_is_unlinked_can_be_written_and_closed(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    stage.fs.release(stage.request(ino), fh, 0)
    stage.start()
    stage.store.once_after("getattr", lambda: stage.fs.unlink(stage.request(ROOT_INO), b"f"))
    opened = stage.fs.open(stage.request(ino), os.O_RDWR, 0)
    orphans, removed = stage.source / ".wbfuse" / "orphans", threading.Event()
    assert len(os.listdir(orphans)) == 1
    stage.store.after["drop"] = lambda *_: removed.set() if not os.listdir(orphans) else None
    stage.write(ino, opened.fh, 0, b"to nobody")
    stage.fs.release(stage.request(ino), opened.fh, 0)
    wait_for(removed)
    assert drain(stage.cache, lambda _left: None, lambda: False) == []
    assert ino not in stage.cache.files


def test_forget_does_not_wait_for_a_name_operation(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    stage.fs.release(stage.request(ino), fh, 0)
    stage.start()
    forgotten = threading.Event()

    def forget() -> None:
        stage.fs.forget(stage.request(ino, blocking=False), 1)
        forgotten.set()

    store = cast(DirectoryStore, stage.store.store)
    with store.names:  # a slow unlink(2) is under way
        thread = threading.Thread(target=forget)
        thread.start()
        wait_for(forgotten)
    thread.join()
    with pytest.raises(OSError, match="not known"):
        stage.store.getattr(ino)


def test_age_is_watched_while_another_round_is_under_way(source: Path) -> None:
    """The committer that watched the oldest file's age takes that file: another must watch the next."""
    stage = Stage(source, expire=0.2)
    slow, slow_fh = stage.create(b"slow")
    young, young_fh = stage.create(b"young")
    under_way, written = threading.Event(), threading.Event()

    def commit(rounds: Any, _progress: object) -> None:
        if rounds[0].ino == slow:
            under_way.set()
            wait_for(written)
        else:
            written.set()

    stage.store.before["commit"] = commit
    try:
        stage.start()
        stage.write(slow, slow_fh, 0, b"1")
        stage.write(young, young_fh, 0, b"2")
        wait_for(under_way)
        wait_for(written)  # though the one round that age alone may start has not ended
        stage.engine.wait_until(2)
        assert stage.stored("young") == b"2"
    finally:
        written.set()
        stage.end()


def test_a_store_that_cannot_drop_does_not_end_write_back(stage: Stage) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect of the store")

    stage.start()
    for n in range(20):  # more than there are committers
        ino, fh = stage.create(b"f%d" % n)
        stage.write(ino, fh, 0, b"x")
        stage.store.before["drop"] = fail
        stage.fs.release(stage.request(ino), fh, 0)
        stage.engine.wait_until(n + 1)
        del stage.store.before["drop"]
    assert stage.stored("f19") == b"x"


class Clock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asked = threading.Condition()
        self.times = 0

    def __call__(self) -> float:
        with self.asked:
            self.times += 1
            self.asked.notify_all()
            return self.now

    def wait_asked(self, more: int) -> None:
        with self.asked:
            until = self.times + more
            assert self.asked.wait_for(lambda: self.times >= until, PATIENCE)


def test_a_sync_that_fails_for_now_is_not_tried_again_before_its_time(source: Path) -> None:
    clock = Clock()
    stage = Stage(source, clock, expire=3600)
    try:
        ino, fh = stage.create(b"f")
        stage.start()

        def fail(*_: object) -> None:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

        stage.store.before["sync"] = fail
        unique = stage.fsync(ino, fh)
        assert unique is not None
        stage.engine.wait_until(1)
        clock.wait_asked(3)  # the committers have looked again, at a time that has not moved
        assert stage.store.calls["sync"] == 1
        del stage.store.before["sync"]
        clock.now += 1
        assert stage.reply(unique) == (None, 0)
        assert stage.store.calls["sync"] == 2
    finally:
        stage.end()


def sparse_segment(stage: Stage, live: tuple[int, int, int, bytes], dead: tuple[int, int]) -> int:
    """Write `live` (node, handle, offset, data), then rewrites by another file until the segment is left.

    Answers its number.
    """
    ino, fh, offset, data = live
    stage.fs.write(stage.request(ino), fh, offset, memoryview(data), 0, 0)
    index = stage.cache.log._side.index
    while stage.cache.log._side.index == index:
        stage.fs.write(stage.request(dead[0]), dead[1], 0, memoryview(b"r" * MIB), 0, 0)
    return index


def test_the_cleaner_passes_over_a_segment_with_notes(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    other = stage.create(b"rewritten")
    stage.fs.setattr(stage.request(ino), Setattr(FATTR_MTIME, fh, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0))
    noted = sparse_segment(stage, (ino, fh, 0, b"L" * 4096), other)
    plain = sparse_segment(stage, (ino, fh, 4096, b"L" * 8192), other)
    segments = stage.cache.log.segments
    before = segments[noted].live
    with stage.cache.lock:
        assert clean(stage.cache)
    assert segments[plain].live == 0
    assert (segments[noted].live, segments[noted].notes) == (before, 1)
    lent = stage.fs.read(stage.request(ino, blocking=False), fh, 0, 12288, 0)
    assert isinstance(lent, Lent)
    assert b"".join(bytes(part) for part in lent) == b"L" * 12288
    lent.release()


def test_the_cleaner_passes_over_a_round_in_flight(source: Path) -> None:
    stage = Stage(source, expire=3600)
    in_flight, cleaned = threading.Event(), threading.Event()

    def commit(*_: object) -> None:
        in_flight.set()
        wait_for(cleaned)

    try:
        ino, fh = stage.create(b"f")
        idle, idle_fh = stage.create(b"idle")
        other = stage.create(b"rewritten")
        busy = sparse_segment(stage, (ino, fh, 0, b"L" * 4096), other)
        plain = sparse_segment(stage, (idle, idle_fh, 0, b"I" * 8192), other)
        stage.store.before["commit"] = commit
        stage.start()
        unique = stage.fsync(ino, fh)
        assert unique is not None
        wait_for(in_flight)
        segments = stage.cache.log.segments
        with stage.cache.lock:
            assert clean(stage.cache)
            assert (segments[busy].live, segments[plain].live) == (4096, 0)
        cleaned.set()
        assert stage.reply(unique) == (None, 0)
        assert stage.stored("f") == b"L" * 4096
        assert drain(stage.cache, lambda _left: None, lambda: False) == []
        assert stage.stored("idle") == b"I" * 8192
    finally:
        cleaned.set()
        stage.end()


def test_a_request_that_would_wait_says_so_on_the_reader(stage: Stage) -> None:
    """What no cache knows is not asked of the store inline."""
    ino, fh = stage.create(b"f")
    stage.fs.release(stage.request(ino), fh, 0)
    stage.start()
    drain(stage.engine.cache, lambda _left: None, lambda: False)
    with pytest.raises(WouldBlock):
        stage.fs.write(stage.request(ino, blocking=False), fh, 0, memoryview(b"x"), 0, 0)


def test_an_atime_set_after_a_write_leaves_the_mtime_of_the_write(stage: Stage) -> None:
    ino, fh = stage.create(b"f")
    f = stage.cache.files[ino]
    stage.cache.set_times(f, 1, None, 1000)
    stage.write(ino, fh, 0, b"x")  # direct: it moves the time itself
    moved = f.core.mtime_ns
    stage.cache.set_times(f, 2, 5, None)
    assert moved > 1000
    assert (f.core.atime_ns, f.core.mtime_ns) == (5, moved)


def test_a_fenced_file_is_set_aside_and_others_in_its_commit_are_not(source: Path) -> None:
    """Nothing is lost while it is being kept, whatever comes meanwhile, and who waits is answered."""
    stage = Stage(source, expire=3600)
    kept: list[tuple[int, list[bytes]]] = []
    keeping, go_on = threading.Event(), threading.Event()
    lost, lost_fh = stage.create(b"lost")
    fine, fine_fh = stage.create(b"fine")

    def commit(rounds: Any, _progress: object) -> None:
        if any(r.ino == lost for r in rounds):
            raise FencedError("by the test")

    def keep(ino: int, _size: int, rounds: list[list[Any]]) -> None:
        keeping.set()
        wait_for(go_on)
        kept.append((ino, [bytes(b) for pieces in rounds for p in pieces for b in p.buffers]))

    stage.store.before["commit"] = commit
    stage.engine.keep = keep
    try:
        stage.start()
        stage.write(lost, lost_fh, 0, b"precious")
        first = stage.fsync(lost, lost_fh)
        wait_for(keeping)
        another = stage.fs.open(stage.request(lost), os.O_RDWR, 0)  # it has not seen the error
        second = stage.fsync(lost, another.fh)
        stage.write(fine, fine_fh, 0, b"good")
        go_on.set()
        for unique in (first, second):
            assert unique is not None
            assert stage.reply(unique)[1] == errno.EIO
        assert kept == [(lost, [b"precious"])]
        with pytest.raises(OSError, match="by the test"):
            stage.write(lost, lost_fh, 0, b"more")
        done = stage.fsync(fine, fine_fh)
        assert done is not None
        assert stage.reply(done)[1] == 0
        assert stage.stored("fine") == b"good"
    finally:
        go_on.set()
        stage.end()


@pytest.mark.parametrize("error", [errno.EFBIG, errno.ESTALE])
def test_what_fails_for_good_is_set_aside_after_some_tries_and_what_may_pass_is_not(
    source: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wbfuse.writeback.engine._FIRST_RETRY", 0.0005)
    stage = Stage(source, expire=3600)
    passing = [errno.EIO, error]
    """Others do not count, and begin the count anew."""
    kept: list[int] = []
    tries: list[int] = []
    full, full_fh = stage.create(b"full")
    ino, fh = stage.create(b"f")

    def commit(rounds: Any, _progress: object) -> None:
        tries.append(rounds[0].ino)
        if rounds[0].ino == full:
            raise OSError(errno.ENOSPC, "by the test")
        raise OSError(passing.pop() if passing else error, "by the test")

    stage.store.before["commit"] = commit
    stage.engine.keep = lambda ino, _size, _rounds: kept.append(ino)
    try:
        stage.start()
        stage.write(full, full_fh, 0, b"may pass")
        stage.write(ino, fh, 0, b"never")
        for one, handle, number in ((full, full_fh, errno.ENOSPC), (ino, fh, error)):
            waits = stage.fsync(one, handle)
            assert waits is not None
            assert stage.reply(waits)[1] == number
        assert wait_until(lambda: bool(kept) and tries.count(full) >= _TRIES)
        assert kept == [ino]
        assert tries.count(ino) == 2 + _TRIES
        assert wait_until(lambda: not stage.cache.files[ino].core.generations)
        assert stage.cache.files[full].core.generations
        with pytest.raises(OSError, match=os.strerror(error)):
            stage.write(ino, fh, 0, b"more")
    finally:
        stage.end()


def unlink_it(stage: Stage, ino: int, fh: int) -> None:
    stage.fs.release(stage.request(ino), fh, 0)
    stage.fs.unlink(stage.request(ROOT_INO), b"f")


def close_the_mount(stage: Stage, _ino: int, _fh: int) -> None:
    stage.cache.close()


@pytest.mark.parametrize("act", [unlink_it, close_the_mount])
def test_a_large_round_is_broken_off_where_nobody_wants_it_any_more(
    source: Path, act: Callable[[Stage, int, int], None]
) -> None:
    stage = Stage(source, expire=3600)
    ino, fh = stage.create(b"f")
    taken: list[int] = []

    def commit(rounds: Any, progress: Callable[[int], None]) -> None:
        def told(done: int) -> None:
            taken.append(done)
            if len(taken) == 1:
                act(stage, ino, fh)
            progress(done)

        DirectoryStore.commit(stage.store.store, rounds, told)

    cast(Any, stage.store).commit = commit
    try:
        for at in range(16):
            stage.write(ino, fh, at * MIB, os.urandom(MIB))
        stage.start()
        drain(stage.cache, lambda _left: None, lambda: len(stage.engine.finished) > 0)
        assert stage.engine.finished[0] == (ino, errno.ECANCELED)
        assert taken == [MIB]
        assert stage.cache.unwritten == (0 if act is unlink_it else 16 * MIB)
        assert not stage.cache.last_error or act is close_the_mount
    finally:
        stage.end()


def test_what_is_set_aside_has_nothing_of_what_was_cut_off(source: Path, tmp_path: Path) -> None:
    stage = Stage(source, expire=3600)
    ino, fh = stage.create(b"f")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "by the test")

    stage.store.before["commit"] = fail
    stage.engine.keep = lambda ino, size, rounds: quarantine.keep(str(tmp_path), "x", ino, "/f", size, rounds)
    try:
        stage.start()
        stage.write(ino, fh, 0, b"A" * MIB)
        waits = stage.fsync(ino, fh)
        assert waits is not None
        assert stage.reply(waits)[1] == errno.EIO
        f = stage.cache.files[ino]
        stage.cache.truncate(f, 1, 5000, 1000)
        stage.write(ino, fh, 0, b"B" * 10)
        stage.cache.truncate(f, 2, MIB, 1000)
        assert stage.engine.rescue()
        (kept,) = quarantine.entries(str(tmp_path))
        assert Path(kept.data).read_bytes() == (b"B" * 10 + b"A" * 4990).ljust(MIB, b"\0")
        assert kept.manifest["ranges"] == [[0, MIB]]
    finally:
        stage.end()
