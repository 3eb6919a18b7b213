"""The read cache: frames of packs, raw in memory and as stored on disk. Packs never change, so nothing is ever stale.

What is missing is fetched in runs of neighbours, runs in parallel, and each once: who comes second waits for the first.
A frame on disk is believed only if its checksum fits, so a torn or foreign file costs a fetch and nothing else.

Lock: `_lock` guards both indexes and what is under way, for an instant.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from wbfuse.store.volume.layout import Frame, pack_key
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.packer import CorruptFrameError, open_frame

log = logging.getLogger(__name__)

_RUN = 2 << 20
"""The longest range fetched as one."""
_GAP = 64 << 10
"""Bytes that are rather fetched for nothing than asked for around."""
_FETCHERS = 24


class Wanted(NamedTuple):
    """One frame: where it is, and what it must be."""

    pack: int
    offset: int
    frame: Frame


Place = tuple[int, int]


class DiskCache:
    """Packs as sparse files in a directory of one volume, the least used removed beyond `size` bytes."""

    def __init__(self, directory: str, size: int) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._directory = directory
        self._size = size
        self._lock = threading.Lock()
        found = []
        for name in os.listdir(directory):
            if name.isdigit():
                s = os.stat(os.path.join(directory, name))
                found.append((s.st_mtime, int(name), s.st_blocks * 512))
        self._packs: OrderedDict[int, int] = OrderedDict((pack, size) for _, pack, size in sorted(found))
        self.used = sum(self._packs.values())

    def _path(self, pack: int) -> str:
        return os.path.join(self._directory, str(pack))

    def read(self, pack: int, offset: int, length: int) -> bytes | None:
        with self._lock:
            if pack not in self._packs:
                return None
            self._packs.move_to_end(pack)
        try:
            fd = os.open(self._path(pack), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def write(self, pack: int, offset: int, buffers: Sequence[memoryview | bytes]) -> None:
        """Keep these bytes of a pack. What cannot be kept is not: this is a cache."""
        size = sum(map(len, buffers))
        try:
            fd = os.open(self._path(pack), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                at = 0
                while at < len(buffers):  # writev takes 1024 at most
                    some = buffers[at : at + 1000]
                    offset += os.pwritev(fd, some, offset)
                    at += len(some)
            finally:
                os.close(fd)
        except OSError as e:
            log.warning("cache: %s", e)
            self.discard(pack)
            return
        with self._lock:
            self._packs[pack] = self._packs.pop(pack, 0) + size
            self.used += size
            gone = []
            while self.used > self._size and len(self._packs) > 1:
                old, bytes_ = self._packs.popitem(last=False)
                self.used -= bytes_
                gone.append(old)
        for old in gone:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(old))

    def discard(self, pack: int) -> None:
        with self._lock:
            self.used -= self._packs.pop(pack, 0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(pack))


class FrameCache:
    """`memory`: bytes of raw frames kept. `compression` is the volume's."""

    def __init__(self, objects: Objects, compression: str, memory: int, disk: DiskCache | None = None) -> None:
        self._objects = objects
        self._compression = compression
        self._memory = memory
        self._disk = disk
        self._lock = threading.Lock()
        self._raw: OrderedDict[Place, bytes] = OrderedDict()
        self._held = 0
        self._coming: dict[Place, Future[None]] = {}
        self._pool = ThreadPoolExecutor(_FETCHERS, "fetch")
        self.fetched = 0
        """Bytes that came from the store."""
        self.hits = self.misses = 0

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _keep(self, place: Place, raw: bytes) -> None:
        """Held: lock."""
        old = self._raw.pop(place, None)
        self._held += len(raw) - (len(old) if old is not None else 0)
        self._raw[place] = raw
        while self._held > self._memory:
            self._held -= len(self._raw.popitem(last=False)[1])

    def put(self, pack: int, offset: int, raw: bytes) -> None:
        """A frame that was just written."""
        with self._lock:
            self._keep((pack, offset), raw)

    def put_stored(self, pack: int, buffers: Sequence[memoryview]) -> None:
        """A pack that was just written, for the disk."""
        if self._disk is not None:
            self._disk.write(pack, 0, buffers)

    def peek(self, wanted: Iterable[Wanted]) -> dict[Place, bytes] | None:
        """All of these from memory, None where one is not there. Does not block."""
        out = {}
        with self._lock:
            for w in wanted:
                raw = self._raw.get((w.pack, w.offset))
                if raw is None:
                    return None
                out[w.pack, w.offset] = raw
        return out

    def get(self, wanted: Sequence[Wanted]) -> dict[Place, bytes]:
        """The raw bytes of these frames. Raises OSError of the store; EIO where bytes are not what was written."""
        out: dict[Place, bytes] = {}
        runs, waiting = self._claim(wanted, out)
        if runs:
            others = [self._pool.submit(self._fetch, run, out) for run in runs[1:]]
            error = _failure(lambda: self._fetch(runs[0], out))
            for other in others:
                error = _failure(other.result) or error
            if error is not None:
                raise error
        for w, future in waiting:
            try:
                future.result()
            except OSError:
                log.debug("a fetch that others began failed; trying again")
            with self._lock:
                raw = self._raw.get((w.pack, w.offset))
            if raw is None:  # that fetch failed, or what it brought is gone again
                self._fetch([w], out)
            else:
                out[w.pack, w.offset] = raw
        return out

    def prefetch(self, wanted: Sequence[Wanted]) -> None:
        """Begin to fetch what is not there."""
        runs, _ = self._claim(wanted, {})
        for run in runs:
            self._pool.submit(self._quietly, run)

    def _quietly(self, run: list[Wanted]) -> None:
        try:
            self._fetch(run, {})
        except OSError as e:
            log.debug("read-ahead: %s", e)  # who reads it will be told

    def _claim(
        self, wanted: Sequence[Wanted], out: dict[Place, bytes]
    ) -> tuple[list[list[Wanted]], list[tuple[Wanted, Future[None]]]]:
        """Take from memory what is there; answers runs for the caller to fetch and what others are fetching."""
        runs: list[list[Wanted]] = []
        waiting = []
        with self._lock:
            for w in sorted(wanted, key=lambda w: (w.pack, w.offset)):
                place = w.pack, w.offset
                raw = self._raw.get(place)
                if raw is not None:
                    self._raw.move_to_end(place)
                    out[place] = raw
                    self.hits += 1
                    continue
                coming = self._coming.get(place)
                if coming is not None:
                    waiting.append((w, coming))
                    continue
                self.misses += 1
                if runs and _joins(runs[-1], w):
                    runs[-1].append(w)
                else:
                    runs.append([w])
            for run in runs:
                future: Future[None] = Future()
                for w in run:
                    self._coming[w.pack, w.offset] = future
        return runs, waiting

    def _fetch(self, run: list[Wanted], out: dict[Place, bytes]) -> None:
        """Get one run, from disk where it is whole there. Whoever waits for it is told, however this ends."""
        with self._lock:
            future = self._coming.get((run[0].pack, run[0].offset))
        found: dict[Place, bytes] = {}
        error: OSError | None = None
        try:
            found = self._from_disk(run) or self._from_store(run)
            out |= found
        except OSError as e:
            error = e
            raise
        finally:
            with self._lock:
                for place, raw in found.items():
                    self._keep(place, raw)
                for w in run:
                    self._coming.pop((w.pack, w.offset), None)
            if future is not None and not future.done():
                future.set_exception(error) if error is not None else future.set_result(None)

    def _from_disk(self, run: list[Wanted]) -> dict[Place, bytes] | None:
        if self._disk is None:
            return None
        first = run[0]
        data = self._disk.read(first.pack, first.offset, run[-1].offset + run[-1].frame.stored - first.offset)
        if data is None:
            return None
        try:
            return self._open(run, memoryview(data), first.offset)
        except CorruptFrameError:
            return None  # never written there

    def _from_store(self, run: list[Wanted]) -> dict[Place, bytes]:
        first = run[0]
        length = run[-1].offset + run[-1].frame.stored - first.offset
        for last in (False, True):
            data = self._objects.get(pack_key(first.pack), first.offset, length)
            with self._lock:
                self.fetched += length
            try:
                found = self._open(run, data, first.offset)
            except CorruptFrameError as e:
                if last:
                    key = pack_key(first.pack)
                    log.error("pack %s, bytes %d to %d: %s", key, first.offset, first.offset + length, e)
                    raise OSError(errno.EIO, f"pack {key}: {e}") from e
                continue  # it may have been the way, not the store
            if self._disk is not None:
                self._disk.write(first.pack, first.offset, [data])
            return found
        raise AssertionError("unreachable")

    def _open(self, run: list[Wanted], data: memoryview, base: int) -> dict[Place, bytes]:
        return {
            (w.pack, w.offset): open_frame(
                data[w.offset - base : w.offset - base + w.frame.stored], w.frame, self._compression
            )
            for w in run
        }


def _joins(run: list[Wanted], w: Wanted) -> bool:
    """Whether `w` is fetched along with `run`."""
    end = run[-1].offset + run[-1].frame.stored
    return run[0].pack == w.pack and w.offset - end <= _GAP and w.offset + w.frame.stored - run[0].offset <= _RUN


def _failure(act: object) -> OSError | None:
    try:
        act()  # type: ignore[operator]
    except OSError as e:
        return e
    return None
