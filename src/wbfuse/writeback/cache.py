"""The write-back cache: the log, the dirty state of files, who waits for what. The threads that commit are in engine.

Locks: one, `lock`, guards everything here (log, files, queues, limits); it is held for microseconds and never over a
store call, a reply or a callback. Conditions on it: `work` (committers), `paced` (the pacer), `room` (whoever waits
for space or for everything to be clean).

What may wait: WRITE replies above the limits (`paced`), fsync and close (`waiters`). Nothing else.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from struct import Struct

from wbfuse.journal import Journal
from wbfuse.journal import Kind as Entry
from wbfuse.store.contract import Store
from wbfuse.wire.types import Attr
from wbfuse.writeback.cached_file import Done, File, Sequel, Waiter
from wbfuse.writeback.cleaner import clean
from wbfuse.writeback.disk.writer import DiskLog
from wbfuse.writeback.extents import HOLE
from wbfuse.writeback.file import STORE, Generation
from wbfuse.writeback.limits import Limits
from wbfuse.writeback.log import Log, LogFull, Segment
from wbfuse.writeback.records import ATIME, MTIME, Kind, Record

log = logging.getLogger(__name__)

MIB = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)

GEOMETRY = Struct("<QQ")
"""Of the log: its size as asked for, and max_write."""
_FLOOR, _ERROR = Struct("<Q"), Struct("<II")


class WritebackCache:
    """Takes changes at memory speed, keeps their order, and lets an Engine commit them.

    `log_size` bytes are allocated at once. `kernel_dirty` is how much the kernel may hand over beyond any reply.
    With `log_fd`, the log of a server that died, `replay` comes before anything else.
    """

    def __init__(
        self,
        store: Store,
        log_size: int,
        max_write: int,
        kernel_dirty: int,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
        log_fd: int | None = None,
    ) -> None:
        self.store = store
        self.clock = clock
        self.journal = journal or Journal()
        self._errors: dict[int, bytes] = {}
        """What the journal says of errors of files that are being taken over."""
        if log_fd is not None and (made := self.journal.inherited(Entry.LOG).get(0)):
            log_size, max_write = GEOMETRY.unpack(made)  # as it is, whatever would be chosen now
        self.log = Log(log_size, max_write, log_fd)
        if log_fd is None:
            self.journal.put(Entry.LOG, 0, GEOMETRY.pack(log_size, max_write))
        # Beyond the limit WRITEs are still taken (their replies wait), so what the kernel may send must fit behind it.
        reserve = min(kernel_dirty + max_write, self.log.size // 2) + 2 * self.log.segment_size
        limit = max(self.log.size - reserve, self.log.size // 4)
        self.limits = Limits(limit // 4, limit)
        self.seal_bytes = max(max_write, min(64 * MIB, limit // 16))
        self.seal_early = store.capabilities.stages
        self.max_file_size = store.capabilities.max_file_size
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.paced = threading.Condition(self.lock)
        self.room = threading.Condition(self.lock)
        self.files: dict[int, File] = {}
        self.dirty: OrderedDict[int, File] = OrderedDict()
        """Files with generations and nothing in flight, the longest dirty first."""
        self.urgent: OrderedDict[int, File] = OrderedDict()
        """Those that somebody waits for."""
        self.full: OrderedDict[int, File] = OrderedDict()
        """Those whose oldest generation is sealed."""
        self.failing: dict[int, File] = {}
        """Those whose last round failed; retried at `retry_at`."""
        self.parked: deque[tuple[int, int, Callable[[], None]]] = deque()
        """(ino, size, answer) of WRITEs whose replies wait, in order of arrival."""
        self.draining = 0
        self.in_flight_bytes = 0
        self.incomplete: set[int] = set()
        """Files of which something was set aside, until they are cut to nothing."""
        self.last_error = ""
        self.taken: dict[int, int] = {}
        """unique -> length of WRITEs that a server before this one took, and perhaps did not answer."""
        self.held_back: Callable[[int], bool] = lambda _ino: False
        """Whether nothing of a file should be committed for now; `let_go_on` ends that."""
        self.disk: DiskLog | None = None
        """The log on disk, where there is one."""
        self.can_resend = False
        """The kernel honours NOTIFY_RESEND (Linux 6.9)."""
        self.at_scratch = False
        """The reader's own: its last receive target was the scratch buffer."""
        self._scratch = memoryview(bytearray(b"\xff" * max_write))  # resident, as every receive target
        self.overflowed: list[tuple[float, Callable[[int], None]]] = []
        """WRITEs of which nothing but the request was kept, each with when it came (infinity: never to be refused)."""
        self.closing = False
        """Nobody waits for room any more: the mount ends though its store does not answer."""
        self.epoch = 0
        """Counts states that were let go."""
        self._let_go: deque[int] = deque(maxlen=4096)
        """Their inos, the latest last."""

    # the reader's side

    def receive_target(self) -> memoryview:
        """Where the next payload is to be received.

        Where the log has no room at all: a scratch buffer, from which nothing can be kept (`at_scratch`), if the
        kernel can be asked to send again; else this waits, and reading with it.
        """
        self.at_scratch = False
        if not self.log.ready:
            with self.lock:
                try:
                    self.log.advance()
                except LogFull:
                    self._want_room()
                    if self.can_resend:
                        self.at_scratch = True
                        return self._scratch
                    self._wait_for_room(self.log.advance)
        return self.log.tail

    def overflow(self, fail: Callable[[int], None], promised: bool) -> None:
        """A WRITE came with no room for it: the engine asks for it again when there is. `fail` ends it otherwise.

        `promised`: write(2) has acknowledged its bytes, so it is never refused.
        """
        with self.lock:
            self.overflowed.append((math.inf if promised else self.clock(), fail))
            self.paced.notify()

    def _wait_for_room(self, act: Callable[[], None]) -> None:
        """Held: lock. Repeat `act` until the log has room for it."""
        while True:
            try:
                return act()
            except LogFull:
                if self.closing:
                    raise OSError(errno.EIO, "the mount is ending") from None
                self._want_room()
                self.room.wait(1.0)

    def _want_room(self) -> None:
        """Held: lock. Have everything written back, and live bytes gathered from mostly dead segments."""
        if not clean(self):
            self.work.notify_all()

    def close(self) -> None:
        """End all waiting for room: WRITEs that found none fail with EIO."""
        with self.lock:
            self.closing = True
            self.room.notify_all()
            self.paced.notify()

    def adopt(self, ino: int, attr: Attr) -> File:
        """The state of a file that is about to be changed; `attr` is the store's."""
        with self.lock:
            return self._adopt(ino, attr)

    def open(self, ino: int, attr: Attr | None) -> File | None:
        """Count an open of a file whose state is here, or is made from `attr`; None where it is neither."""
        with self.lock:
            if attr is None and ino not in self.files:
                return None
            f = self._adopt(ino, attr or self.files[ino].attr)
            f.opens += 1
            return f

    def _adopt(self, ino: int, attr: Attr) -> File:
        """Held: lock."""
        f = self.files.get(ino)
        if f is None:
            self.store.hold(ino)
            f = self.files[ino] = self._new(ino, attr)
        return f

    def _new(self, ino: int, attr: Attr) -> File:
        """Also with what the journal says of its errors."""
        f = File(ino, attr, self.seal_bytes, self.seal_early)
        if ino in self._errors:
            f.error, f.error_sequence = _ERROR.unpack(self._errors.pop(ino))
        return f

    def closed(self, f: File) -> None:
        with self.lock:
            f.opens -= 1
            gone = self._discard(f) if f.unlinked and not f.opens else []
            forget = self._forgettable(f)
        self._answer_all(gone)
        if forget:
            self.drop(f.ino)

    def drop(self, ino: int) -> None:
        """Tell the store that `ino` is not held any more. Nobody waits for what it says, so it is logged."""
        try:
            self.store.drop(ino)
        except Exception:  # a defect of a store must not end the thread that happens to call this
            log.exception("node %d could not be dropped", ino)

    def let_go_since(self, epoch: int, ino: int) -> bool:
        """Whether the state of `ino` was let go after `epoch`: what the store said in between may be old."""
        with self.lock:
            n = self.epoch - epoch
            return ino not in self.files and n > 0 and (n > len(self._let_go) or ino in list(self._let_go)[-n:])

    def _forgettable(self, f: File) -> bool:
        """Held: lock. Take `f` out where nothing needs it; the caller then drops it in the store, without the lock."""
        if f.opens or f.busy or f.core.generations or f.waiters or f.sequel or self.files.get(f.ino) is not f:
            return False
        del self.files[f.ino]
        if f.marked:
            self.journal.remove(Entry.DIRTY, f.ino)
        if f.error:
            self.journal.remove(Entry.ERROR, f.ino)
        for queue in (self.dirty, self.urgent, self.full, self.failing):
            queue.pop(f.ino, None)
        self.epoch += 1
        self._let_go.append(f.ino)
        return True

    # taking over from a server that died

    def inherited(self) -> dict[int, list[tuple[int, Record]]]:
        """What the log has and the store has not, as (segment, record) by ino, in order. To be asked once; all of it
        must be replayed."""
        floors = {ino: _FLOOR.unpack(value)[0] for ino, value in self.journal.inherited(Entry.DIRTY).items()}
        found: dict[int, list[tuple[int, Record]]] = {ino: [] for ino in floors}
        for segment, record in self.log.scan():
            self.log.sequence = max(self.log.sequence, record.sequence)
            if record.sequence > floors.get(record.ino, record.sequence):
                found[record.ino].append((segment, record))
        for ino, records in list(found.items()):
            if not records:
                self.journal.remove(Entry.DIRTY, ino)
                del found[ino]
            self.log.revive(records)
        self._errors = self.journal.inherited(Entry.ERROR)
        self.log.settle()
        return found

    def taken_over(self) -> None:
        """Everything is replayed, and every file that is open is adopted: nobody will ask for other errors."""
        for ino in self._errors:
            self.journal.remove(Entry.ERROR, ino)
        self._errors = {}

    def replay(self, ino: int, attr: Attr | None, records: list[tuple[int, Record]]) -> File:
        """Take the changes of one file again, in their order. `attr` is the store's; None where it has not the file."""
        with self.lock:
            if attr is None:
                f = self.files[ino] = self._new(ino, Attr(ino, 0))
            else:
                f = self._adopt(ino, attr)
            f.marked = True
            for (segment, record), following in zip(records, [*records[1:], None], strict=True):
                self._replay(f, segment, record)
                if following is not None and following[1].sequence == record.sequence:
                    # What the cleaner moved has the number of another: one floor must stand above both.
                    f.core.generations[-1].sealed = False
            if attr is not None:
                self._dirtied(f)
            return f

    def _replay(self, f: File, segment: int, r: Record) -> None:
        """Held: lock."""
        core, now, mtime = f.core, self.clock(), r.mtime_ns or None
        if r.kind == Kind.WRITE:
            if r.unique:
                self.taken[r.unique] = r.length
            self.freed(self.log.release(core.write(r.offset, r.offset + r.length, r.place, now, r.sequence, mtime)))
        elif r.kind == Kind.TRUNCATE:
            self.freed(self.log.release(core.truncate(r.offset, now, r.sequence, segment, mtime)))
        elif r.kind == Kind.ZERO:
            end = r.offset + r.length
            self.freed(self.log.release(core.zero(r.offset, end, r.length > 0, now, r.sequence, segment, mtime)))
        elif r.kind == Kind.TIMES:
            atime = r.offset if r.flags & ATIME else None
            core.set_times(atime, r.length if r.flags & MTIME else None, now, r.sequence, segment)

    # changes

    def write(self, f: File, unique: int, offset: int, data: memoryview, at_tail: bool, mtime_ns: int | None) -> int:
        """Take `data`, which stands at the tail or is a copy, and stamp its record. Answers the occupied bytes.

        Raises EFBIG beyond what the store can hold.
        """
        n = len(data)
        if offset + n > self.max_file_size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        f.check()
        log_ = self.log

        def take(receive: Callable[[], int]) -> None:
            g = self._adopt(f.ino, f.attr)  # it may have been let go a moment ago, being clean
            self._mark(g)
            place = receive()
            sequence = log_.stamp(unique, g.ino, offset, n, place, mtime_ns or g.core.mtime_ns)
            dropped = g.core.write(offset, offset + n, place, self.clock(), sequence, mtime_ns)
            if dropped:
                log_.release(dropped)
            self._dirtied(g)

        with self.lock:
            if at_tail:
                take(partial(log_.take, n))
            else:
                self._wait_for_room(lambda: take(partial(log_.put, data)))
            return log_.occupied

    # Changes without payload. With `wait` False they raise LogFull where they would have to wait for room.

    def truncate(self, f: File, unique: int, size: int, mtime_ns: int | None, wait: bool = True) -> None:
        if size > self.max_file_size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        def change(g: File) -> None:
            token = self.log.note(Kind.TRUNCATE, unique, g.ino, size, 0, 0, mtime_ns or g.core.mtime_ns)
            self.freed(self.log.unnote(g.core.superseded_by_truncate(size)))
            self.freed(self.log.release(g.core.truncate(size, self.clock(), self.log.sequence, token, mtime_ns)))
            if size == 0:
                self.incomplete.discard(g.ino)

        self._change(f, change, wait)

    def zero(
        self, f: File, unique: int, start: int, end: int, grow: bool, mtime_ns: int | None, wait: bool = True
    ) -> None:
        """[start, end) reads as zeros; with `grow` the size reaches `end`."""
        if grow and end > self.max_file_size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

        def change(g: File) -> None:
            # Cut to the size, which it says again: the write that made the file so long may be superseded by this.
            length = max(0, (end if grow else min(end, g.core.size)) - start)
            token = self.log.note(Kind.ZERO, unique, g.ino, start, length, 0, mtime_ns or g.core.mtime_ns)
            dropped = g.core.zero(start, end, grow, self.clock(), self.log.sequence, token, mtime_ns)
            self.freed(self.log.release(dropped))

        self._change(f, change, wait)

    def set_times(self, f: File, unique: int, atime_ns: int | None, mtime_ns: int | None, wait: bool = True) -> None:
        def change(g: File) -> None:
            before = g.core.noted_times()
            atime = before[0] if atime_ns is None else atime_ns
            # The mtime as it is now: a write may have moved it since that record.
            mtime = g.core.mtime_ns if mtime_ns is None and before[1] is not None else mtime_ns
            flags = ATIME * (atime is not None) | MTIME * (mtime is not None)
            token = self.log.note(Kind.TIMES, unique, g.ino, atime or 0, mtime or 0, flags)
            self.freed(self.log.unnote(g.core.superseded_by_times()))
            g.core.set_times(atime, mtime, self.clock(), self.log.sequence, token)

        self._change(f, change, wait)

    def _change(self, f: File, change: Callable[[File], None], wait: bool) -> None:
        """Do `change`, which raises LogFull before it has changed anything, to the state of a file."""
        f.check()

        def act() -> None:
            g = self._adopt(f.ino, f.attr)  # it may have been let go, also while this waited
            self._mark(g)
            change(g)
            self._dirtied(g)

        with self.lock:
            if wait:
                self._wait_for_room(act)
                return
            try:
                act()
            except LogFull:
                self._want_room()
                raise

    def _mark(self, f: File) -> None:
        """Held: lock. The file is about to be dirty: who replays must know where to begin. May raise OSError."""
        if not f.marked:
            self.journal.put(Entry.DIRTY, f.ino, _FLOOR.pack(self.log.sequence))
            f.marked = True

    def _dirtied(self, f: File) -> None:
        """Held: lock. Put `f` where the engine finds it, and wake the engine if it should look now."""
        ino = f.ino
        if f.busy or ino in self.failing:
            if f.core.generations[-1].sealed:
                self.work.notify()  # it may be staged meanwhile
            return
        if ino not in self.dirty:
            self.dirty[ino] = f
            if len(self.dirty) == 1:
                self.work.notify()  # somebody must watch its age
        if f.core.generations[0].sealed and ino not in self.full:
            self.full[ino] = f
            self.work.notify()
        elif self.log.occupied > self.limits.background:
            self.work.notify()

    def unlinked(self, ino: int) -> None:
        """The last link of `ino` is gone; its data goes with the last open."""
        with self.lock:
            f = self.files.get(ino)
            if f is None:
                return
            f.unlinked = True
            f.attr.nlink = 0
            self.incomplete.discard(ino)
            answers = self._unpark(ino) if f.opens else self._discard(f)
            forget = self._forgettable(f)
        self._answer_all(answers)
        if forget:
            self.drop(ino)

    def _discard(self, f: File) -> list[Callable[[], None]]:
        """Held: lock. Forget the dirty data of a file that nobody can reach. Answers replies to send."""
        gone = f.core.discard()
        for g in gone:
            if g.round is not None:
                self.store.unstage(g.round)  # does not block
        self._release(f, gone)
        if not f.core.generations:
            self.dirty.pop(f.ino, None)
            self.full.pop(f.ino, None)
            self.failing.pop(f.ino, None)
        waiters, f.waiters = f.waiters, []
        f.sequel = None
        self.urgent.pop(f.ino, None)
        return self._unpark(f.ino) + [_settle(w, 0) for w in waiters]

    def _unpark(self, ino: int) -> list[Callable[[], None]]:
        """Held: lock. The parked WRITE replies of one file: rm of it waits for them in the kernel."""
        mine = [answer for i, _, answer in self.parked if i == ino]
        if mine:
            self.parked = deque(item for item in self.parked if item[0] != ino)
        return mine

    @staticmethod
    def _answer_all(answers: list[Callable[[], None]]) -> None:
        for answer in answers:
            answer()

    def _release(self, f: File, gone: list[Generation]) -> None:
        """Held: lock. The log bytes of generations of a file that are committed or forgotten."""
        if gone and f.core.generations:
            self.journal.put(Entry.DIRTY, f.ino, _FLOOR.pack(gone[-1].sequence))
        elif gone:
            self.journal.remove(Entry.DIRTY, f.ino)
            f.marked = False
        freed = False
        for g in gone:
            freed |= self.log.release(g.extents.places())
            freed |= self.log.unnote(g.tokens)
        self.freed(freed)

    def freed(self, freed: bool) -> None:
        """Held: lock. Wake who waits for room, if a segment became free."""
        if freed:
            self.room.notify_all()
            self.paced.notify()

    # pacing

    def must_wait(self, occupied: int) -> bool:
        """Whether a WRITE's reply must go through the pacer."""
        return occupied >= self.limits.freerun or bool(self.parked)

    def pace(self, ino: int, size: int, answer: Callable[[], None]) -> None:
        """Send this reply when the limits allow, after those that wait already."""
        with self.lock:
            self.parked.append((ino, size, answer))
            self.paced.notify()
            self.work.notify()

    # reading

    def read_plan(self, f: File, start: int, end: int) -> tuple[list[tuple[int, int, int]], list[Segment]]:
        """What `FileCache.resolve` says, its log segments pinned; the caller must `unpin` them."""
        with self.lock:
            plan = f.core.resolve(start, end)
            return plan, self.log.pin((place, e - s) for s, e, place in plan if place not in (HOLE, STORE))

    def unpin(self, pinned: list[Segment]) -> None:
        with self.lock:
            self.freed(self.log.unpin(pinned))

    # durability

    def sync(self, f: File, done: Done) -> bool:
        """Call `done` once everything accepted so far of `f` is durable, or its round has failed.

        Answers True, and never calls it, where that is so already.
        """
        with self.lock:
            number = f.core.seal()
            if not number and f.synced == f.version and not f.busy and f.sequel is None:
                return True
            f.waiters.append(Waiter(number, done))
            self._hurry(f)
            return False

    def _hurry(self, f: File) -> None:
        """Held: lock. Somebody waits for `f` now."""
        f.retry_at = 0.0
        self.failing.pop(f.ino, None)
        if not f.busy:
            self.urgent[f.ino] = f
            self.work.notify()

    def is_held_back(self, f: File) -> bool:
        """Held: lock. Not where the log needs the room: writers would wait for what may wait for them."""
        return self.log.occupied < self.limits.freerun and self.held_back(f.ino)

    def let_go_on(self, ino: int) -> None:
        """A file is not held back any more."""
        with self.lock:
            f = self.files.get(ino)
            if f is not None and not f.busy:
                self.requeue(f)

    def follow(self, ino: int, attr: Attr, sequel: Sequel) -> File:
        """`sequel` is to follow what is accepted of a file until `let_follow`; it takes the place of one before it."""
        with self.lock:
            f = self._adopt(ino, attr)
            f.sequel = sequel
            return f

    def let_follow(self, f: File, sequel: Sequel) -> None:
        """Everything that it is to follow has been accepted."""
        with self.lock:
            if f.sequel is sequel and sequel.generation is None:
                sequel.generation = f.core.seal()
                self._hurry(f)

    def cancel(self, f: File, done: Done) -> bool:
        """Forget a waiter (it was interrupted). False where it is being answered already."""
        with self.lock:
            for w in f.waiters:
                if w.done is done:
                    f.waiters.remove(w)
                    if not f.waited_for:
                        self.urgent.pop(f.ino, None)
                        if f.core.generations and not f.busy and f.ino not in self.failing:
                            self.dirty.setdefault(f.ino, f)
                    return True
            return False

    # copies inside the store

    def begin_copy(self, source: int, target: int) -> File | None:
        """Keep rounds off `target` while the store copies into it. EOPNOTSUPP where either file has unwritten data.

        Answers the target's state for `end_copy`, None where it has none.
        """
        with self.lock:
            files = [self.files.get(source), self.files.get(target)]
            if self.held_back(target) or any(f is not None and (f.core.generations or f.busy) for f in files):
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            f = files[1]
            if f is not None:
                f.copying = True
            return f

    def end_copy(self, f: File, end: int, mtime_ns: int) -> None:
        """The store has the bytes up to `end`."""
        with self.lock:
            f.copying = False
            f.version += 1
            f.core.grown(end, mtime_ns)
            self.requeue(f)

    def failed(self, f: File, error: int) -> None:
        """Held: lock. An error that each opener of the file shall hear of, also from the server after this one."""
        f.error = error
        f.error_sequence += 1
        self.journal.put(Entry.ERROR, f.ino, _ERROR.pack(error, f.error_sequence))

    def requeue(self, f: File) -> None:
        """Held: lock. A file that is idle again goes where the engine finds it."""
        if f.copying:
            return  # the end of the copy sees to it
        if f.core.generations:
            self.dirty[f.ino] = f
            if f.core.generations[0].sealed:
                self.full[f.ino] = f
        if f.waited_for:
            self.urgent[f.ino] = f
        if f.core.generations or f.waited_for:
            self.work.notify()

    # what status shows

    def newest(self, f: File) -> int:
        """The sequence of the last change of a file that the store has not; 0 where there is none."""
        with self.lock:
            return f.core.generations[-1].sequence if f.core.generations else 0

    @property
    def unwritten(self) -> int:
        """Bytes that the store has not, or not all of."""
        with self.lock:
            return sum(f.core.dirty_bytes for f in self.files.values())

    def status(self) -> dict[str, int | float | str]:
        with self.lock:
            dirty = sum(f.core.dirty_bytes for f in self.files.values())
            return {
                "dirty_bytes": dirty - self.in_flight_bytes,
                "writeback_bytes": self.in_flight_bytes,
                "dirty_files": sum(1 for f in self.files.values() if f.core.generations),
                "parked_writes": len(self.parked),
                "log_size": self.log.size,
                "log_used": self.log.occupied,
                "log_limit": self.limits.limit,
                "bandwidth": round(self.limits.bandwidth.value),
                "failing_files": len(self.failing),
                "last_error": self.last_error,
            }


def _settle(waiter: Waiter, error: int) -> Callable[[], None]:
    return lambda: waiter.done(error)
