"""CachedFileSystem: the same tree with wbfuse's write-back cache between the kernel and the store.

Data, size and times of a file go through the cache by node, never by handle: with the kernel's write-back a WRITE
names a guessed handle, and may come after that handle's RELEASE. Names, owners, modes and xattrs go to the store at
once; name operations never wait for data.

What may wait here without a thread: WRITE (limits), FSYNC, FLUSH of a writable handle, and O_SYNC writes.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from wbfuse.filesystem.api import PARKED, Buffer, Lent, Parked, Request, WouldBlock
from wbfuse.filesystem.appends import Appends
from wbfuse.filesystem.following import Follower
from wbfuse.filesystem.handles import Handle
from wbfuse.filesystem.store_fs import MAX_OFFSET, O_DSYNC, StoreFileSystem, writable
from wbfuse.journal import Journal
from wbfuse.store.contract import Found
from wbfuse.wire import replies
from wbfuse.wire import requests as wire
from wbfuse.wire.constants import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    FATTR_ATIME,
    FATTR_CTIME,
    FATTR_FH,
    FATTR_GID,
    FATTR_KILL_SUIDGID,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_SIZE,
    FATTR_UID,
    OPEN_KILL_SUIDGID,
    UNIQUE_RESEND,
    WRITE_CACHE,
    WRITE_KILL_SUIDGID,
    Cap,
)
from wbfuse.wire.negotiate import Agreement
from wbfuse.wire.types import Attr, Entry, Opened
from wbfuse.writeback.cache import FULL, WritebackCache
from wbfuse.writeback.cached_file import File
from wbfuse.writeback.disk.writer import Answer
from wbfuse.writeback.engine import Engine
from wbfuse.writeback.extents import HOLE
from wbfuse.writeback.file import STORE
from wbfuse.writeback.log import LogFull
from wbfuse.writeback.merged import assemble, seek, zero_filled
from wbfuse.writeback.renames import DeferredRenames, Move

log = logging.getLogger(__name__)

OURS = b"user.wbfuse."
"""Extended attributes of what the cache knows: `dirty`, bytes that are not in the store; `error`, the last one."""
_KERNELS_TIMES = FATTR_MTIME | FATTR_CTIME | FATTR_FH
_SLOW_CHANGES = FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_KILL_SUIDGID


class CachedFileSystem(StoreFileSystem):
    """`kernel_writeback` asks the kernel for its own write-back cache as well (promise 5: nothing else does)."""

    inline = StoreFileSystem.inline | {"write", "fsync", "getattr", "setattr", "getxattr", "release", "fallocate"}
    readers = 1

    def __init__(
        self, renames: DeferredRenames, cache: WritebackCache, engine: Engine, kernel_writeback: bool,
        direct_io: bool = False, wait_on_close: bool = True, journal: Journal | None = None,
    ) -> None:  # fmt: skip
        store = renames.as_store()
        super().__init__(store, direct_io, wait_on_close, journal)
        self.renames = renames
        renames.waits = self._may_be_behind
        renames.settle = self._settle
        renames.on_released = cache.let_go_on
        renames.on_gone = self._removed
        renames.on_kept = self._kept
        renames.incomplete = self._is_incomplete
        pull = self._pull_later if kernel_writeback else None
        self._follower = Follower(renames, cache, pull, self._taking, self._fresh_attr, self._lost)
        cache.held_back = renames.is_replaced
        self.cache = cache
        self.engine = engine
        self.kernel_writeback = kernel_writeback
        if store.capabilities.quick_names:
            self.inline = type(self).inline | {"lookup"}
        self._durable_commits = store.capabilities.atomic_commit
        self.max_write = cache.log.max_write
        self._appends = Appends(self._journal)
        self.fsync_by_log = False
        """fsync is answered once the log on disk has it."""
        self.on_stopped: Callable[[], None] = lambda: None
        """Called at the end, when nothing is written back any more and store and log are still there."""
        if kernel_writeback:
            # Sizes and times are the kernel's own now: AUTO_INVAL_DATA would do nothing.
            self.capabilities = StoreFileSystem.capabilities & ~Cap.AUTO_INVAL_DATA | Cap.WRITEBACK_CACHE

    def receive_target(self) -> memoryview:
        return self.cache.receive_target()

    def init(self, agreement: Agreement) -> None:
        super().init(agreement)
        self.cache.can_resend = bool(agreement.capabilities & Cap.HAS_RESEND)
        self.engine.pacer.on_room = self._ask_again
        self.engine.start()
        self.renames.on_deferred = self._follower.try_all
        self._follower.try_all()

    def take_over(self) -> None:
        """Also replays the log."""
        self._follower.load()
        for ino, records in self.cache.inherited().items():
            self.engine.take_over(ino, records)
        super().take_over()
        self.cache.taken_over()
        for f in list(self.cache.files.values()):
            if f.attr.nlink == 0 and not f.opens:
                self.gone(f.ino)  # who had it open is gone with the mount

    def _take_over(self, handle: Handle) -> None:
        self._attach(handle)
        if handle.file is not None and handle.file.error:
            handle.errors_seen = handle.file.error_sequence - 1  # it may have been told; twice is better than never

    def _ask_again(self) -> None:
        self.notify(replies.notify_resend(), at_once=True)

    def destroy(self) -> None:
        try:
            self.engine.stop()
            self.on_stopped()
        finally:
            self.store.close()
            self.cache.log.close()

    # names

    def _may_be_behind(self, ino: int) -> bool:
        """Whether the store may not have all that was written to a file, durably."""
        f = self.cache.files.get(ino)
        if f is None:
            return not self._durable_commits
        with self.cache.lock:
            return bool(f.opens or f.core.generations or f.busy) or not self._durable_commits

    def _is_incomplete(self, ino: int) -> bool:
        f = self.cache.files.get(ino)
        return ino in self.cache.incomplete or (f is not None and f.lost is not None)

    def follow_renames(self) -> None:
        """See to all renames that wait, also of a server before this one."""
        self._follower.follow_all()

    def _settle(self, move: Move) -> None:
        self.pull(move.ino)
        f = self.cache.files.get(move.ino)
        if f is not None:
            self._follower.handed_over(f)
        self._commit_now(move.ino)
        self._follower.carry_out(move)

    def fsyncdir(self, request: Request, fh: int, datasync: bool) -> Parked | None:
        """Renames that wait come first: the log on disk has none of them, so the store must."""
        for move in self.renames.inside(request.nodeid):
            self._settle(move)
        return super().fsyncdir(request, fh, datasync)

    # attributes

    def shown(self, ino: int, attr: Attr) -> Attr:
        f = self.cache.files.get(ino)
        return attr if f is None else f.shown()

    def changed(self, ino: int, attr: Attr) -> None:
        with self.cache.lock:
            f = self.cache.files.get(ino)
            if f is not None:
                f.set_attr(attr)
                f.version += 1

    def renewed(self, ino: int) -> None:
        """Raises OSError."""
        f = self.cache.files.get(ino)
        while f is not None:
            seen = f.attr_version
            attr = self.store.getattr(ino)
            with self.cache.lock:
                if f.attr_version == seen:  # else somebody has asked later, or at the same time: who is right?
                    f.set_attr(attr)
                    f.version += 1
                    return

    def gone(self, ino: int) -> None:
        """Its last name is lost. What waits to be replaced keeps its data: it may have to be the file again."""
        if not self.renames.is_victim(ino):
            self.cache.unlinked(ino)
            return
        with self.cache.lock:
            f = self.cache.files.get(ino)
            if f is not None:
                f.attr.nlink = 0

    def _removed(self, ino: int, links: int) -> None:
        """As `_lost`, for who has done it already."""
        try:
            self._lost(ino, links)
        except OSError as e:
            log.warning("node %d lost a name, and how many it has left is not known: %s", ino, e.strerror)

    def _kept(self, ino: int) -> None:
        """What was to be replaced is the file again."""
        try:
            self.renewed(ino)
        except OSError as e:
            log.warning("node %d is not replaced, and its links are not known: %s", ino, e.strerror)

    @contextmanager
    def _taking(self, ino: int) -> Iterator[None]:
        """A file that is about to be changed stays this mount's, also where the cache lets go of it meanwhile."""
        self.store.hold(ino)  # who acquires must hold
        try:
            self.store.acquire(ino)
            yield
        finally:
            self.store.drop(ino)

    def _file(self, request: Request, ino: int) -> File:
        """The cache's state of `ino`, read from the store where it is new (which may block)."""
        f = self.cache.files.get(ino)
        if f is not None:
            return f
        if not request.blocking:
            raise WouldBlock
        with self._taking(ino):
            return self.cache.adopt(ino, self._fresh_attr(ino))

    def _fresh_attr(self, ino: int) -> Attr:
        """The attributes of a file, not older than what the cache has let go meanwhile."""
        while True:
            epoch = self.cache.epoch
            attr = self.shown(ino, self.store.getattr(ino))
            if not self.cache.let_go_since(epoch, ino):
                return attr

    def lookup(self, request: Request, name: bytes) -> Entry:
        while True:
            epoch = self.cache.epoch
            try:
                ino, attr = self.store.lookup(request.nodeid, name, nowait=not request.blocking)
            except BlockingIOError:
                raise WouldBlock from None
            entry = self._entry((ino, attr))  # first: what it takes from the cache may be let go in between
            if not self.cache.let_go_since(epoch, ino):
                return entry
            self.store.forget(ino, 1)

    def getattr(self, request: Request, fh: int | None) -> Attr:
        f = self.cache.files.get(request.nodeid)
        if f is not None:
            return f.shown()
        if request.blocking:
            return self._fresh_attr(request.nodeid)
        try:
            return self.store.getattr(request.nodeid, nowait=True)
        except BlockingIOError:
            raise WouldBlock from None

    def setattr(self, request: Request, change: wire.Setattr) -> Attr:
        ino, valid = request.nodeid, change.valid
        if valid & _SLOW_CHANGES and not request.blocking:
            raise WouldBlock
        if valid & FATTR_SIZE and change.size > MAX_OFFSET:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if not self.store.capabilities.shared or not (valid & FATTR_SIZE or ino in self.cache.files):
            return self._set(request, change)
        if not request.blocking:
            raise WouldBlock
        with self._taking(ino):
            return self._set(request, change)

    def _set(self, request: Request, change: wire.Setattr) -> Attr:
        ino, valid = request.nodeid, change.valid
        f = self._file(request, ino) if valid & FATTR_SIZE else self.cache.files.get(ino)
        same = self._same_times(request, f, change)
        if same is not None:
            return same
        if f is None:
            if not request.blocking:
                raise WouldBlock
            if self.cache.disk is not None and valid & (FATTR_ATIME | FATTR_MTIME):
                self.cache.disk.wait()  # that the file is clean must be known there, or its old times are replayed
            return super().setattr(request, change)
        # Other hosts see it at their next open, but no close of this file will come.
        at_once = bool(valid & FATTR_SIZE) and not f.opens and self.store.capabilities.shared
        if valid & FATTR_SIZE:
            self._noted(self.cache.truncate, request, f, change.size, time.time_ns())
        wanted = self._change(change, time.time_ns())
        if valid & (FATTR_ATIME | FATTR_MTIME):
            self._noted(self.cache.set_times, request, f, wanted.atime_ns, wanted.mtime_ns)
            wanted.atime_ns = wanted.mtime_ns = None
        if valid & FATTR_KILL_SUIDGID and wanted.mode is None:
            self._kill_suid(ino)
        if valid & (FATTR_MODE | FATTR_UID | FATTR_GID):
            self.changed(ino, self.store.setattr(ino, wanted))
        if at_once:
            self._commit_now(ino)
        return f.shown()

    def _same_times(self, request: Request, f: File | None, change: wire.Setattr) -> Attr | None:
        """The kernel repeats the mtime that it was given when it writes back the ctime of a rename or unlink."""
        if change.valid & ~_KERNELS_TIMES or not change.valid & FATTR_MTIME:
            return None
        if f is not None:
            known = f.shown()
        else:
            try:
                known = self.store.getattr(request.nodeid, nowait=not request.blocking)
            except BlockingIOError:
                return None
            except OSError as e:
                if e.errno not in (errno.ESTALE, errno.ENOENT):
                    raise
                # Removed a moment ago; an error here would be one of the next syncfs(2).
                return Attr(
                    request.nodeid, stat.S_IFREG, 0, mtime_ns=change.mtime_ns, ctime_ns=change.mtime_ns, nlink=0
                )
        return known if known.mtime_ns == change.mtime_ns else None

    @staticmethod
    def _noted(change: Callable[..., None], request: Request, f: File, *arguments: Any) -> None:
        """A change without payload. Where the log has no room for its record, the reader must not be who waits."""
        try:
            change(f, request.unique, *arguments, wait=request.blocking)
        except LogFull:
            raise WouldBlock from None

    def getxattr(self, request: Request, name: bytes) -> bytes:
        """The kernel asks for security.capability at the first write to each file; a new one cannot have it."""
        f = self.cache.files.get(request.nodeid)
        if f is not None and f.bare and name == b"security.capability":
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if name.startswith(OURS):
            return self._told(f, name)
        if not request.blocking:
            raise WouldBlock
        return super().getxattr(request, name)

    @staticmethod
    def _told(f: File | None, name: bytes) -> bytes:
        """What wbfuse knows of a file. Never listed: cp -a and tar would copy it as if it were the file's."""
        if name == OURS + b"dirty":
            return b"%d" % (0 if f is None else f.core.dirty_bytes)
        if name == OURS + b"error" and f is not None and f.error:
            return os.strerror(f.error).encode()
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def setxattr(self, request: Request, name: bytes, value: bytes, flags: int) -> None:
        if name.startswith(OURS):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        f = self.cache.files.get(request.nodeid)
        if f is not None:
            f.bare = False
        super().setxattr(request, name, value, flags)

    # open files

    def open(self, request: Request, flags: int, open_flags: int) -> Opened:
        ino = request.nodeid
        if open_flags & OPEN_KILL_SUIDGID:
            self._kill_suid(ino)
        flags_for_kernel = self._open_flags(ino)
        before = self.handles.opened_before(request.unique, ino)
        if before is not None:
            return Opened(before[0], flags_for_kernel)
        fh, handle = self.handles.open(ino, writable(flags), request.unique)
        try:
            self._attach(handle)
        except OSError:
            self.handles.close(fh)
            raise
        return Opened(fh, flags_for_kernel)

    def _attach(self, handle: Handle, attr: Attr | None = None) -> None:
        """A writable handle, or one of a file that is dirty, keeps the file's state; another only holds the file."""
        ino = handle.ino
        self.store.hold(ino)  # before anything is asked of it: an unlink may be under way
        try:
            if handle.writable:
                self.store.acquire(ino)
            f = self.cache.open(ino, None)
            if f is None and handle.writable:
                f = self.cache.open(ino, attr or self._fresh_attr(ino))
        except OSError:
            self.store.drop(ino)
            raise
        if f is not None:
            self.store.drop(ino)  # the cache holds it now
            handle.errors_seen = f.error_sequence
            handle.file = f

    def _created(self, request: Request, found: Found, flags: int) -> tuple[Entry, Opened]:
        ino, attr = found
        before = self.handles.opened_before(request.unique, ino)
        if before is not None:
            return self._entry(found), Opened(before[0], self._open_flags(ino))
        fh, handle = self.handles.open(ino, True, request.unique)
        self._attach(handle, attr)
        handle.file.bare = attr.size == 0 and attr.nlink <= 1
        return self._entry(found), Opened(fh, self._open_flags(ino))

    def release(self, request: Request, fh: int, flags: int) -> None:
        handle = self.handles.get(fh)
        if handle is None:
            return
        f = handle.file
        if (f is None or f.unlinked) and not request.blocking:
            raise WouldBlock  # removing an orphan takes the store's time
        self.handles.close(fh)
        if f is None:
            self.store.drop(handle.ino)
        else:
            self.cache.closed(f)
            if not f.opens:
                self._appends.forget(f.ino)

    # data

    def write(
        self, request: Request, fh: int, offset: int, data: memoryview, write_flags: int, flags: int
    ) -> int | Parked:
        from_kernel_cache = bool(write_flags & WRITE_CACHE)
        if not request.blocking and self.cache.at_scratch:
            request.again = True
            parked = request.park(None if from_kernel_cache else lambda: request.fail(errno.EINTR))
            self.cache.overflow(request.fail, from_kernel_cache)
            return parked
        at_tail = not request.blocking
        f = self._file(request, request.nodeid)
        if request.unique & UNIQUE_RESEND and self.cache.taken.pop(request.unique & ~UNIQUE_RESEND, None) is not None:
            if flags & O_DSYNC and not from_kernel_cache:
                self._when_durable(request, f, self.handles.get(fh), len(data), by_log=False)
                return PARKED
            return len(data)  # it is in the log, from a server that died before it could say so
        if write_flags & WRITE_KILL_SUIDGID and f.attr.mode & (stat.S_ISUID | stat.S_ISGID):
            if not request.blocking:
                raise WouldBlock
            self._kill_suid(f.ino)
        if not from_kernel_cache and f.error in FULL and f.failures:
            # These bytes nobody has promised yet, so a full store may say so; a kernel-cache WRITE must be taken.
            raise OSError(f.error, os.strerror(f.error))
        if flags & os.O_APPEND and not from_kernel_cache and self.store.capabilities.shared:
            offset = self._end_of(f, request, offset)
        durable = bool(flags & O_DSYNC) and not from_kernel_cache
        by_log = durable and self._by_log(request, f)
        n = len(data)
        moves_time = None if from_kernel_cache else time.time_ns()
        occupied = self.cache.write(f, request.unique, offset, data, at_tail, moves_time)
        if durable:
            self._when_durable(request, f, self.handles.get(fh), n, by_log)
            return PARKED
        if self.cache.must_wait(occupied):
            parked = request.park()
            self.cache.pace(f.ino, n, partial(request.answer, n))
            return parked
        return n

    def _end_of(self, f: File, request: Request, offset: int) -> int:
        """Where an append goes: the kernel took the end that it knew, and another host may have moved it since."""
        end = self._appends.place(request, f.core.size)
        if offset != end:
            self.notify(replies.notify_inval_inode(f.ino, min(offset, end) & -4096, 0))
        return end

    def read(self, request: Request, fh: int, offset: int, size: int, flags: int) -> Buffer | Sequence[Buffer] | Parked:
        f = self.cache.files.get(request.nodeid)
        if f is None:
            return self._read_store(request, offset, size)
        plan, pinned = self.cache.read_plan(f, offset, min(offset + size, MAX_OFFSET))
        lent = None
        try:
            if len(plan) == 1 and plan[0][2] == STORE:
                start, end, _ = plan[0]
                return zero_filled(self._read_store(request, start, end - start), end - start)
            if request.blocking:
                return self._assemble(f.ino, plan)
            if any(place == STORE for _, _, place in plan):
                raise WouldBlock
            view = self.cache.log.view
            parts = [bytes(e - s) if place == HOLE else view(place, e - s) for s, e, place in plan]
            lent = Lent(parts, partial(self.cache.unpin, pinned))
            return lent
        finally:
            if lent is None:
                self.cache.unpin(pinned)

    def _assemble(self, ino: int, plan: list[tuple[int, int, int]]) -> Buffer:
        """Log, holes and store in one buffer."""
        if not plan:
            return b""
        buffer = self.buffer(plan[-1][1] - plan[0][0])
        assemble(self.cache, ino, plan, buffer)
        return buffer

    # durability

    def _by_log(self, request: Request, f: File) -> bool:
        """Whether the log on disk can answer for what was and is about to be written; what it has let go is durable.

        May wait for the store, so it comes before anything is changed.
        """
        disk = self.cache.disk
        if not self.fsync_by_log or disk is None or disk.broken:
            return False
        with self.cache.lock:
            behind = f.synced != f.version
        if behind:
            if not request.blocking:
                raise WouldBlock
            self.engine.sync_now(f)
        return True

    def _when_durable(self, request: Request, f: File, handle: Handle | None, value: int | None, by_log: bool) -> None:
        """Answer `value` once everything so far is durable (in the store, or on disk `by_log`), or the error met."""

        def done(error: int) -> None:
            if handle is not None:
                handle.errors_seen = f.error_sequence
            if error:
                request.fail(error)
            else:
                request.answer(value)

        def by_store() -> None:
            if self.cache.sync(f, done):
                request.answer(value)

        request.park(on_interrupt=lambda: self._interrupted(request, f, done))

        def by_disk(answer: Answer) -> None:
            if answer is Answer.DURABLE:
                request.answer(value)
            else:
                by_store()

        disk = self.cache.disk if by_log else None
        if disk is None:
            by_store()
            return
        answer = disk.when_durable(by_disk, self.cache.newest(f))
        if answer is not None:
            by_disk(answer)

    def _interrupted(self, request: Request, f: File, done: Callable[[int], None]) -> None:
        self.cache.cancel(f, done)  # it may wait for the log on disk instead, or be answered just now
        request.fail(errno.EINTR)

    def _commit_now(self, ino: int) -> None:
        """Wait, in a thread that may, until what was accepted so far is in the store. Raises the error it met."""
        f = self.cache.files.get(ino)
        if f is None:
            return
        ended, errors = threading.Event(), list[int]()

        def done(error: int) -> None:
            errors.append(error)
            ended.set()

        if not self.cache.sync(f, done):
            ended.wait()
            if errors[0]:
                raise OSError(errors[0], os.strerror(errors[0]))

    def _report(self, handle: Handle, f: File) -> None:
        """errseq: an error that this opener has not seen is raised, once."""
        if handle.errors_seen < f.error_sequence:
            handle.errors_seen = f.error_sequence
            raise OSError(f.error, os.strerror(f.error))

    def flush(self, request: Request, fh: int, lock_owner: int) -> Parked | None:
        if not self.wait_on_close:
            # The kernel need not ask again; an error stays for the next fsync, `wbfuse sync` or unmount.
            raise OSError(errno.ENOSYS, "close does not wait")
        handle = self.handles.get(fh)
        if handle is None or not handle.writable or handle.file is None:
            return None
        f = handle.file
        by_log = self._by_log(request, f)
        self._follower.handed_over(f)
        self._report(handle, f)
        if self._durable_commits and not f.core.generations and not f.busy:
            return None  # nothing was written, or all of it is committed, and so durable
        self._when_durable(request, f, handle, None, by_log)
        return PARKED

    def fsync(self, request: Request, fh: int, datasync: bool) -> Parked | None:
        handle = self.handles.get(fh)
        f = self.cache.files.get(request.nodeid)
        if f is None:
            if not request.blocking:
                raise WouldBlock
            return super().fsync(request, fh, datasync)
        by_log = self._by_log(request, f)
        self._follower.handed_over(f)
        if handle is not None:
            self._report(handle, f)
        self._when_durable(request, f, handle, None, by_log)
        return PARKED

    # the rest of a file

    def fallocate(self, request: Request, fh: int, offset: int, length: int, mode: int) -> Parked | None:
        f = self._file(request, request.nodeid)
        end, keep = offset + length, bool(mode & FALLOC_KEEP_SIZE)
        kind = mode & ~FALLOC_KEEP_SIZE
        if kind not in (0, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE) or (kind == FALLOC_PUNCH_HOLE and not keep):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if end > self.cache.max_file_size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if kind == 0:
            if not request.blocking:
                raise WouldBlock
            # Room is the store's to promise; it changes neither bytes nor size, so no order is at stake.
            self.store.fallocate(f.ino, FALLOC_KEEP_SIZE, offset, length)
            if not keep and end > f.core.size:
                self._noted(self.cache.truncate, request, f, end, time.time_ns())
            return None
        self._noted(self.cache.zero, request, f, offset, end, not keep and kind == FALLOC_ZERO_RANGE, time.time_ns())
        return None

    def _pull_later(self, ino: int) -> Future[None]:
        return self.notify(replies.notify_inval_inode(ino, 0, 0))

    def pull(self, ino: int) -> None:
        """Have the kernel write back what it holds of a file; returns once all of it has been taken here."""
        if self.kernel_writeback:
            try:
                self._pull_later(ino).result()
            except FileNotFoundError:
                return  # the kernel has nothing of it

    def lseek(self, request: Request, fh: int, offset: int, whence: int) -> int:
        """The kernel does not write back before it asks, so a file open for writing is pulled first."""
        ino = request.nodeid
        f = self.cache.files.get(ino)
        if f is None:
            return super().lseek(request, fh, offset, whence)
        self.pull(ino)
        return seek(self.cache, f, offset, whence)

    def copy_file_range(
        self, request: Request, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int,
        flags: int,
    ) -> int:  # fmt: skip
        """Inside the store where both files are clean; else the kernel copies through its own cache.

        A store that clones gets what is dirty first: that moves each byte once, the kernel's way twice.
        """
        if self.cache.held_back(nodeid_out):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if self.store.capabilities.clones:
            for ino in (request.nodeid, nodeid_out):
                self._commit_now(ino)
        target = self.cache.begin_copy(request.nodeid, nodeid_out)
        done = 0
        try:
            if self.cache.disk is not None:
                self.cache.disk.wait()  # what is about to be written over must not be replayed
            done = super().copy_file_range(request, fh, offset, nodeid_out, fh_out, offset_out, length, flags)
        finally:
            if target is not None:
                self.cache.end_copy(target, offset_out + done if done else 0, time.time_ns())
        return done
