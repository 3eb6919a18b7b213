"""The log: segments of a memfd into which the reader receives payloads, and the records that make them count.

    memfd:  | segment 0 payload | segment 1 payload | ... | records of 0 | records of 1 | ...

Invariants:
- The tail has room for max_write bytes at a page boundary, and its segment is resident in this process before it
  becomes the tail (a SIGKILL in mid-copy to a page that is not would lose the WRITE).
- Bytes once taken never change until their segment is recycled; a rewrite goes to a new place. So data under
  write-back is stable for free.
- A segment is recycled when no live byte and no record of a pending change is in it, and it is neither the reader's
  tail nor the side segment (notes, and payloads that other threads copy in). A record of a payload stands in the
  payload's own segment, so both live equally long. A segment is full when its bytes or its slots have run out: a tail
  that was somebody's side before its server died has notes as well.

Not thread-safe by itself: the cache's lock guards all of it, except `tail`, which is the one reader's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator

from wbfuse.writeback import records

PAGE = mmap.PAGESIZE
MIB = 1 << 20
_MADV_POPULATE_WRITE = 23
_WORKER = 64 * MIB
"""What a server needs beside its log, before it has read or cached anything."""
_WRITE, _LIFE = int(records.Kind.WRITE), int(records.Kind.LIFE)
_libc = ctypes.CDLL(None, use_errno=True)


def free_memory() -> int:
    """Bytes that this process may still have: what the machine has available, or less where its cgroup is tighter."""
    with open("/proc/meminfo", encoding="ascii") as f:
        info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in f}
    with open("/proc/self/cgroup", encoding="ascii") as f:
        groups = [line.rstrip("\n").split(":", 2) for line in f]
    free = [info["MemAvailable"]]
    for _, controllers, path in groups:
        if controllers == "memory":
            base = f"/sys/fs/cgroup/memory{path}"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        elif controllers == "":
            base = f"/sys/fs/cgroup{path}"
            limit, used, cache = "memory.max", "memory.current", "inactive_file"
        else:
            continue
        with contextlib.suppress(OSError, ValueError):  # no such controller here, or "max": no limit
            with open(f"{base}/memory.stat", encoding="ascii") as f:
                reclaimable = dict(line.split() for line in f).get(cache, "0")
            with open(f"{base}/{limit}", encoding="ascii") as a, open(f"{base}/{used}", encoding="ascii") as b:
                free.append(int(a.read()) - int(b.read()) + int(reclaimable))
    return min(free)


def _nothing() -> None: ...


class LogFull(Exception):  # noqa: N818 - a state to wait out, not an error
    """No segment is free. The reader must wait, or receive elsewhere."""


class LogError(Exception):
    """The log cannot be made; one line for the person who asked."""


def segment_size(log_size: int, max_write: int) -> int:
    """A sixteenth of the log, within 4 x max_write (bounds what the end of a segment wastes) and 16 MiB."""
    return max(4 * max_write, min(16 * MIB, log_size // 16 // MIB * MIB))


class Geometry:
    """Where things stand in a log of `size` bytes. Raises LogError where that is too small."""

    def __init__(self, size: int, max_write: int) -> None:
        if max_write <= 0:
            raise LogError(f"a log cannot take payloads of {max_write} bytes")
        self.segment_size = segment_size(max(size, max_write), max_write)
        self.count = size // self.segment_size
        if self.count < 4:
            raise LogError(
                f"a log of {size >> 20} MiB is too small: at least {self.segment_size * 4 >> 20} MiB are needed"
            )
        self.size = self.count * self.segment_size
        """Of all payloads; the records stand behind it."""
        self.slots = 2 * self.segment_size // PAGE - 1
        """Records in a segment, beside its head."""
        self.total = self.size + self.count * (self.slots + 1) * records.SIZE

    def head(self, segment: int) -> int:
        """Where the records of a segment begin: first its head, then its slots."""
        return self.size + segment * (self.slots + 1) * records.SIZE

    def slot(self, segment: int, n: int) -> int:
        return self.head(segment) + (n + 1) * records.SIZE


class Segment:
    __slots__ = ("base", "copied", "index", "life", "live", "notes", "pins", "records", "used", "warm")

    def __init__(self, index: int, base: int) -> None:
        self.index = index
        self.base = base
        self.used = 0
        """Payload bytes handed out, pages rounded up."""
        self.records = 0
        self.copied = 0
        """Of them, those that are in the log on disk, or on their way there."""
        self.life = 0
        """Which of all the times that a segment was begun anew."""
        self.live = 0
        """Bytes that some extent refers to, and records.SIZE for each pending change without payload."""
        self.notes = 0
        """Pending changes without payload whose records stand here."""
        self.pins = 0
        """Readers that are copying out of it."""
        self.warm = False


class Log:
    """`size` bytes of payload in whole segments. Raises LogError where memory does not allow it."""

    def __init__(self, size: int, max_write: int, fd: int | None = None) -> None:
        """With `fd` (owned from now on): the log of a server that died, of the same size. `revive` what counts in it,
        then `settle`, before anything else.
        """
        try:
            g = self.geometry = Geometry(size, max_write)
        except LogError:
            if fd is not None:
                os.close(fd)
            raise
        self.asked = size, max_write
        self.segment_size, self.size = g.segment_size, g.size
        self._usable = self.segment_size - PAGE
        """One page at the end stays unused, so an extent never runs on into the next segment."""
        self.max_write = max_write
        self.fd = self.allocate(g.total) if fd is None else fd
        if os.fstat(self.fd).st_size < g.total:
            os.close(self.fd)
            raise LogError(f"the memory file of a log of {g.size >> 20} MiB is too short")
        self._memory = mmap.mmap(self.fd, g.total)
        self._view = memoryview(self._memory)
        self.segments = [Segment(i, i * self.segment_size) for i in range(g.count)]
        self._free: list[Segment] = []
        """A stack: the segment used last is warm in the processor's cache and comes first."""
        self.sequence = 0
        self.on_stamp: Callable[[], None] = _nothing
        """Called for each record, with the lock held."""
        self._lives = 0
        self.tail = self._view[:0]
        """Where the next payload is to be received."""
        self._receiving = self._side = self.segments[0]
        """Where the reader's tail is, which only the reader moves; and where everybody else stamps notes and copies
        payloads to, under the lock."""
        if fd is None:
            self.settle()

    @staticmethod
    def allocate(total: int) -> int:
        free = free_memory()
        if total + _WORKER > free:
            raise LogError(
                f"a log of {total >> 20} MiB does not fit into memory, of which {max(free, 0) >> 20} MiB are free"
                f" and its server needs {_WORKER >> 20}; choose a smaller --log-size"
            )
        fd = os.memfd_create("wbfuse-log", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, total)
        except OSError as e:
            os.close(fd)
            raise LogError(
                f"a log of {total >> 20} MiB does not fit into memory ({e.strerror}); choose a smaller --log-size"
            ) from e
        return fd

    # taking over

    def revive(self, found: Iterable[tuple[int, records.Record]]) -> None:
        """These records, each with the segment that it stands in, still count."""
        for index, record in found:
            self.sequence = max(self.sequence, record.sequence)
            s = self.segments[index]
            if record.kind == records.Kind.WRITE:
                s.live += record.length
            else:
                s.live += records.SIZE
                s.notes += 1

    def settle(self) -> None:
        """What nobody revived is free; where nothing is, the two segments with the most room are gone on with."""
        for s in self.segments:
            s.life = self._life_of(s)
            self._lives = max(self._lives, s.life)
            if not s.live:
                self._free.append(s)
                continue
            for record in self._records(s):
                s.records += 1
                if record.kind == _WRITE:
                    s.used = max(s.used, record.place - s.base + record.length + PAGE - 1 & -PAGE)
        self._free.reverse()
        roomy = sorted((s for s in self.segments if s.live), key=self._room, reverse=True)
        self._receiving = self._fresh() if self._free else self._go_on(roomy.pop(0))
        self._side = self._fresh() if self._free else self._go_on(roomy.pop(0))
        self._set_tail()

    def _go_on(self, s: Segment) -> Segment:
        self._warm(s)
        return s

    # the reader's tail

    def _fresh(self) -> Segment:
        if not self._free:
            raise LogFull
        s = self._free.pop()
        self._warm(s)
        self._zero_records(s)
        self._lives += 1
        s.life, s.copied = self._lives, 0
        at = self.geometry.head(s.index)
        self._view[at : at + records.SIZE] = records.pack(s.life, 0, 0, 0, 0, 0, _LIFE)
        return s

    def _set_tail(self) -> None:
        at = self._receiving.base + self._receiving.used
        self.tail = self._view[at : at + self.max_write]

    def _room(self, s: Segment) -> int:
        """How much a segment can take at least, in small payloads."""
        return min(self._usable - s.used, (self.geometry.slots - s.records) * PAGE)

    @property
    def ready(self) -> bool:
        """Whether the tail has room for a payload of max_write, and its record."""
        s = self._receiving
        return s.used + self.max_write <= self._usable and s.records < self.geometry.slots

    def advance(self) -> None:
        """Make the tail ready; for the reader only. Raises LogFull."""
        if not self.ready:
            full, self._receiving = self._receiving, self._fresh()
            self._recycle(full)
            self._set_tail()

    def take(self, length: int) -> int:
        """Keep what was received at the tail; answers its place. `stamp` must follow before the lock is let go."""
        s = self._receiving
        place = s.base + s.used
        s.used += length + PAGE - 1 & -PAGE
        s.live += length
        if self.ready:
            self._set_tail()
        return place

    # everybody's side

    def _side_room(self, length: int) -> Segment:
        s = self._side
        if s.used + length > self._usable or s.records >= self.geometry.slots:
            full, self._side = s, self._fresh()
            self._recycle(full)
        return self._side

    def put(self, data: memoryview) -> int:
        """Copy a payload of at most max_write that was received elsewhere; answers its place. Raises LogFull."""
        s = self._side_room(len(data))
        place = s.base + s.used
        self._view[place : place + len(data)] = data
        s.used += len(data) + PAGE - 1 & -PAGE
        s.live += len(data)
        return place

    def stamp(self, unique: int, ino: int, offset: int, length: int, place: int, mtime_ns: int) -> int:
        """Write the record of a payload at `place`, into its segment. Answers its sequence number."""
        self.sequence += 1
        s = self.segments[place // self.segment_size]
        self._stamp(s, (self.sequence, unique, ino, offset, length, place, _WRITE, 0, mtime_ns))
        return self.sequence

    def stamp_moved(self, sequence: int, ino: int, offset: int, length: int, place: int, mtime_ns: int) -> None:
        """Write the record of a payload that was copied to `place`; its turn stays that of `sequence`."""
        s = self.segments[place // self.segment_size]
        self._stamp(s, (sequence, 0, ino, offset, length, place, _WRITE, 0, mtime_ns))

    def note(
        self, kind: int, unique: int, ino: int, offset: int, length: int, flags: int = 0, mtime_ns: int = 0
    ) -> int:
        """Stamp a change that has no payload; answers the token (a segment's number) to `unnote` once it is committed.

        Raises LogFull.
        """
        s = self._side_room(0)
        s.live += records.SIZE
        s.notes += 1
        self.sequence += 1
        self._stamp(s, (self.sequence, unique, ino, offset, length, 0, kind, flags, mtime_ns))
        return s.index

    def _stamp(self, s: Segment, record: tuple[int, int, int, int, int, int, int, int, int]) -> None:
        at = self.geometry.slot(s.index, s.records)
        self._view[at : at + records.SIZE] = records.pack(*record)
        s.records += 1
        self.on_stamp()

    # what is used

    @property
    def free_segments(self) -> int:
        return len(self._free)

    @property
    def occupied(self) -> int:
        """Bytes that cannot be received into: dirty, in flight, and not yet reusable."""
        open_room = 2 * self.segment_size - self._receiving.used - self._side.used
        return self.size - len(self._free) * self.segment_size - open_room

    def release(self, dropped: Iterable[tuple[int, int]]) -> bool:
        """Nobody refers to these (place, length) any more. Answers whether a segment became free."""
        size, segments, freed = self.segment_size, self.segments, False
        for place, length in dropped:
            s = segments[place // size]
            s.live -= length
            if s.live == 0:
                freed |= self._recycle(s)
        return freed

    def unnote(self, tokens: Iterable[int]) -> bool:
        """These records without payload are committed. Answers whether a segment became free."""
        freed = False
        for index in tokens:
            s = self.segments[index]
            s.live -= records.SIZE
            s.notes -= 1
            if s.live == 0:
                freed |= self._recycle(s)
        return freed

    def pin(self, places: Iterable[tuple[int, int]]) -> list[Segment]:
        """Keep the segments of these places from being recycled until `unpin`."""
        pinned = [self.segments[place // self.segment_size] for place, _ in places]
        for s in pinned:
            s.pins += 1
        return pinned

    def unpin(self, pinned: Iterable[Segment]) -> bool:
        freed = False
        for s in pinned:
            s.pins -= 1
            freed |= self._recycle(s)
        return freed

    def _recycle(self, s: Segment) -> bool:
        if s.live or s.pins or s is self._receiving or s is self._side or (s.used == 0 and s.records == 0):
            return False
        s.used = s.records = s.copied = 0
        self._free.append(s)
        return True

    def sparse(self) -> list[Segment]:
        """Segments that could be emptied by copying: under a quarter live, no notes, no pins; the emptiest first."""
        busy = (self._receiving, self._side)
        found = [
            s for s in self.segments if s.used and s not in busy and not s.pins and not s.notes and s.live * 4 < s.used
        ]
        return sorted(found, key=lambda s: s.live)

    def view(self, place: int, length: int) -> memoryview:
        return self._view[place : place + length]

    # residence

    def _warm(self, s: Segment) -> None:
        if s.warm:
            return
        self._memory.madvise(_MADV_POPULATE_WRITE, s.base, self.segment_size)
        start = self.geometry.head(s.index) // PAGE * PAGE
        self._memory.madvise(_MADV_POPULATE_WRITE, start, self.geometry.head(s.index + 1) - start)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory, s.base))
        _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(self.segment_size))  # where the limit allows it
        s.warm = True

    def warm_next(self) -> bool:
        """Make one more segment resident, ahead of its use; for a helper thread, without the lock. False: all are."""
        cold = next((s for s in self.segments if not s.warm), None)
        if cold is None:
            return False
        self._warm(cold)
        return True

    def _zero_records(self, s: Segment) -> None:
        start, end = self.geometry.head(s.index), self.geometry.head(s.index + 1)
        self._view[start:end] = bytes(end - start)

    # reading it back

    def _records(self, s: Segment) -> Iterator[records.Record]:
        """The records that stand in a segment, up to the first that is not whole."""
        for i in range(self.geometry.slots):
            at = self.geometry.slot(s.index, i)
            record = records.unpack(self._view[at : at + records.SIZE])
            if record is None:
                return
            yield record

    def _life_of(self, s: Segment) -> int:
        at = self.geometry.head(s.index)
        head = records.unpack(self._view[at : at + records.SIZE])
        return 0 if head is None else head.sequence

    def slots(self, s: Segment, first: int, end: int) -> memoryview:
        """The records from slot `first` up to `end`, as bytes."""
        return self._view[self.geometry.slot(s.index, first) : self.geometry.slot(s.index, end)]

    def scan(self) -> list[tuple[int, records.Record]]:
        """(segment, record) of every record that stands in the log, also those that count no more, by sequence."""
        found = [(s.index, record) for s in self.segments for record in self._records(s)]
        return sorted(found, key=lambda item: item[1].sequence)

    def close(self) -> None:
        self.tail.release()
        os.close(self.fd)
