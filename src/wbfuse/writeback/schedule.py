"""What a committer does next. Pure choosing: it changes the cache's queues and its own counts, and calls nobody.

Order: rounds that somebody waits for, then sealed generations, then - above the background limit, while draining, or
past their age - the longest dirty. Commits of one file never overlap; those of different files do.

Held, in every call: the cache's lock.
"""

from __future__ import annotations

from collections import OrderedDict

from wbfuse.store.contract import Capabilities
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File
from wbfuse.writeback.file import Generation

_HEAVY, _HEAVY_ROUNDS, _HEAVY_STAGED = 1 << 20, 2, 4
"""What a heavy round is, and how many go at once: more where their bytes are staged ahead."""
_COMPANY = 512
"""The most files in one commit."""
_CALM_ROUNDS = 1
"""Rounds at once where age is the only reason, until twice the age: more take the interpreter from the reader."""


class Schedule:
    """Of one cache. `dirty_expire`: the age in seconds at which dirty data is written."""

    def __init__(self, cache: WritebackCache, dirty_expire: float) -> None:
        self.cache = cache
        self.dirty_expire = dirty_expire
        store: Capabilities = cache.store.capabilities
        self._stages, self._group_bytes = store.stages, store.group_bytes
        self._most_heavy = _HEAVY_STAGED if store.stages else _HEAVY_ROUNDS
        self._heavy = 0
        """Large rounds under way."""
        self._at_work = 0
        """Committers that carry something."""
        self._carried: dict[int, File] = {}
        """Files that have something in a committer's hands, where the store stages."""

    # booking

    def next(self, now: float) -> list[File] | tuple[File, Generation] | None:
        """Files whose oldest generations go to the store in one commit, or one to stage; None where nothing is due.

        It is for one committer, which says `ended` after its end.
        """
        f = self._pick(now)
        found = self._company(f, now) if f is not None else self._ahead()
        self._at_work += found is not None
        return found

    def begun(self, f: File, g: Generation | None) -> None:
        """A generation of a file, or without one only a sync, is in a committer's hands."""
        if g is not None:
            g.weighed = g.extents.bytes >= _HEAVY and g.round is None
            self._heavy += g.weighed
        if self._stages:
            self._carried[f.ino] = f

    def ended(self, f: File, g: Generation | None, last: bool) -> None:
        """It is not any more; it was the `last` of its committer's."""
        self._at_work -= last
        self._carried.pop(f.ino, None)
        if g is not None:
            self._heavy -= g.weighed

    def staging_begun(self, g: Generation) -> None:
        self._heavy += g.extents.bytes >= _HEAVY

    def staging_ended(self, g: Generation) -> None:
        self._at_work -= 1
        self._heavy -= g.extents.bytes >= _HEAVY

    # choosing

    def _pick(self, now: float) -> File | None:
        """The file to serve next, taken out of the queues; None where nothing is due."""
        cache = self.cache
        for ino, failed in list(cache.failing.items()):
            if failed.retry_at <= now:
                del cache.failing[ino]
                cache.dirty.setdefault(ino, failed)
                cache.dirty.move_to_end(ino, last=False)
                cache.full[ino] = failed
        urgent = (f for f in cache.urgent.values() if f.retry_at <= now and not self._held_up(f))
        f = next(urgent, None) or self._oldest(now)
        if f is not None:
            self._take(f)
        return f

    def _take(self, f: File) -> None:
        for queue in (self.cache.urgent, self.cache.full, self.cache.dirty, self.cache.failing):
            queue.pop(f.ino, None)

    def _company(self, first: File, now: float) -> list[File]:
        """`first` and others that are due as well and whose bytes fit into the same commit."""
        found = [first]
        if not self._group_bytes or not first.core.generations or first.failures:
            return found
        room = self._group_bytes - first.core.generations[0].extents.bytes
        over = self._over()
        cache = self.cache
        aged = (f for f in cache.dirty.values() if over or now - _born(f) >= self.dirty_expire)
        for f in [*cache.urgent.values(), *cache.full.values(), *aged]:
            if room <= 0 or len(found) >= _COMPANY:
                break
            if not f.core.generations or f.failures or f in found or self._held_up(f):
                continue
            size = f.core.generations[0].extents.bytes
            if size <= room:
                room -= size
                found.append(f)
        for f in found[1:]:
            self._take(f)
        return found

    def _over(self) -> bool:
        """Whether there is reason to write everything now."""
        cache = self.cache
        return bool(cache.draining or cache.parked or cache.log.occupied > cache.limits.background)

    def _ahead(self) -> tuple[File, Generation] | None:
        """The oldest sealed generation that may be staged while what is before it is being committed."""
        if not self._stages or self._heavy >= self._most_heavy:
            return None
        found = [(g.born, f.ino, f, g) for f in self._carried.values() if not f.failures and (g := f.core.ahead())]
        return min(found)[2:] if found else None

    def _oldest(self, now: float) -> File | None:
        """The file whose oldest generation is the oldest of all that are due and that nobody waits for.

        The oldest first, because a log segment is free only once everything in it is committed. Of heavy rounds
        only few at once: many would each be slow, and end - and free their segments - all at the same time.
        """
        cache = self.cache
        found = list(cache.full.values())
        over = self._over()
        for f in cache.dirty.values():  # in order of age
            age = now - _born(f)
            if not over and (
                age < self.dirty_expire or (self._at_work >= _CALM_ROUNDS and age < 2 * self.dirty_expire)
            ):
                break
            if self._may_start(f):
                found.append(f)
                break
        return min((f for f in found if self._may_start(f)), key=_born, default=None)

    def _held_up(self, f: File) -> bool:
        """Whether its oldest generation is on its way to the store, or the store must not change it now."""
        return _staging(f) or (bool(f.core.generations) and self.cache.is_held_back(f))

    def _may_start(self, f: File) -> bool:
        if self._held_up(f):
            return False
        return self._heavy < self._most_heavy or f.core.generations[0].extents.bytes < _HEAVY or _staged(f)

    def due(self, now: float) -> float | None:
        """Seconds until `_pick` may find something by time alone.

        What is due and was not picked waits for a round under way, whose committer will look again.
        """
        cache = self.cache
        times = [f.retry_at for f in (*cache.failing.values(), *cache.urgent.values())]
        oldest = _first(cache.dirty)
        if oldest is not None:
            times += [_born(oldest) + self.dirty_expire, _born(oldest) + 2 * self.dirty_expire]
        return min((t - now for t in times if t > now), default=None)


def _born(f: File) -> float:
    return f.core.generations[0].born


def _staging(f: File) -> bool:
    """Whether the oldest generation is on its way to the store, so that its commit must wait."""
    return bool(f.core.generations) and f.core.generations[0].staging


def _staged(f: File) -> bool:
    return f.core.generations[0].round is not None


def _first(queue: OrderedDict[int, File]) -> File | None:
    return next(iter(queue.values()), None)
