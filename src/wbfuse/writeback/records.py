"""Records: what the log says of each thing that was accepted, 64 bytes each, little-endian. Pure.

A record is stamped before its request is answered, so whoever reads the log knows all that was ever promised. The
last 8 bytes check the other 56. The payload's own checksum is not here: a memory log is there or is not, and the
payload is whole before the record is stamped.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

SIZE = 64
PAGE = 4096
_BODY = Struct("<QQQQQQIHH")
_CHECK = Struct("<Q")
_MASK = (1 << 64) - 1
_SIGN = 1 << 63


class Kind(IntEnum):
    WRITE = 1
    """`length` bytes of `ino` at `offset` stand at `place`."""
    TRUNCATE = 2
    """The size of `ino` became `offset`."""
    ZERO = 3
    """[offset, offset + length) of `ino` became zeros; a size that was less became its end."""
    TIMES = 4
    """`offset` is atime_ns and `length` mtime_ns of `ino`, as `flags` say."""
    LIFE = 5
    """The head of a segment's records: `sequence` counts how often any segment was begun anew."""


ATIME, MTIME = 1, 2


@dataclass(slots=True)
class Record:
    sequence: int
    """Of its acceptance. A payload that was moved keeps one, so it may be there twice."""
    unique: int
    ino: int
    offset: int
    length: int
    place: int
    """Of the payload, in bytes from the log's start; at a page."""
    kind: int
    flags: int = 0
    mtime_ns: int = 0
    """The file's mtime after it, whether it moved it or not: the record that did may have been superseded."""


def pack(
    sequence: int, unique: int, ino: int, offset: int, length: int, place: int, kind: int, flags: int = 0,
    mtime_ns: int = 0,
) -> bytes:  # fmt: skip
    """The fields of a Record as its 64 bytes."""
    body = _BODY.pack(
        sequence, unique, ino, offset & _MASK, length & _MASK, mtime_ns & _MASK, place // PAGE, kind, flags
    )
    return body + _CHECK.pack(zlib.crc32(body))


def unpack(raw: bytes | bytearray | memoryview) -> Record | None:
    """The record in these 64 bytes; None where there is none, or a torn one."""
    if len(raw) < SIZE:
        return None
    body = bytes(raw[: _BODY.size])
    (check,) = _CHECK.unpack_from(raw, _BODY.size)
    sequence, unique, ino, offset, length, mtime_ns, page, kind, flags = _BODY.unpack(body)
    if kind == 0 or check != zlib.crc32(body):
        return None
    if kind == Kind.TIMES:
        offset, length = _signed(offset), _signed(length)
    return Record(sequence, unique, ino, offset, length, page * PAGE, kind, flags, _signed(mtime_ns))


def _signed(number: int) -> int:
    return number - (1 << 64) if number & _SIGN else number
