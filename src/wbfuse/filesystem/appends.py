"""Where appends go whose place the server chooses (shared volumes), so that one that is sent again goes there again.

The place is in the journal before the record is in the log. While an append is not answered the kernel holds the
file's lock, so there is one at most; written again at its place it changes nothing, also where the first time is in
the store already and gone from the log.
"""

from __future__ import annotations

from struct import Struct

from wbfuse.filesystem.api import Request
from wbfuse.journal import Journal, Kind
from wbfuse.wire.constants import UNIQUE_RESEND

_ENTRY = Struct("<QQ")
"""The request's unique, and the offset."""


class Appends:
    """Of one mount. Any thread may call it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._inherited: dict[int, tuple[int, int]] = {
            ino: _ENTRY.unpack(value) for ino, value in journal.inherited(Kind.APPEND).items()
        }
        self._noted = set(self._inherited)

    def place(self, request: Request, end: int) -> int:
        """The offset for an append to a file that ends at `end`."""
        ino, unique = request.nodeid, request.unique & ~UNIQUE_RESEND
        if request.unique & UNIQUE_RESEND:
            found = self._inherited.get(ino)
            if found is not None and found[0] == unique:
                return found[1]
        self._noted.add(ino)
        self._journal.put(Kind.APPEND, ino, _ENTRY.pack(unique, end))
        return end

    def forget(self, ino: int) -> None:
        """Every append to it has been answered."""
        if ino in self._noted:
            self._noted.discard(ino)
            self._inherited.pop(ino, None)
            self._journal.remove(Kind.APPEND, ino)
