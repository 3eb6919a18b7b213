"""A dirty file as one sequence of bytes: what the log has of it, holes, and the store beneath."""

from __future__ import annotations

import errno
import os

from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File
from wbfuse.writeback.extents import HOLE
from wbfuse.writeback.file import STORE

Plan = list[tuple[int, int, int]]
"""(start, end, place) of pieces that follow one another; see FileCache.resolve."""


def zero_filled(data: bytes | bytearray | memoryview, size: int) -> bytes | bytearray | memoryview:
    """Below the size that the cache holds, what the store has not is zeros (promise 3)."""
    return data if len(data) == size else bytes(data) + bytes(size - len(data))


def assemble(cache: WritebackCache, ino: int, plan: Plan, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a plan, whose log segments are pinned. Waits for the store."""
    first = plan[0][0]
    for start, end, place in plan:
        part = buffer[start - first : end - first]
        if place == HOLE:
            part[:] = bytes(end - start)
        elif place == STORE:
            n = cache.store.read(ino, start, part)
            part[n:] = bytes(len(part) - n)
        else:
            part[:] = cache.log.view(place, end - start)


def seek(cache: WritebackCache, f: File, offset: int, whence: int) -> int:
    """lseek(2) with SEEK_DATA or SEEK_HOLE. Raises ENXIO."""
    size = f.core.size
    if offset >= size:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    at = offset
    while at < size:
        with cache.lock:
            plan = f.core.resolve(at, size)
        for start, end, place in plan:
            found = _seek_in(cache, f.ino, start, end, place, whence)
            if found is not None:
                return found
            at = end
    if whence == os.SEEK_HOLE:
        return size
    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))


def _seek_in(cache: WritebackCache, ino: int, start: int, end: int, place: int, whence: int) -> int | None:
    """The first byte of the wanted kind in a piece of the file; None where it has none."""
    if place != STORE:
        return start if (place == HOLE) == (whence == os.SEEK_HOLE) else None
    try:
        found = cache.store.seek(ino, start, whence)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return start if whence == os.SEEK_HOLE else None  # past the store's end: zeros
    return found if found < end else None
