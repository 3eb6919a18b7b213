"""The journal: what a server must know again after its death and what is not in the log - open files, nodes, promises.

It is a small table, key -> bytes, in a memfd that outlives the process that writes it. Every change is stamped into it
before a reply rests on it; replaying it gives the table. It knows nothing of what the values mean.

    memfd:  (punched away) | window | window | ... | window with the tail         offsets only grow, nothing wraps
                             ^ head

A record is the whole value of one key, or its removal, so the last record of a key is what counts. Space comes back
without a pause: for each byte that is written or becomes worthless, two are looked at at the head; what still counts is
carried to the tail, and windows that are left behind are punched out. So the journal stays below three times its table.

Lock: one, for an append; nothing else is taken with it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from enum import IntEnum
from struct import Struct

VERSION = 1
"""Of what entries and records of the log say; a server goes on with its own only. The log on disk has one as well."""
WINDOW = 256 << 10
SLACK = 2 * WINDOW
"""Dead bytes that are not worth the trouble."""
_HEADER = Struct("<IHHQ")
"""crc32 of all that follows, bytes of the value, flags, tag (key and kind)."""
_CHECKED = Struct("<HHQ")
_REMOVED = 1
MAX_VALUE = (1 << 16) - 1 - _HEADER.size


class Kind(IntEnum):
    """Whose the entry is; with a key of its owner's choice it names one."""

    AGREEMENT = 1
    """What INIT agreed on; key 0."""
    COUNTER = 2
    """The high-water mark of a `Counter`; the key is the kind of what it numbers."""
    OPEN = 3
    """An open file handle; the key is its fh."""
    NODE = 4
    """A node that the kernel knows; the key is its ino."""
    DIRTY = 5
    """A file of which the log has what the store has not; the key is its ino, the value the sequence up to which the
    store has everything."""
    INTENT = 6
    """A change of names that may have been done; the key is the request's unique."""
    SESSION = 7
    """The session that the mount has on a volume; key 0."""
    ERROR = 8
    """What write-back of a file met and its openers shall hear of; the key is its ino."""
    LOG = 9
    """Size of the log and of its largest payload; key 0."""
    RENAME = 10
    """A rename that waits for the data of its source; the key is that file's ino."""
    APPEND = 12
    """Where the last append to a file goes; the key is its ino."""
    VERSION = 11
    """Which `VERSION` of wbfuse's writes this one; key 0."""


def pack(tag: int, value: bytes, flags: int = 0) -> bytes:
    checked = _CHECKED.pack(len(value), flags, tag)
    return _HEADER.pack(zlib.crc32(value, zlib.crc32(checked)), len(value), flags, tag) + value


def records(window: mmap.mmap | bytes | bytearray) -> Iterator[tuple[int, int, int, bytes | None]]:
    """(offset, size, tag, value or None where the key was removed), up to the first that is not whole. Pure."""
    at = 0
    while at + _HEADER.size <= len(window):
        crc, length, flags, tag = _HEADER.unpack_from(window, at)
        size = _HEADER.size + length
        value = bytes(window[at + _HEADER.size : at + size])
        if tag == 0 or len(value) < length or crc != zlib.crc32(value, zlib.crc32(_CHECKED.pack(length, flags, tag))):
            return
        yield at, size, tag, None if flags & _REMOVED else value
        at += size


class Journal:
    """A table that survives its writer. With `fd` (owned from now on), it begins with what stands there.

    Values have at most MAX_VALUE bytes, keys are below 2^56. Any thread may call it. Raises OSError without memory.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("wbfuse-journal", os.MFD_CLOEXEC) if fd is None else fd
        weakref.finalize(self, os.close, self.fd)
        self._lock = threading.Lock()
        self._latest: dict[int, int] = {}
        """tag -> position << 16 | size of the record that counts."""
        self._live = 0
        self.on_append: Callable[[bytes], None] | None = None
        """Called with each record that is appended, with the lock held."""
        self._values: dict[int, bytes] = {}
        """What was there at the beginning and nobody has asked for yet."""
        self._load()

    def _load(self) -> None:
        size = os.fstat(self.fd).st_size
        if size == 0:
            size = self._grow(0)
        try:
            first = os.lseek(self.fd, 0, os.SEEK_DATA) // WINDOW
        except OSError as e:
            if e.errno != errno.ENXIO:  # else nothing is written anywhere
                raise
            first = size // WINDOW - 1
        self._head = first * WINDOW
        self._head_window = self._map(self._head)
        for base in range(self._head, size, WINDOW):
            self._base, self._window, self._at = base, self._map(base), 0
            for at, length, tag, value in records(self._window):
                self._at = at + length
                if value is None:
                    self._count(tag, 0, 0)
                    self._values.pop(tag, None)
                else:
                    self._count(tag, base + at, length)
                    self._values[tag] = value

    def inherited(self, kind: Kind) -> dict[int, bytes]:
        """What stood in the journal when it was opened, by key. To be asked once: it is forgotten then."""
        return {tag >> 8: self._values.pop(tag) for tag in sorted(self._values) if tag & 0xFF == kind}

    def inherited_mark(self, kind: Kind) -> int:
        """The number that a Counter of `kind` goes on from; 0 where there was none."""
        return int.from_bytes(self._values.pop(kind << 8 | Kind.COUNTER, b""), "little")

    @property
    def used(self) -> int:
        """Bytes from head to tail."""
        return self._base + self._at - self._head

    @property
    def live(self) -> int:
        """Bytes of the records that count."""
        return self._live

    def put(self, kind: Kind, key: int, value: bytes) -> None:
        """`key` is `value` from now on."""
        if len(value) > MAX_VALUE:
            raise ValueError(f"a value of {len(value)} bytes is too long for the journal")
        tag = key << 8 | kind
        record = pack(tag, value)
        with self._lock:
            replaced = self._count(tag, self._append(record), len(record))
            self._carry(2 * (len(record) + replaced))

    def remove(self, kind: Kind, key: int) -> None:
        """`key` is no more."""
        tag = key << 8 | kind
        record = pack(tag, b"", _REMOVED)
        with self._lock:
            if tag in self._latest:
                self._append(record)
                self._carry(2 * (len(record) + self._count(tag, 0, 0)))

    @property
    def tail(self) -> int:
        """The offset behind the last record."""
        return self._base + self._at

    def pass_up_to(self, offset: int) -> None:
        """Append again what still counts of the records below `offset`. Raises OSError without memory."""
        with self._lock:
            while self._head < min(offset, self.tail):
                self._pass()

    # held: lock

    def _count(self, tag: int, position: int, size: int) -> int:
        """The record that counts for `tag` is the one at `position`; with size 0 there is none.

        Answers the size of the one that counted before.
        """
        before = self._latest.pop(tag, 0) & 0xFFFF
        self._live += size - before
        if size:
            self._latest[tag] = position << 16 | size
        return before

    def _grow(self, base: int) -> int:
        """Memory for one more window: an error here, never a SIGBUS later. Answers where it ends."""
        os.posix_fallocate(self.fd, base, WINDOW)
        return base + WINDOW

    def _map(self, base: int) -> mmap.mmap:
        """Only the windows of head and tail stay mapped: each costs a descriptor."""
        return mmap.mmap(self.fd, WINDOW, offset=base)

    def _append(self, record: bytes) -> int:
        if self._at + len(record) > WINDOW:
            base = self._base + WINDOW
            self._grow(base)
            window = self._map(base)  # until here it may fail, and nothing has changed
            rest = min(_HEADER.size, WINDOW - self._at)
            self._window[self._at : self._at + rest] = bytes(rest)  # no half record of a dead writer behind the last
            self._base, self._at, self._window = base, 0, window
        position = self._base + self._at
        self._window[self._at : self._at + len(record)] = record
        self._at += len(record)
        if self.on_append is not None:
            self.on_append(bytes(record))
        return position

    def _carry(self, budget: int) -> None:
        """Look at `budget` bytes of records at the head, where the journal is too long for its table."""
        while budget > 0 and self.used > 2 * self._live + SLACK:
            try:
                budget -= self._pass()
            except OSError:
                return  # no memory or descriptor to carry with: nothing is lost, and the next append tries again

    def _pass(self) -> int:
        """Carry the record at the head if it counts, and go on to the next. Answers its size."""
        at = self._head % WINDOW
        whole = at + _HEADER.size <= WINDOW
        _, length, _, tag = _HEADER.unpack_from(self._head_window, at) if whole else (0, 0, 0, 0)
        size: int = _HEADER.size + length
        if tag == 0:
            size = WINDOW - at  # the rest of a window that was left for the next
        elif self._latest.get(tag) == self._head << 16 | size:
            self._latest[tag] = self._append(self._head_window[at : at + size]) << 16 | size
        if at + size == WINDOW:
            if self._head + size == self._base + WINDOW:
                self._grow(self._head + size)  # the tail stands there as well, and nothing is behind it yet
            following = self._map(self._head + size)
            self._head_window.madvise(mmap.MADV_REMOVE)
            self._head_window = following
        self._head += size
        return size


class Counter:
    """Numbers from `first` on, never one twice, not even by the next server: marks are stamped ahead, in steps."""

    STEP = 1024

    def __init__(self, journal: Journal, kind: Kind, first: int) -> None:
        self._journal = journal
        self._kind = kind
        self._next = self._mark = journal.inherited_mark(kind) or first
        self._lock = threading.Lock()

    def take(self) -> int:
        with self._lock:
            number = self._next
            if number >= self._mark:
                mark = number + self.STEP
                self._journal.put(Kind.COUNTER, self._kind, mark.to_bytes(8, "little"))
                self._mark = mark
            self._next = number + 1
            return number
