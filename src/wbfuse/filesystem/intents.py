"""Intents: what makes a change of names happen once, though the server that did it died before it could say so.

An intent is stamped before the store is asked. The kernel sends a request again that was not answered; where an intent
of the dead server stands for it, the store may hold its result already, and is looked at first. Until the reply the
kernel keeps the directories locked, so what is found there is the request's own doing or nobody's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from wbfuse.filesystem.api import Request
from wbfuse.journal import Journal, Kind
from wbfuse.wire.constants import UNIQUE_RESEND

T = TypeVar("T")
_CLOCK_REALTIME_COARSE = 5
_ANSWERED = 256
"""After so many others have ended, a request has been answered."""


class Intents:
    """Of one mount. Any thread may call it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._inherited = journal.inherited(Kind.INTENT)
        self._ended: deque[int] = deque(self._inherited)
        self._most = _ANSWERED + len(self._inherited)
        self._lock = threading.Lock()
        """Guards `_ended`, for an instant."""

    def once(
        self, request: Request, act: Callable[[], T], done: Callable[[int], tuple[T] | None], note: int | None = None
    ) -> T:
        """`act`, unless a server before this one has done it already, as `done(note)` finds out.

        `note` is what is worth knowing of the time before; by default that time, in ns, not later than what the store
        says of what was done. `done` answers the result in a tuple, None where it was not done; FileNotFoundError says
        the same.
        """
        key = request.unique & ~UNIQUE_RESEND
        began = self._inherited.pop(key, None)
        try:
            if began is None:
                if note is None:  # the kernel stamps files with its coarse clock, which is behind the fine one
                    note = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
                self._journal.put(Kind.INTENT, key, note.to_bytes(8, "little"))
            else:
                try:
                    found = done(int.from_bytes(began, "little"))
                except FileNotFoundError:
                    found = None
                if found is not None:
                    return found[0]
            return act()
        finally:
            self._end(key)

    def _end(self, key: int) -> None:
        with self._lock:
            self._ended.append(key)
            old = self._ended.popleft() if len(self._ended) > self._most else None
        if old is not None:
            self._journal.remove(Kind.INTENT, old)
