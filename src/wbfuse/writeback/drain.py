"""Draining: everything that was accepted before it began becomes durable, whatever comes in meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File, Sequel


def drain(
    cache: WritebackCache, on_progress: Callable[[int], None], give_up: Callable[[], bool]
) -> list[tuple[int, int]]:
    """Commit everything that was accepted before the call and make it durable, whatever comes in meanwhile.

    `on_progress` gets the bytes left, about five times a second. Answers (ino, errno) of files that failed:
    where every file left has failed since the call, or where `give_up` says so; their data stays and is tried
    again. Raises OSError where the store cannot make durable what it has.
    """
    with cache.lock:
        cache.draining += 1
        for f in cache.failing.values():
            f.retry_at = 0.0
        # By number, not by emptiness: beside a writer that never stops there is no moment when all is clean.
        goals = [_Goal(f, f.core.seal(), f.error_sequence, f.sequel) for f in cache.files.values()]
        for goal in goals:
            if goal.number and not goal.file.busy:
                cache.full[goal.file.ino] = goal.file
        cache.work.notify_all()
    try:
        while True:
            with cache.lock:
                left = [g for g in goals if cache.files.get(g.file.ino) is g.file and g.pending]
                failed = [g for g in left if g.file.error_sequence > g.error_sequence]
                stuck = [g for g in left if g in failed or cache.is_held_back(g.file)]
                if not left:
                    versions = {f: f.version for f in cache.files.values()}
                    break
                if (failed and len(stuck) == len(left)) or give_up():
                    return [(g.file.ino, g.file.error) for g in left]
                pending = sum(g.file.core.dirty_bytes for g in left)
                cache.room.wait(0.2)
            on_progress(pending)
    finally:
        with cache.lock:
            cache.draining -= 1
    cache.store.sync_all()
    with cache.lock:
        for f, version in versions.items():
            f.synced = max(f.synced, version)
    on_progress(0)
    return []


@dataclass(slots=True)
class _Goal:
    """Of a drain: generations of a file up to `number` are committed, and what was to follow then has."""

    file: File
    number: int
    error_sequence: int
    """When the drain began."""
    sequel: Sequel | None

    @property
    def pending(self) -> bool:
        generations = self.file.core.generations
        dirty = bool(generations) and generations[0].number <= self.number
        return dirty or (self.sequel is not None and self.file.sequel is self.sequel)
