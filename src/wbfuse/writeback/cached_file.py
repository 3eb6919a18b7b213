"""What the cache holds of one file: the pure FileCache, and what surrounds it - attributes, opens, waiters, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wbfuse.wire.types import Attr
from wbfuse.writeback.file import FileCache

Done = Callable[[int], None]
"""Called once with 0 or an errno."""


@dataclass(slots=True)
class Waiter:
    """Somebody who waits until everything up to a generation is durable."""

    generation: int
    done: Done


@dataclass(slots=True, eq=False)
class Sequel:
    """What the store is to do once everything up to a generation is durable, and before that is told to anybody."""

    act: Callable[[], None]
    """Raises OSError where it must be tried again."""
    fail: Callable[[], None]
    """Called when it, or the data before it, met an error that is told; it is tried again."""
    give_up: Callable[[], None]
    """Called instead where the file can never be committed."""
    generation: int | None = None
    """None: not known yet."""
    error: int = 0
    """What it met last, until that is told."""

    def ready(self, f: File, committed: int) -> bool:
        """Held: lock. Whether its time has come; `committed` is the generation in flight that the store has taken."""
        if self.generation is None:
            return False
        return all(g.number > self.generation or g.number <= committed for g in f.core.generations)


class File:
    """What the cache holds of one file: the pure FileCache and what surrounds it."""

    __slots__ = (
        "attr", "attr_version", "bare", "copying", "core", "error", "error_sequence", "failures", "hopeless", "ino",
        "lost", "marked", "opens", "retry_at", "sequel", "synced", "syncing", "unlinked", "version", "waiters",
    )  # fmt: skip

    def __init__(self, ino: int, attr: Attr, seal_bytes: int, seal_early: bool) -> None:
        self.ino = ino
        self.core = FileCache(ino, attr.size, attr.mtime_ns, seal_bytes, seal_early)
        self.attr = attr
        """As the store last said; size and times are the core's."""
        self.attr_version = 0
        """Counts settings of `attr`, so that an older answer of the store does not replace a newer one."""
        self.bare = False
        """Made by this mount, and no extended attribute was set since."""
        self.marked = False
        """The journal says that it is dirty."""
        self.opens = 0
        self.waiters: list[Waiter] = []
        self.sequel: Sequel | None = None
        self.error = 0
        self.error_sequence = 0
        """errseq: counts errors; a handle that has seen a lower number has one to report."""
        self.failures = 0
        self.hopeless = 0
        """Commits in a row of which the store said what will not pass."""
        self.retry_at = 0.0
        self.syncing = False
        self.copying = False
        """The store copies into it: no round may begin."""
        self.version = 1
        """Counts what the store was given. What it was given before this state began may not be durable: so 1."""
        self.synced = 0
        """The version that the store has made durable."""
        self.unlinked = False
        self.lost: OSError | None = None
        """Why nothing more can be committed, and nothing more is taken: another host has it now, or it is too large."""

    def shown(self) -> Attr:
        """The attributes as stat must show them."""
        a, core = self.attr, self.core
        blocks = a.blocks + (core.dirty_bytes >> 9)
        atime = a.atime_ns if core.atime_ns is None else core.atime_ns
        # Not dataclasses.replace, which takes three times as long: this is for each GETATTR.
        return Attr(
            a.ino, a.mode, core.size, blocks, atime, core.mtime_ns, a.ctime_ns, a.nlink, a.uid, a.gid, a.rdev, a.blksize
        )

    def set_attr(self, attr: Attr) -> None:
        """The store says so. Held: the cache's lock."""
        if self.unlinked:
            attr.nlink = 0
        self.attr = attr
        self.attr_version += 1

    def check(self) -> None:
        """Raises OSError where the file takes nothing more."""
        if self.lost is not None:
            raise OSError(self.lost.errno, self.lost.strerror)

    @property
    def waited_for(self) -> bool:
        return bool(self.waiters) or (self.sequel is not None and self.sequel.generation is not None)

    def waits_up_to(self, generation: int) -> bool:
        """Whether somebody waits for this generation or one before it."""
        last = None if self.sequel is None else self.sequel.generation
        return any(w.generation <= generation for w in self.waiters) or (last is not None and last <= generation)

    @property
    def busy(self) -> bool:
        return self.core.in_flight or self.syncing or self.copying
