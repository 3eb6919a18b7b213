"""The directory of one log on disk: chunks, a manifest that says which count, and a lock. System calls, no policy.

    DIR/manifest.json        whose log it is, and the epoch whose chunks count; without it there is no log
    DIR/EPOCH-NUMBER.chunk   chunks of the stream; `spare-N.chunk` are those that wait to be used, preallocated

Room is taken at the mount, so it cannot be missing later. What stands in a spare chunk of its former life does not
count in its next one (format.Header.seed). The manifest is replaced as a whole (fsync, rename, fsync of the directory),
so one step makes an epoch count or a log end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from typing import Any

from wbfuse.writeback.disk.format import DamagedError
from wbfuse.writeback.log import LogError

MANIFEST = "manifest.json"
_NEW = ".manifest"
_SUFFIX = ".chunk"
_SPARE = "spare-"
_MOST_BUFFERS = 1024
"""IOV_MAX."""


class Chunk:
    """A file of the directory, open for writing; `direct` is its second descriptor, past the page cache."""

    def __init__(self, fd: int, direct: int | None) -> None:
        self._fd = fd
        self._direct = direct

    def write(self, buffers: Sequence[memoryview | bytes], at: int) -> None:
        """All of them, one after another. Raises OSError."""
        _write(self._fd, buffers, at)

    def write_pages(self, buffers: Sequence[memoryview], at: int) -> None:
        """Whole pages of memory to whole pages of the file. Raises OSError."""
        if self._direct is not None:
            try:
                _write(self._direct, buffers, at)
                return
            except OSError as e:
                if e.errno != errno.EINVAL:  # else it wants larger blocks than pages
                    raise
        _write(self._fd, buffers, at)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)


def _write(fd: int, buffers: Sequence[memoryview | bytes], at: int) -> None:
    left = [memoryview(b) for b in buffers if len(b)]
    while left:
        done = os.pwritev(fd, left[:_MOST_BUFFERS], at)
        at += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if done:
            left[0] = left[0][done:]


class Directory:
    """`path`, locked as long as the descriptor lives. Raises LogError where that cannot be.

    `fd` (owned from now on): of a server that died, with its lock.
    """

    def __init__(self, path: str, fd: int | None = None, make: bool = False) -> None:
        self.path = path
        self.fd = self._open(path, make) if fd is None else fd

    @staticmethod
    def _open(path: str, make: bool) -> int:
        try:
            if make:
                os.makedirs(path, 0o700, exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise LogError(f"{path}: cannot be the directory of a log: {e.strerror}") from e
        try:
            found = os.fstat(fd)
            if found.st_uid not in (0, os.geteuid()):
                raise LogError(f"{path}: belongs to another user")
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise LogError(f"{path}: others can get at it; a log holds what was written: chmod 700 {path}")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            strange = [n for n in os.listdir(fd) if n not in (MANIFEST, _NEW) and not n.endswith(_SUFFIX)]
            if strange:
                raise LogError(f"{path}: is in use for something else ({strange[0]}); choose another directory")
        except BlockingIOError:
            os.close(fd)
            raise LogError(f"{path}: another mount uses it as its log") from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    # the manifest

    def manifest(self) -> dict[str, Any] | None:
        """None where there is no log. Raises DamagedError."""
        try:
            fd = os.open(MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as f:
            try:
                found = json.load(f)
                if not isinstance(found["epoch"], int) or not isinstance(found["source"], str):
                    raise ValueError("no epoch or source")
            except (ValueError, KeyError, TypeError) as e:
                raise DamagedError(f"{self.path}/{MANIFEST}: {e}") from e
        return dict(found)

    def publish(self, manifest: dict[str, Any]) -> None:
        """From here on this is the manifest. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_NEW, flags, 0o600, dir_fd=self.fd)
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            json.dump(manifest, out)
            out.flush()
            os.fsync(fd)
        os.rename(_NEW, MANIFEST, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()

    def withdraw(self) -> None:
        """From here on there is no log; its chunks are free. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(MANIFEST, dir_fd=self.fd)
        self.sync()
        self.remove(self.chunks())

    def clear(self) -> None:
        """Give all room back, after `withdraw`. Raises OSError."""
        for name in self._spares():
            os.unlink(name, dir_fd=self.fd)

    # chunks

    @staticmethod
    def _name(epoch: int, number: int) -> str:
        return f"{epoch:06d}-{number:09d}{_SUFFIX}"

    def chunks(self) -> list[tuple[int, int]]:
        """(epoch, number) of those that are there, in order."""
        found = []
        for name in os.listdir(self.fd):
            epoch, _, number = name.removesuffix(_SUFFIX).partition("-")
            if name.endswith(_SUFFIX) and epoch.isdigit() and number.isdigit():
                found.append((int(epoch), int(number)))
        return sorted(found)

    def _spares(self) -> list[str]:
        return [name for name in os.listdir(self.fd) if name.startswith(_SPARE)]

    def reserve(self, count: int, size: int) -> None:
        """Have so many chunks of `size` bytes in all. Raises LogError where there is no room for them."""
        missing = count - len(self._spares()) - len(self.chunks())
        free = self.free()
        if missing * size > free:
            raise LogError(
                f"{self.path}: {count * size >> 20} MiB are needed for this log, and {free >> 20} MiB are free;"
                " choose a smaller --log-size, or another directory"
            )
        try:
            for _ in range(missing):
                os.close(self._make(size))
        except OSError as e:
            raise LogError(f"{self.path}: {e.strerror}") from e

    def _make(self, size: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        name = f"{_SPARE}{secrets.token_hex(8)}{_SUFFIX}"
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        try:
            os.posix_fallocate(fd, 0, size)
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=self.fd)
            raise
        return fd

    def create(self, epoch: int, number: int, size: int) -> Chunk:
        """A chunk to be written anew, which is there after a power cut as well. Raises OSError."""
        spares = self._spares()
        if not spares:
            os.close(self._make(size))
            spares = self._spares()
        name = self._name(epoch, number)
        fd = os.open(spares[0], os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.posix_fallocate(fd, 0, size)  # it may be one of a smaller log
            os.fsync(fd)
            os.rename(spares[0], name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            self.sync()
        except BaseException:
            os.close(fd)
            raise
        return Chunk(fd, self._past_the_cache(name))

    def _past_the_cache(self, name: str) -> int | None:
        try:
            return os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:  # not every file system can
            return None

    def remove(self, chunks: Iterable[tuple[int, int]]) -> None:
        """One after another, so that no power cut leaves a later one missing before an earlier. Raises OSError."""
        for epoch, number in chunks:
            spare = f"{_SPARE}{secrets.token_hex(8)}{_SUFFIX}"
            os.rename(self._name(epoch, number), spare, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            self.sync()

    def view(self, epoch: int, number: int) -> memoryview:
        """A chunk to read, as it is now. Raises OSError."""
        fd = os.open(self._name(epoch, number), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            size = os.fstat(fd).st_size
            if not size:
                return memoryview(b"")
            os.posix_fadvise(fd, 0, size, os.POSIX_FADV_WILLNEED)
            mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            return memoryview(mapped)
        finally:
            os.close(fd)

    def sync(self) -> None:
        os.fsync(self.fd)

    def free(self) -> int:
        """Bytes that the file system has for us."""
        found = os.fstatvfs(self.fd)
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        os.close(self.fd)
