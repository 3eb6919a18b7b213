"""The interface of a file system in Python: subclass `FileSystem`, override what you have.

Design: a method gets a `Request` (who asks, for which node) and bare arguments, and returns a value or raises
OSError with an errno. What is not overridden answers ENOSYS (which the kernel remembers) or a sensible default.

Threads: methods named in `inline` run on the reader thread, where nothing else is served meanwhile; such a method
raises `WouldBlock` as soon as it finds that it would wait, and is called again, with `request.blocking` true, from
a pool thread. All other methods run where they may block, several at once.

A method that must wait for long returns `request.park()`: no thread is held, whoever completes the work calls
`request.answer(value)` or `request.fail(errno)`, once, from any thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Protocol

from wbfuse.wire import requests as wire
from wbfuse.wire.constants import Cap
from wbfuse.wire.types import Attr, Dirent, Entry, Lock, Opened, Statfs

if TYPE_CHECKING:
    from wbfuse.wire.negotiate import Agreement

Buffer = bytes | bytearray | memoryview
EntryMaker = Callable[[], Entry | None]


class Parked:
    """The type of `PARKED`: this request will be answered later."""


PARKED: Final = Parked()


class Lent(list["Buffer"]):
    """Buffers of a READ answer that must stay as they are until it is sent; then `release` is called, once."""

    def __init__(self, buffers: Sequence[Buffer], release: Callable[[], None]) -> None:
        super().__init__(buffers)
        self.release = release


class WouldBlock(Exception):  # noqa: N818 - a signal of control, not an error
    """Raised by an inline method that would have to wait. It is then called again from the pool."""


class Request:
    """Who asks, for which node, and how to answer later. Made by the session; plain attributes."""

    __slots__ = ("_finish", "again", "blocking", "gid", "nodeid", "on_interrupt", "pid", "uid", "unique")

    def __init__(self, unique: int, nodeid: int, uid: int, gid: int, pid: int, finish: Finish) -> None:
        self.unique = unique
        self.nodeid = nodeid
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.blocking = False
        """True where the method may wait."""
        self.again = False
        """Set on a parked request that could not be taken: when the kernel sends it again (NOTIFY_RESEND), it is served
        as if it had never been here."""
        self.on_interrupt: Callable[[], None] | None = None
        """Called, from the reader thread, when the caller got a signal. It may fail the request with EINTR."""
        self._finish = finish

    def park(self, on_interrupt: Callable[[], None] | None = None) -> Parked:
        """Keep the request open: `return request.park()`."""
        self.on_interrupt = on_interrupt
        return self._finish.park(self)

    def answer(self, value: object = None) -> None:
        """Complete a parked request with what its method would have returned. Later calls do nothing."""
        self._finish.complete(self, value, 0)

    def fail(self, error: int) -> None:
        """Complete a parked request with a positive errno. Later calls do nothing."""
        self._finish.complete(self, None, error)


class Finish(Protocol):
    """What the session gives a Request: the way back for a parked one."""

    def park(self, request: Request) -> Parked: ...

    def complete(self, request: Request, value: object, error: int) -> None: ...


class FileSystem:
    """Base of every file system. Node 1 is the root. All names are bytes, all sizes and offsets bytes."""

    attr_timeout: float = 1.0
    """Seconds for which the kernel may keep attributes of GETATTR and SETATTR replies."""
    inline: frozenset[str] = frozenset({"forget", "batch_forget", "release", "releasedir", "flush", "access"})
    """Methods that are tried on the reader thread first."""
    capabilities: Cap = (
        Cap.ASYNC_READ | Cap.PARALLEL_DIROPS | Cap.AUTO_INVAL_DATA | Cap.DO_READDIRPLUS | Cap.READDIRPLUS_AUTO
        | Cap.ASYNC_DIO
    )  # fmt: skip
    """What to take of the kernel's offer. READDIRPLUS is taken only where `readdirplus` is overridden."""
    required: Cap = Cap(0)
    max_write: int = 1 << 20
    max_readahead: int = 1 << 20
    readers: int = 1
    """Threads that receive requests. More than one pays only where most requests may block."""

    notify: Callable[..., Future[None]]
    """Set by the session: sends a notification of `wbfuse.wire.replies` from a thread of its own."""

    def receive_target(self) -> memoryview | None:
        """Where the payload of the next WRITE shall be received, at least max_write bytes; None for a private buffer.

        Asked before each request, from the one reader thread (so `readers` must be 1). The memory must be resident.
        """
        return None

    def init(self, agreement: Agreement) -> None:
        """The connection is negotiated; called once, before any other method."""

    def destroy(self) -> None:
        """The session has ended; called once, after every other method has returned."""

    # names

    def lookup(self, request: Request, name: bytes) -> Entry:
        raise OSError(errno.ENOENT, "no such name")

    def forget(self, request: Request, nlookup: int) -> None:
        """The kernel drops so many of the references that replies with an Entry gave it. There is no reply."""

    def batch_forget(self, request: Request, forgets: Sequence[tuple[int, int]]) -> None:
        for nodeid, nlookup in forgets:
            request.nodeid = nodeid
            self.forget(request, nlookup)

    def mknod(self, request: Request, name: bytes, mode: int, rdev: int, umask: int) -> Entry:
        raise OSError(errno.ENOSYS, "mknod")

    def mkdir(self, request: Request, name: bytes, mode: int, umask: int) -> Entry:
        raise OSError(errno.ENOSYS, "mkdir")

    def symlink(self, request: Request, name: bytes, target: bytes) -> Entry:
        raise OSError(errno.ENOSYS, "symlink")

    def link(self, request: Request, nodeid: int, name: bytes) -> Entry:
        """Give `nodeid` another name in directory `request.nodeid`."""
        raise OSError(errno.ENOSYS, "link")

    def readlink(self, request: Request) -> bytes:
        raise OSError(errno.EINVAL, "readlink")

    def unlink(self, request: Request, name: bytes) -> None:
        raise OSError(errno.ENOSYS, "unlink")

    def rmdir(self, request: Request, name: bytes) -> None:
        raise OSError(errno.ENOSYS, "rmdir")

    def rename(self, request: Request, name: bytes, newdir: int, newname: bytes, flags: int) -> None:
        raise OSError(errno.ENOSYS, "rename")

    # attributes

    def getattr(self, request: Request, fh: int | None) -> Attr:
        """`fh` is given where the caller asked through an open file."""
        raise OSError(errno.ENOSYS, "getattr")

    def setattr(self, request: Request, change: wire.Setattr) -> Attr:
        """Apply what `change.valid` (FATTR_*) names; answer the attributes as they then are."""
        raise OSError(errno.ENOSYS, "setattr")

    def access(self, request: Request, mask: int) -> None:
        raise OSError(errno.ENOSYS, "access")

    def statfs(self, request: Request) -> Statfs:
        return Statfs(blocks=0, bfree=0, bavail=0, files=0, ffree=0)

    def getxattr(self, request: Request, name: bytes) -> bytes:
        raise OSError(errno.ENOSYS, "getxattr")

    def listxattr(self, request: Request) -> Sequence[bytes]:
        raise OSError(errno.ENOSYS, "listxattr")

    def setxattr(self, request: Request, name: bytes, value: bytes, flags: int) -> None:
        raise OSError(errno.ENOSYS, "setxattr")

    def removexattr(self, request: Request, name: bytes) -> None:
        raise OSError(errno.ENOSYS, "removexattr")

    # files

    def open(self, request: Request, flags: int, open_flags: int) -> Opened:
        return Opened(0)

    def create(self, request: Request, name: bytes, flags: int, mode: int, umask: int) -> tuple[Entry, Opened]:
        """Make and open a file. ENOSYS makes the kernel use mknod and open."""
        raise OSError(errno.ENOSYS, "create")

    def tmpfile(self, request: Request, flags: int, mode: int, umask: int) -> tuple[Entry, Opened]:
        raise OSError(errno.EOPNOTSUPP, "tmpfile")

    def read(self, request: Request, fh: int, offset: int, size: int, flags: int) -> Buffer | Sequence[Buffer] | Parked:
        raise OSError(errno.ENOSYS, "read")

    def write(
        self, request: Request, fh: int, offset: int, data: memoryview, write_flags: int, flags: int
    ) -> int | Parked:
        """Take all of `data`, which is valid only during the call, or raise: a short count loses data in write-back."""
        raise OSError(errno.ENOSYS, "write")

    def flush(self, request: Request, fh: int, lock_owner: int) -> Parked | None:
        """A descriptor was closed (there may be several for one open, and there may be none after an error)."""
        return None

    def fsync(self, request: Request, fh: int, datasync: bool) -> Parked | None:
        raise OSError(errno.ENOSYS, "fsync")

    def release(self, request: Request, fh: int, flags: int) -> None:
        """The last use of a handle."""

    def fallocate(self, request: Request, fh: int, offset: int, length: int, mode: int) -> Parked | None:
        raise OSError(errno.ENOSYS, "fallocate")

    def lseek(self, request: Request, fh: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE only."""
        raise OSError(errno.ENOSYS, "lseek")

    def copy_file_range(
        self, request: Request, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int,
        flags: int,
    ) -> int:  # fmt: skip
        raise OSError(errno.ENOSYS, "copy_file_range")

    def getlk(self, request: Request, lock: wire.Getlk) -> Lock:
        raise OSError(errno.ENOSYS, "getlk")

    def setlk(self, request: Request, lock: wire.Getlk) -> Parked | None:
        raise OSError(errno.ENOSYS, "setlk")

    def setlkw(self, request: Request, lock: wire.Getlk) -> Parked | None:
        raise OSError(errno.ENOSYS, "setlkw")

    def ioctl(
        self, request: Request, fh: int, cmd: int, arg: int, flags: int, data: bytes, out_size: int
    ) -> tuple[int, bytes]:
        raise OSError(errno.ENOTTY, "ioctl")

    def poll(self, request: Request, fh: int, kh: int, flags: int, events: int) -> int:
        raise OSError(errno.ENOSYS, "poll")

    def bmap(self, request: Request, block: int, blocksize: int) -> int:
        raise OSError(errno.ENOSYS, "bmap")

    # directories

    def opendir(self, request: Request, flags: int) -> Opened:
        return Opened(0)

    def readdir(self, request: Request, fh: int, offset: int) -> Iterable[Dirent]:
        """Entries from `offset` on, "." and ".." included; taken until the kernel's buffer is full."""
        raise OSError(errno.ENOSYS, "readdir")

    def readdirplus(self, request: Request, fh: int, offset: int) -> Iterable[tuple[Dirent, EntryMaker]]:
        """As readdir, with a function that looks the name up; it is called only for names that fit.

        It answers None for "." and ".." and for what has gone: those give no reference to the kernel.
        """
        raise OSError(errno.ENOSYS, "readdirplus")

    def releasedir(self, request: Request, fh: int, flags: int) -> None:
        """The last use of a directory handle."""

    def fsyncdir(self, request: Request, fh: int, datasync: bool) -> Parked | None:
        raise OSError(errno.ENOSYS, "fsyncdir")

    def syncfs(self, request: Request) -> Parked | None:
        raise OSError(errno.ENOSYS, "syncfs")


def overrides(fs: FileSystem, method: str) -> bool:
    """Whether the class of `fs` has its own `method`."""
    return getattr(type(fs), method) is not getattr(FileSystem, method)


def error_number(e: OSError) -> int:
    """The errno to answer for an OSError; EIO where it has none."""
    return e.errno if e.errno and 0 < e.errno < 512 else errno.EIO


def strerror(error: int) -> str:
    return f"{errno.errorcode.get(error, error)}: {os.strerror(error)}"


Handler = Callable[..., Any]
