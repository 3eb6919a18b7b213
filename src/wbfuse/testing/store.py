"""The contract suite of a Store: subclass `StoreContract`, give it a `store` fixture, and pytest runs it.

class TestMyStore(StoreContract):
    @pytest.fixture
    def store(self): ...
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from wbfuse.store.contract import ROOT_INO, Change, Owner, Piece, Round, Store
from wbfuse.wire.constants import FALLOC_KEEP_SIZE, RENAME_EXCHANGE, RENAME_NOREPLACE

ME = Owner(os.getuid(), os.getgid())


def fails_with(code: int, act: Callable[[], object]) -> bool:
    """Whether `act` raises OSError with exactly this errno."""
    try:
        act()
    except OSError as e:
        return e.errno == code
    return False


def read_all(store: Store, ino: int, size: int = 1 << 16) -> bytes:
    buffer = memoryview(bytearray(size))
    return bytes(buffer[: store.read(ino, 0, buffer)])


def put(store: Store, ino: int, data: bytes) -> None:
    store.commit([Round(ino, None, [Piece(0, len(data), [memoryview(data)])], len(data))], lambda _n: None)


class StoreContract:
    """What every store must do. Each test gets a fresh `store`."""

    def test_a_created_file_is_found_under_its_name(self, store: Store) -> None:
        ino, attr = store.create(ROOT_INO, b"a", 0o100640, ME)
        assert stat.S_IMODE(attr.mode) == 0o640
        assert store.lookup(ROOT_INO, b"a")[0] == ino
        assert fails_with(errno.EEXIST, lambda: store.create(ROOT_INO, b"a", 0o100644, ME))
        assert fails_with(errno.ENOENT, lambda: store.lookup(ROOT_INO, b"b"))

    def test_names_that_are_none_are_refused(self, store: Store) -> None:
        for name in (b"", b".", b"..", b"a/b", b"a\0b"):
            assert fails_with(errno.EINVAL, lambda name=name: store.create(ROOT_INO, name, 0o644, ME)), name  # type: ignore[misc]
        assert fails_with(errno.ENAMETOOLONG, lambda: store.create(ROOT_INO, b"x" * 256, 0o644, ME))
        assert store.create(ROOT_INO, b"x" * 255, 0o644, ME)[0] > ROOT_INO

    def test_a_number_is_never_used_twice(self, store: Store) -> None:
        seen = set()
        for _ in range(20):
            ino, _ = store.create(ROOT_INO, b"again", 0o644, ME)
            assert ino not in seen
            seen.add(ino)
            store.unlink(ROOT_INO, b"again")
            store.forget(ino, 1)

    def test_directories_and_their_errors(self, store: Store) -> None:
        d, attr = store.mkdir(ROOT_INO, b"d", 0o755, ME)
        assert stat.S_ISDIR(attr.mode)
        store.create(d, b"f", 0o644, ME)
        assert fails_with(errno.ENOTEMPTY, lambda: store.rmdir(ROOT_INO, b"d"))
        assert fails_with(errno.EISDIR, lambda: store.unlink(ROOT_INO, b"d"))
        assert fails_with(errno.ENOTDIR, lambda: store.rmdir(d, b"f"))
        store.unlink(d, b"f")
        store.rmdir(ROOT_INO, b"d")
        assert fails_with(errno.ENOENT, lambda: store.lookup(ROOT_INO, b"d"))

    def test_links_are_one_file(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        again, attr = store.link(ino, ROOT_INO, b"b")
        assert (again, attr.nlink) == (ino, 2)
        assert store.unlink(ROOT_INO, b"a") == (ino, 1)
        assert store.getattr(ino).nlink == 1
        assert store.lookup(ROOT_INO, b"b")[0] == ino
        assert fails_with(errno.EEXIST, lambda: store.link(ino, ROOT_INO, b"b"))

    def test_symlinks_keep_their_target(self, store: Store) -> None:
        ino, attr = store.symlink(ROOT_INO, b"l", b"../else/where", ME)
        assert stat.S_ISLNK(attr.mode)
        assert store.readlink(ino) == b"../else/where"

    def test_an_unlinked_open_file_lives_until_it_is_dropped(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.hold(ino)
        put(store, ino, b"still here")
        assert store.unlink(ROOT_INO, b"a") == (ino, 0)
        assert store.getattr(ino).nlink == 0
        put(store, ino, b"and written")
        assert read_all(store, ino) == b"and written"
        assert [e.name for e in store.readdir(ROOT_INO, 0)] in ([b".", b".."], [b"..", b"."])
        store.drop(ino)
        assert fails_with(errno.ESTALE, lambda: store.getattr(ino))

    def test_rename_replaces_and_an_open_target_lives_on(self, store: Store) -> None:
        a, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        b, _ = store.create(ROOT_INO, b"b", 0o644, ME)
        put(store, a, b"a")
        put(store, b, b"b")
        store.hold(b)
        assert store.rename(ROOT_INO, b"a", ROOT_INO, b"b", 0) == (b, 0)
        assert store.lookup(ROOT_INO, b"b")[0] == a
        assert fails_with(errno.ENOENT, lambda: store.lookup(ROOT_INO, b"a"))
        assert read_all(store, b) == b"b"
        store.drop(b)

    def test_rename_flags(self, store: Store) -> None:
        a, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        d, _ = store.mkdir(ROOT_INO, b"d", 0o755, ME)
        b, _ = store.create(d, b"b", 0o644, ME)
        assert fails_with(errno.EEXIST, lambda: store.rename(ROOT_INO, b"a", d, b"b", RENAME_NOREPLACE))
        store.rename(ROOT_INO, b"a", d, b"b", RENAME_EXCHANGE)
        assert store.lookup(ROOT_INO, b"a")[0] == b
        assert store.lookup(d, b"b")[0] == a
        assert fails_with(errno.EINVAL, lambda: store.rename(ROOT_INO, b"a", d, b"b", 1 << 7))
        put(store, a, b"moved")
        assert read_all(store, a) == b"moved"

    def test_a_held_file_is_found_when_its_directory_is_forgotten(self, store: Store) -> None:
        d, _ = store.mkdir(ROOT_INO, b"d", 0o755, ME)
        e, _ = store.mkdir(d, b"e", 0o755, ME)
        f, _ = store.create(e, b"f", 0o644, ME)
        store.hold(f)
        for ino in (f, e, d):
            store.forget(ino, 1)
        put(store, f, b"late")
        store.drop(f)
        assert fails_with(errno.ESTALE, lambda: store.getattr(d))
        found = store.lookup(store.lookup(store.lookup(ROOT_INO, b"d")[0], b"e")[0], b"f")[0]
        assert read_all(store, found) == b"late"

    def test_an_open_file_lives_by_a_link_that_nobody_looked_up(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.link(ino, ROOT_INO, b"b")
        store.forget(ino, 2)
        again, _ = store.lookup(ROOT_INO, b"a")
        store.hold(again)
        assert store.unlink(ROOT_INO, b"a") == (again, 1)
        assert store.getattr(again).nlink == 1
        put(store, again, b"both")
        assert read_all(store, store.lookup(ROOT_INO, b"b")[0]) == b"both"
        store.drop(again)
        assert read_all(store, store.lookup(ROOT_INO, b"b")[0]) == b"both"
        assert store.getattr(store.lookup(ROOT_INO, b"b")[0]).nlink == 1

    def test_what_was_removed_cannot_be_held(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.unlink(ROOT_INO, b"a")
        assert fails_with(errno.ESTALE, lambda: store.hold(ino))

    def test_a_directory_that_moved_is_still_found(self, store: Store) -> None:
        d, _ = store.mkdir(ROOT_INO, b"d", 0o755, ME)
        e, _ = store.mkdir(d, b"e", 0o755, ME)
        f, _ = store.create(e, b"f", 0o644, ME)
        store.rename(ROOT_INO, b"d", ROOT_INO, b"moved", 0)
        put(store, f, b"x")
        assert store.lookup(e, b"f")[0] == f
        assert fails_with(errno.EINVAL, lambda: store.rename(ROOT_INO, b"moved", e, b"into-itself", 0))

    def test_listing_goes_on_from_any_offset_while_names_come_and_go(self, store: Store) -> None:
        names = {b"n%04d" % i for i in range(500)}
        for name in names:
            store.create(ROOT_INO, name, 0o644, ME)
        first = []
        offset = 0
        for entry in store.readdir(ROOT_INO, 0):
            first.append(entry.name)
            offset = entry.offset
            if len(first) == 100:
                break
        for name in first[50:60]:
            if name.startswith(b"n"):
                store.unlink(ROOT_INO, name)
        store.create(ROOT_INO, b"new", 0o644, ME)
        store.rename(ROOT_INO, b"new", ROOT_INO, next(name for name in first[70:] if name.startswith(b"n")), 0)
        rest = [e.name for e in store.readdir(ROOT_INO, offset)]
        assert not set(first) & set(rest)
        assert set(first) | set(rest) == names | {b".", b".."}

    def test_attributes_are_kept_to_the_nanosecond(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        attr = store.setattr(ino, Change(mode=0o600, atime_ns=1_000_000_001, mtime_ns=2_123_456_789))
        assert (stat.S_IMODE(attr.mode), attr.atime_ns, attr.mtime_ns) == (0o600, 1_000_000_001, 2_123_456_789)
        assert store.setattr(ino, Change(mtime_ns=3)).atime_ns == 1_000_000_001

    def test_extended_attributes(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.setxattr(ino, b"user.one", b"1", os.XATTR_CREATE)
        assert fails_with(errno.EEXIST, lambda: store.setxattr(ino, b"user.one", b"2", os.XATTR_CREATE))
        assert fails_with(errno.ENODATA, lambda: store.setxattr(ino, b"user.two", b"2", os.XATTR_REPLACE))
        assert store.getxattr(ino, b"user.one") == b"1"
        assert list(store.listxattr(ino)) == [b"user.one"]
        store.removexattr(ino, b"user.one")
        assert fails_with(errno.ENODATA, lambda: store.getxattr(ino, b"user.one"))

    def test_a_round_is_applied_in_order(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        put(store, ino, b"0123456789" * 10)
        done: list[int] = []
        pieces = [Piece(5, 10, None), Piece(30, 6, [memoryview(b"abc"), memoryview(b"def")])]
        store.commit([Round(ino, 20, pieces, 50, atime_ns=5, mtime_ns=7)], done.append)
        assert read_all(store, ino) == b"01234" + bytes(10) + b"56789" + bytes(10) + b"abcdef" + bytes(14)
        assert store.getattr(ino).mtime_ns == 7
        assert sum(done) == 6

    def test_large_and_unaligned_pieces_arrive_whole(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        data = os.urandom(1 << 20)
        for offset, length in ((0, 1 << 20), (4096, 70000), (3, 200000), (65536, 65536)):
            part = data[:length]
            wanted = bytearray(store.getattr(ino).size)
            store.read(ino, 0, memoryview(wanted))
            wanted[offset : offset + length] = part
            store.commit([Round(ino, None, [Piece(offset, length, [memoryview(part)])], len(wanted))], lambda _n: None)
            assert read_all(store, ino, len(wanted) + 1) == bytes(wanted)

    def test_a_round_may_be_applied_twice(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        put(store, ino, b"x" * 100)
        round_ = Round(ino, 10, [Piece(50, 3, [memoryview(b"abc")])], 60)
        store.commit([round_], lambda _n: None)
        store.commit([round_], lambda _n: None)
        assert read_all(store, ino) == b"x" * 10 + bytes(40) + b"abc" + bytes(7)

    def test_data_and_holes_are_found(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        block = bytes([1]) * 65536
        store.commit([Round(ino, None, [Piece(1 << 20, 65536, [memoryview(block)])], 2 << 20)], lambda _n: None)
        assert store.seek(ino, 0, os.SEEK_DATA) in range((1 << 20) + 1)
        assert store.seek(ino, 1 << 20, os.SEEK_HOLE) >= (1 << 20) + 65536
        assert fails_with(errno.ENXIO, lambda: store.seek(ino, 2 << 20, os.SEEK_DATA))

    def test_the_largest_size_is_told(self, store: Store) -> None:
        largest = store.capabilities.max_file_size
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.truncate(ino, largest)
        assert store.getattr(ino).size == largest
        if largest < (1 << 63) - 1:
            assert fails_with(errno.EFBIG, lambda: store.truncate(ino, largest + 1))

    def test_a_tmpfile_gets_its_name_by_link(self, store: Store) -> None:
        ino, attr = store.tmpfile(ROOT_INO, 0o100600, ME)
        store.hold(ino)
        assert attr.nlink == 0
        put(store, ino, b"later")
        assert store.link(ino, ROOT_INO, b"named")[0] == ino
        assert store.getattr(ino).nlink == 1
        store.drop(ino)
        assert read_all(store, store.lookup(ROOT_INO, b"named")[0]) == b"later"

    def test_room_is_reserved_without_changing_the_size(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.fallocate(ino, FALLOC_KEEP_SIZE, 0, 1 << 16)
        assert store.getattr(ino).size == 0

    def test_reading_without_waiting_says_so(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        put(store, ino, b"data")
        buffer = memoryview(bytearray(4))
        try:
            n = store.read(ino, 0, buffer, nowait=True)
        except BlockingIOError:
            n = store.read(ino, 0, buffer)
        assert bytes(buffer[:n]) == b"data"

    def test_sync_and_statfs_answer(self, store: Store) -> None:
        ino, _ = store.create(ROOT_INO, b"a", 0o644, ME)
        store.sync(ino)
        store.sync(ino, datasync=True)
        store.fsyncdir(ROOT_INO)
        store.sync_all()
        assert store.statfs().blocks > 0

    def test_a_number_that_nobody_gave_is_stale(self, store: Store) -> None:
        assert fails_with(errno.ESTALE, lambda: store.getattr(999_999))
        with pytest.raises(OSError, match="not known"):
            store.hold(999_999)
