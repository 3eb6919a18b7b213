"""Maps of files in memory: windows of 16 MiB of a file, as they were resolved.

Few are kept, so memory does not grow with files; a commit drops the windows that it touches. Windows loaded while one
was dropped are not kept (`stamp`).

Lock: `_lock` guards the windows, for an instant.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from wbfuse.store.volume.layout import MAX_EXTENT, Extent

WINDOW = MAX_EXTENT
_ROWS = 100_000
"""Rows kept in all windows together."""
_FILES = 50_000
"""Files of which it is remembered when they changed."""
_FEW = 4


class Maps:
    """Windows by (ino, number)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[int, int], list[Extent]] = OrderedDict()
        self._of: dict[int, set[int]] = {}
        self._rows = 0
        self._changes: dict[int, int] = {}
        """When a file changed, as a number of `_clock`; `_floor` for those that are not in it."""
        self._clock = self._floor = 0
        self._versions: dict[int, int] = {}

    def get(self, ino: int, start: int, end: int) -> list[Extent] | None:
        """The map of [start, end) from memory, uncut at the edges; None where a part of it is not there."""
        out: list[Extent] = []
        with self._lock:
            for number in range(start // WINDOW, -(-end // WINDOW)):
                window = self._windows.get((ino, number))
                if window is None:
                    return None
                self._windows.move_to_end((ino, number))
                out += window if len(window) < _FEW else _between(window, start, end)
        return out

    def stamp(self, ino: int) -> int:
        """To be taken before rows are read, for `put`."""
        with self._lock:
            return self._changes.get(ino, self._floor)

    def put(self, ino: int, stamp: int, number: int, window: list[Extent]) -> None:
        with self._lock:
            if self._changes.get(ino, self._floor) != stamp:
                return
            self._remove(ino, number)
            self._windows[ino, number] = window
            self._of.setdefault(ino, set()).add(number)
            self._rows += len(window) + 1
            while self._rows > _ROWS and len(self._windows) > 1:
                self._remove(*next(iter(self._windows)))

    def _remove(self, ino: int, number: int) -> None:
        """Held: lock."""
        window = self._windows.pop((ino, number), None)
        if window is not None:
            self._rows -= len(window) + 1
            of = self._of[ino]
            of.discard(number)
            if not of:
                del self._of[ino]

    def changed(self, ino: int, ranges: Iterable[tuple[int, int]] | None) -> None:
        """These ranges (None: any) have changed in the database."""
        with self._lock:
            self._clock += 1
            if len(self._changes) > _FILES:
                self._changes.clear()
                self._floor = self._clock
            self._changes[ino] = self._clock
            numbers = list(self._of.get(ino, ()))
            if ranges is not None:
                touched = {n for a, b in ranges for n in range(a // WINDOW, -(-b // WINDOW))}
                numbers = [n for n in numbers if n in touched]
            for n in numbers:
                self._remove(ino, n)

    def at_version(self, ino: int, version: int) -> None:
        """Drop what was loaded under another version of the inode's row: another host may have changed the file."""
        if self._versions.get(ino) != version:
            self.changed(ino, None)
            self.is_version(ino, version)

    def committed(self, ino: int, version: int, ranges: Iterable[tuple[int, int]] | None) -> None:
        """A commit of ours made the row `version` by changing `ranges` (None: any).

        What is here of another version than the one before was changed by somebody else as well: all of it goes.
        """
        self.changed(ino, ranges if self._versions.get(ino) == version - 1 else None)
        self.is_version(ino, version)

    def is_version(self, ino: int, version: int) -> None:
        """What is here, or is loaded from now on, is of this version."""
        with self._lock:
            if len(self._versions) > _FILES:
                self._versions.clear()
            self._versions[ino] = version


def _between(window: list[Extent], start: int, end: int) -> list[Extent]:
    """The extents of a window that reach into [start, end)."""
    low, high = 0, len(window)
    while low < high:
        middle = (low + high) // 2
        if window[middle].end <= start:
            low = middle + 1
        else:
            high = middle
    out = []
    while low < len(window) and window[low].start < end:
        out.append(window[low])
        low += 1
    return out
