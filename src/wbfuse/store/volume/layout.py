"""The map of a file: extents and their frames, changes laid over them, layers seen through each other. Pure.

An extent is one row of the map and says where a range of the file stands in a pack; a frame is what is stored,
compressed and verified as one. See docs/design/volumes.md. All offsets and lengths are bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

FRAME = 64 << 10
"""The most bytes of a file in one frame; frames end where file offsets are multiples of it."""
MAX_EXTENT = 16 << 20
"""The longest extent."""
HOLE = 0
"""The pack of an extent that reads as zeros (needed only where a base layer lies below)."""

_FRAME_INFO = struct.Struct("<IIQ")


class Frame(NamedTuple):
    """One stored piece of a pack."""

    stored: int
    """Bytes in the pack; equal to `raw` where it is not compressed."""
    raw: int
    digest: int
    """xxh3 (64 bits) of the raw bytes."""


class Extent(NamedTuple):
    """The file's [start, start + length) are the bytes of `frames`, at `offset` of `pack`, after the first `skip`."""

    start: int
    length: int
    pack: int
    offset: int
    skip: int
    frames: bytes

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def is_sound(self) -> bool:
        """Whether it can be a row of a map at all."""
        if self.start < 0 or not 0 < self.length <= MAX_EXTENT:
            return False
        whole = len(self.frames) % _FRAME_INFO.size == 0
        return self.pack == HOLE or (
            self.pack > 0 and self.offset >= 0 and self.skip >= 0 and whole and bool(self.frames)
        )


def pack_key(pack: int) -> str:
    """The object of a pack. Numbers are never used twice, so neither are keys."""
    return f"packs/{pack % 256:02x}/{pack:x}"


def pack_of(key: str) -> int | None:
    """The pack whose object this is; None where it is none of ours."""
    digits = key.rpartition("/")[2]
    if len(digits) > 15 or not all(d in "0123456789abcdef" for d in digits) or not digits:
        return None
    number = int(digits, 16)
    return number if pack_key(number) == key else None


def encode_frames(frames: Iterable[Frame]) -> bytes:
    return b"".join(_FRAME_INFO.pack(*f) for f in frames)


def decode_frames(blob: bytes) -> Iterator[Frame]:
    """Raises ValueError where `blob` is none."""
    if len(blob) % _FRAME_INFO.size:
        raise ValueError(f"{len(blob)} bytes are no list of frames")
    return map(Frame._make, _FRAME_INFO.iter_unpack(blob))


def hole(start: int, end: int) -> Extent:
    """A range of zeros that hides a base layer."""
    return Extent(start, end - start, HOLE, 0, 0, b"")


def cut(extent: Extent, start: int, end: int) -> Extent:
    """The part of `extent` in [start, end), which must not be empty, with no more frames than it needs."""
    start, end = max(start, extent.start), min(end, extent.end)
    if start == extent.start and end == extent.end:
        return extent
    if extent.pack == HOLE:
        return hole(start, end)
    skip = extent.skip + start - extent.start
    need = skip + end - start
    if len(extent.frames) == _FRAME_INFO.size:
        return Extent(start, end - start, extent.pack, extent.offset, skip, extent.frames)
    first, last, offset, at = 0, 0, extent.offset, 0
    for frame in decode_frames(extent.frames):
        if at + frame.raw <= skip:
            first += 1
            offset += frame.stored
        last += 1
        at += frame.raw
        if first == last:
            dropped = at
        if at >= need:
            break
    if first:
        skip -= dropped
    size = _FRAME_INFO.size
    return Extent(start, end - start, extent.pack, offset, skip, extent.frames[first * size : last * size])


def overlay(
    old: Iterable[Extent], new: Iterable[Extent], keep_holes: bool
) -> tuple[list[int], list[Extent], dict[int, int]]:
    """Lay `new` extents over the `old` ones that they touch. Both sorted and without overlaps.

    Answers the starts of old rows that go, the rows that come, and by how many bytes the use of each pack changes.
    `keep_holes` says whether holes need rows.
    """
    gone: list[int] = []
    come: list[Extent] = []
    live: dict[int, int] = {}
    changes = list(new)
    k = 0
    for row in old:
        while k < len(changes) and changes[k].end <= row.start:
            k += 1
        at, j, kept = row.start, k, []
        while j < len(changes) and changes[j].start < row.end:
            if at < changes[j].start:
                kept.append(cut(row, at, changes[j].start))
            at = max(at, changes[j].end)
            j += 1
        if j == k:
            continue
        if at < row.end:
            kept.append(cut(row, at, row.end))
        gone.append(row.start)
        come += kept
        if row.pack != HOLE:
            live[row.pack] = live.get(row.pack, 0) - row.length + sum(e.length for e in kept)
    for extent in changes:
        if extent.pack != HOLE:
            live[extent.pack] = live.get(extent.pack, 0) + extent.length
            come.append(extent)
        elif keep_holes:
            come += [hole(a, min(a + MAX_EXTENT, extent.end)) for a in range(extent.start, extent.end, MAX_EXTENT)]
    come.sort()
    if any(a.end > b.start for a, b in pairwise(come)):
        raise ValueError("rows of a map would overlap")
    return gone, come, live


def without_gaps(rows: Iterable[Extent], start: int, end: int) -> Iterator[tuple[int, int, Extent | None]]:
    """[start, end) in order as (start, end, row cut to it), None where there is no row."""
    at = start
    for row in rows:
        if row.end <= at or row.start >= end:
            continue
        if at < row.start:
            yield at, row.start, None
        piece = cut(row, at, end)
        yield piece.start, piece.end, piece
        at = piece.end
    if at < end:
        yield at, end, None
