"""StoreFileSystem: a store as a FUSE file system, write-through. Every change is in the store before its reply.

It keeps the open table and nothing else; the store counts the references that entries give to the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from wbfuse.filesystem.api import Buffer, EntryMaker, FileSystem, Parked, Request, WouldBlock
from wbfuse.filesystem.handles import Handle, OpenTable
from wbfuse.filesystem.intents import Intents
from wbfuse.journal import Journal, Kind
from wbfuse.store.contract import Change, Found, Owner, Store
from wbfuse.wire import replies
from wbfuse.wire import requests as wire
from wbfuse.wire.constants import (
    FATTR_ATIME,
    FATTR_ATIME_NOW,
    FATTR_GID,
    FATTR_KILL_SUIDGID,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_MTIME_NOW,
    FATTR_SIZE,
    FATTR_UID,
    FOPEN_DIRECT_IO,
    FOPEN_KEEP_CACHE,
    OPEN_KILL_SUIDGID,
    RENAME_EXCHANGE,
    WRITE_KILL_SUIDGID,
    Cap,
)
from wbfuse.wire.negotiate import Agreement
from wbfuse.wire.types import Attr, Dirent, Entry, Opened, Statfs

log = logging.getLogger(__name__)

O_DSYNC = os.O_DSYNC
MAX_OFFSET = (1 << 63) - 1


class StoreFileSystem(FileSystem):
    """Serve `store`. `direct_io` keeps file data out of the kernel's cache; `wait_on_close` makes close(2) durable.

    `journal` keeps what a server that comes after this one must know.
    """

    capabilities = (
        FileSystem.capabilities
        | Cap.HANDLE_KILLPRIV_V2 | Cap.DIRECT_IO_ALLOW_MMAP | Cap.CACHE_SYMLINKS | Cap.HAS_RESEND
    )  # fmt: skip
    inline = frozenset({"forget", "batch_forget", "read", "releasedir", "flush", "opendir"})
    readers = 3

    def __init__(
        self, store: Store, direct_io: bool = False, wait_on_close: bool = True, journal: Journal | None = None
    ) -> None:
        self.store = store
        self.attr_timeout = store.capabilities.attr_timeout
        self.direct_io = direct_io
        self.wait_on_close = wait_on_close
        self._journal = journal or Journal()
        self.handles = OpenTable(self._journal)
        self._intents = Intents(self._journal)
        self._buffers = threading.local()

    def init(self, agreement: Agreement) -> None:
        self._journal.put(Kind.AGREEMENT, 0, agreement.encode())

    def take_over(self) -> None:
        """Go on where the server of `journal` was when it died: its open files are held again. Before `init`."""
        for fh, handle in self.handles.all():
            try:
                self._take_over(handle)
            except OSError as e:
                log.warning("node %d, which was open, is not in the store any more: %s", handle.ino, e.strerror)
                self.handles.close(fh)
        self.store.taken_over()

    def _take_over(self, handle: Handle) -> None:
        self.store.hold(handle.ino)
        try:
            if handle.writable:
                self.store.acquire(handle.ino)
        except OSError:
            self.store.drop(handle.ino)
            raise

    def destroy(self) -> None:
        self.store.close()

    # hooks for what a cache knows better

    def shown(self, ino: int, attr: Attr) -> Attr:
        """The attributes to show, given the store's."""
        return attr

    def changed(self, ino: int, attr: Attr) -> None:
        """The store's attributes of `ino` are new."""

    def renewed(self, ino: int) -> None:
        """The store's attributes of `ino` may be new."""

    def gone(self, ino: int) -> None:
        """The last link of `ino` was removed."""

    # names

    def _entry(self, found: Found) -> Entry:
        ino, attr = found
        return Entry(ino, self.shown(ino, attr), 0, self.attr_timeout, self.attr_timeout)

    @staticmethod
    def _owner(request: Request) -> Owner:
        return Owner(request.uid, request.gid)

    def lookup(self, request: Request, name: bytes) -> Entry:
        return self._entry(self.store.lookup(request.nodeid, name))

    def forget(self, request: Request, nlookup: int) -> None:
        self.store.forget(request.nodeid, nlookup)

    def _make(self, request: Request, name: bytes, act: Callable[[], Found], mode: int | None = None) -> Found:
        """Give something new a name, once."""

        def made(when: int) -> tuple[Found] | None:
            ino, attr = self.store.lookup(request.nodeid, name)
            if attr.ctime_ns < when:
                self.store.forget(ino)
                return None
            if attr.uid != request.uid:  # it was made, and not given away any more
                group = request.gid if attr.gid == os.getegid() else None
                attr = self.store.setattr(ino, Change(uid=request.uid, gid=group, mode=mode))
            return ((ino, attr),)

        return self._intents.once(request, act, made)

    def mknod(self, request: Request, name: bytes, mode: int, rdev: int, umask: int) -> Entry:
        store, owner = self.store, self._owner(request)
        if stat.S_ISREG(mode):
            return self._entry(self._make(request, name, lambda: store.create(request.nodeid, name, mode, owner), mode))
        return self._entry(
            self._make(request, name, lambda: store.mknod(request.nodeid, name, mode, rdev, owner), mode)
        )

    def mkdir(self, request: Request, name: bytes, mode: int, umask: int) -> Entry:
        owner = self._owner(request)
        return self._entry(self._make(request, name, lambda: self.store.mkdir(request.nodeid, name, mode, owner), mode))

    def symlink(self, request: Request, name: bytes, target: bytes) -> Entry:
        owner = self._owner(request)
        return self._entry(self._make(request, name, lambda: self.store.symlink(request.nodeid, name, target, owner)))

    def link(self, request: Request, nodeid: int, name: bytes) -> Entry:
        def linked(_when: int) -> tuple[Found] | None:
            found = self.store.lookup(request.nodeid, name)
            if found[0] == nodeid:
                return (found,)
            self.store.forget(found[0])
            return None

        found = self._intents.once(request, lambda: self.store.link(nodeid, request.nodeid, name), linked)
        self.renewed(found[0])
        return self._entry(found)

    def readlink(self, request: Request) -> bytes:
        return self.store.readlink(request.nodeid)

    def _is_there(self, parent: int, name: bytes) -> int:
        """The node under a name. FileNotFoundError."""
        ino, _ = self.store.lookup(parent, name)
        self.store.forget(ino)
        return ino

    def unlink(self, request: Request, name: bytes) -> None:
        self._lost(*self._remove(request, name, lambda: self.store.unlink(request.nodeid, name)))

    def rmdir(self, request: Request, name: bytes) -> None:
        self._remove(request, name, lambda: self.store.rmdir(request.nodeid, name))

    def _remove(self, request: Request, name: bytes, act: Callable[[], Any]) -> Any:
        """Remove a name, once. Answers what `act` does, or (0, 0) where it was done before."""

        def removed(_when: int) -> tuple[Any] | None:
            try:
                self._is_there(request.nodeid, name)
            except FileNotFoundError:
                return ((0, 0),)
            return None

        return self._intents.once(request, act, removed)

    def rename(self, request: Request, name: bytes, newdir: int, newname: bytes, flags: int) -> None:
        def renamed(_when: int) -> tuple[tuple[int, int]] | None:
            with contextlib.suppress(FileNotFoundError):
                self._is_there(request.nodeid, name)
                return None
            self._is_there(newdir, newname)  # which also teaches the store where it is now
            return ((0, 0),)

        if flags & RENAME_EXCHANGE:
            self._exchange(request, name, newdir, newname)
            return
        act = partial(self.store.rename, request.nodeid, name, newdir, newname, flags)
        self._lost(*self._intents.once(request, act, renamed))

    def _exchange(self, request: Request, name: bytes, newdir: int, newname: bytes) -> None:
        """Both names are there before and after, so the intent says which node stood under the first."""
        was = self._is_there(request.nodeid, name)

        def exchanged(before: int) -> tuple[tuple[int, int]] | None:
            return ((0, 0),) if was != before else None

        act = partial(self.store.rename, request.nodeid, name, newdir, newname, RENAME_EXCHANGE)
        self._intents.once(request, act, exchanged, note=was)

    def _lost(self, ino: int, links: int) -> None:
        """A name of `ino` was removed."""
        if ino and links <= 0:
            self.gone(ino)
        elif ino:
            try:
                self.renewed(ino)
            except OSError as e:
                if e.errno not in (errno.ESTALE, errno.ENOENT):
                    raise

    # attributes

    def getattr(self, request: Request, fh: int | None) -> Attr:
        return self.shown(request.nodeid, self.store.getattr(request.nodeid))

    def setattr(self, request: Request, change: wire.Setattr) -> Attr:
        ino, valid = request.nodeid, change.valid
        if valid & FATTR_SIZE:
            self._resize(request, change.size)
        wanted = self._change(change, time.time_ns())
        if valid & FATTR_KILL_SUIDGID and wanted.mode is None:
            self._kill_suid(ino)
        if wanted == Change():
            attr = self.store.getattr(ino)
        else:
            attr = self.store.setattr(ino, wanted)
            self.changed(ino, attr)
        return self.shown(ino, attr)

    @staticmethod
    def _change(change: wire.Setattr, now_ns: int) -> Change:
        valid, out = change.valid, Change()
        if valid & FATTR_MODE:
            out.mode = change.mode
        if valid & FATTR_UID:
            out.uid = change.uid
        if valid & FATTR_GID:
            out.gid = change.gid
        if valid & FATTR_ATIME:
            out.atime_ns = now_ns if valid & FATTR_ATIME_NOW else change.atime_ns
        if valid & FATTR_MTIME:
            out.mtime_ns = now_ns if valid & FATTR_MTIME_NOW else change.mtime_ns
        return out

    def _resize(self, request: Request, size: int) -> None:
        if size > MAX_OFFSET:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self.store.truncate(request.nodeid, size)

    def _kill_suid(self, ino: int) -> None:
        """What write(2) owes a set-user-id file (HANDLE_KILLPRIV_V2): the bits go, setgid only with group execute."""
        attr = self.store.getattr(ino)
        drop = attr.mode & stat.S_ISUID
        if attr.mode & stat.S_ISGID and attr.mode & stat.S_IXGRP:
            drop |= stat.S_ISGID
        if drop:
            self.changed(ino, self.store.setattr(ino, Change(mode=attr.mode & 0o7777 & ~drop)))

    def statfs(self, request: Request) -> Statfs:
        return self.store.statfs()

    def getxattr(self, request: Request, name: bytes) -> bytes:
        return self.store.getxattr(request.nodeid, name)

    def listxattr(self, request: Request) -> Sequence[bytes]:
        return self.store.listxattr(request.nodeid)

    def setxattr(self, request: Request, name: bytes, value: bytes, flags: int) -> None:
        if name.startswith(b"system.posix_acl_"):
            # The kernel was not told to honour ACLs on this mount, so storing one would promise what nobody keeps.
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        ino = request.nodeid
        self._intents.once(
            request, lambda: self.store.setxattr(ino, name, value, flags),
            lambda _when: (None,) if self._xattr(ino, name) == value else None,
        )  # fmt: skip

    def removexattr(self, request: Request, name: bytes) -> None:
        ino = request.nodeid
        self._intents.once(
            request, lambda: self.store.removexattr(ino, name),
            lambda _when: (None,) if self._xattr(ino, name) is None else None,
        )  # fmt: skip

    def _xattr(self, ino: int, name: bytes) -> bytes | None:
        try:
            return self.store.getxattr(ino, name)
        except OSError as e:
            if e.errno != errno.ENODATA:
                raise
            return None

    # open files

    def _open_flags(self, ino: int) -> int:
        """Also has the store look at what other hosts have done to the file."""
        if not self.store.opened(ino):
            with contextlib.suppress(FileNotFoundError):  # it may not know the file yet
                self.notify(replies.notify_inval_inode(ino, -1)).result()  # the size that it believes
            return FOPEN_DIRECT_IO if self.direct_io else 0
        return FOPEN_DIRECT_IO if self.direct_io else FOPEN_KEEP_CACHE

    def open(self, request: Request, flags: int, open_flags: int) -> Opened:
        ino = request.nodeid
        if open_flags & OPEN_KILL_SUIDGID:
            self._kill_suid(ino)
        return Opened(self._open(request, ino, flags), self._open_flags(ino))

    def _open(self, request: Request, ino: int, flags: int) -> int:
        """A handle that holds the file."""
        before = self.handles.opened_before(request.unique, ino)
        if before is not None:
            return before[0]
        self.store.hold(ino)
        try:
            if writable(flags):
                self.store.acquire(ino)
            return self.handles.open(ino, writable(flags), request.unique)[0]
        except OSError:
            self.store.drop(ino)
            raise

    def create(self, request: Request, name: bytes, flags: int, mode: int, umask: int) -> tuple[Entry, Opened]:
        owner = self._owner(request)
        try:
            found = self._make(request, name, lambda: self.store.create(request.nodeid, name, mode, owner), mode)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            found = self.store.lookup(request.nodeid, name)  # somebody else made it behind the kernel's back
        return self._created(request, found, flags)

    def _created(self, request: Request, found: Found, flags: int) -> tuple[Entry, Opened]:
        return self._entry(found), Opened(self._open(request, found[0], flags), self._open_flags(found[0]))

    def tmpfile(self, request: Request, flags: int, mode: int, umask: int) -> tuple[Entry, Opened]:
        before = self.handles.opened_before(request.unique)
        if before is not None:  # it has no name by which it could be found
            fh, handle = before
            return self._entry((handle.ino, self.store.getattr(handle.ino))), Opened(fh, self._open_flags(handle.ino))
        return self._created(request, self.store.tmpfile(request.nodeid, mode, self._owner(request)), flags)

    def release(self, request: Request, fh: int, flags: int) -> None:
        handle = self.handles.close(fh)
        if handle is not None:
            self.store.drop(handle.ino)

    def buffer(self, size: int) -> memoryview:
        """Memory of this thread's own, valid until it asks again."""
        own: memoryview | None = getattr(self._buffers, "own", None)
        if own is None or len(own) < size:
            own = self._buffers.own = memoryview(mmap.mmap(-1, max(size, 1 << 20)))
        return own[:size]

    def read(self, request: Request, fh: int, offset: int, size: int, flags: int) -> Buffer | Sequence[Buffer] | Parked:
        return self._read_store(request, offset, size)

    def _read_store(self, request: Request, offset: int, size: int) -> Buffer:
        buffer = self.buffer(size)
        try:
            n = self.store.read(request.nodeid, offset, buffer, nowait=not request.blocking)
        except BlockingIOError:
            if request.blocking:
                raise
            raise WouldBlock from None
        if n < size and not request.blocking:
            raise WouldBlock  # a short answer without waiting says nothing about the end of the file
        return buffer[:n]

    def write(
        self, request: Request, fh: int, offset: int, data: memoryview, write_flags: int, flags: int
    ) -> int | Parked:
        ino = request.nodeid
        if offset + len(data) > MAX_OFFSET:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if write_flags & WRITE_KILL_SUIDGID:
            self._kill_suid(ino)
        self.store.write(ino, offset, data)
        handle = self.handles.get(fh)
        if handle is not None:
            handle.written = True
        if flags & O_DSYNC:
            self.store.sync(ino)
        return len(data)

    def flush(self, request: Request, fh: int, lock_owner: int) -> Parked | None:
        if not self.wait_on_close:
            raise OSError(errno.ENOSYS, "close does not wait")  # so the kernel need not ask again
        handle = self.handles.get(fh)
        if handle is not None and handle.written:
            if not request.blocking:
                raise WouldBlock
            self.store.sync(handle.ino)
            handle.written = False
        return None

    def fsync(self, request: Request, fh: int, datasync: bool) -> Parked | None:
        self.store.sync(request.nodeid, datasync)
        return None

    def fallocate(self, request: Request, fh: int, offset: int, length: int, mode: int) -> Parked | None:
        self.store.fallocate(request.nodeid, mode, offset, length)
        return None

    def lseek(self, request: Request, fh: int, offset: int, whence: int) -> int:
        return self.store.seek(request.nodeid, offset, whence)

    def copy_file_range(
        self, request: Request, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int,
        flags: int,
    ) -> int:  # fmt: skip
        return self.store.copy_range(request.nodeid, offset, nodeid_out, offset_out, min(length, 1 << 30))

    # directories

    def readdir(self, request: Request, fh: int, offset: int) -> Iterable[Dirent]:
        return self.store.readdir(request.nodeid, offset)

    def readdirplus(self, request: Request, fh: int, offset: int) -> Iterator[tuple[Dirent, EntryMaker]]:
        parent = request.nodeid

        def look_up(name: bytes) -> Entry | None:
            if name in (b".", b".."):
                return None
            try:
                return self._entry(self.store.lookup(parent, name))
            except FileNotFoundError:
                return None

        for entry in self.store.readdir(parent, offset):
            yield entry, lambda name=entry.name: look_up(name)  # type: ignore[misc]

    def fsyncdir(self, request: Request, fh: int, datasync: bool) -> Parked | None:
        self.store.fsyncdir(request.nodeid)
        return None


def writable(flags: int) -> bool:
    """Whether open(2) with these flags may write."""
    return (flags & os.O_ACCMODE) != os.O_RDONLY
