"""Reading a volume: the map of a file, its frames from cache or bucket, what to fetch ahead, and where holes are."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Connection, select

from wbfuse.store.volume.clone import VolumeClones
from wbfuse.store.volume.frames import FrameCache, Place, Wanted
from wbfuse.store.volume.layout import Extent, decode_frames, without_gaps
from wbfuse.store.volume.maps import WINDOW
from wbfuse.store.volume.names import fail
from wbfuse.store.volume.readahead import Streams
from wbfuse.store.volume.rows import MAX_SIZE, next_data, resolve
from wbfuse.store.volume.schema import inodes

_KEEP_STREAMS = 256


class VolumeReads(VolumeClones):
    """Part of VolumeStore."""

    frames: FrameCache
    workers: ThreadPoolExecutor

    def _init_reads(self, readahead: int) -> None:
        self._readahead = readahead
        self._streams: dict[int, Streams] = {}

    def _map(self, ino: int, start: int, end: int, nowait: bool) -> list[Extent]:
        if self.leases is not None:
            self.maps.at_version(ino, self.nodes.version(ino))
        found = self.maps.get(ino, start, end)
        if found is not None:
            return found
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "the map must be read")
        for number in range(start // WINDOW, -(-end // WINDOW)):
            if self.maps.get(ino, number * WINDOW, number * WINDOW + 1) is None:
                stamp = self.maps.stamp(ino)
                self.maps.put(ino, stamp, number, self._load(ino, number))
        return self.maps.get(ino, start, end) or self.database.query(lambda c: self._resolved(c, ino, start, end))

    def _load(self, ino: int, number: int) -> list[Extent]:
        return self.database.query(
            lambda c: self._resolved(c, ino, number * WINDOW, min(MAX_SIZE, (number + 1) * WINDOW))
        )

    @staticmethod
    def _resolved(c: Connection, ino: int, start: int, end: int) -> list[Extent]:
        layer = c.execute(select(inodes.c.layer).where(inodes.c.ino == ino)).scalar_one_or_none()
        if layer is None:
            raise fail(errno.ESTALE)
        return resolve(c, layer, start, end)

    def read(self, ino: int, offset: int, buffer: memoryview, nowait: bool = False) -> int:
        row = self.nodes.fresh(ino)
        if row is None:
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "the database must be asked")
            row = self._row(ino)
        n: int = min(len(buffer), row.size - offset)
        if n <= 0:
            return 0
        for last in (False, True):
            try:
                self._fill(ino, offset, buffer[:n], row.size, nowait)
                break
            except FileNotFoundError:  # its pack was collected: somebody has rewritten that part of the file
                if last:
                    raise fail(errno.EIO, f"a pack of node {ino} is missing") from None
                self.maps.changed(ino, None)
        return n

    def _fill(self, ino: int, offset: int, buffer: memoryview, size: int, nowait: bool) -> None:
        end = offset + len(buffer)
        plan = list(without_gaps(self._map(ino, offset, end, nowait), offset, end))
        wanted = [w for _, _, extent in plan if extent is not None for w in _wanted(extent)]
        if nowait:
            raw = self.frames.peek(wanted)
            if raw is None:
                raise BlockingIOError(errno.EAGAIN, "must be fetched")
        else:
            raw = None
        self._read_ahead(ino, offset, len(buffer), size)
        found = raw if raw is not None else self.frames.get(wanted)
        for start, stop, extent in plan:
            part = buffer[start - offset : stop - offset]
            if extent is None:
                part[:] = bytes(stop - start)
            else:
                _copy(extent, found, part)

    def _read_ahead(self, ino: int, offset: int, length: int, size: int) -> None:
        if not self._readahead:
            return
        streams = self._streams.get(ino)
        if streams is None:
            if len(self._streams) >= _KEEP_STREAMS:
                self._streams.pop(next(iter(self._streams)), None)
            streams = self._streams.setdefault(ino, Streams(self._readahead))
        ahead = streams.read(offset, length)
        if ahead is not None and ahead[0] < size:
            start, end = ahead[0], min(ahead[1], size)
            known = self.maps.get(ino, start, end)
            if known is None:
                self.workers.submit(self._prefetch, ino, start, end)
            else:
                self._fetch_ahead(known, start, end)

    def _prefetch(self, ino: int, start: int, end: int) -> None:
        try:
            self._fetch_ahead(self._map(ino, start, end, False), start, end)
        except OSError:
            return  # who reads it will be told

    def _fetch_ahead(self, known: list[Extent], start: int, end: int) -> None:
        self.frames.prefetch([w for _, _, e in without_gaps(known, start, end) if e is not None for w in _wanted(e)])

    def read_rows(self, rows: list[Extent], offset: int, buffer: memoryview) -> None:
        """The bytes that these rows show, for compaction."""
        plan = list(without_gaps(rows, offset, offset + len(buffer)))
        found = self.frames.get([w for _, _, e in plan if e is not None for w in _wanted(e)])
        for start, stop, extent in plan:
            if extent is not None:
                _copy(extent, found, buffer[start - offset : stop - offset])

    # holes

    def seek(self, ino: int, offset: int, whence: int) -> int:
        size: int = self._row(ino).size
        if offset >= size:
            raise fail(errno.ENXIO)
        if whence == os.SEEK_DATA:
            at = self.database.query(lambda c: next_data(c, ino, offset, size))
            if at is None:
                raise fail(errno.ENXIO)
            return at
        at = offset
        while at < size:
            step = min(size, (at // WINDOW + 1) * WINDOW)
            for start, _, extent in without_gaps(self._map(ino, at, step, False), at, step):
                if extent is None:
                    return start
            at = step
        return size


def _wanted(extent: Extent) -> list[Wanted]:
    out, at = [], extent.offset
    for frame in decode_frames(extent.frames):
        out.append(Wanted(extent.pack, at, frame))
        at += frame.stored
    return out


def _copy(extent: Extent, raw: dict[Place, bytes], buffer: memoryview) -> None:
    """The bytes of an extent, from its frames."""
    at, skip, done = extent.offset, extent.skip, 0
    for frame in decode_frames(extent.frames):
        part = memoryview(raw[extent.pack, at])[skip : skip + extent.length - done]
        buffer[done : done + len(part)] = part
        done += len(part)
        skip = 0
        at += frame.stored
    if done != extent.length:
        raise OSError(errno.EIO, f"a row of the map has {extent.length} bytes and its frames {done}")
