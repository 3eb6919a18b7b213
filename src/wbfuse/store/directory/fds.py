"""Descriptors as a cache: at most so many are open; one that was not used for a whole round of the clock goes first.

A `Fd` closes itself when the last reference to it goes, so a thread that holds one may use it though the cache has
let it go. Hence the rule: keep the Fd in a variable while its number is in use; `dir_fd(x).n` as an argument is a
descriptor that may be closed, and its number another file's, before the call. (`tests/test_style.py` looks for it.)
Reopening goes through the nodes; no correctness rests on a descriptor being here.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable


class Fd:
    """An open descriptor `n`."""

    __slots__ = ("lock", "n", "used", "writable")

    def __init__(self, n: int, writable: bool = False) -> None:
        self.n = n
        self.writable = writable
        self.used = True
        self.lock = threading.Lock()
        """Guards the file position, for those few calls that use it (getdents)."""

    def __del__(self) -> None:
        os.close(self.n)


class FdCache:
    """Key -> Fd, evicted by second chance, so that looking one up (for each WRITE) needs no lock.

    Lock: `_lock` guards changes of the dict; nothing else is held with it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._open: OrderedDict[Hashable, Fd] = OrderedDict()

    def get(self, key: Hashable) -> Fd | None:
        fd = self._open.get(key)
        if fd is not None:
            fd.used = True
        return fd

    def put(self, key: Hashable, fd: Fd) -> Fd:
        """Keep `fd`; closes what must go for it once nobody uses that any more."""
        gone: list[Fd | None] = []
        with self._lock:
            gone.append(self._open.pop(key, None))
            self._open[key] = fd
            while len(self._open) > self._capacity:
                oldest, other = next(iter(self._open.items()))
                if other.used and other is not fd:
                    other.used = False
                    self._open.move_to_end(oldest)
                else:
                    gone.append(self._open.pop(oldest))
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
