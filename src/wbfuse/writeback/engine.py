"""The threads of write-back: committers carry rounds to the store, a warmer prepares memory (and pacer.py).

What comes first is in schedule.py. Where the store can, small rounds of many files go in one commit, and bytes of
later rounds are staged meanwhile. A failed round goes back to dirty and is tried again with growing delay; nothing is
dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable
from functools import partial

from wbfuse.store.contract import FencedError, Piece, Round
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File, Sequel
from wbfuse.writeback.file import Generation, contents, plan
from wbfuse.writeback.pacer import Pacer
from wbfuse.writeback.records import Record
from wbfuse.writeback.schedule import Schedule

log = logging.getLogger(__name__)

TRANSIENT = frozenset({
    errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EPIPE, errno.ECANCELED,
})  # fmt: skip
"""Errors that no application hears of: waited out."""
_FIRST_RETRY, _LAST_RETRY = 0.1, 30.0
_PIECE_SECONDS = 0.1
_PIECE_LEAST, _PIECE_FIRST = 256 << 10, 1 << 20
_LOOK_AGAIN = 1.0
_LOST = (errno.ESTALE, errno.ENOENT, errno.EBUSY)
"""Of a file that was dirty when its server died: it is gone, or another host has taken it over."""
_FOR_GOOD = (errno.EFBIG, errno.ESTALE, errno.ENOENT)
"""Of a commit: the store has no file so large, or has this one no more."""
_TRIES = 10
"""How often in a row it may say so: for a minute, in which a server that restarts may come to itself."""
_PR_SET_IO_FLUSHER = 57

_Commit = list[tuple[File, Generation | None]]
"""Generations to commit in one call; None: the file is only synced."""
_Stage = tuple[File, Generation]
"""A generation to bring to the store ahead of its commit."""


class Engine:
    """Runs a WritebackCache: `start`, later `stop` (which leaves dirty data dirty: drain first)."""

    def __init__(self, cache: WritebackCache, dirty_expire: float, committers: int = 8) -> None:
        self.cache = cache
        self.schedule = Schedule(cache, dirty_expire)
        self.bytes_written = 0
        self.writes = 0
        self.rounds = 0
        self.on_bandwidth: Callable[[float], None] | None = None
        """Called, from a committer, when the store's measured bandwidth has changed by a third."""
        self.pacer = Pacer(cache)
        self.keep: Callable[[int, int, list[list[Piece]]], None] | None = None
        """Called, from a committer, with (ino, size, pieces of each generation) of what can never be committed."""
        self.on_defect: Callable[[], None] | None = None
        """Called, from a committer, when it cannot go on: without it write-back would stop unseen."""
        self.sync_each = False
        """Make every round durable before the log forgets it: there is one on disk, and what it says must be enough."""
        self._told = 0.0
        self._watchers = 0
        """Committers that sleep with a time to wake."""
        self._stages = cache.store.capabilities.stages
        self._atomic = cache.store.capabilities.atomic_commit
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._commit_loop, name=f"committer-{i}", daemon=True) for i in range(committers)
        ]
        self._threads.append(threading.Thread(target=self.pacer.run, name="pacer", daemon=True))
        self._threads.append(threading.Thread(target=self._warm_loop, name="warmer", daemon=True))

    def take_over(self, ino: int, records: list[tuple[int, Record]]) -> None:
        """Take what a server that died had accepted of a file; waits for a store that does not answer.

        What the store does not know any more is set aside.
        """
        cache = self.cache
        while True:
            try:
                cache.store.hold(ino)
                try:
                    cache.store.acquire(ino)
                    cache.replay(ino, cache.store.getattr(ino), records)
                    return
                finally:
                    cache.store.drop(ino)
            except OSError as e:
                log.warning("node %d: %d changes wait in the log: %s", ino, len(records), e.strerror)
                if isinstance(e, FencedError) or e.errno in _LOST:
                    why = e
                    break  # anything else may pass
            with cache.lock:
                cache.room.wait(_LOOK_AGAIN)
        f = cache.replay(ino, None, records)
        f.lost = why
        self._set_aside(f)
        with cache.lock:
            if not f.core.generations:
                del cache.files[ino]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        with self.cache.lock:
            self._stopping = self.pacer.stopping = True
            self.cache.work.notify_all()
            self.cache.paced.notify_all()
            self.cache.room.notify_all()
        for thread in self._threads:
            if thread.ident is not None:  # else it was never started
                thread.join()

    # committing

    def _commit_loop(self) -> None:
        with contextlib.suppress(OSError):
            _set_io_flusher()
        try:
            self._commit_until_stopped()
        except Exception:
            log.exception("a committer failed")
            if self.on_defect is None:
                raise
            self.on_defect()

    def _commit_until_stopped(self) -> None:
        cache = self.cache
        while True:
            with cache.lock:
                while (work := self._choose()) is None:
                    if self._stopping:
                        return
                    due = self.schedule.due(cache.clock())
                    self._watchers += due is not None
                    cache.work.wait(due)
                    self._watchers -= due is not None
                if (self._watchers == 0 and (cache.dirty or cache.failing or cache.urgent)) or self._stages:
                    cache.work.notify()  # somebody else must watch what becomes due next, or stage what follows
            self._do(work)

    def step(self) -> bool:
        """Do what a committer would do now, in this thread. Whether there was anything. For simulations."""
        with self.cache.lock:
            work = self._choose()
        if work is not None:
            self._do(work)
        return work is not None

    def _choose(self) -> _Commit | _Stage | None:
        """Held: lock. The next thing to do, begun; None where nothing is due, or the engine ends."""
        if self._stopping:
            return None
        found = self.schedule.next(self.cache.clock())
        if isinstance(found, list):
            return [self._begin(f) for f in found]
        if found is not None:
            self._begin_staging(*found)
        return found

    def _do(self, work: _Commit | _Stage) -> None:
        if isinstance(work, tuple):
            self._stage(*work)
            return
        try:
            errors = self._carry(work)
        except Exception:  # a defect of a store must not end write-back
            log.exception("write-back of node %d failed", work[0][0].ino)
            errors = {f.ino: errno.EIO for f, _ in work}
        for i, (f, g) in enumerate(work):
            self._finish(f, g, errors.get(f.ino, 0), last=i == len(work) - 1)

    def _begin(self, f: File) -> tuple[File, Generation | None]:
        """Held: lock. Put the oldest generation in flight; without one, the file is only synced."""
        if f.core.generations and not f.core.generations[0].sealed:
            f.core.seal()  # else the open one goes on absorbing, also while an older one fails again and again
        g = f.core.begin()
        f.syncing = g is None
        if g is not None:
            self.cache.in_flight_bytes += g.extents.bytes
        self.schedule.begun(f, g)
        return f, g

    def _round(self, f: File, g: Generation) -> Round:
        """What the store is given. The generation is sealed and in flight or pinned, so nobody else touches its map."""
        if g.round is not None:
            return g.round
        cache = self.cache
        bandwidth = cache.limits.bandwidth
        with cache.lock:
            bandwidth.start(cache.clock())
            piece = cache.store.capabilities.preferred_piece
            if bandwidth.measured:
                piece = max(_PIECE_LEAST, min(piece, int(bandwidth.value * _PIECE_SECONDS) & -4096))
            first = min(piece, _PIECE_FIRST) if bandwidth.unknown else piece
        pieces = plan(g.extents, piece, cache.log.view, first)
        return Round(f.ino, g.lowest, pieces, g.size, g.atime_ns, g.mtime_ns)

    def _carry(self, jobs: list[tuple[File, Generation | None]]) -> dict[int, int]:
        """Commit, and make durable where somebody waits. Answers the errors, by ino."""
        work = [(f, g, self._round(f, g)) for f, g in jobs if g is not None]
        errors: dict[int, int] = {}
        if work:
            if self.cache.disk is not None:  # what the store has, the log on disk must know
                try:
                    # Of an atomic store also that of what it was given before: what is replayed over it must be newer.
                    self.cache.disk.wait(None if self._atomic else max(g.sequence for _, g, _ in work))
                except OSError as e:
                    return {f.ino: e.errno or errno.EIO for f, _, _ in work}
            with self.cache.lock:
                seen = [f.attr_version for f, _, _ in work]
            errors = self._commit([r for _, _, r in work])
            with self.cache.lock:
                for _, g, r in work:
                    g.round = r if r.staged is not None else None  # after a failure only the commit is left to repeat
            for (f, g, _), version in zip(work, seen, strict=True):
                if f.ino not in errors:
                    errors |= self._committed(f, g, version)
        for f, nothing in jobs:
            if nothing is None and (error := self._sync(f)):
                errors[f.ino] = error
        return errors

    def _commit(self, rounds: list[Round]) -> dict[int, int]:
        """Give rounds to the store, one by one where they fail together. Answers the errors, by ino."""
        try:
            self.cache.store.commit(rounds, self._progress_of(rounds))
        except FencedError as e:
            if len(rounds) == 1:
                with self.cache.lock:
                    self._lose(self.cache.files[rounds[0].ino], e)
                return {rounds[0].ino: errno.EIO}
        except OSError as e:
            if len(rounds) == 1 or e.errno in TRANSIENT:
                return {r.ino: e.errno or errno.EIO for r in rounds}
        else:
            return {}
        errors: dict[int, int] = {}
        for r in rounds:
            errors |= self._commit([r])
        return errors

    def _committed(self, f: File, g: Generation, seen: int) -> dict[int, int]:
        """The store has `g`; `seen` was the version of the file's attributes before that."""
        try:
            attr = self.cache.store.getattr(f.ino)
        except OSError as e:
            return {f.ino: e.errno or errno.EIO}
        with self.cache.lock:
            f.version += 1
            if f.attr_version == seen:  # else somebody has set a mode or owner since, and knows better
                f.set_attr(attr)
            waited_for = self.sync_each or f.waits_up_to(g.number)
        error = self._sync(f, g.number) if waited_for else 0
        return {f.ino: error} if error else {}

    def _begin_staging(self, f: File, g: Generation) -> None:
        """Held: lock."""
        g.staging = True
        g.pinned = self.cache.log.pin(g.extents.places())
        self.schedule.staging_begun(g)

    def _stage(self, f: File, g: Generation) -> None:
        """Bring the bytes of a generation to the store while an older one is being committed."""
        cache = self.cache
        round_ = None
        try:
            round_ = self._round(f, g)
            cache.store.stage([round_], self._progress_of([round_]))
        except OSError as e:
            log.debug("staging of node %d failed: %s", f.ino, e)  # its commit will try again, and tell
        except Exception:
            log.exception("staging of node %d failed", f.ino)
        with cache.lock:
            self.schedule.staging_ended(g)
            g.staging = False
            staged = round_ is not None and round_.staged is not None
            wanted = any(g is mine for mine in f.core.generations)
            if staged and wanted:
                g.round = round_
            cache.freed(cache.log.unpin(g.pinned))
            g.pinned = []
            if wanted and not staged:
                f.failures += 1  # so that nobody tries the same again at once
                f.retry_at = cache.clock() + _FIRST_RETRY
            if wanted and not f.busy:
                if staged:
                    cache.requeue(f)
                else:
                    cache.failing[f.ino] = f
            cache.work.notify()
        if staged and not wanted and round_ is not None:
            cache.store.unstage(round_)

    def sync_now(self, f: File) -> None:
        """Make durable, in this thread, what was committed of a file. Raises OSError."""
        if error := self._sync(f):
            raise OSError(error, os.strerror(error))

    def _sync(self, f: File, committed: int = 0) -> int:
        """Make durable what the store was given, and have done what was to follow. `committed`: see Sequel."""
        with self.cache.lock:
            version = f.version
            sequel = f.sequel if f.sequel is not None and f.sequel.ready(f, committed) else None
        try:
            self.cache.store.sync(f.ino)
        except OSError as e:
            return e.errno or errno.EIO
        if sequel is not None:
            try:
                sequel.act()
            except OSError as e:  # what is durable stays so
                sequel.error = e.errno or errno.EIO
        with self.cache.lock:
            f.synced = max(f.synced, version)
            if sequel is not None and not sequel.error and f.sequel is sequel:
                f.sequel = None
        return 0

    def _progress_of(self, rounds: list[Round]) -> Callable[[int], None]:
        """What the store tells of these. A round of one file alone is broken off where nobody wants it any more."""
        f = self.cache.files.get(rounds[0].ino) if len(rounds) == 1 else None

        def progress(done: int) -> None:
            self._progress(done)
            if f is not None and (self.cache.closing or _gone(f)):
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

        return progress

    def _progress(self, done: int) -> None:
        cache = self.cache
        with cache.lock:
            if done:
                self.bytes_written += done
                self.writes += 1
                cache.limits.bandwidth.progress(cache.clock(), done)
                cache.paced.notify()
            value = cache.limits.bandwidth.value
            changed = cache.limits.bandwidth.measured and abs(value - self._told) > self._told / 3
            if changed:
                self._told = value
        if changed and self.on_bandwidth is not None:
            try:
                self.on_bandwidth(value)
            except OSError:
                log.exception("the kernel's share could not be set")

    def _finish(self, f: File, g: Generation | None, error: int, last: bool = True) -> None:
        """The round of `g` (or, where None, a sync alone) has ended; it was the `last` of its commit."""
        cache = self.cache
        answers: list[Callable[[], None]] = []
        with cache.lock:
            self.schedule.ended(f, g, last)
            f.syncing = False
            if g is not None:
                cache.in_flight_bytes -= g.extents.bytes
                # A failed sync may have lost committed pages in the store, so its round is written again as well.
                if f.core.end(error == 0) is not None:
                    cache._release(f, [g])
                    self.rounds += 1
            f.hopeless = f.hopeless + 1 if g is not None and error in _FOR_GOOD else 0
            if error and not _gone(f):
                answers += self._failed(f, error)
                if f.hopeless >= _TRIES:
                    self._lose(f, OSError(error, os.strerror(error)))
            elif not error and f.sequel is not None and f.sequel.error:
                answers += self._sequel_failed(f, f.sequel)
            elif not error:
                f.failures = 0
                if f.synced == f.version:  # else somebody began to wait during the commit: a sync of its own follows
                    oldest = f.core.generations[0].number if f.core.generations else None
                    ready = [w for w in f.waiters if oldest is None or w.generation < oldest]
                    f.waiters = [w for w in f.waiters if w not in ready]
                    answers += [partial(w.done, 0) for w in ready]
                cache.requeue(f)
            if _gone(f):
                answers += cache._discard(f)
            forget = cache._forgettable(f)
            lost = f.lost is not None and bool(error) and not any(g.staging for g in f.core.generations)
            cache.room.notify_all()
            cache.paced.notify()
        if lost:
            self._set_aside(f)
        for answer in answers:
            answer()
        if forget:
            cache.drop(f.ino)

    def rescue(self) -> bool:
        """The mount ends with dirty data: keep all of it. Whether that worked."""
        cache, whole = self.cache, True
        for f in list(cache.files.values()):
            with cache.lock:
                gone = list(f.core.generations)
                pinned = cache.log.pin(place for g in gone for place in g.extents.places())
                pieces = [contents(g, f.core.size, cache.log.view) for g in gone]
            try:
                if gone and self.keep is not None:
                    self.keep(f.ino, f.core.size, pieces)
            except Exception:  # whatever it is, the others may still be kept
                log.exception("node %d could not be set aside", f.ino)
                whole = False
            finally:
                with cache.lock:
                    cache.log.unpin(pinned)
        return whole

    def _lose(self, f: File, why: OSError) -> None:
        """Held: lock. Nothing of the file can ever be committed; see `_set_aside`."""
        if f.lost is None:
            log.error("node %d can not be committed any more: %s", f.ino, why.strerror)
            f.lost = why

    def _set_aside(self, f: File) -> None:
        """Put what can never be committed where it can be found again. While that fails the log keeps it."""
        cache = self.cache
        with cache.lock:
            f.core.seal()
            gone = list(f.core.generations)
            if self.keep is None or not gone:
                return
            f.syncing = True  # nobody else takes it up meanwhile
            pinned = cache.log.pin(place for g in gone for place in g.extents.places())
            pieces = [contents(g, f.core.size, cache.log.view) for g in gone]
        kept = False
        try:
            self.keep(f.ino, f.core.size, pieces)
            kept = True
        except Exception:  # whatever it is, the committer must live on
            log.exception("node %d can not be committed, nor set aside for now; trying again", f.ino)
        with cache.lock:
            f.syncing = False
            if kept:
                del f.core.generations[: len(gone)]
                cache._release(f, gone)
                cache.incomplete.add(f.ino)
                cache.failing.pop(f.ino, None)
            cache.freed(cache.log.unpin(pinned))
            waiters, f.waiters = f.waiters, []
            sequel, f.sequel = f.sequel, None
            f.retry_at = cache.clock() + _FIRST_RETRY
            cache.requeue(f)  # what came meanwhile follows
            cache.room.notify_all()
        if sequel is not None:
            sequel.give_up()
        for w in waiters:
            w.done(errno.EIO if f.lost is None else f.lost.errno or errno.EIO)

    def _sequel_failed(self, f: File, sequel: Sequel) -> list[Callable[[], None]]:
        """Held: lock. The data is durable, and what was to follow is tried again later."""
        error, sequel.error = sequel.error, 0
        answers = self._failed(f, error)
        self.cache.failing.pop(f.ino, None)
        self.cache.requeue(f)
        return answers

    def _failed(self, f: File, error: int) -> list[Callable[[], None]]:
        """Held: lock. Keep the data, note the error, try again later. Answers the replies to send."""
        cache = self.cache
        f.failures += 1
        f.retry_at = cache.clock() + min(_LAST_RETRY, _FIRST_RETRY * 2 ** min(f.failures - 1, 16))
        if f.core.generations:
            cache.failing[f.ino] = f
        cache.last_error = f"node {f.ino}: {os.strerror(error)}"
        log.warning("write-back of node %d failed: %s; try %d", f.ino, os.strerror(error), f.failures)
        if error in TRANSIENT:
            if f.waited_for and not f.core.generations:
                cache.urgent[f.ino] = f
            return []
        cache.failed(f, error)
        waiters, f.waiters = f.waiters, []
        others = [] if f.sequel is None else [f.sequel.fail]
        if f.waited_for and not f.core.generations:
            cache.urgent[f.ino] = f
        return others + [partial(w.done, error) for w in waiters]

    def _warm_loop(self) -> None:
        while not self._stopping and self.cache.log.warm_next():
            pass


def _gone(f: File) -> bool:
    """Nobody can reach it any more."""
    return f.unlinked and not f.opens


def _set_io_flusher() -> None:
    """Memory reclaim in this thread must not wait for the writers that it serves (prctl(2); CAP_SYS_RESOURCE)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
