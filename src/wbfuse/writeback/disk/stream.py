"""The stream of a log on disk: frames one after another, in chunks, epoch by epoch. Knows nothing of who waits.

    Stream.begin -> | header | frames ... |  next chunk: the one before it is durable first  | header | frames ... |

Small buffers are gathered and leave together; large payloads leave as whole pages, straight from the log to the disk.
Of one thread, the writer's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from wbfuse.writeback.disk import format as chunks
from wbfuse.writeback.disk.format import PAGE, Header, Kind
from wbfuse.writeback.log import Geometry, Log, Segment
from wbfuse.writeback.records import SIZE, unpack
from wbfuse.writeback.records import Kind as RecordKind

MIB = 1 << 20
_FRAME_BYTES = 4 * MIB
_FRAME_SLOTS = 4096
_AT_ONCE = 8 * MIB
_PAGES_FROM = 256 << 10
"""Bytes of payload from which a frame is written past the page cache."""


def chunks_of(geometry: Geometry) -> tuple[int, int]:
    """How many chunks a log needs at most, and of which size: twice itself, and once more where a new epoch begins."""
    size = max(16 * MIB, min(64 * MIB, geometry.size // 8))
    return 3 * geometry.size // size + 4, size


class Chunk(Protocol):
    def write(self, buffers: list[memoryview | bytes], at: int) -> None: ...
    def write_pages(self, buffers: list[memoryview], at: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class Directory(Protocol):
    """As directory.Directory has it."""

    newest_epoch: int
    trouble: str

    def look(self) -> None: ...
    def publish(self, manifest: dict[str, Any]) -> None: ...
    def withdraw(self) -> None: ...
    def chunks(self) -> list[tuple[int, int]]: ...
    def create(self, epoch: int, number: int, size: int) -> Chunk: ...
    def remove(self, chunks: Iterable[tuple[int, int]]) -> None: ...


@dataclass(slots=True)
class Written:
    """A chunk that counts, and what it is needed for."""

    number: int
    lives: dict[int, int] = field(default_factory=dict)
    """The life of each segment of which something is in it."""
    journal_end: int = 0
    """The journal's offset behind the last record in it."""


class Stream:
    """Writes to chunks of `directory`; `identity` are the 16 bytes that say whose they are. Raises OSError."""

    def __init__(self, directory: Directory, log: Log, identity: bytes, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._log = log
        self._identity = identity
        self._clock = clock
        _, self._chunk_size = chunks_of(log.geometry)
        self._most = 2 * log.size // self._chunk_size + 2
        """Chunks of an epoch beyond which the oldest is emptied."""
        self.epoch = directory.newest_epoch
        self.bytes_written = 0
        self.unsynced_since: float | None = None
        """Since when something is written and not durable."""
        self.written: list[Written] = []
        """The chunks of this epoch that count, in order."""
        self._since: dict[int, int] = {}
        """The chunk in which the copy of a segment begins."""
        self._last_commit = self._safe_commit = 0
        """The batch of the last COMMIT that was written, and of the last that is durable."""
        self._chunk: Chunk | None = None
        self._seed = 0
        self._at = 0
        self._out: list[memoryview | bytes] = []
        self._out_bytes = 0
        self._out_at = 0

    def begin(self) -> None:
        """The next epoch."""
        self.epoch = max(self.epoch, self._directory.newest_epoch) + 1
        self.written.clear()
        self._since.clear()
        self._roll()

    def put_slots(self, s: Segment, first: int, end: int) -> None:
        """Records of a segment with their payloads, in frames of a bounded size."""
        raw = self._log.slots(s, first, end)
        begin, size = 0, 0
        found: list[tuple[int, int]] = []
        for i in range(end - first):
            record = unpack(raw[i * SIZE : (i + 1) * SIZE])
            if record is not None and record.kind == RecordKind.WRITE:  # a stamped one is whole
                found.append((record.place, record.length))
                size += record.length
            if size >= _FRAME_BYTES or i + 1 - begin >= _FRAME_SLOTS or i + 1 == end - first:
                self._put_frame(s, first + begin, raw[begin * SIZE : (i + 1) * SIZE], found, size)
                begin, size, found = i + 1, 0, []

    def put_journal(self, new: list[bytes], tail: int) -> None:
        """Records of the journal, which ends at the offset `tail` with them."""
        part: list[memoryview | bytes] = []
        size = 0
        for i, record in enumerate(new):
            part.append(record)
            size += len(record)
            if size >= _FRAME_BYTES or i + 1 == len(new):
                self._room_for(size)
                self.written[-1].journal_end = tail
                self._put(chunks.frame(self._seed, Kind.JOURNAL, [b"".join(part)]))
                part, size = [], 0

    def commit(self, batch: int, sequence: int) -> None:
        """What was put so far counts, up to a sequence of the log, once it is durable."""
        self._put(chunks.commit(self._seed, batch, sequence, self._safe_commit))
        self._last_commit = batch
        self._flush()

    def sync(self) -> None:
        """What was committed is durable."""
        if self._chunk is not None and self.unsynced_since is not None:
            self._chunk.sync()
        self.unsynced_since = None
        self._safe_commit = self._last_commit

    def close(self) -> None:
        """What was not committed is forgotten. Does nothing the second time."""
        if self._chunk is not None:
            self._chunk.close()
            self._chunk = None
        self._out, self._out_bytes = [], 0

    # room

    def alive(self, w: Written) -> list[Segment]:
        """Segments that still are in the life of which something is in this chunk, and nowhere later. Held: the lock of
        the log."""
        found = []
        for i, life in w.lives.items():
            s = self._log.segments[i]
            if s.life == life and s.records and self._since[i] <= w.number:
                found.append(s)
        return found

    def oldest_is_needless(self, lock: Any) -> bool:
        """Whether the oldest chunk should go: nothing but journal is alive in it, or there are too many."""
        if len(self.written) < 2:
            return False
        if len(self.written) > self._most:
            return True
        with lock:
            return not self.alive(self.written[0])

    def drop_oldest(self) -> None:
        """After everything that is alive in it was written again and is durable."""
        oldest = self.written.pop(0)
        self._directory.remove([(self.epoch, oldest.number)])

    # frames

    def _put_frame(self, s: Segment, first: int, raw: memoryview, payloads: list[tuple[int, int]], size: int) -> None:
        """Large payloads leave as whole pages, straight from the log to the disk."""
        count = len(raw) // SIZE
        in_pages = size >= _PAGES_FROM and size >= PAGE * len(payloads)
        self._room_for(len(raw) + PAGE + (sum(chunks.whole_pages(n) for _, n in payloads) if in_pages else size))
        w = self.written[-1]
        w.lives[s.index] = s.life
        if first == 0:
            self._since[s.index] = w.number
        if not in_pages:
            views = [self._log.view(place, end - place) for place, end in _runs(payloads, 1)]
            self._put(chunks.frame(self._seed, Kind.SLOTS, [raw, *views], s.index, s.life, first, count))
            return
        pages = [self._log.view(place, end - place) for place, end in _runs(payloads, PAGE)]
        fill = -(self._at + chunks.FRAME + len(raw)) % PAGE
        body: list[memoryview | bytes] = [raw, bytes(fill), *pages]
        head = chunks.frame(self._seed, Kind.PAGES, body, s.index, s.life, first, count)
        self._put(head[:3])
        self._flush()
        if self._chunk is not None:
            self._chunk.write_pages(pages, self._at)
        n = sum(map(len, pages))
        self._at += n
        self._out_at = self._at
        self._wrote(n)

    def _room_for(self, size: int) -> None:
        """A frame with so many bytes, and a COMMIT behind it, must fit into the chunk."""
        if self._at + size + 4 * chunks.FRAME > self._chunk_size:
            self._roll()

    def _put(self, buffers: list[memoryview | bytes]) -> None:
        self._out += buffers
        n = sum(map(len, buffers))
        self._at += n
        self._out_bytes += n
        if self._out_bytes >= _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._out and self._chunk is not None:
            self._chunk.write(self._out, self._out_at)
            self._wrote(self._out_bytes)
        self._out, self._out_bytes, self._out_at = [], 0, self._at

    def _wrote(self, n: int) -> None:
        self.bytes_written += n
        if self.unsynced_since is None:
            self.unsynced_since = self._clock()

    def _roll(self) -> None:
        """The next chunk; the one before it is durable first."""
        self._flush()
        before = self.written[-1] if self.written else None
        if self._chunk is not None:
            self._chunk.sync()
        end = self._at
        self.close()
        number = before.number + 1 if before else 1
        self._chunk = self._directory.create(self.epoch, number, self._chunk_size)
        head, end = (self.written[0].number, end) if before else (1, 0)
        header = Header(self.epoch, number, head, end, *self._log.asked, self._identity, secrets.randbits(64))
        self._chunk.write([header.encode()], 0)
        self._seed = header.seed
        self._at = self._out_at = PAGE
        self.written.append(Written(number, journal_end=before.journal_end if before else 0))


def _runs(payloads: list[tuple[int, int]], unit: int) -> list[tuple[int, int]]:
    """The (place, end) of payloads in order, each filled up to whole units, neighbours together."""
    out: list[tuple[int, int]] = []
    for place, length in payloads:
        end = place + length + -length % unit
        if out and out[-1][1] == place:
            out[-1] = out[-1][0], end
        else:
            out.append((place, end))
    return out
