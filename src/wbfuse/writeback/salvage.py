"""What is in the log of a mount that nobody serves any more: its dirty files, read from log and journal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wbfuse.journal import Journal
from wbfuse.journal import Kind as Entry
from wbfuse.store.contract import Piece
from wbfuse.store.directory.nodes import path_of, unpack
from wbfuse.wire.types import Attr
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File
from wbfuse.writeback.file import contents


@dataclass(slots=True)
class Dirty:
    """One file: `rounds` as quarantine.keep takes them. `path` as far as the journal knows it."""

    ino: int
    path: str
    size: int
    rounds: list[list[Piece]]


class _NoStore:
    """Behind a cache that is only looked at."""

    class capabilities:  # noqa: N801 - as Store has it
        stages = False
        max_file_size = (1 << 63) - 1

    def hold(self, _ino: int) -> None: ...


def dirty_files(log_fd: int, journal_fd: int) -> Iterator[Dirty]:
    """The dirty files in these memory files (owned from now on). Their pieces hold while one is looked at.

    Raises LogError where they are none.
    """
    journal = Journal(journal_fd)
    nodes: dict[int, list[tuple[int, bytes]]] = {}
    for ino, entry in journal.inherited(Entry.NODE).items():
        with contextlib.suppress(ValueError):  # its name is all that is missing then
            nodes[ino] = unpack(ino, entry).places
    store: Any = _NoStore()
    cache = WritebackCache(store, 0, 0, 0, journal=journal, log_fd=log_fd)
    try:
        for ino, found in cache.inherited().items():
            f: File = cache.replay(ino, Attr(ino, 0), found)
            rounds = [contents(g, f.core.size, cache.log.view) for g in f.core.generations]
            yield Dirty(ino, path_of(lambda at: nodes.get(at, []), ino), f.core.size, rounds)
    finally:
        cache.log.close()


def in_memory(path: str) -> int:
    """A copy of a file that `dirty_files` may have. Raises OSError."""
    fd = os.memfd_create("wbfuse-image", os.MFD_CLOEXEC)
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        os.ftruncate(fd, size)
        at = 0
        while at < size:
            n = os.sendfile(fd, f.fileno(), at, size - at)
            if not n:
                break
            at += n
    return fd
