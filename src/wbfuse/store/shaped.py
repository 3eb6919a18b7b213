"""A store made slower, and counted: bandwidth, delay, and how much was written in how many calls.

`--slow` delays every call and `--bwlimit` holds writes to a rate; without either this only counts. The delays are
real sleeps in the threads that call, which is what a slow store does to them.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from wbfuse.store.contract import Buffer, Capabilities, Found, Progress, Round, Store
from wbfuse.wire.types import Attr, Dirent

_SLICE_SECONDS = 0.005
_LATE = 0.002


@dataclass(slots=True, frozen=True)
class Shape:
    """How slow: `rate` bytes/s both ways, `write_rate` for writes only (None: no limit), `delay` seconds a call."""

    rate: float | None = None
    delay: float = 0.0
    write_rate: float | None = None

    @property
    def slow(self) -> bool:
        return self.rate is not None or self.delay > 0


class Bucket:
    """A link of `rate` bytes a second that several threads share: what is large goes in slices, so it is shared fairly.

    Lock: guards `_free_at`, nothing is held with it.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self.slice = max(4096, int(rate * _SLICE_SECONDS))
        """Bytes that go at a time."""
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, size: int) -> None:
        """Return when the link has carried `size` bytes for this caller."""
        while size > 0:
            with self._lock:
                # A sleep ends late; what the link could have carried since is not lost.
                self._free_at = max(time.monotonic() - _LATE, self._free_at) + min(size, self.slice) / self._rate
                until = self._free_at
            size -= self.slice
            time.sleep(max(0.0, until - time.monotonic()))


class Flow:
    """What one round puts on a link. Small pieces go together: one turn at the link for each would be unfair to it."""

    def __init__(self, link: Bucket) -> None:
        self._link = link
        self._owed = 0

    def put(self, size: int) -> None:
        whole, self._owed = divmod(self._owed + size, self._link.slice)
        self._link.wait(whole * self._link.slice)

    def settle(self) -> None:
        self._link.wait(self._owed)
        self._owed = 0


_QUICK = frozenset({"hold", "drop", "forget", "close", "unstage"})
"""These must not block by contract, so they are never delayed."""


class ShapedStore:
    """Wraps a store; see `shaped`."""

    def __init__(self, store: Store, shape: Shape) -> None:
        self._store = store
        self._shape = shape
        self._both = Bucket(shape.rate) if shape.rate else None
        self._out = Bucket(shape.write_rate) if shape.write_rate else None
        self._lock = threading.Lock()
        self.bytes_written = 0
        self.writes = 0

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._store, name)
        if name not in _QUICK and self._shape.delay:
            delay, undelayed = self._shape.delay, method

            def method(*args: Any, **kwargs: Any) -> Any:
                time.sleep(delay)
                return undelayed(*args, **kwargs)

        setattr(self, name, method)
        return method

    def lookup(self, parent: int, name: bytes, nowait: bool = False) -> Found:
        if nowait and self._shape.slow:
            raise BlockingIOError(errno.EAGAIN, "a slow store always waits")
        if self._shape.delay:
            time.sleep(self._shape.delay)
        return self._store.lookup(parent, name, nowait)

    def _carry(self, size: int) -> None:
        if self._shape.delay:
            time.sleep(self._shape.delay)
        if self._both is not None:
            self._both.wait(size)

    def _written(self, size: int) -> None:
        with self._lock:
            self.bytes_written += size
            self.writes += 1

    def getattr(self, ino: int, nowait: bool = False) -> Attr:
        if nowait and self._shape.slow:
            raise BlockingIOError(errno.EAGAIN, "a slow store always waits")
        if self._shape.delay:
            time.sleep(self._shape.delay)
        return self._store.getattr(ino, nowait)

    def read(self, ino: int, offset: int, buffer: memoryview, nowait: bool = False) -> int:
        if self._shape.slow:
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "a slow store always waits")
            self._carry(len(buffer))
        return self._store.read(ino, offset, buffer, nowait)

    def write(self, ino: int, offset: int, data: Buffer) -> None:
        if self._shape.slow:
            self._carry(len(data))
        self._store.write(ino, offset, data)
        self._written(len(data))
        if self._out is not None:
            self._out.wait(len(data))

    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        self._carry_rounds(self._store.commit, rounds, progress)

    def stage(self, rounds: Sequence[Round], progress: Progress) -> None:
        self._carry_rounds(self._store.stage, rounds, progress)

    def _carry_rounds(
        self, call: Callable[[Sequence[Round], Progress], None], rounds: Sequence[Round], progress: Progress
    ) -> None:
        """`progress` may come from several threads at once: each puts on the links what it has taken."""
        links = [link for link in (self._both, self._out) if link is not None]
        flows = threading.local()
        settled: list[Flow] = []

        def taken(size: int) -> None:
            if self._shape.delay:
                time.sleep(self._shape.delay)
            if size:
                self._written(size)
            mine = getattr(flows, "mine", None)
            if mine is None:
                mine = flows.mine = [Flow(link) for link in links]
                settled.extend(mine)
            for flow in mine:
                flow.put(size)
            progress(size)

        try:
            call(rounds, taken)
        finally:
            for flow in settled:
                flow.settle()

    def readdir(self, ino: int, offset: int) -> Iterator[Dirent]:
        if self._shape.delay:
            time.sleep(self._shape.delay)
        return self._store.readdir(ino, offset)


def shaped(store: Store, shape: Shape) -> tuple[Store, ShapedStore]:
    """`store` behind `shape`: as a Store, and as the object that holds the counters."""
    wrapped = ShapedStore(store, shape)
    return cast(Store, wrapped), wrapped
