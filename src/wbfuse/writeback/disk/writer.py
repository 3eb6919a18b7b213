"""The writer: carries what is new in log and journal to the chunks of a log on disk, batch by batch.

    BEGINNING --all of it durable, manifest--> CURRENT --error--> WITHDRAWING --manifest or note gone--> BROKEN
       ^ |error, and an older epoch counts: again later                                                     |
       +-+-------------------------------------------a while later------------------------------------------+

A batch is what was new at one instant, taken with the cache's lock held: records and payloads of segments that are
pinned until they are written, and everything that went to the journal. So after each COMMIT the chunks say what
memory said at that instant, and all that was accepted before it.

What makes it safe to replay: a round goes to the store only after its records are durable here (`wait`), so the store
never has anything that the chunks do not know of. Where they cannot be written they are withdrawn first; in BROKEN
alone the store may be given what is not here.

Locks: the cache's `lock`, for an instant, to take a batch; `_mutex` for numbers and waiters, inside it. Chunks are the
writer's own.
"""

from __future__ import annotations

import errno
import logging
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from wbfuse.journal import Journal
from wbfuse.writeback.disk import format as chunks
from wbfuse.writeback.disk.format import PAGE, Header, Kind
from wbfuse.writeback.log import Geometry, Log, Segment
from wbfuse.writeback.records import SIZE, unpack
from wbfuse.writeback.records import Kind as RecordKind

log = logging.getLogger(__name__)

MIB = 1 << 20
_FRAME_BYTES = 4 * MIB
_FRAME_SLOTS = 4096
_AT_ONCE = 8 * MIB
_PAGES_FROM = 256 << 10
"""Bytes of payload from which a frame is written past the page cache."""
_PAUSE = 0.02
"""Seconds for which changes are gathered where nobody waits for them."""
_IDLE = 1.0
"""Seconds after which what was written is made durable though nobody asked."""
_AGAIN = 5.0
"""Seconds after which a log that could not be written is tried again."""


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

    @property
    def newest_epoch(self) -> int: ...
    def publish(self, manifest: dict[str, Any]) -> None: ...
    def withdraw(self) -> None: ...
    def chunks(self) -> list[tuple[int, int]]: ...
    def create(self, epoch: int, number: int, size: int) -> Chunk: ...
    def remove(self, chunks: Iterable[tuple[int, int]]) -> None: ...


class State(Enum):
    BEGINNING = "beginning"
    """A new epoch is being written; what counts on disk is an older one, or nothing."""
    CURRENT = "current"
    WITHDRAWING = "withdrawing"
    """It could not be written, and still counts."""
    BROKEN = "broken"
    """Nothing counts on disk, so nothing can be promised."""


@dataclass(slots=True)
class _Written:
    """A chunk that counts, and what it is needed for."""

    number: int
    lives: dict[int, int] = field(default_factory=dict)
    """The life of each segment of which something is in it."""
    journal_end: int = 0
    """The journal's offset behind the last record in it."""


class DiskLog:
    """Copies `log` and `journal` to `directory`. `lock` guards the log; `freed` is told when a segment became free.

    `manifest` is what to publish; `start` runs the writer in a thread of its own. `remember` and `forget` have the
    source note durably that it has this log, or none: a log counts only where manifest and note agree. Raise OSError.
    """

    def __init__(
        self, directory: Directory, log_: Log, journal: Journal, lock: threading.Lock, freed: Callable[[bool], None],
        manifest: dict[str, Any], remember: Callable[[], None] = lambda: None,
        forget: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._remember, self._forget = remember, forget
        self._clock = clock
        self.on_defect: Callable[[], None] | None = None
        """Called, from the writer's thread, when it cannot go on."""
        self._directory = directory
        self._log = log_
        self._journal = journal
        self._lock = lock
        self._freed = freed
        self._manifest = manifest
        _, self._chunk_size = chunks_of(log_.geometry)
        self._most = 2 * log_.size // self._chunk_size + 2
        """Chunks of an epoch beyond which the oldest is emptied."""
        self._mutex = threading.Lock()
        self._wake = threading.Condition(self._mutex)
        self._new: list[bytes] = []
        """Journal records that no batch has taken yet."""
        self._dirty = False
        """Something is new."""
        self._waiting: deque[tuple[int, Callable[[int], None]]] = deque()
        """(batch, done) of those who wait until a batch is durable, in order."""
        self._batch = 0
        """The one that was taken last."""
        self._taken = self._durable = 0
        """The highest sequence in it, and in the last one that is durable."""
        self._durable_batch = 0
        self._last_commit = self._safe_commit = 0
        """The batch of the last COMMIT that was written, and of the last that is durable."""
        self._stopping = self._abandoned = False
        self.error = ""
        """Why nothing can be written; empty while it can."""
        self.state = State.BEGINNING
        self._older = bool(directory.chunks())
        """An epoch before this one counts on disk, and the store has nothing that it does not know of."""
        self.bytes_written = 0
        self._epoch = directory.newest_epoch
        self._uuid = uuid.UUID(manifest["uuid"]).bytes
        self._written: list[_Written] = []
        self._since: dict[int, int] = {}
        """The chunk in which the copy of a segment begins."""
        self._chunk: Chunk | None = None
        self._seed = 0
        self._at = 0
        self._out: list[memoryview | bytes] = []
        self._out_bytes = 0
        self._out_at = 0
        self._unsynced: float | None = None
        """Since when something is written and not durable."""
        self._thread = threading.Thread(target=self._run, name="disk-log", daemon=True)
        journal.on_append = self._appended
        log_.on_stamp = self._stamped

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After everything that was accepted is durable, or cannot be."""
        with self._mutex:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._close_chunk()

    def end(self) -> None:
        """The store has everything, after `stop`. Raises OSError."""
        # The manifest says so first: without it, a source that still has its note would be waiting for this log.
        self._directory.publish(self._manifest | {"epoch": self._epoch, "ended": True})
        self._forget()
        self._directory.withdraw()

    def status(self) -> dict[str, int | str]:
        """What status shows: records that are not durable yet, bytes written, and why nothing can be."""
        with self._mutex:
            return {
                "behind": self._log.sequence - self._durable,
                "written": self.bytes_written,
                "chunks": len(self._written),
                "error": self.error,
            }

    # what is new

    def _appended(self, record: bytes) -> None:
        with self._mutex:
            self._new.append(record)
            self._tell()

    def _stamped(self) -> None:
        if not self._dirty:  # else the writer knows
            with self._mutex:
                self._tell()

    def _tell(self) -> None:
        """Held: mutex."""
        if not self._dirty:
            self._dirty = True
            self._wake.notify_all()

    # who waits

    @property
    def broken(self) -> bool:
        return self.state is State.BROKEN

    def when_durable(self, done: Callable[[int], None], sequence: int | None = None) -> bool:
        """Call `done` once everything accepted so far (or up to a sequence) is on disk, with 0 or an errno.

        Answers True, and never calls it, where that is so already, or the log is broken.
        """
        with self._mutex:
            if self.broken or (self.state is State.CURRENT and self._is_durable(sequence)):
                return True
            if not self._abandoned:
                under_way = sequence is not None and sequence <= self._taken
                self._waiting.append((self._batch + (not under_way), done))
                self._dirty = True
                self._wake.notify_all()
                return False
        done(errno.EIO)
        return False

    def _is_durable(self, sequence: int | None) -> bool:
        """Held: mutex."""
        if sequence is None:
            return not self._dirty and self._durable_batch == self._batch
        return sequence <= self._durable

    def wait(self, sequence: int | None = None) -> None:
        """Until the store may be given what was accepted so far, or up to a sequence. Raises EIO where it never may."""
        answers: list[int] = []
        ended = threading.Event()

        def done(error: int) -> None:
            answers.append(error)
            ended.set()

        if not self.when_durable(done, sequence):
            ended.wait()
            if answers[0] and not self.broken:
                raise OSError(answers[0], "the log on disk does not answer")

    def abandon(self) -> None:
        """Nobody waits for it any more: the mount ends though it cannot be written. It still counts."""
        with self._mutex:
            self._abandoned = True
        self._answer_all(errno.EIO)

    def _answer_all(self, error: int) -> None:
        with self._mutex:
            waiting = [done for _, done in self._waiting]
            self._waiting.clear()
        for done in waiting:
            done(error)

    # the thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            log.exception("the log on disk failed")
            if self.on_defect is None:
                raise
            self.on_defect()

    def _turn(self) -> bool:
        """Wait for something to do and do it. False: it is over."""
        with self._mutex:
            while not (self._dirty or self._stopping):
                if not self._wake.wait(None if self._unsynced is None else _IDLE):
                    break
            if not (self._waiting or self._stopping) and self._dirty:
                self._wake.wait(_PAUSE)
            stopping = self._stopping
            old = self._unsynced is not None and self._clock() - self._unsynced >= _IDLE
        self.step(sync=stopping or old)
        if self.error and not stopping:
            with self._mutex:
                self._wake.wait_for(lambda: self._stopping, _AGAIN)
        return not stopping

    def step(self, sync: bool) -> None:
        """Write one batch, and make everything durable where `sync` says so or somebody waits. For the thread, and
        for simulations."""
        try:
            if self.state is State.WITHDRAWING:
                self._withdraw()
            if self.state is not State.CURRENT:
                self._begin()
            self._write_batch()
            if sync or self._waiting:
                self._sync()
            while self._needless():
                self._empty_oldest()
        except OSError as e:
            self._break(e)

    # held by nobody: the writer's own

    def _begin(self) -> None:
        """A new epoch: everything is written again, and counts once it is durable."""
        with self._mutex:
            self.state = State.BEGINNING  # from here on the store gets nothing that is not here
        self._remember()
        old = self._directory.chunks()
        self._epoch += 1
        self._written.clear()
        self._since.clear()
        with self._lock:
            for s in self._log.segments:
                s.copied = 0
        with self._mutex:
            self._new.clear()
        self._journal.pass_up_to(self._journal.tail)
        self._roll()
        self._write_batch()
        self._flush()
        if self._chunk is not None:
            self._chunk.sync()
        self._directory.publish(self._manifest | {"epoch": self._epoch})
        self._directory.remove(old)
        with self._mutex:
            self.state, self.error, self._older = State.CURRENT, "", True
        self._sync()

    def _break(self, error: OSError) -> None:
        """It cannot be written. What is there is older than the store soon: it must not count when anybody goes on."""
        if not self.error:
            log.error("the log on disk cannot be written: %s", error)
        self._close_chunk()
        with self._mutex:
            self.error = error.strerror or str(error)
        if self.state is State.BEGINNING:
            self._directory.remove(chunk for chunk in self._directory.chunks() if chunk[0] == self._epoch)
            if self._older:
                return  # it counts, and is all that there is: the store waits until this works
        with self._mutex:
            self.state = State.WITHDRAWING
        self._withdraw()

    def _withdraw(self) -> None:
        """Have it count no more: without the manifest, or without the source's note."""
        errors: list[OSError] = []
        for act in (self._directory.withdraw, self._forget):
            try:
                act()
            except OSError as e:
                errors.append(e)
        if len(errors) == 2:
            log.error("the log on disk cannot be withdrawn: %s; write-back waits", errors[0])
            return
        with self._mutex:
            self.state, self._older = State.BROKEN, False
        self._answer_all(errno.EIO)

    def _write_batch(self) -> None:
        todo: list[tuple[Segment, int, int]] = []
        with self._lock:
            with self._mutex:
                new, self._new = self._new, []
                self._dirty = False
                self._batch += 1
                self._taken = sequence = self._log.sequence
                number = self._batch
            tail = self._journal.tail
            for s in self._log.segments:
                if s.records > s.copied:
                    todo.append((s, s.copied, s.records))
                    s.copied = s.records
                    s.pins += 1
        try:
            for s, first, end in todo:
                self._put_slots(s, first, end)
            self._put_journal(new, tail)
            if todo or new or self.state is State.BEGINNING:
                self._put(chunks.commit(self._seed, number, sequence, self._safe_commit))
                self._last_commit = number
                self._flush()
        finally:
            with self._lock:
                self._freed(self._log.unpin(s for s, _, _ in todo))

    def _put_slots(self, s: Segment, first: int, end: int) -> None:
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

    def _wrote(self) -> None:
        if self._unsynced is None:
            self._unsynced = self._clock()

    def _put_frame(self, s: Segment, first: int, raw: memoryview, payloads: list[tuple[int, int]], size: int) -> None:
        """Large payloads leave as whole pages, straight from the log to the disk."""
        count = len(raw) // SIZE
        in_pages = size >= _PAGES_FROM and size >= PAGE * len(payloads)
        self._room_for(len(raw) + PAGE + (sum(chunks.whole_pages(n) for _, n in payloads) if in_pages else size))
        w = self._written[-1]
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
        self.bytes_written += n
        self._wrote()

    def _put_journal(self, new: list[bytes], tail: int) -> None:
        part: list[memoryview | bytes] = []
        size = 0
        for i, record in enumerate(new):
            part.append(record)
            size += len(record)
            if size >= _FRAME_BYTES or i + 1 == len(new):
                self._room_for(size)
                self._written[-1].journal_end = tail
                self._put(chunks.frame(self._seed, Kind.JOURNAL, [b"".join(part)]))
                part, size = [], 0

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
            self.bytes_written += self._out_bytes
            self._wrote()
        self._out, self._out_bytes, self._out_at = [], 0, self._at

    def _roll(self) -> None:
        """The next chunk; the one before it is durable first."""
        self._flush()
        before = self._written[-1] if self._written else None
        if self._chunk is not None:
            self._chunk.sync()
        end = self._at
        self._close_chunk()
        number = before.number + 1 if before else 1
        self._chunk = self._directory.create(self._epoch, number, self._chunk_size)
        head, end = (self._written[0].number, end) if before else (1, 0)
        header = Header(self._epoch, number, head, end, *self._log.asked, self._uuid, secrets.randbits(64))
        self._chunk.write([header.encode()], 0)
        self._seed = header.seed
        self._at = self._out_at = PAGE
        self._written.append(_Written(number, journal_end=before.journal_end if before else 0))

    def _close_chunk(self) -> None:
        if self._chunk is not None:
            self._chunk.close()
            self._chunk = None
        self._out, self._out_bytes = [], 0

    def _sync(self) -> None:
        with self._mutex:
            number, sequence = self._batch, self._taken
        if self._chunk is not None and self._unsynced is not None:
            self._chunk.sync()
        self._unsynced = None
        self._safe_commit = self._last_commit
        with self._mutex:
            self._durable, self._durable_batch = sequence, number
            ready = []
            while self._waiting and self._waiting[0][0] <= number:
                ready.append(self._waiting.popleft()[1])
        for done in ready:
            done(0)

    # room

    def _alive(self, w: _Written) -> list[Segment]:
        """Held: lock. Segments that still are in the life of which something is in this chunk, and nowhere later."""
        found = []
        for i, life in w.lives.items():
            s = self._log.segments[i]
            if s.life == life and s.records and self._since[i] <= w.number:
                found.append(s)
        return found

    def _needless(self) -> bool:
        """Whether the oldest chunk should go: nothing but journal is alive in it, or there are too many."""
        if self.state is not State.CURRENT or len(self._written) < 2:
            return False
        if len(self._written) > self._most:
            return True
        with self._lock:
            return not self._alive(self._written[0])

    def _empty_oldest(self) -> None:
        """Write again what is alive in the oldest chunk, and remove it."""
        oldest = self._written[0]
        with self._lock:
            for s in self._alive(oldest):
                s.copied = 0
        self._journal.pass_up_to(oldest.journal_end)
        self._write_batch()
        self._sync()
        del self._written[0]
        self._directory.remove([(self._epoch, oldest.number)])


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
