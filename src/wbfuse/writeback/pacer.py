"""The pacer: lets the replies of WRITEs go when the limits say so, and asks again for those that found no room.

taken, beyond freerun --> parked --limits.ready_at--> answered
no room at all -------> overflowed --an eighth of the log is free--> all of them are sent again (NOTIFY_RESEND)
                             '--full_timeout, or the mount ends--> refused
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from functools import partial

from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cleaner import clean

_CLEAN_EVERY = 0.1
"""Seconds between attempts to gain room by moving what is left in old segments, while writers wait for it."""


class Pacer:
    """`run` is for a thread of its own; whoever sets `stopping`, with the cache's lock, notifies `cache.paced`."""

    def __init__(self, cache: WritebackCache) -> None:
        self.cache = cache
        self.stopping = False
        self.on_room: Callable[[], None] | None = None
        """Called when WRITEs that found no room may be sent again."""
        self.full_timeout = math.inf
        """Seconds after which a direct WRITE that finds no room in the log is refused with ENOSPC."""
        self._clean_at = 0.0

    def run(self) -> None:
        cache = self.cache
        limits = cache.limits
        while True:
            with cache.lock:
                if self.stopping:
                    break
                resend, failed = self._overflow()
                if not resend and not failed and not cache.parked:
                    self._wait(math.inf)
                    continue
            if resend and self.on_room is not None:
                self.on_room()
            for answer in failed:
                answer()
            with cache.lock:
                if not cache.parked:
                    continue
                now, occupied = cache.clock(), cache.log.occupied
                at = limits.ready_at(now, occupied)
                if at is None and now >= self._clean_at:
                    self._clean_at = now + _CLEAN_EVERY
                    if clean(cache):
                        continue
                if at is None or at > now:
                    self._wait(math.inf if at is None else at - now)
                    continue
                _, size, answer = cache.parked.popleft()
                limits.sent(now, size)
            answer()
        for _, _, answer in list(cache.parked):
            answer()

    def _wait(self, seconds: float) -> None:
        """Held: lock. Until somebody notifies, so long has passed, or an overflowed WRITE is to be refused."""
        cache = self.cache
        first = min((since for since, _ in cache.overflowed), default=math.inf)
        left = min(seconds, first + self.full_timeout - cache.clock())
        cache.paced.wait(None if left == math.inf else max(left, 0.0))

    def _overflow(self) -> tuple[bool, list[Callable[[], None]]]:
        """Held: lock. Whether to ask for overflowed WRITEs again now, and refusals: the mount ends, or it took long."""
        cache = self.cache
        if not cache.overflowed:
            return False, []
        if cache.closing:
            failed, cache.overflowed = cache.overflowed, []
            return False, [partial(fail, errno.EIO) for _, fail in failed]
        until = cache.clock() - self.full_timeout
        late = [fail for since, fail in cache.overflowed if since <= until]
        if late:
            cache.overflowed = [(since, fail) for since, fail in cache.overflowed if since > until]
            return False, [partial(fail, errno.ENOSPC) for fail in late]
        # All come again at once, so ask only when a good part of them will find room.
        if cache.log.free_segments < max(1, len(cache.log.segments) // 8):
            cache.work.notify()
            return False, []
        cache.overflowed = []
        return True, []
