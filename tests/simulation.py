"""The write-back cache in one thread with a model of the kernel before it and of a store behind it, dying anywhere.

    python -m tests.simulation FIRST COUNT      runs the seeds FIRST .. FIRST + COUNT - 1; a failing one is named

A seed chooses the changes, the faults of the store, whether there is a log on disk, and the steps at which the worker
dies or the power is cut: before, within and after
each record that is stamped, each segment that is recycled, each entry of the journal, each piece that reaches the
store, each commit, each reply, each write and sync of the log on disk. Then the next worker takes over what outlives a
process - log, journal, store - and

- everything acknowledged is read back, with sizes and times; what was not answered was done or not done, never half;
- what the kernel sends again then happens;
- the store alone holds at every moment one point of each file's history, not before its last fsync (atomic stores).

After a power cut the next mount has what the log on disk and the store have kept: of what was not synced any sector
may be lost. Then each file is at one point of its history, not before its last fsync, whichever of the two answered
that (in a store whose commits are not atomic: where fsync is the log's, or nothing followed it).
"""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from tests.simulated_disk import PAGE, SimDirectory
from wbfuse.journal import Journal
from wbfuse.store.contract import Capabilities, Progress, Round
from wbfuse.wire.types import Attr
from wbfuse.writeback.cache import WritebackCache
from wbfuse.writeback.cached_file import File
from wbfuse.writeback.cleaner import clean
from wbfuse.writeback.disk.load import load
from wbfuse.writeback.disk.writer import Answer, DiskLog
from wbfuse.writeback.engine import Engine
from wbfuse.writeback.extents import HOLE
from wbfuse.writeback.file import STORE
from wbfuse.writeback.log import Log, LogError, LogFull
from wbfuse.writeback.records import SIZE

MAX_WRITE = 8192
LOG = 10 * 4 * MAX_WRITE
LONGEST = 60_000
FILES = (11, 12, 13)
OPERATIONS = 60
EXPIRE = 5.0


class Crash(BaseException):
    """The worker is dead."""


class Steps:
    """Where a worker may die; it does when `left` of them have passed."""

    def __init__(self) -> None:
        self.left = -1
        self.passed = 0

    def __call__(self) -> None:
        self.passed += 1
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.left = -1
                raise Crash


@dataclass
class Content:
    """A file at one point of its history."""

    data: bytes = b""
    mtime_ns: int = 1

    def written(self, offset: int, data: bytes, mtime: int | None) -> Content:
        base = self.data.ljust(offset, b"\0")
        return Content(base[:offset] + data + base[offset + len(data) :], mtime or self.mtime_ns)

    def cut(self, size: int, mtime: int | None) -> Content:
        return Content(self.data[:size].ljust(size, b"\0"), mtime or self.mtime_ns)

    def zeroed(self, start: int, end: int, grow: bool, mtime: int) -> Content:
        size = max(len(self.data), end) if grow else len(self.data)
        base = self.data.ljust(size, b"\0")
        end = min(end, size)
        hole = bytes(max(0, end - start))
        return Content(base[:start] + hole + base[start + len(hole) :] if hole else base, mtime)


class SimStore:
    """What outlives the worker: files in memory. `atomic`: a commit is seen whole or not at all."""

    def __init__(self, atomic: bool, steps: Steps, rng: random.Random) -> None:
        self.files = {ino: Content() for ino in FILES}
        self.durable = dict(self.files)
        """What a power cut leaves."""
        self.capabilities = Capabilities(atomic, 1 << 20, 1 << 40, group_bytes=MAX_WRITE if atomic else 0)
        self._steps = steps
        self._rng = rng
        self.faults = 0.0

    def _fault(self) -> None:
        if self._rng.random() < self.faults:
            raise OSError(self._rng.choice((errno.EIO, errno.ENOSPC, errno.ETIMEDOUT)), "by chance")

    def hold(self, ino: int) -> None: ...
    def drop(self, ino: int) -> None: ...
    def acquire(self, ino: int) -> None: ...

    def getattr(self, ino: int) -> Attr:
        f = self.files[ino]
        return Attr(ino, 0o100644, len(f.data), mtime_ns=f.mtime_ns)

    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        self._fault()
        new = {}
        for r in rounds:
            f = self.files[r.ino]
            if r.lowest is not None and r.lowest < len(f.data):
                f = f.cut(r.lowest, None)
            for piece in r.pieces:
                data = bytes(piece.length) if piece.buffers is None else b"".join(map(bytes, piece.buffers))
                f = f.written(piece.offset, data, None)
                self._steps()
                if not self.capabilities.atomic_commit:
                    self.files[r.ino] = f
                    self._fault()
            assert r.size is not None
            new[r.ino] = f.cut(r.size, r.mtime_ns)
        self._steps()
        self.files |= new
        if self.capabilities.atomic_commit:
            self.durable |= new
        self._steps()
        progress(sum(p.length for r in rounds for p in r.pieces))

    def sync(self, ino: int) -> None:
        self._steps()
        self._fault()
        self.durable[ino] = self.files[ino]
        self._steps()

    def cut(self) -> None:
        """Pages, size and mtime of what was not synced are any of both."""
        for ino, now in self.files.items():
            before = self.durable[ino]
            a, b = before.data.ljust(LONGEST, b"\0"), now.data.ljust(LONGEST, b"\0")
            pages = [self._rng.choice((a, b))[at : at + PAGE] for at in range(0, LONGEST, PAGE)]
            size = len(self._rng.choice((before, now)).data)
            mtime = self._rng.choice((before, now)).mtime_ns
            self.files[ino] = self.durable[ino] = Content(b"".join(pages)[:size], mtime)


class SimDisk(DiskLog):
    """Its thread is whoever waits."""

    def wait(self, sequence: int | None = None) -> None:
        answers: list[Answer] = []
        answer = self.when_durable(answers.append, sequence)
        while answer is None and not answers:
            self.step(sync=True)
        if (answer or answers[0]) is Answer.ABANDONED:
            raise OSError(errno.EIO, "the log on disk does not answer")


@contextmanager
def dying(steps: Steps) -> Iterator[None]:
    """Let the worker die around and within what it writes to memory that outlives it."""
    stamp, recycle, zero, append = Log._stamp, Log._recycle, Log._zero_records, Journal._append

    def torn_stamp(self: Any, s: Any, record: Any) -> None:
        at = self.geometry.slot(s.index, s.records)
        before = bytes(self._view[at : at + SIZE])
        steps()
        try:
            steps()
        except Crash:
            stamp(self, s, record)
            self._view[at + SIZE // 2 : at + SIZE] = before[SIZE // 2 :]
            raise
        stamp(self, s, record)
        steps()

    def stepped(act: Callable[..., Any]) -> Callable[..., Any]:
        def around(self: Any, *args: Any) -> Any:
            steps()
            done = act(self, *args)
            steps()
            return done

        return around

    with ExitStack() as stack:
        stack.enter_context(patch.object(Log, "_stamp", torn_stamp))
        stack.enter_context(patch.object(Log, "_recycle", stepped(recycle)))
        stack.enter_context(patch.object(Log, "_zero_records", stepped(zero)))
        stack.enter_context(patch.object(Journal, "_append", stepped(append)))
        stack.enter_context(patch("wbfuse.writeback.engine.log.warning"))
        stack.enter_context(patch("wbfuse.writeback.disk.writer.log.error"))
        stack.enter_context(patch("wbfuse.writeback.disk.stream.chunks_of", lambda _g: (0, 128 << 10)))
        stack.enter_context(patch("wbfuse.writeback.disk.stream._FRAME_BYTES", 16 << 10))
        stack.enter_context(patch("wbfuse.writeback.disk.stream._PAGES_FROM", 12 << 10))
        yield


@dataclass
class Change:
    """A request of the kernel: what it makes of a file, and how it is made."""

    ino: int
    after: Callable[[Content], Content]
    act: Callable[[int], None]
    unique: int = 0


@dataclass
class Past:
    """The history of a file: every state that it had, which the last fsync has promised, and the store's last one."""

    states: list[Content] = field(default_factory=lambda: [Content()])
    promised: int = 0
    stored: int = 0
    firm: bool = True
    """The promise holds; else it is the last that was seen after a power cut, and nobody has asked for it since."""


class Machine:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.steps = Steps()
        self.store = SimStore(self.rng.random() < 0.6, self.steps, self.rng)
        self.past = {ino: Past() for ino in FILES}
        self.by_log = self.rng.random() < 0.5
        """fsync may be answered by the log on disk."""
        self.dark = False
        """The last cut was one of the power, not only the keeper's death."""
        self.faulty_disk = self.rng.random() < 0.2
        self.directory = SimDirectory(self.steps, self._disk_fault) if self.rng.random() < 0.5 else None
        self.now = 1000.0
        self.uniques = 0
        self.deaths = self.cuts = 0
        self._fds: dict[str, int] = {}
        self._start()

    def _disk_fault(self) -> None:
        if self.faulty_disk and self.rng.random() < 0.1:
            raise OSError(errno.EIO, "by chance")

    # lives

    def _start(self) -> None:
        """A worker with what the last one left. May die."""
        fresh = not self._fds
        self.journal = Journal(None if fresh else os.dup(self._fds["journal"]))
        fd = None if fresh else os.dup(self._fds["log"])
        self.cache = WritebackCache(
            self.store,
            LOG,
            MAX_WRITE,
            0,
            clock=lambda: self.now,
            journal=self.journal,
            log_fd=fd,  # type: ignore[arg-type]
        )
        self.engine = Engine(self.cache, EXPIRE, committers=0)
        if fresh:
            self._fds = {"journal": os.dup(self.journal.fd), "log": os.dup(self.cache.log.fd)}
            if self.directory is not None:
                self.store.durable |= self.store.files  # as Mount does
        else:
            for ino, records in self.cache.inherited().items():
                self.engine.take_over(ino, records)
        if self.directory is not None:
            self.engine.sync_each = self.by_log
            self.directory.look()
            self.cache.disk = self.disk = SimDisk(
                self.directory, self.cache.log, self.journal, self.cache.lock, self.cache.freed, {"uuid": "0" * 32},
                self.directory.noted, self.directory.remember, self.directory.forget,
                self.directory.manifest() is not None,
            )  # fmt: skip

    def _power_cut(self) -> None:
        """The machine is off, or only the keeper is gone; then the log on disk is all that is left beside the store."""
        assert self.directory is not None
        self.cuts += 1
        self.dark = self.rng.random() < 0.8
        if self.dark:
            self.directory.cut(self.rng)
            self.store.cut()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        try:
            loaded = load(self.directory) if self.directory.counts else None  # type: ignore[arg-type]
        except LogError as e:
            raise AssertionError(f"after a power cut: {e}") from e
        if loaded is not None:
            self._fds = {"log": loaded.log, "journal": loaded.journal}

    def _next_life(self) -> bool:
        """Workers die until one has taken over. Whether the power was cut meanwhile."""
        cut = False
        while True:
            self.deaths += 1
            assert self.deaths < 50
            self._check_store()
            self._end()
            if self.directory is not None and self.rng.random() < 0.4:
                self._power_cut()
                cut = True
            if self.rng.random() < 0.3:
                self.steps.left = self.rng.randrange(1, 60)
            try:
                self._start()
            except Crash:
                continue
            if cut:
                self._check_cut()
            return cut

    def _check_cut(self) -> None:
        """Each file is at a point of its history that nobody has been promised to be behind; it goes on from there."""
        for ino, past in self.past.items():
            seen = self._seen(ino)
            tight = self.store.capabilities.atomic_commit or self.by_log
            # A log that could not be written is gone; what it had promised is being written back when the power goes.
            lost = self.directory is not None and self.directory.gone
            promised = past.stored if lost else past.promised
            if lost and not self.store.capabilities.atomic_commit:
                pass
            elif tight or (past.firm and past.promised == len(past.states) - 1):
                assert seen in past.states[promised:], f"{ino}: after a power cut: no point of its history"
            past.states.append(seen)
            if self.dark:  # what is left is on the platter
                past.promised, past.firm = len(past.states) - 1, tight

    def _end(self) -> None:
        """Close what the worker had, once."""
        if self.cache is not None:
            self.cache.log.close()
            self.cache = None  # type: ignore[assignment]

    def close(self) -> None:
        self._end()
        for fd in self._fds.values():
            os.close(fd)

    # what the kernel does

    def _file(self, ino: int) -> File:
        return self.cache.files.get(ino) or self.cache.adopt(ino, self.store.getattr(ino))

    def _time(self) -> int:
        return self.rng.randrange(2, 1 << 62)

    def _write(self, ino: int) -> Change:
        offset = self.rng.choice((0, 4096, self.rng.randrange(LONGEST - MAX_WRITE)))
        data = self.rng.randbytes(self.rng.choice((1, 100, 4096, self.rng.randrange(1, MAX_WRITE))))
        mtime = self._time() if self.rng.random() < 0.5 else None
        at_tail = self.rng.random() < 0.7

        def act(unique: int) -> None:
            target = self.cache.receive_target()
            while self.cache.at_scratch or self.cache.log.free_segments < 2:
                self._drive()
                target = self.cache.receive_target()
            view = memoryview(bytearray(data))
            if at_tail:
                target[: len(data)] = data
                view = target[: len(data)]
            self.cache.write(self._file(ino), unique, offset, view, at_tail, mtime)

        return Change(ino, lambda c: c.written(offset, data, mtime), act)

    def _noted(self, act: Callable[[], None]) -> None:
        while True:
            try:
                return act()
            except LogFull:
                self._drive()

    def _truncate(self, ino: int) -> Change:
        size, mtime = self.rng.randrange(LONGEST), self._time()

        def act(unique: int) -> None:
            self._noted(lambda: self.cache.truncate(self._file(ino), unique, size, mtime, wait=False))

        return Change(ino, lambda c: c.cut(size, mtime), act)

    def _zero(self, ino: int) -> Change:
        start = self.rng.randrange(LONGEST - 1)
        end, grow, mtime = self.rng.randrange(start + 1, LONGEST), self.rng.random() < 0.4, self._time()

        def act(unique: int) -> None:
            self._noted(lambda: self.cache.zero(self._file(ino), unique, start, end, grow, mtime, wait=False))

        return Change(ino, lambda c: c.zeroed(start, end, grow, mtime), act)

    def _times(self, ino: int) -> Change:
        mtime = self._time()

        def act(unique: int) -> None:
            self._noted(lambda: self.cache.set_times(self._file(ino), unique, None, mtime, wait=False))

        return Change(ino, lambda c: Content(c.data, mtime), act)

    def _change(self, change: Change) -> None:
        """A request: sent again, with the same unique, until a worker lives to answer it."""
        self.uniques += 1
        change.unique = self.uniques
        past = self.past[change.ino]
        after = change.after(past.states[-1])
        while True:
            # From here on it may have been done, and committed, though nobody says so.
            past.states.append(after)
            try:
                change.act(change.unique)
                self.steps()
                return
            except Crash:
                if self._next_life():
                    return  # who asked is gone as well
                seen = self._seen(change.ino)
                assert seen in past.states[-2:], "neither done nor undone"
                past.states.append(seen)
                after = change.after(seen)

    def _fsync(self, ino: int, by_log: bool = True) -> None:
        while True:
            wanted = len(self.past[ino].states) - 1
            said: list[int] = []
            logged = False
            try:
                f = self.cache.files.get(ino)
                if f is None:
                    self._sync_clean(ino, said)
                elif by_log and self._by_log(f, said):
                    logged = True
                elif not self.cache.sync(f, said.append):
                    while not said:
                        self._drive()
                self.steps()
            except Crash:
                if self._next_life():
                    return
                continue
            if not said or not said[0]:
                self.past[ino].promised, self.past[ino].firm = wanted, True
                if not logged:
                    self.past[ino].stored = wanted
            return

    def _sync_clean(self, ino: int, said: list[int]) -> None:
        try:
            self.store.sync(ino)
        except OSError as e:
            said.append(e.errno or errno.EIO)

    def _by_log(self, f: File, said: list[int]) -> bool:
        """As CachedFileSystem has it: whether the log on disk has answered."""
        if self.directory is None or not self.by_log or self.disk.broken or self.rng.random() < 0.2:
            return False
        if f.synced != f.version:
            try:
                self.engine.sync_now(f)
            except OSError as e:
                said.append(e.errno or errno.EIO)
                return True
        answers: list[Answer] = []
        answer = self.disk.when_durable(answers.append, self.cache.newest(f))
        while answer is None and not answers:
            self.disk.step(sync=True)
        return (answer or answers[0]) is Answer.DURABLE

    def _drive(self) -> None:
        """Write-back goes on; where nothing is due, time does."""
        if self.directory is not None and self.rng.random() < 0.5:
            self.disk.step(sync=self.rng.random() < 0.3)
        with self.cache.lock:
            clean(self.cache)
        if not self.engine.step():
            self.now += self.rng.choice((0.05, 1.0, EXPIRE, 31.0))
            with self.cache.lock:
                for f in self.cache.files.values():
                    if f.core.generations:
                        f.core.seal()
                    if f.core.generations and not f.busy and f.ino not in self.cache.failing:
                        self.cache.full[f.ino] = f

    # checks

    def _seen(self, ino: int) -> Content:
        """What stat(2) and read(2) show."""
        f = self.cache.files.get(ino)
        if f is None:
            return self.store.files[ino]
        plan, pinned = self.cache.read_plan(f, 0, 1 << 30)
        left, self.steps.left = self.steps.left, -1  # who looks does not die
        out = bytearray()
        for start, end, place in plan:
            if place == HOLE:
                out += bytes(end - start)
            elif place == STORE:
                out += self.store.files[ino].data[start:end].ljust(end - start, b"\0")
            else:
                out += self.cache.log.view(place, end - start)
        self.cache.unpin(pinned)
        self.steps.left = left
        assert len(out) == f.core.size
        return Content(bytes(out), f.shown().mtime_ns)

    def _check_store(self) -> None:
        if self.store.capabilities.atomic_commit:
            for ino, past in self.past.items():
                assert self.store.files[ino] in past.states[past.stored :], f"{ino}: no point of its history"

    def _check(self) -> None:
        for ino, past in self.past.items():
            assert self._seen(ino) == past.states[-1], f"{ino}: not what was acknowledged"
        self._check_store()

    # the seed

    def run(self) -> None:
        writes = self.rng.choice((1, 4, 4, 12))
        makers = (*[self._write] * writes, self._truncate, self._zero, self._times)
        for _ in range(OPERATIONS):
            self.store.faults = self.rng.choice((0, 0, 0, 0.3))
            if self.steps.left < 0 and self.rng.random() < 0.2:
                self.steps.left = self.rng.randrange(1, 40)
            what = self.rng.random()
            if what < 0.75:
                self._change(self.rng.choice(makers)(self.rng.choice(FILES)))
            elif what < 0.82:
                self._fsync(self.rng.choice(FILES))
            else:
                self._without_request(self._drive)
            if self.rng.random() < 0.3:
                self._check()
        self.store.faults = 0
        self.steps.left = -1
        for ino in FILES:
            self._fsync(ino, by_log=False)
        self._check()
        for ino, past in self.past.items():
            assert self.store.files[ino] == past.states[-1], f"{ino}: not in the store after fsync"

    def _without_request(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Crash:
            self._next_life()
            self._check()


def simulate(seed: int) -> tuple[int, int, int]:
    """Run a seed. Answers (steps passed, deaths, power cuts). Raises AssertionError with the seed's number."""
    machine = None
    steps = Steps()
    with dying(steps):
        try:
            machine = Machine(seed)
            steps_of = machine.steps
            steps.__dict__ = steps_of.__dict__  # what is patched counts the same steps
            machine.run()
            return steps_of.passed, machine.deaths, machine.cuts
        except AssertionError as e:
            raise AssertionError(f"seed {seed}: {e}") from e
        finally:
            if machine is not None:
                machine.close()


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    steps = deaths = cuts = 0
    for seed in range(first, first + count):
        passed, died, cut = simulate(seed)
        steps, deaths, cuts = steps + passed, deaths + died, cuts + cut
        if sys.stderr.isatty() and seed % 50 == 0:
            print(f"\r{seed - first} of {count} seeds", end="", file=sys.stderr, flush=True)
    print(f"{count} seeds: {steps} steps, {deaths} deaths of workers, {cuts} power cuts or deaths of keepers")


if __name__ == "__main__":
    main()
