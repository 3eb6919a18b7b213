"""A file system exerciser in the spirit of fsx: random operations on one file, each checked against a byte array.

    python -m wbfuse.testing.fsx DIRECTORY [--operations 20000] [--seed N]

The directory must not be served by the calling process. A failure prints the last operations and the seed that
repeats it. Operations: read, write, append, both kinds of mmap access, truncate, fallocate (allocate, keep size,
punch, zero range), copy_file_range, O_DIRECT read and write, fsync, reopen, dropping the page cache, SEEK_DATA/HOLE.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import os
import random
import sys
from collections import Counter, deque
from collections.abc import Callable

PAGE = mmap.PAGESIZE
_KEEP, _PUNCH, _ZERO = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Mismatch(AssertionError):  # noqa: N818 - it is what happened
    """The file is not what the operations made of it."""


class Exerciser:
    """Runs operations on `path`, which it makes and removes. `largest` bounds the file's size in bytes."""

    def __init__(self, path: str, seed: int, largest: int = 256 << 10) -> None:
        self.path = path
        self.seed = seed
        self.largest = largest
        self.random = random.Random(seed)
        self.model = bytearray()
        self.done: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=40)
        self.unsupported: set[str] = set()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.direct = self._open_direct()
        self.fill = 0

    def _open_direct(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDWR | os.O_DIRECT)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            return None

    def close(self) -> None:
        os.close(self.fd)
        if self.direct is not None:
            os.close(self.direct)

    # what it may do

    def run(self, operations: int, progress: Callable[[int], None] | None = None) -> None:
        """Do so many operations. Raises Mismatch."""
        table: list[tuple[int, Callable[[], None]]] = [
            (20, self.read), (24, self.write), (4, self.append), (8, self.map_read), (10, self.map_write),
            (8, self.truncate), (3, self.allocate), (3, self.allocate_keep), (6, self.punch), (4, self.zero),
            (3, self.zero_keep), (6, self.copy), (4, self.direct_read), (6, self.direct_write), (3, self.fsync),
            (2, self.reopen), (2, self.drop_cache), (3, self.seek), (1, self.check_all),
        ]  # fmt: skip
        weights = [weight for weight, _ in table]
        for n in range(operations):
            (_, operation) = self.random.choices(table, weights)[0]
            operation()
            self.done[operation.__name__] += 1
            size = os.fstat(self.fd).st_size
            if size != len(self.model):
                self._fail(f"size is {size}, should be {len(self.model)}")
            if progress is not None and n % 1000 == 0:
                progress(n)
        self.check_all()
        os.fsync(self.fd)
        self.check_all()

    def _note(self, text: str) -> None:
        self.recent.append(text)

    def _fail(self, why: str) -> None:
        lines = "\n".join(f"  {line}" for line in self.recent)
        raise Mismatch(
            f"seed {self.seed}, after {sum(self.done.values())} operations: {why}\nlast operations:\n{lines}"
        )

    def _compare(self, found: bytes, start: int, what: str) -> None:
        wanted = bytes(self.model[start : start + len(found)])
        if found == wanted:
            return
        at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
        bad = sum(a != b for a, b in zip(found, wanted, strict=False))
        self._fail(
            f"{what}: byte {start + at:#x} is {found[at]:#04x}, should be {wanted[at]:#04x} ({bad} bytes differ)"
        )

    def _range(self, limit: int) -> tuple[int, int]:
        """A random [start, end) inside `limit`; often at page edges."""
        a, b = self.random.randrange(limit + 1), self.random.randrange(limit + 1)
        start, end = min(a, b), max(a, b)
        if self.random.random() < 0.5:
            end = min(end, start + self.random.randrange(1, 3 * PAGE))
        if self.random.random() < 0.3:
            start, end = start // PAGE * PAGE, min(limit, -(-end // PAGE) * PAGE)
        return start, end

    def _bytes(self, length: int) -> bytes:
        self.fill = self.fill % 255 + 1
        pattern = bytes([self.fill, *self.random.randbytes(6)])
        return (pattern * (length // 7 + 1))[:length]

    def _put(self, start: int, data: bytes) -> None:
        if start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + len(data)] = data

    # the operations

    def read(self) -> None:
        start, end = self._range(len(self.model))
        self._note(f"read {start:#x}..{end:#x}")
        found = os.pread(self.fd, end - start, start)
        if len(found) != end - start:
            self._fail(f"read gave {len(found)} of {end - start} bytes")
        self._compare(found, start, "read")

    def write(self) -> None:
        start, end = self._range(self.largest)
        data = self._bytes(end - start)
        self._note(f"write {start:#x}..{end:#x}")
        if data and os.pwrite(self.fd, data, start) != len(data):
            self._fail("a short write")
        if data:
            self._put(start, data)

    def append(self) -> None:
        length = min(self.random.randrange(1, 2 * PAGE), self.largest - len(self.model))
        if length <= 0:
            return
        data = self._bytes(length)
        self._note(f"append {length:#x} at {len(self.model):#x}")
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        self._put(len(self.model), data)

    def map_read(self) -> None:
        start, end = self._range(len(self.model))
        if start == end:
            return
        self._note(f"mapread {start:#x}..{end:#x}")
        base = start // PAGE * PAGE
        with mmap.mmap(self.fd, end - base, prot=mmap.PROT_READ, offset=base) as m:
            self._compare(m[start - base :], start, "mapread")

    def map_write(self) -> None:
        start, end = self._range(len(self.model))
        if start == end:
            return
        data = self._bytes(end - start)
        self._note(f"mapwrite {start:#x}..{end:#x}")
        base = start // PAGE * PAGE
        with mmap.mmap(self.fd, end - base, offset=base) as m:
            m[start - base :] = data
            if self.random.random() < 0.5:
                m.flush()
        self._put(start, data)

    def truncate(self) -> None:
        size = self.random.randrange(self.largest + 1)
        if self.random.random() < 0.3:
            size = min(size, len(self.model))
        self._note(f"truncate {len(self.model):#x} -> {size:#x}")
        if self.random.random() < 0.5:
            os.ftruncate(self.fd, size)
        else:
            os.truncate(self.path, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def _fallocate(self, name: str, mode: int, start: int, end: int) -> bool:
        if start == end or name in self.unsupported:
            return False
        self._note(f"{name} {start:#x}..{end:#x}")
        if _libc.fallocate(self.fd, mode, start, end - start) != 0:
            code = ctypes.get_errno()
            if code != errno.EOPNOTSUPP:
                raise OSError(code, f"{name}: {os.strerror(code)}")
            self.unsupported.add(name)
            return False
        return True

    def allocate(self) -> None:
        start, end = self._range(self.largest)
        if self._fallocate("allocate", 0, start, end):
            self.model.extend(bytes(max(0, end - len(self.model))))

    def allocate_keep(self) -> None:
        self._fallocate("allocate_keep", _KEEP, *self._range(self.largest))

    def _zeroed(self, start: int, end: int) -> None:
        end = min(end, len(self.model))
        if start < end:
            self.model[start:end] = bytes(end - start)

    def punch(self) -> None:
        start, end = self._range(self.largest)
        if self._fallocate("punch", _PUNCH | _KEEP, start, end):
            self._zeroed(start, end)

    def zero(self) -> None:
        start, end = self._range(self.largest)
        if self._fallocate("zero", _ZERO, start, end):
            self.model.extend(bytes(max(0, end - len(self.model))))
            self._zeroed(start, end)

    def zero_keep(self) -> None:
        start, end = self._range(self.largest)
        if self._fallocate("zero_keep", _ZERO | _KEEP, start, end):
            self._zeroed(start, end)

    def copy(self) -> None:
        start, end = self._range(len(self.model))
        target = self.random.randrange(self.largest + 1)
        length = min(end - start, self.largest - target)
        if length <= 0 or (start < target + length and target < start + length):
            return  # overlapping ranges are EINVAL
        self._note(f"copy {start:#x}..{start + length:#x} to {target:#x}")
        done = 0
        while done < length:
            n = os.copy_file_range(self.fd, self.fd, length - done, start + done, target + done)
            if n == 0:
                self._fail("copy_file_range stopped short")
            done += n
        self._put(target, bytes(self.model[start : start + length]))

    def direct_read(self) -> None:
        if self.direct is None:
            return
        start, end = self._range(len(self.model))
        start, end = start // PAGE * PAGE, -(-end // PAGE) * PAGE
        if start == end:
            return
        self._note(f"directread {start:#x}..{end:#x}")
        with mmap.mmap(-1, end - start) as buffer:
            n = os.preadv(self.direct, [buffer], start)
            if n != min(end, len(self.model)) - start:
                self._fail(f"directread gave {n} of {min(end, len(self.model)) - start} bytes")
            self._compare(buffer[:n], start, "directread")

    def direct_write(self) -> None:
        if self.direct is None:
            return
        start, end = self._range(self.largest)
        start, end = start // PAGE * PAGE, end // PAGE * PAGE
        if start >= end:
            return
        data = self._bytes(end - start)
        self._note(f"directwrite {start:#x}..{end:#x}")
        with mmap.mmap(-1, end - start) as buffer:
            buffer[:] = data
            if os.pwritev(self.direct, [buffer], start) != end - start:
                self._fail("a short direct write")
        self._put(start, data)

    def fsync(self) -> None:
        self._note("fsync")
        if self.random.random() < 0.5:
            os.fsync(self.fd)
        else:
            os.fdatasync(self.fd)

    def reopen(self) -> None:
        self._note("reopen")
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def drop_cache(self) -> None:
        self._note("drop cache")
        os.fdatasync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def seek(self) -> None:
        """Where SEEK_DATA jumps over, and where SEEK_HOLE stops, there may be only zeros."""
        if not self.model:
            return
        start = self.random.randrange(len(self.model))
        self._note(f"seek from {start:#x}")
        try:
            data = os.lseek(self.fd, start, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            data = len(self.model)
        if any(self.model[start:data]):
            self._fail(f"SEEK_DATA from {start:#x} went to {data:#x} past bytes that are not zero")
        if data < len(self.model):
            hole = os.lseek(self.fd, data, os.SEEK_HOLE)
            if not data < hole <= len(self.model):
                self._fail(f"SEEK_HOLE from {data:#x} gave {hole:#x}, the size is {len(self.model):#x}")

    def check_all(self) -> None:
        self._note("check all")
        found = os.pread(self.fd, len(self.model) + 1, 0)
        if len(found) != len(self.model):
            self._fail(f"the file has {len(found)} bytes, should have {len(self.model)}")
        self._compare(found, 0, "check")


def exercise(directory: str, operations: int, seed: int, largest: int = 256 << 10) -> Counter[str]:
    """Exercise a new file in `directory`; answers how often each operation ran. Raises Mismatch."""
    path = os.path.join(directory, f"fsx-{os.getpid()}-{seed}")
    exerciser = Exerciser(path, seed, largest)
    try:
        exerciser.run(operations)
        with open(path, "rb") as f:
            if f.read() != bytes(exerciser.model):
                raise Mismatch(f"seed {seed}: the file differs when it is opened again")
    finally:
        exerciser.close()
    os.unlink(path)
    return exerciser.done


def main() -> None:
    parser = argparse.ArgumentParser(description="Exercise a file system with random operations on one file.")
    parser.add_argument("directory")
    parser.add_argument("--operations", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, printed")
    parser.add_argument("--largest", type=int, default=256 << 10, help="largest file in bytes, default: %(default)s")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    try:
        done = exercise(arguments.directory, arguments.operations, seed, arguments.largest)
    except Mismatch as e:
        print(f"FAILED: {e}")
        sys.exit(1)
    print(
        f"passed: {sum(done.values())} operations, seed {seed}: {', '.join(f'{n} {k}' for k, n in done.most_common())}"
    )


if __name__ == "__main__":
    main()
