"""The writer: carries what is new in log and journal to the chunks of a log on disk, batch by batch.

    BEGINNING --all of it durable, manifest, note--> CURRENT --error--> WITHDRAWING --manifest or note gone--> BROKEN
       ^ |error, and an older epoch counts: again later, a few times                                              |
       +-+----------------------------------------------a while later---------------------------------------------+

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
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from typing import Any, TypeVar

from wbfuse.journal import Journal
from wbfuse.writeback.disk.stream import Directory, Stream
from wbfuse.writeback.log import Log, LogError, Segment

log = logging.getLogger(__name__)

_PAUSE = 0.02
"""Seconds for which changes are gathered where nobody waits for them."""
_IDLE = 1.0
"""Seconds after which what was written is made durable though nobody asked."""
_AGAIN = 5.0
"""Seconds after which a log that could not be written is tried again."""
_TRIES = 3
"""How often a new epoch is begun before the older one, which the store waits for, is withdrawn."""


T = TypeVar("T")


class _StoreError(OSError):
    """The store does not answer for its note: no fault of the log's, which stays as it is."""


class State(Enum):
    BEGINNING = "beginning"
    """A new epoch is being written; what counts on disk is an older one, or nothing."""
    CURRENT = "current"
    WITHDRAWING = "withdrawing"
    """It could not be written, and still counts."""
    BROKEN = "broken"
    """Nothing counts on disk, so nothing can be promised."""


class Answer(Enum):
    """To who waits until something is durable here."""

    DURABLE = "durable"
    BROKEN = "broken"
    """Nothing counts here any more: the store may be given everything, and durable is what it has made so."""
    ABANDONED = "abandoned"
    """It is not, and the log counts: whoever would give it to the store must not."""


class DiskLog:
    """Copies `log` and `journal` to `directory`. `lock` guards the log; `freed` is told when a segment became free.

    `manifest` is what to publish; `start` runs the writer in a thread of its own. `noted` says whether the source has a
    note of this log; `remember` and `forget` have it note durably that it has, or has none: a log counts only where
    manifest and note agree. They raise OSError.

    `there`: there is a manifest. `trouble`: why that cannot be told, which is an error of its disk.
    """

    def __init__(
        self, directory: Directory, log_: Log, journal: Journal, lock: threading.Lock, freed: Callable[[bool], None],
        manifest: dict[str, Any], noted: Callable[[], bool], remember: Callable[[], None],
        forget: Callable[[], None], there: bool, trouble: str = "", clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._noted, self._remember, self._forget = noted, remember, forget
        self._clock = clock
        self.on_defect: Callable[[], None] | None = None
        """Called, from the writer's thread, when it cannot go on."""
        self._directory = directory
        self._log = log_
        self._journal = journal
        self._lock = lock
        self._freed = freed
        self._manifest = manifest
        self._stream = Stream(directory, log_, uuid.UUID(manifest["uuid"]).bytes, clock)
        self._mutex = threading.Lock()
        self._wake = threading.Condition(self._mutex)
        self._new: list[bytes] = []
        """Journal records that no batch has taken yet."""
        self._dirty = False
        """Something is new."""
        self._waiting: deque[tuple[int, Callable[[Answer], None]]] = deque()
        """(batch, done) of those who wait until a batch is durable, in order."""
        self._batch = 0
        """The one that was taken last."""
        self._taken = self._durable = 0
        """The highest sequence in it, and in the last one that is durable."""
        self._durable_batch = 0
        self._stopping = self._abandoned = False
        self.error = trouble
        """Why nothing can be written; empty while it can."""
        self.state = State.WITHDRAWING if trouble else State.BEGINNING
        self._older = there or bool(trouble)
        """An epoch before this one counts on disk, and the store has nothing that it does not know of."""
        self._tries = 0
        """How often it has waited for a new one in vain."""
        self._before: list[tuple[int, int]] = []
        """The chunks that were there when an epoch was begun."""
        self._published = False
        """A manifest may name the epoch that is being begun."""
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
        self._stream.close()

    def end(self) -> None:
        """The store has everything, after `stop`. Raises OSError."""
        # The manifest says so first: without it, a source that still has its note would be waiting for this log.
        self._directory.publish(self._manifest | {"epoch": self._stream.epoch, "ended": True})
        self._forget()
        self._directory.withdraw()

    def status(self) -> dict[str, int | str]:
        """What status shows: records that are not durable yet, bytes written, and why nothing can be."""
        with self._mutex:
            return {
                "behind": self._log.sequence - self._durable,
                "written": self._stream.bytes_written,
                "chunks": len(self._stream.written),
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

    def when_durable(self, done: Callable[[Answer], None], sequence: int | None = None) -> Answer | None:
        """Call `done` once everything accepted so far (or up to a sequence) is on disk, or never will be.

        Answers at once, and never calls it, where that is known already.
        """
        with self._mutex:
            if self.broken:
                return Answer.BROKEN
            if self.state is State.CURRENT and self._is_durable(sequence):
                return Answer.DURABLE
            if self._abandoned:
                return Answer.ABANDONED
            under_way = sequence is not None and sequence <= self._taken
            self._waiting.append((self._batch + (not under_way), done))
            self._dirty = True
            self._wake.notify_all()
            return None

    def _is_durable(self, sequence: int | None) -> bool:
        """Held: mutex."""
        if sequence is None:
            return not self._dirty and self._durable_batch == self._batch
        return sequence <= self._durable

    def wait(self, sequence: int | None = None) -> None:
        """Until the store may be given what was accepted so far, or up to a sequence. Raises EIO where it never may."""
        answers: SimpleQueue[Answer] = SimpleQueue()
        if (self.when_durable(answers.put, sequence) or answers.get()) is Answer.ABANDONED:
            raise OSError(errno.EIO, "the log on disk does not answer")

    def abandon(self) -> None:
        """Nobody waits for it any more: the mount ends though it cannot be written. It still counts."""
        with self._mutex:
            self._abandoned = True
        self._answer_all(Answer.ABANDONED)

    def _answer_all(self, answer: Answer) -> None:
        with self._mutex:
            waiting = [done for _, done in self._waiting]
            self._waiting.clear()
        for done in waiting:
            done(answer)

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
            while self.state is State.CURRENT and not (self._dirty or self._stopping):
                if not self._wake.wait(None if self._stream.unsynced_since is None else _IDLE):
                    break
            if not (self._waiting or self._stopping) and self._dirty:
                self._wake.wait(_PAUSE)
            stopping = self._stopping
            since = self._stream.unsynced_since
            old = since is not None and self._clock() - since >= _IDLE
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
            if self.state is State.WITHDRAWING:
                return
            if self.state is not State.CURRENT:
                self._begin()
            self._write_batch()
            if sync or self._waiting:
                self._sync()
            while self.state is State.CURRENT and self._stream.oldest_is_needless(self._lock):
                self._empty_oldest()
        except OSError as e:
            self._break(e)

    # held by nobody: the writer's own

    def _begin(self) -> None:
        """A new epoch: everything is written again, and counts once it is durable."""
        with self._mutex:
            self.state = State.BEGINNING  # from here on the store gets nothing that is not here
        self._before, self._published = self._directory.chunks(), False
        if self._directory.trouble:  # nobody knows what stands there, and an epoch must not be begun twice
            if self._older:
                raise OSError(errno.EIO, self._directory.trouble)  # it is to be withdrawn first
            try:
                self._directory.look()
            except LogError as e:
                raise OSError(errno.EIO, str(e)) from e
        if self._older and not self._ask_store(self._noted):
            self._older = False
        self._before = self._directory.chunks()
        with self._lock:
            for s in self._log.segments:
                s.copied = 0
        with self._mutex:
            self._new.clear()
        self._journal.pass_up_to(self._journal.tail)
        self._stream.begin()
        self._write_batch()
        self._stream.sync()
        # The manifest before the note: else an older one that the store has left behind would count again. Until the
        # note is there, a manifest that has only begun is of no log.
        self._published = True
        self._directory.publish(self._manifest | {"epoch": self._stream.epoch, "begun": True})
        self._directory.remove(self._before)
        self._ask_store(self._remember)
        self._directory.publish(self._manifest | {"epoch": self._stream.epoch})
        with self._mutex:
            self.state, self.error, self._older, self._tries = State.CURRENT, "", True, 0
        self._sync()

    @staticmethod
    def _ask_store(act: Callable[[], T]) -> T:
        try:
            return act()
        except OSError as e:
            raise _StoreError(e.errno, e.strerror) from e

    def _break(self, error: OSError) -> None:
        """It cannot be written. What is there is older than the store soon: it must not count when anybody goes on."""
        if not self.error:
            log.error("the log on disk cannot be written: %s", error)
        self._stream.close()
        with self._mutex:
            self.error = error.strerror or str(error)
        if self.state is State.BEGINNING:
            if not self._published:
                self._directory.remove(chunk for chunk in self._directory.chunks() if chunk not in self._before)
            self._tries += not isinstance(error, _StoreError)
            if self._older and self._tries < _TRIES:
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
        self._directory.remove(self._directory.chunks())
        with self._mutex:
            self.state, self._older = State.BROKEN, False
        self._answer_all(Answer.BROKEN)

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
                self._stream.put_slots(s, first, end)
            self._stream.put_journal(new, tail)
            if todo or new or self.state is State.BEGINNING:
                self._stream.commit(number, sequence)
        finally:
            with self._lock:
                self._freed(self._log.unpin(s for s, _, _ in todo))

    def _sync(self) -> None:
        with self._mutex:
            number, sequence = self._batch, self._taken
        self._stream.sync()
        with self._mutex:
            self._durable, self._durable_batch = sequence, number
            ready = []
            while self._waiting and self._waiting[0][0] <= number:
                ready.append(self._waiting.popleft()[1])
        for done in ready:
            done(Answer.DURABLE)

    def _empty_oldest(self) -> None:
        """Write again what is alive in the oldest chunk, and remove it."""
        oldest = self._stream.written[0]
        with self._lock:
            for s in self._stream.alive(oldest):
                s.copied = 0
        self._journal.pass_up_to(oldest.journal_end)
        self._write_batch()
        self._sync()
        self._stream.drop_oldest()
