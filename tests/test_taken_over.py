"""What the next server goes on with: the file system of a dead one's journal, in the same process."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.stage import Stage
from tests.test_promises import wait_until
from wbfuse.journal import Journal, Kind
from wbfuse.store.contract import ROOT_INO
from wbfuse.wire.constants import UNIQUE_RESEND


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


def test_an_append_that_is_sent_again_after_it_was_committed_goes_where_it_went(source: Path) -> None:
    """A server dies after the record has left the log and before the reply; on a shared volume it chose the place."""
    (source / "f").write_bytes(b"first line\n")

    def append(stage: Stage, unique: int, end: int) -> tuple[int, int]:
        ino = stage.fs.lookup(stage.request(ROOT_INO), b"f").nodeid
        fh = stage.fs.open(stage.request(ino), os.O_RDWR | os.O_APPEND, 0).fh
        request = stage.request(ino)
        request.unique = unique
        stage.fs.write(request, fh, end, memoryview(b"once\n"), 0, os.O_APPEND)
        waits = stage.fsync(ino, fh)
        assert waits is not None
        assert stage.reply(waits)[1] == 0
        return ino, fh

    before = Stage(source, shared=True)
    before.start()
    append(before, 1000, 11)
    before.end()
    after = Stage(source, shared=True, journal=Journal(os.dup(before.journal.fd)))
    after.start()
    try:
        ino, fh = append(after, 1000 | UNIQUE_RESEND, 11)
        assert after.stored("f") == b"first line\nonce\n"
        after.fs.release(after.request(ino), fh, 0)
        append(after, 1002, 16)
        assert after.stored("f") == b"first line\nonce\nonce\n"
    finally:
        after.end()


def test_an_error_that_a_handle_has_not_heard_of_outlives_the_server(source: Path) -> None:
    """Though the data has been written since, and the file is clean."""
    before = Stage(source, expire=3600)
    before.start()
    ino, one = before.create(b"f")
    other = before.fs.open(before.request(ino), os.O_RDWR, 0).fh

    def fail(*_: object) -> None:
        before.store.before.clear()
        raise OSError(errno.EIO, "by the test")

    before.store.before["commit"] = fail
    before.write(ino, one, 0, b"data")
    waits = before.fsync(ino, one)
    assert waits is not None
    assert before.reply(waits)[1] == errno.EIO
    waits = before.fsync(ino, one)
    assert waits is not None
    assert before.reply(waits)[1] == 0
    journal = Journal(os.dup(before.journal.fd))
    before.end()
    after = Stage(source, expire=3600, journal=journal)
    try:
        after.fs.take_over()
        after.start()
        with pytest.raises(OSError, match="Input/output"):
            after.fsync(ino, other)
        waits = after.fsync(ino, other)
        assert waits is not None
        assert after.reply(waits)[1] == 0
        assert wait_until(lambda: not after.cache.files[ino].busy)
        after.fs.release(after.request(ino), one, 0)
        after.fs.release(after.request(ino), other, 0)
        assert not Journal(os.dup(journal.fd)).inherited(Kind.ERROR)
    finally:
        after.end()


def test_a_file_without_a_name_that_is_asked_for_again_is_the_same(source: Path) -> None:
    before = Stage(source)
    request = before.request(ROOT_INO)
    entry, opened = before.fs.tmpfile(request, os.O_RDWR, 0o600, 0)
    journal = Journal(os.dup(before.journal.fd))
    root_fd = os.dup(before.store.root_fd)  # as the keeper does; and nothing else ends well
    before.cache.log.close()
    after = Stage(source, journal=journal, root_fd=root_fd)
    try:
        after.fs.take_over()
        request.unique |= UNIQUE_RESEND
        again = after.fs.tmpfile(request, os.O_RDWR, 0o600, 0)
        assert (again[0].nodeid, again[1].fh) == (entry.nodeid, opened.fh)
        assert again[0].attr.nlink == 0
        assert len(os.listdir(source / ".wbfuse/orphans")) == 1
        after.fs.release(after.request(entry.nodeid), opened.fh, 0)
        assert wait_until(lambda: not os.listdir(source / ".wbfuse/orphans"))
    finally:
        after.end()
