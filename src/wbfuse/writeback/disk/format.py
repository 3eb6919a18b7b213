"""What stands in the chunks of a log on disk, and what a reader makes of it. Pure.

    chunk:  | header, one page | frame | frame | ... | zeros |
    frame:  | check | length of the body | kind | segment | life | first | count |  body, padded to 8 bytes

A frame counts only if its checksum is right, which also covers the header that it stands behind; what counts of a
stream are the batches up to the last COMMIT before the first frame that is not whole. Within a batch the order of
frames says nothing but for the journal's. All numbers little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct

import xxhash

from wbfuse import journal
from wbfuse.writeback import records

PAGE = 4096
VERSION = 2
"""Of the chunks, and of the entries of the journal in them."""
_MAGIC = b"wbfuselg"
_HEADER = Struct("<8sIIQQQQQQ16sQ")
_FRAME = Struct("<QIIQII")
_CHECK = Struct("<Q")
FRAME = _CHECK.size + _FRAME.size
"""Bytes of a frame's head."""
_COMMIT = Struct("<QQ")


class DamagedError(Exception):
    """The chunks are none, or some of what was durable cannot be read; one line for the person who asked."""


class Kind(IntEnum):
    SLOTS = 1
    """`count` records of `segment` in its `life` from the slot `first` on, and then their payloads."""
    PAGES = 4
    """The same, with payloads from the next page of the chunk on, each filled up to whole pages."""
    JOURNAL = 2
    """Records of the journal, one after another."""
    COMMIT = 3
    """Everything up to here counts; `life` is the number of the batch. The body is the highest sequence in it, and the
    last batch that was known to be durable."""


@dataclass(slots=True, frozen=True)
class Header:
    """Of a chunk. `previous_end`: where the stream left the chunk before it."""

    epoch: int
    number: int
    """From 1 on."""
    head: int
    """The first chunk that was needed when this one was begun."""
    previous_end: int
    log_size: int
    max_write: int
    uuid: bytes
    salt: int
    """64 bits by chance. A chunk may be begun twice in an epoch: a power cut took the first header and left frames."""

    def encode(self) -> bytes:
        """One page."""
        body = _HEADER.pack(
            _MAGIC, VERSION, 0, self.epoch, self.number, self.head, self.previous_end, self.log_size, self.max_write,
            self.uuid, self.salt,
        )  # fmt: skip
        return (body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))).ljust(PAGE, b"\0")

    @classmethod
    def decode(cls, raw: bytes | memoryview) -> Header | None:
        """None where it is none, or half a one. Raises DamagedError where a newer wbfuse wrote it."""
        if len(raw) < _HEADER.size + _CHECK.size:
            return None
        body = bytes(raw[: _HEADER.size])
        magic, version, _, epoch, number, head, previous_end, size, max_write, uuid, salt = _HEADER.unpack(body)
        (check,) = _CHECK.unpack_from(raw, _HEADER.size)
        if magic != _MAGIC or check != xxhash.xxh3_64_intdigest(body):
            return None
        if version > VERSION:
            raise DamagedError(f"made by a newer wbfuse (log version {version}, this one knows {VERSION}); update it")
        return cls(epoch, number, head, previous_end, size, max_write, uuid, salt)

    @property
    def seed(self) -> int:
        """Of the checksums of its frames: none that stood there before is taken for one of this."""
        return xxhash.xxh3_64_intdigest(self.encode())


def frame(
    seed: int, kind: Kind, body: list[memoryview | bytes], segment: int = 0, life: int = 0, first: int = 0,
    count: int = 0,
) -> list[memoryview | bytes]:  # fmt: skip
    """A frame as buffers to write one after another."""
    length = sum(map(len, body))
    head = _FRAME.pack(length, kind, segment, life, first, count)
    check = xxhash.xxh3_64(head, seed)
    for part in body:
        check.update(part)
    return [_CHECK.pack(check.intdigest()) + head, *body, bytes(-length % 8)]


def whole_pages(size: int) -> int:
    return size + PAGE - 1 & -PAGE


def commit(seed: int, batch: int, sequence: int, durable: int) -> list[memoryview | bytes]:
    return frame(seed, Kind.COMMIT, [_COMMIT.pack(sequence, durable)], life=batch)


_ANY_COMMIT = _FRAME.pack(_COMMIT.size, Kind.COMMIT, 0, 0, 0, 0)[:16]


def _commits_after(chunk: memoryview, at: int, seed: int) -> Iterator[Frame]:
    """Those behind `at`, wherever they stand."""
    raw = bytes(chunk[at:])
    place = raw.find(_ANY_COMMIT)
    while place >= 0:
        f = next(frames(chunk, seed, at + place - _CHECK.size), None)
        if f is not None and f.kind == Kind.COMMIT:
            yield f
        place = raw.find(_ANY_COMMIT, place + 1)


@dataclass(slots=True, frozen=True)
class Frame:
    kind: int
    segment: int
    life: int
    first: int
    count: int
    body: memoryview
    begin: int
    end: int
    """Where it and the next one stand in the chunk."""

    def payloads(self) -> int:
        """Where in the body the payloads begin."""
        at = self.count * records.SIZE
        return whole_pages(self.begin + FRAME + at) - self.begin - FRAME if self.kind == Kind.PAGES else at


def frames(chunk: memoryview, seed: int, at: int = PAGE) -> Iterator[Frame]:
    """The frames of a chunk, up to the first that is not whole."""
    while 0 <= at <= len(chunk) - FRAME:
        (check,) = _CHECK.unpack_from(chunk, at)
        length, kind, segment, life, first, count = _FRAME.unpack_from(chunk, at + _CHECK.size)
        end = at + FRAME + length + -length % 8
        if kind == 0 or end > len(chunk):
            return
        if check != xxhash.xxh3_64_intdigest(chunk[at + _CHECK.size : at + FRAME + length], seed):
            return
        yield Frame(kind, segment, life, first, count, chunk[at + FRAME : at + FRAME + length], at, end)
        at = end


@dataclass(slots=True)
class Segment:
    """What stands of the newest life of a segment: its frames by their first slot."""

    life: int = 0
    slots: dict[int, Frame] = field(default_factory=dict)


@dataclass(slots=True)
class Image:
    """Log and journal as they were at the last COMMIT."""

    log_size: int
    max_write: int
    segments: dict[int, Segment] = field(default_factory=dict)
    table: dict[int, bytes] = field(default_factory=dict)
    """The journal's, by tag."""
    batches: int = 0
    batch: int = 0
    """The number of the last."""
    warning: str = ""
    """What is missing, where that was not to be an error."""


def read(chunks: Iterable[memoryview], epoch: int, uuid: bytes, lenient: bool = False) -> Image | None:
    """What the chunks of an epoch say, in any order and among others; None where nothing was ever committed in it.

    The image refers to the chunks. Raises DamagedError where something is missing that was there; with `lenient` what
    stands around it is answered, with a `warning`.
    """
    headers = [(header, chunk) for chunk in chunks if (header := Header.decode(chunk)) is not None]
    found = {h.number: (h, chunk) for h, chunk in headers if (h.epoch, h.uuid) == (epoch, uuid)}
    if not found:
        return None
    last = max(found)
    first = found[last][0].head
    image = Image(found[last][0].log_size, found[last][0].max_write)

    def missing(what: str) -> None:
        if not lenient:
            raise DamagedError(what)
        image.warning = image.warning or what

    _read_all(image, found, range(first, last + 1), missing)
    return image if image.batches else None


def _read_all(
    image: Image, found: dict[int, tuple[Header, memoryview]], numbers: range, missing: Callable[[str], None]
) -> None:
    """`missing` is told of each hole; where it does not raise, reading goes on behind the next COMMIT."""
    batch: list[Frame] = []
    for number in numbers:
        more = f"{numbers[-1] - number} more follow it"
        if number not in found:
            missing(f"chunk {number} is damaged at its beginning; {more}")
            batch = []
            continue
        header, chunk = found[number]
        at: int | None = PAGE
        while at is not None:
            for f in frames(chunk, header.seed, at):
                at = f.end
                batch.append(f)
                if f.kind == Kind.COMMIT:
                    _apply(image, batch)
                    batch = []
            behind = list(_commits_after(chunk, at, header.seed))
            # A chunk is durable before the next is begun.
            if number + 1 in found and found[number + 1][0].previous_end != at:
                missing(f"chunk {number} is damaged at byte {at}; {more}")
            elif number == numbers[-1] and any(_COMMIT.unpack(f.body)[1] > image.batch for f in behind):
                missing(f"chunk {number} is damaged at byte {at}, before what was durable")
            else:
                break
            batch = []
            at = behind[0].end if behind else None
    if not image.batches and numbers[0] > 1:  # its beginning went only after something later was durable
        missing(f"chunk {numbers[0]} is damaged, and what was before it is gone")


def _apply(image: Image, batch: list[Frame]) -> None:
    for f in batch:
        if f.kind in (Kind.SLOTS, Kind.PAGES):
            segment = image.segments.setdefault(f.segment, Segment())
            if f.life > segment.life:
                segment.life = f.life
                segment.slots.clear()
            if f.life == segment.life:
                segment.slots[f.first] = f
        elif f.kind == Kind.JOURNAL:
            for _, _, tag, value in journal.records(bytes(f.body)):
                if value is None:
                    image.table.pop(tag, None)
                else:
                    image.table[tag] = value
        elif f.kind == Kind.COMMIT:
            image.batches += 1
            image.batch = f.life
