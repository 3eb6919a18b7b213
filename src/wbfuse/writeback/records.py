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
_BODY = Struct("<QQQQQqHHI")
_CHECK = Struct("<Q")


class Kind(IntEnum):
    WRITE = 1
    """`length` bytes of `ino` at `offset` stand at `place`."""
    TRUNCATE = 2
    """The size of `ino` became `offset`."""
    ZERO = 3
    """[offset, offset + length) of `ino` became zeros; with `flags` 1 the size grew to its end where it was less."""
    TIMES = 4
    """`offset` is atime_ns and `length` mtime_ns of `ino`; `flags` bit 0: atime counts, bit 1: mtime counts."""
    COMMITTED = 5
    """A hint: the store has all of `ino` up to sequence `offset`."""
    DISCARDED = 6
    """`ino` has no links and no opens left: what stands before counts no more."""


@dataclass(slots=True)
class Record:
    sequence: int
    unique: int
    ino: int
    offset: int
    length: int
    place: int
    kind: int
    flags: int = 0


def pack(
    sequence: int, unique: int, ino: int, offset: int, length: int, place: int, kind: int, flags: int = 0
) -> bytes:
    mask = (1 << 64) - 1
    body = _BODY.pack(sequence, unique, ino, offset & mask, length & mask, place, kind, flags, 0)
    return body + _CHECK.pack(zlib.crc32(body))


def unpack(raw: bytes | bytearray | memoryview) -> Record | None:
    """The record in these 64 bytes; None where there is none, or a torn one."""
    if len(raw) < SIZE:
        return None
    body = bytes(raw[: _BODY.size])
    (check,) = _CHECK.unpack_from(raw, _BODY.size)
    sequence, unique, ino, offset, length, place, kind, flags, _ = _BODY.unpack(body)
    if kind == 0 or check != zlib.crc32(body):
        return None
    return Record(sequence, unique, ino, offset, length, place, kind, flags)
