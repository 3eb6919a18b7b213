"""File data of the directory store: reads, write-through, commits of rounds. Descriptors come from a bounded cache.

Large aligned runs go out with O_DIRECT where the file system takes it: they skip a copy and leave no dirty pages to
write back a second time. A commit here is not atomic: a crash in mid-round leaves part of it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wbfuse.store.contract import Buffer, Piece, Progress, Round
from wbfuse.store.directory import syscalls
from wbfuse.store.directory.fds import Fd, FdCache
from wbfuse.wire.constants import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE

ALIGN = mmap.PAGESIZE
DIRECT_MIN = 64 << 10
_IOV_MAX = 512
_ZEROS = bytes(1 << 20)
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


def split_direct(offset: int, length: int) -> tuple[int, int]:
    """The part [start, end) of a run that O_DIRECT may carry: page-aligned, at least 64 KiB, else empty."""
    start = -(-offset // ALIGN) * ALIGN
    end = (offset + length) // ALIGN * ALIGN
    return (start, end) if end - start >= DIRECT_MIN else (offset, offset)


def slice_buffers(buffers: Sequence[Buffer], start: int, end: int) -> list[memoryview]:
    """The bytes [start, end) of a vector, as a vector of views."""
    out, at = [], 0
    for buffer in buffers:
        low, high = max(start - at, 0), min(end - at, len(buffer))
        if low < high:
            out.append(memoryview(buffer)[low:high])
        at += len(buffer)
    return out


def write_all(fd: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """pwritev until everything is written."""
    rest = list(buffers)
    while rest:
        some = rest[:_IOV_MAX]
        done = os.pwritev(fd, some, offset)
        offset += done
        whole = sum(map(len, some))
        rest = rest[_IOV_MAX:] if done == whole else slice_buffers(some, done, whole) + rest[_IOV_MAX:]


class DirectoryData:
    """The half of DirectoryStore that moves bytes."""

    if TYPE_CHECKING:

        def open_node(self, ino: int, flags: int) -> Fd: ...

    def __init__(self, capacity: int) -> None:
        self._data = FdCache(capacity)
        self._direct = FdCache(min(64, capacity))
        self._direct_works = True

    def close_data(self) -> None:
        self._data.clear()
        self._direct.clear()

    def forget_data(self, ino: int) -> None:
        self._data.discard(ino)
        self._direct.discard(ino)

    def keep_data_fd(self, ino: int, fd: Fd) -> None:
        """A descriptor that creating the file gave."""
        self._data.put(ino, fd)

    def cached_data_fd(self, ino: int) -> Fd | None:
        return self._data.get(ino)

    def data_fd(self, ino: int, write: bool) -> Fd:
        """A descriptor for reading, and for writing too where asked."""
        fd = self.cached_data_fd(ino)
        if fd is not None and (fd.writable or not write):
            return fd
        try:
            fd = self.open_node(ino, os.O_RDWR)
            fd.writable = True
        except OSError as e:
            if not write and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                with contextlib.suppress(PermissionError):
                    return self._data.put(ino, self.open_node(ino, os.O_RDONLY))
            if e.errno != errno.EACCES:
                raise
            fd = self._open_against_mode(ino)
        return self._data.put(ino, fd)

    def _open_against_mode(self, ino: int) -> Fd:
        """A server without privileges must reach its own file though the mode denies it: it was open, or created so.

        POSIX checks the mode when a file is opened, which the kernel has done; here it is only opened again.
        """
        path = self.open_node(ino, os.O_PATH)
        name = f"/proc/self/fd/{path.n}"
        mode = os.stat(name).st_mode & 0o7777
        os.chmod(name, mode | 0o600)  # PermissionError for a file of somebody else, which is the right answer
        try:
            return Fd(os.open(name, os.O_RDWR | os.O_CLOEXEC), writable=True)
        finally:
            os.chmod(name, mode)

    def _direct_fd(self, ino: int) -> Fd | None:
        if not self._direct_works:
            return None
        fd = self._direct.get(ino)
        if fd is None:
            try:
                fd = self.open_node(ino, os.O_RDWR | os.O_DIRECT)
            except OSError as e:
                if e.errno in _NO_DIRECT:
                    self._direct_works = False
                    return None
                if e.errno in (errno.EACCES, errno.EPERM):
                    return None
                raise
            self._direct.put(ino, fd)
        return fd

    def read(self, ino: int, offset: int, buffer: memoryview, nowait: bool = False) -> int:
        fd = self.cached_data_fd(ino)
        if nowait:
            if fd is None:
                raise BlockingIOError(errno.EAGAIN, "not open")
            return os.preadv(fd.n, (buffer,), offset, os.RWF_NOWAIT)
        if fd is None:
            fd = self.data_fd(ino, write=False)
        done = 0
        while done < len(buffer):
            n = os.preadv(fd.n, (buffer[done:],), offset + done)
            if n == 0:
                break
            done += n
        return done

    def write(self, ino: int, offset: int, data: Buffer) -> None:
        fd = self._data.get(ino)
        if fd is None or not fd.writable:
            fd = self.data_fd(ino, write=True)
        done = os.pwrite(fd.n, data, offset)
        if done != len(data):
            write_all(fd.n, offset + done, [memoryview(data)[done:]])

    def truncate(self, ino: int, size: int) -> None:
        fd = self.data_fd(ino, write=True)
        os.ftruncate(fd.n, size)

    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        for round_ in rounds:
            self._commit(round_, progress)

    def _commit(self, round_: Round, progress: Progress) -> None:
        fd = self.data_fd(round_.ino, write=True)
        size = os.fstat(fd.n).st_size
        if round_.lowest is not None and round_.lowest < size:
            os.ftruncate(fd.n, round_.lowest)
            size = round_.lowest
        for piece in round_.pieces:
            self._put(fd, round_.ino, piece, size)
            progress(piece.length if piece.buffers is not None else 0)
        if round_.size is not None and os.fstat(fd.n).st_size != round_.size:
            os.ftruncate(fd.n, round_.size)
        if round_.mtime_ns is not None or round_.atime_ns is not None:
            now = syscalls.statx(fd.n)[0]
            atime = now.atime_ns if round_.atime_ns is None else round_.atime_ns
            mtime = now.mtime_ns if round_.mtime_ns is None else round_.mtime_ns
            os.utime(fd.n, ns=(atime, mtime))

    def _put(self, fd: Fd, ino: int, piece: Piece, size: int) -> None:
        offset, length, buffers = piece.offset, piece.length, piece.buffers
        if buffers is None:
            self._punch(fd, offset, min(length, max(0, size - offset)))
            return
        start, end = split_direct(offset, length)
        direct = self._direct_fd(ino) if end > start else None
        if direct is not None and self._put_direct(direct, piece, start, end):
            if offset < start:
                write_all(fd.n, offset, slice_buffers(buffers, 0, start - offset))
            if end < offset + length:
                write_all(fd.n, end, slice_buffers(buffers, end - offset, length))
            return
        write_all(fd.n, offset, buffers)

    def _put_direct(self, direct: Fd, piece: Piece, start: int, end: int) -> bool:
        """Write [start, end) with O_DIRECT; False where memory or file system does not allow it."""
        parts = slice_buffers(piece.buffers or (), start - piece.offset, end - piece.offset)
        if any(len(part) % ALIGN for part in parts):
            return False
        try:
            write_all(direct.n, start, parts)
        except OSError as e:
            if e.errno in _NO_DIRECT:
                return False
            raise
        return True

    def _punch(self, fd: Fd, offset: int, length: int) -> None:
        if length <= 0:
            return
        try:
            syscalls.fallocate(fd.n, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            for at in range(offset, offset + length, len(_ZEROS)):
                write_all(fd.n, at, [_ZEROS[: min(len(_ZEROS), offset + length - at)]])

    def sync(self, ino: int, datasync: bool = False) -> None:
        fd = self.data_fd(ino, write=False)
        if datasync:
            os.fdatasync(fd.n)
        else:
            os.fsync(fd.n)

    def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        fd = self.data_fd(ino, write=True)
        syscalls.fallocate(fd.n, mode, offset, length)

    def seek(self, ino: int, offset: int, whence: int) -> int:
        fd = self.data_fd(ino, write=False)
        return os.lseek(fd.n, offset, whence)

    def copy_range(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        into, out = self.data_fd(target, write=True), self.data_fd(source, write=False)
        return os.copy_file_range(out.n, into.n, length, offset, target_offset)
