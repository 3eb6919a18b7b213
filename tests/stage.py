"""A stage for tests of the cached file system in one process: the kernel's part is played by the test."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from wbfuse.filesystem.api import PARKED, Parked, Request
from wbfuse.filesystem.cached_fs import CachedFileSystem
from wbfuse.journal import Journal
from wbfuse.store.contract import ROOT_INO, Store
from wbfuse.store.directory import DirectoryStore
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File
from wbfuse.writeback.engine import Engine
from wbfuse.writeback.file import Generation
from wbfuse.writeback.renames import DeferredRenames

MIB = 1 << 20
PATIENCE = 20.0
"""Seconds after which an event that should come is called missing."""

Hook = Callable[..., object]


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "it never happened"


class Hooked:
    """A store with hooks; a hook may raise, wait, or do what somebody else would do just then."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.before: dict[str, Hook] = {}
        self.after: dict[str, Hook] = {}
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            if name in self.before:
                self.before[name](*args)
            answer = found(*args, **kwargs)
            if name in self.after:
                self.after[name](*args)
            return answer

        return call

    def once_after(self, name: str, act: Callable[[], object]) -> None:
        def hook(*_: object) -> None:
            del self.after[name]
            act()

        self.after[name] = hook


class HookedEngine(Engine):
    """Tells when a round has ended, and lets a test act just before it does."""

    def __init__(self, cache: WritebackCache, dirty_expire: float) -> None:
        super().__init__(cache, dirty_expire)
        self.before_finish: Callable[[], None] | None = None
        self.finished: list[tuple[int, int]] = []
        """(ino, errno) of rounds and syncs."""
        self.news = threading.Condition()

    def _finish(self, f: File, g: Generation | None, error: int, last: bool = True) -> None:
        if self.before_finish is not None:
            act, self.before_finish = self.before_finish, None
            act()
        super()._finish(f, g, error, last)
        with self.news:
            self.finished.append((f.ino, error))
            self.news.notify_all()

    def wait_until(self, n: int) -> None:
        """Until `n` rounds and syncs have ended."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.finished) >= n, PATIENCE), self.finished


class Stage:
    """The kernel's part is played by the test: requests go to `fs` with bare arguments."""

    def __init__(
        self, source: Path, clock: Callable[[], float] = time.monotonic, expire: float = 0.02, shared: bool = False,
        journal: Journal | None = None, root_fd: int | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self.journal = journal or Journal()
        self.store = Hooked(DirectoryStore(str(source), journal=self.journal, root_fd=root_fd))
        self.store.capabilities = replace(self.store.capabilities, shared=shared)
        renames = DeferredRenames(cast(Store, self.store), self.journal)
        self.cache = WritebackCache(renames.as_store(), 64 * MIB, MIB, 4 * MIB, clock, self.journal)
        self.engine = HookedEngine(self.cache, expire)
        self.fs = CachedFileSystem(renames, self.cache, self.engine, False, journal=self.journal)
        self.started = False
        self.replies: dict[int, tuple[object, int]] = {}
        self.news = threading.Condition()
        self._unique = 0

    def start(self) -> None:
        self.started = True
        self.engine.start()

    def end(self) -> None:
        self.store.before.clear()
        self.store.after.clear()
        if self.started:
            self.engine.stop()
        self.store.close()
        self.cache.log.close()

    # the way back of parked requests

    def park(self, request: Request) -> Parked:
        return PARKED

    def complete(self, request: Request, value: object, error: int) -> None:
        with self.news:
            self.replies[request.unique] = value, error
            self.news.notify_all()

    def reply(self, unique: int) -> tuple[object, int]:
        with self.news:
            assert self.news.wait_for(lambda: unique in self.replies, PATIENCE), "never answered"
            return self.replies[unique]

    # requests

    def request(self, nodeid: int, blocking: bool = True) -> Request:
        self._unique += 1
        request = Request(self._unique, nodeid, 0, 0, 0, self)
        request.blocking = blocking
        return request

    def create(self, name: bytes) -> tuple[int, int]:
        entry, opened = self.fs.create(self.request(ROOT_INO), name, os.O_RDWR, 0o644, 0)
        return entry.nodeid, opened.fh

    def write(self, ino: int, fh: int, offset: int, data: bytes) -> None:
        """As the reader does: received at the tail, served inline."""
        target = self.cache.receive_target()
        target[: len(data)] = data
        self.fs.write(self.request(ino, blocking=False), fh, offset, target[: len(data)], 0, 0)

    def fsync(self, ino: int, fh: int) -> int | None:
        """The unique of a request that waits; None where it is answered at once."""
        request = self.request(ino)
        return request.unique if self.fs.fsync(request, fh, False) is PARKED else None

    def stored(self, name: str) -> bytes:
        return (self.source / name).read_bytes()
