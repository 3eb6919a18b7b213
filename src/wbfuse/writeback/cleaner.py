"""Cleaning: the live bytes of mostly dead segments of the log are copied together, so that whole segments become free.

Held, in every call: the cache's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wbfuse.writeback.log import LogFull, Segment

if TYPE_CHECKING:
    from wbfuse.writeback.cache import WritebackCache


def clean(cache: WritebackCache) -> bool:
    """Copy the live bytes out of a mostly dead segment. Answers whether one became free.

    A segment that holds notes, or bytes of a round in flight, cannot be emptied now; the next one is tried.
    """
    return any(_gather(cache, s) for s in cache.log.sparse())


def _gather(cache: WritebackCache, s: Segment) -> bool:
    """Copy what is live in `s` to the side segment. Answers whether `s` became free."""
    low, high = s.base, s.base + cache.log.segment_size
    found = []
    for f in cache.files.values():
        for n, g in enumerate(f.core.generations):
            for i, (start, end, place) in enumerate(g.extents):
                if low <= place < high:
                    if n == 0 and f.core.in_flight:
                        return False  # its buffers are in a store call
                    found.append((f, g, i, start, end - start, place))
    freed = False
    for f, g, i, start, length, place in found:
        try:
            moved = cache.log.put(cache.log.view(place, length))
        except LogFull:
            break
        cache.log.stamp_moved(g.sequence, f.ino, start, length, moved, g.mtime_ns or f.core.mtime_ns)
        g.extents.move(i, moved)
        freed |= cache.log.release([(place, length)])
    cache.freed(freed)
    return freed
