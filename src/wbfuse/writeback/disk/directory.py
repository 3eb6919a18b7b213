"""The directory of one log on disk: chunks, a manifest that says which count, and a lock. System calls, no policy.

    DIR/manifest.json   whose log it is, and the epoch whose chunks count; without it there is no log
    DIR/*.chunk         preallocated; the header of each says which one it is now, its name says nothing

Room is taken at the mount, so it cannot be missing later, and taking or giving back a chunk changes nothing in the
directory, so it costs no sync of it. The manifest is replaced as a whole (fsync, rename, fsync of the directory): one
step makes an epoch count or a log end.
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
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from wbfuse.store.directory import syscalls
from wbfuse.wire.constants import RENAME_EXCHANGE
from wbfuse.writeback.disk.format import PAGE, DamagedError, Header
from wbfuse.writeback.log import LogError

MANIFEST = "manifest.json"
_NEW, _OLD = ".manifest", ".manifest.old"
"""Where the next one is written, and where one that is withdrawn goes, whose room it is."""
_SUFFIX = ".chunk"
_KNOWN = (MANIFEST, _NEW, _OLD, "lost+found")
_MOST_BUFFERS = 1024
"""IOV_MAX."""


class Chunk:
    """A file of the directory, open for writing; `direct` is its second descriptor, past the page cache."""

    def __init__(self, fd: int, direct: int | None, size: int) -> None:
        self._fd = fd
        self._direct = direct
        self._size = size

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
        found = os.fstat(self._fd)
        if not found.st_nlink or found.st_size < self._size:
            raise OSError(errno.ESTALE, "somebody has removed or cut a file of the log")

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

    `fd` (owned from now on): of a server that died, with its lock; then it is no error but `trouble` where the
    directory cannot be read any more.
    """

    def __init__(self, path: str, fd: int | None = None, make: bool = False) -> None:
        self.path = path
        self.fd = self._open(path, make) if fd is None else fd
        self._free: list[str] = []
        """Files that may be written anew; the one that was given back last comes last."""
        self._at: dict[tuple[int, int], str] = {}
        """The file in which a chunk of (epoch, number) stands."""
        self.newest_epoch = 0
        """The highest that stands in any file, needed or not."""
        self.trouble = ""
        """Why it cannot be read."""
        try:
            self.look()
        except LogError as e:
            if fd is None:
                raise
            self.trouble = str(e)

    @staticmethod
    def _open(path: str, make: bool) -> int:
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
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
            strange = [n for n in os.listdir(fd) if n not in _KNOWN and not n.endswith(_SUFFIX)]
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
        """None where there is no log. Raises LogError."""
        try:
            fd = os.open(MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise LogError(f"{self.path}/{MANIFEST}: {e.strerror}") from e
        with os.fdopen(fd, "rb") as f:
            try:
                found = json.load(f)
                sound = isinstance(found["epoch"], int) and isinstance(found["source"], str) and found["identity"]
                uuid.UUID(found["uuid"])
                if not sound:
                    raise ValueError("no epoch, source or identity")
            except OSError as e:
                raise LogError(f"{self.path}/{MANIFEST}: {e.strerror}") from e
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise LogError(f"{self.path}/{MANIFEST}: is damaged ({e}); see: wbfuse recover {self.path}/") from e
        return dict(found)

    def publish(self, manifest: dict[str, Any]) -> None:
        """From here on this is the manifest. Needs no room that is not there. Raises OSError."""
        names = self._names()
        files = {"files": len(names), "bytes": min((self._size(name) for name in names), default=0)}
        raw = json.dumps(manifest | files).encode().ljust(PAGE)
        fd = os.open(_NEW, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            _write(fd, [raw], 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            syscalls.renameat2(self.fd, os.fsencode(_NEW), self.fd, os.fsencode(MANIFEST), RENAME_EXCHANGE)
        except FileNotFoundError:
            os.rename(_NEW, MANIFEST, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            with contextlib.suppress(FileNotFoundError):  # the room for the next one
                os.rename(_OLD, _NEW, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()

    def withdraw(self) -> None:
        """From here on there is no log; its chunks are free. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(MANIFEST, _OLD, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()
        self.remove(self.chunks())

    def clear(self) -> None:
        """Give all room back, after `withdraw`. Raises OSError."""
        for name in [*self._names(), _NEW, _OLD]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)

    # chunks

    def _names(self) -> list[str]:
        return sorted(name for name in os.listdir(self.fd) if name.endswith(_SUFFIX))

    def look(self) -> None:
        """See what stands in which file, and which files are free: those that the manifest's epoch does not need.

        Raises LogError, and nothing is known then.
        """
        self._at, self._free = {}, []
        trouble = ""
        try:
            manifest = self.manifest()
        except LogError as e:
            manifest = None  # who wants it will be told
            trouble = str(e)
        headers = self._headers()
        self.newest_epoch = max((header.epoch for _, header in headers if header is not None), default=0)
        counts = manifest is not None and not manifest.get("ended")
        whose = (manifest["epoch"], uuid.UUID(manifest["uuid"]).bytes) if manifest is not None and counts else None
        mine = {name: h for name, h in headers if h is not None and (h.epoch, h.uuid) == whose}
        for name in mine:  # the last header may be in the page cache only, and what it makes free is written over
            self._make_durable(name)
        head = max(((h.number, h.head) for h in mine.values()), default=(0, 0))[1]
        for name, _ in headers:
            h = mine.get(name)
            if h is None or h.number < head:
                self._free.append(name)
            elif (h.epoch, h.number) in self._at:
                raise LogError(f"{self.path}: is damaged: chunk {h.number} is there twice")
            else:
                self._at[h.epoch, h.number] = name
        self.trouble = trouble

    def _headers(self) -> list[tuple[str, Header | None]]:
        """Of each file. Raises LogError."""
        try:
            return [(name, Header.decode(self._page(name))) for name in self._names()]
        except OSError as e:
            raise LogError(f"{self.path}: a file of it cannot be read: {e.strerror}") from e
        except DamagedError as e:
            raise LogError(f"{self.path}: {e}") from e

    def _make_durable(self, name: str) -> None:
        """Raises LogError."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            raise LogError(f"{self.path}: a file of it cannot be synced: {e.strerror}") from e

    def _size(self, name: str) -> int:
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_size

    def damage(self, manifest: dict[str, Any]) -> str:
        """What is missing of the files that were there when a manifest was published; empty where nothing is."""
        least = int(manifest.get("bytes", 0))
        missing = int(manifest.get("files", 0)) - sum(self._size(name) >= least for name in self._names())
        return f"{missing} of its files are missing or were cut short" if missing > 0 else ""

    def _page(self, name: str) -> bytes:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return os.pread(fd, PAGE, 0)
        finally:
            os.close(fd)

    def chunks(self) -> list[tuple[int, int]]:
        """(epoch, number) of those that are needed, in order."""
        return sorted(self._at)

    def reserve(self, count: int, size: int) -> None:
        """Have so many chunks of `size` bytes in all. Raises LogError where there is no room for them."""
        try:
            missing = count - len(self._names())
            free = self.free()
        except OSError as e:
            raise LogError(f"{self.path}: {e.strerror}") from e
        if missing * size > free:
            raise LogError(
                f"{self.path}: {count * size >> 20} MiB are needed for this log, and {free >> 20} MiB are free;"
                " choose a smaller --log-size, or another directory"
            )
        try:
            for _ in range(missing):
                self._free.append(self._make())
            for name in self._free:  # they may be those of a smaller log
                self._allocate(name, size)
            for name in (_NEW, _OLD):  # one to write, and one that the first may come to stand in the place of
                self._allocate(name, PAGE)
            self.sync()
        except OSError as e:
            raise LogError(f"{self.path}: {e.strerror}") from e

    def _allocate(self, name: str, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        try:
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _make(self) -> str:
        name = f"{secrets.token_hex(8)}{_SUFFIX}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(name, flags, 0o600, dir_fd=self.fd))
        return name

    def create(self, epoch: int, number: int, size: int) -> Chunk:
        """A chunk to be written anew, from its header on. Raises OSError."""
        there = self._names()
        self._free = [name for name in self._free if name in there]  # somebody may have removed some
        whole = [name for name in self._free if self._size(name) >= size]
        name = next(reversed(whole or self._free), None) or self._make()
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            if os.fstat(fd).st_size < size:
                os.posix_fallocate(fd, 0, size)
                self.sync()
        except BaseException:
            os.close(fd)
            if name not in self._free:
                os.unlink(name, dir_fd=self.fd)
            raise
        if name in self._free:
            self._free.remove(name)
        self._at[epoch, number] = name
        return Chunk(fd, self._past_the_cache(name), size)

    def _past_the_cache(self, name: str) -> int | None:
        try:
            return os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:  # not every file system can
            return None

    def remove(self, chunks: Iterable[tuple[int, int]]) -> None:
        """They are not needed any more; what stands in them is passed over (Header.head) until it is written over."""
        for chunk in list(chunks):
            self._free.insert(0, self._at.pop(chunk))

    def views(self) -> Iterator[memoryview]:
        """The chunks that are needed, to read, as they are now. Raises OSError."""
        for chunk in self.chunks():
            yield self._view(self._at[chunk])

    def _view(self, name: str) -> memoryview:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            size = os.fstat(fd).st_size
            if not size:
                return memoryview(b"")
            os.posix_fadvise(fd, 0, size, os.POSIX_FADV_WILLNEED)
            scratch = memoryview(bytearray(1 << 20))
            for at in range(0, size, len(scratch)):  # a sector that cannot be read is an error here, and a signal there
                os.preadv(fd, [scratch], at)
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
