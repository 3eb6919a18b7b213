"""The open table: file handles by fh. Each is in the journal before the reply that hands it out, until its RELEASE.

A handle is how the kernel names an open file; what is known of the file itself is by node, elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Any

from wbfuse.journal import Counter, Journal, Kind
from wbfuse.wire.constants import UNIQUE_RESEND

_ENTRY = Struct("<QQB")
"""ino, the unique of the request that opened it, flags."""
_WRITABLE = 1


class Handle:
    """An open file. `errors_seen` is where this opener stands in the file's errseq."""

    __slots__ = ("errors_seen", "file", "ino", "writable", "written")

    def __init__(self, ino: int, writable: bool) -> None:
        self.ino = ino
        self.writable = writable
        self.written = False
        """Since it was last made durable (known without a cache only)."""
        self.errors_seen = 0
        self.file: Any = None
        """The cache's state of the file, where there is a cache."""


class OpenTable:
    """fh -> Handle, beginning with what `journal` inherited. Any thread may call it: each change is one of a dict."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._fhs = Counter(journal, Kind.OPEN, 1)
        self._handles: dict[int, Handle] = {}
        self._inherited: dict[int, int] = {}
        """unique -> fh of what a dead server opened, perhaps without saying so."""
        for fh, entry in journal.inherited(Kind.OPEN).items():
            ino, unique, flags = _ENTRY.unpack(entry)
            handle = self._handles[fh] = Handle(ino, bool(flags & _WRITABLE))
            handle.written = handle.writable  # it may have, before its server died
            self._inherited[unique] = fh

    def open(self, ino: int, writable: bool, unique: int = 0) -> tuple[int, Handle]:
        """A new handle for the request `unique`."""
        fh, handle = self._fhs.take(), Handle(ino, writable)
        self._journal.put(Kind.OPEN, fh, _ENTRY.pack(ino, unique & ~UNIQUE_RESEND, _WRITABLE if writable else 0))
        self._handles[fh] = handle
        return fh, handle

    def opened_before(self, unique: int, ino: int | None = None) -> tuple[int, Handle] | None:
        """What a dead server opened (of a file, or any) for this request, which the kernel sends again."""
        fh = self._inherited.pop(unique & ~UNIQUE_RESEND, 0) if unique & UNIQUE_RESEND else 0
        handle = self._handles.get(fh)
        return (fh, handle) if handle is not None and ino in (None, handle.ino) else None

    def get(self, fh: int) -> Handle | None:
        return self._handles.get(fh)

    def close(self, fh: int) -> Handle | None:
        """Take it out; None where it is not there."""
        if fh in self._handles:
            self._journal.remove(Kind.OPEN, fh)
        return self._handles.pop(fh, None)

    def all(self) -> Iterable[tuple[int, Handle]]:
        return list(self._handles.items())
