"""Descriptors as a cache: at most so many are open, the least recently used go first.

A `Fd` closes itself when the last reference to it goes, so a thread that holds one may use it though the cache has
let it go. Reopening goes through the nodes; no correctness rests on a descriptor being here.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable


class Fd:
    """An open descriptor `n`."""

    __slots__ = ("lock", "n", "writable")

    def __init__(self, n: int, writable: bool = False) -> None:
        self.n = n
        self.writable = writable
        self.lock = threading.Lock()
        """Guards the file position, for those few calls that use it (getdents)."""

    def __del__(self) -> None:
        os.close(self.n)


class FdCache:
    """Key -> Fd, least recently used first out. Lock: `_lock` guards the dict; nothing else is held with it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._open: OrderedDict[Hashable, Fd] = OrderedDict()

    def get(self, key: Hashable) -> Fd | None:
        with self._lock:
            fd = self._open.get(key)
            if fd is not None:
                self._open.move_to_end(key)
            return fd

    def put(self, key: Hashable, fd: Fd) -> Fd:
        """Keep `fd`; closes what must go for it once nobody uses that any more."""
        gone: list[Fd | None] = []
        with self._lock:
            gone.append(self._open.pop(key, None))
            self._open[key] = fd
            while len(self._open) > self._capacity:
                gone.append(self._open.popitem(last=False)[1])
        return fd

    def discard(self, *keys: Hashable) -> None:
        gone: list[Fd | None] = []
        with self._lock:
            gone.extend(self._open.pop(key, None) for key in keys)

    def clear(self) -> None:
        with self._lock:
            gone = list(self._open.values())
            self._open.clear()
        del gone

    def __len__(self) -> int:
        return len(self._open)
