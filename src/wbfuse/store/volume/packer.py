"""From the bytes of rounds to packs: frames, zeros, checksums, compression. No I/O.

Uncompressed frames are not copied: a pack is a list of views into the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import lz4.block
import xxhash
from backports import zstd

from wbfuse.store.contract import Piece, Round
from wbfuse.store.volume.layout import FRAME, MAX_EXTENT, Extent, Frame, encode_frames, hole

_ZEROS = bytes(FRAME)
_ZSTD_LEVEL = 1

Compress = Callable[[bytes], bytes]

COMPRESS: dict[str, Compress | None] = {
    "none": None,
    "zstd": lambda data: zstd.compress(data, _ZSTD_LEVEL),
    "lz4": lambda data: lz4.block.compress(data, store_size=False),
}
DECOMPRESS: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": lambda data, _size: zstd.decompress(data),
    "lz4": lambda data, size: lz4.block.decompress(data, uncompressed_size=size),
}


class CorruptFrameError(Exception):
    """Stored bytes are not those that the checksum in the map was made of."""


def open_frame(stored: memoryview, frame: Frame, compression: str) -> bytes:
    """The raw bytes of a frame. Raises CorruptFrameError."""
    if frame.stored == frame.raw:
        raw = bytes(stored)
    else:
        try:
            raw = DECOMPRESS[compression](bytes(stored), frame.raw)
        except Exception as e:  # each library has its own
            raise CorruptFrameError(f"does not decompress: {e}") from e
    if len(raw) != frame.raw or xxhash.xxh3_64_intdigest(raw) != frame.digest:
        raise CorruptFrameError("checksum mismatch")
    return raw


@dataclass(slots=True)
class Pack:
    """One object to be: its bytes as views, and the extents in it as (index of the round, extent with pack -1)."""

    buffers: list[memoryview] = field(default_factory=list)
    size: int = 0
    extents: list[tuple[int, Extent]] = field(default_factory=list)
    raw: list[tuple[int, list[memoryview]]] = field(default_factory=list)
    """The frames as (offset, raw views)."""


class _Growing:
    """An extent to which frames are being added."""

    __slots__ = ("frames", "length", "offset", "start")

    def __init__(self, start: int, offset: int) -> None:
        self.start, self.offset, self.length = start, offset, 0
        self.frames: list[Frame] = []

    def end(self) -> Extent:
        return Extent(self.start, self.length, -1, self.offset, 0, encode_frames(self.frames))


def is_zero(parts: Sequence[memoryview]) -> bool:
    """Whether there is nothing but zeros. Looks at three bytes before it looks at all."""
    return all(not p[0] and not p[-1] and not p[len(p) // 2] and bytes(p) == _ZEROS[: len(p)] for p in parts)


def frames_of(piece: Piece) -> Iterator[tuple[int, list[memoryview]]]:
    """A piece in frames: (file offset, views whose lengths add up to at most FRAME)."""
    at, parts, room = piece.offset, [], FRAME - piece.offset % FRAME
    for view in piece.buffers or ():
        done = 0
        while done < len(view):
            part = view[done : done + room]
            parts.append(part)
            done += len(part)
            room -= len(part)
            if room == 0:
                yield at, parts
                at += sum(map(len, parts))
                parts, room = [], FRAME
    if parts:
        yield at, parts


def pack_rounds(rounds: Sequence[Round], pack_size: int, compress: Compress | None) -> Iterator[Pack]:
    """Packs of at most `pack_size` bytes, all about the same, each as soon as it is full. `whole` adds the holes."""
    total = sum(p.length for r in rounds for p in r.pieces if p.buffers is not None)
    if total > pack_size:  # no tiny one at the end, which would cost as many round trips as the others
        pack_size = min(pack_size, -(-total // -(-total // pack_size)) + FRAME)
    pack = Pack()
    for number, round_ in enumerate(rounds):
        growing: _Growing | None = None
        for piece in round_.pieces:
            for start, parts in frames_of(piece):
                length = sum(map(len, parts))
                zero = is_zero(parts)
                joins = growing is not None and growing.start + growing.length == start
                if growing is not None and (zero or not joins or growing.length + length > MAX_EXTENT):
                    pack.extents.append((number, growing.end()))
                    growing = None
                if zero:
                    continue
                frame, stored = _frame(parts, length, compress)
                if pack.size + frame.stored > pack_size and pack.size:
                    if growing is not None:
                        pack.extents.append((number, growing.end()))
                        growing = None
                    yield pack
                    pack = Pack()
                if growing is None:
                    growing = _Growing(start, pack.size)
                growing.frames.append(frame)
                growing.length += length
                pack.raw.append((pack.size, parts))
                pack.buffers += stored
                pack.size += frame.stored
        if growing is not None:
            pack.extents.append((number, growing.end()))
    if pack.size:
        yield pack


def _frame(parts: list[memoryview], length: int, compress: Compress | None) -> tuple[Frame, list[memoryview]]:
    if compress is not None:
        raw = b"".join(parts)
        packed = compress(raw)
        digest = xxhash.xxh3_64_intdigest(raw)
        if len(packed) < length:
            return Frame(len(packed), length, digest), [memoryview(packed)]
    elif len(parts) == 1:
        digest = xxhash.xxh3_64_intdigest(parts[0])
    else:
        state = xxhash.xxh3_64()
        for part in parts:
            state.update(part)
        digest = state.intdigest()
    return Frame(length, length, digest), parts


def whole(round_: Round, extents: list[Extent]) -> list[Extent]:
    """Everything that a round writes, in order: `extents` and, between them, holes where its pieces are zeros."""
    out: list[Extent] = []
    k = 0
    for piece in round_.pieces:
        # An extent may reach from one piece into the next.
        at, end = max(piece.offset, out[-1].end if out else 0), piece.offset + piece.length
        while k < len(extents) and extents[k].start < end:
            if at < extents[k].start:
                out.append(hole(at, extents[k].start))
            out.append(extents[k])
            at = extents[k].end
            k += 1
        if at < end:
            out.append(hole(at, end))
    return out
