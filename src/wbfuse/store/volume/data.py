"""Changes to the bytes of files: rounds committed in one transaction, cuts, holes and copies.

Locks of a commit: the session, the inodes ascending, the packs ascending. Everything that it says of a file is in that
one transaction, so a crash leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from wbfuse.store.contract import Buffer, FencedError, Piece, Progress, Round
from wbfuse.store.volume.clone import share
from wbfuse.store.volume.compact import Compactor
from wbfuse.store.volume.layout import HOLE, Extent, overlay
from wbfuse.store.volume.maps import WINDOW
from wbfuse.store.volume.names import fail, path_of
from wbfuse.store.volume.packer import whole
from wbfuse.store.volume.reading import VolumeReads
from wbfuse.store.volume.reaper import leave_layers
from wbfuse.store.volume.rows import (
    MAX_SIZE,
    PacksGoneError,
    clear,
    lay,
    layer_row,
    replace_rows,
    resolve,
    rows_in,
    use_packs,
)
from wbfuse.store.volume.schema import extents, inodes, layers
from wbfuse.store.volume.staging import Staged, Staging
from wbfuse.wire.constants import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE

_COPY_ROWS = 4096
"""The most rows that one call copies."""

_SET_INODE = (
    update(inodes)
    .where(inodes.c.ino == bindparam("i"))
    .values(
        version=inodes.c.version + 1, size=bindparam("z"), bytes=bindparam("b"), layer=bindparam("l"),
        atime_ns=func.coalesce(bindparam("at"), inodes.c.atime_ns),
        mtime_ns=func.coalesce(bindparam("mt"), inodes.c.mtime_ns), ctime_ns=bindparam("ct"),
    )
    .returning(*inodes.c)
)  # fmt: skip


class VolumeData(VolumeReads):
    """Part of VolumeStore."""

    staging: Staging
    compactor: Compactor

    # open files

    def hold(self, ino: int) -> None:
        self._meet(ino)
        self.nodes.hold(ino)

    def drop(self, ino: int) -> None:
        dies = self.nodes.drop(ino)
        if self.leases is not None and not self.nodes.held(ino):
            self.leases.release(ino)
        if dies:
            self.removed(ino)

    def opened(self, ino: int) -> bool:
        if self.leases is None:
            return True
        self._ask(ino)
        return self.nodes.opened(ino)

    def acquire(self, ino: int) -> None:
        if self.leases is not None and self.leases.acquire(ino):
            self._ask(ino)

    def path_of(self, ino: int) -> str:
        return path_of(self.database, ino)

    def _may_write(self, c: Connection, inos: Iterable[int]) -> None:
        """The first statements of a change to bytes. Raises FencedError."""
        self.session.guard(c)
        if self.leases is not None:
            self.leases.guard(c, inos)

    # committing

    def stage(self, rounds: Sequence[Round], progress: Progress) -> None:
        self.staging.stage(rounds, progress)

    def unstage(self, round_: Round) -> None:
        self.staging.unstage(round_)

    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        fresh = [r for r in rounds if r.staged is None]
        if fresh:
            self.stage(fresh, progress)
        try:
            self._commit_staged(rounds)
        except PacksGoneError:
            self.staging.forget_stock()  # whoever took these may have taken those as well
            for round_ in rounds:
                self.unstage(round_)
            raise OSError(errno.EAGAIN, "packs of this round were collected; it must be staged again") from None

    def _commit_staged(self, rounds: Sequence[Round]) -> None:
        spare = self.session.ids(len(rounds))
        now = time.time_ns()
        ordered = sorted(enumerate(rounds), key=lambda item: item[1].ino)

        def act(c: Connection) -> list[Any]:
            self._may_write(c, [r.ino for r in rounds])
            found = self._lock(c, [r.ino for r in rounds])
            live: dict[int, int] = {}
            out = []
            for i, round_ in ordered:
                row = found.get(round_.ino)
                if row is None:  # its bytes can never be committed; somebody may still want them
                    raise FencedError(f"node {round_.ino} is not in the volume any more")
                out.append(self._apply(c, row, round_, spare + i, live, now))
            sizes: dict[int, int | None] = {}
            for round_ in rounds:
                sizes |= round_.staged.sizes  # type: ignore[attr-defined]
            use_packs(c, live, sizes)
            return out

        def learn(rows: list[Any]) -> None:
            for (_, round_), row in zip(ordered, rows, strict=True):
                self._learn_data(row, round_)

        self._durable(act, learn)

    def _durable(self, act: Callable[[Connection], list[Any]], then: Callable[[list[Any]], None]) -> None:
        """A transaction after which everything before it is durable as well."""
        before = self._name_changes
        self.database.transact(act, durable=True, then=then)
        self._names_synced = max(self._names_synced, before)

    def _learn_data(self, row: Any, round_: Round) -> None:
        """A round was committed, and this is the row now."""
        ranges = None if round_.lowest is not None else [(p.offset, p.offset + p.length) for p in round_.pieces]
        if self.leases is None:
            self.maps.changed(row.ino, ranges)
        else:
            self.maps.committed(row.ino, row.version, ranges)
        self.nodes.learn(row)
        if round_.pieces:
            self.compactor.wrote(row.ino)

    def _apply(self, c: Connection, row: Any, round_: Round, spare: int, live: dict[int, int], now: int) -> Any:
        """Bring one round to the rows of its file, whose inode is locked. `live` collects the use of packs."""
        staged: Staged = round_.staged  # type: ignore[assignment]
        layer, held = row.layer, row.bytes
        changes = whole(round_, staged.extents)
        if round_.lowest is not None and round_.lowest < row.size and layer:
            held += clear(c, layer, round_.lowest, MAX_SIZE, live)
            below = update(layers).where(layers.c.layer == layer, layers.c.base_size > round_.lowest)
            c.execute(below.values(base_size=round_.lowest))
        if changes and (layer or staged.extents):
            if not layer:
                layer = spare
                c.execute(insert(layers).values(layer=layer, base=0, base_size=0, users=1, depth=0))
            held += lay(c, layer, changes, live, self.database.sqlite)
        size = round_.size
        if size is None:
            size = max(row.size, changes[-1].end if changes else 0)
        values = {
            "i": row.ino, "z": size, "b": max(0, held), "l": layer, "at": round_.atime_ns, "mt": round_.mtime_ns,
            "ct": now,
        }  # fmt: skip
        return c.execute(_SET_INODE, values).one()

    def _now(self, round_: Round) -> None:
        """Commit a change that somebody waits for."""
        round_.mtime_ns = time.time_ns()
        with self.writing(round_.ino):
            self.commit([round_], lambda _n: None)

    @contextlib.contextmanager
    def writing(self, ino: int) -> Iterator[None]:
        """The file is held, and leased where that is needed, while the block runs."""
        self.hold(ino)
        try:
            self.acquire(ino)
            yield
        finally:
            self.drop(ino)

    def write(self, ino: int, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        self._now(Round(ino, None, [Piece(offset, len(view), [view])], None))

    def truncate(self, ino: int, size: int) -> None:
        if size > MAX_SIZE:
            raise fail(errno.EFBIG)
        self._now(Round(ino, size, [], size))

    def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        """Nothing can be reserved in a bucket; sizes grow, and what is punched or zeroed becomes a hole."""
        if mode & ~(FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
            raise fail(errno.EOPNOTSUPP)
        row = self._row(ino)
        end = offset + length
        size = row.size if mode & FALLOC_KEEP_SIZE else max(row.size, end)
        pieces = []
        if mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE) and offset < row.size:
            pieces.append(Piece(offset, min(end, row.size) - offset, None))
        if pieces or size != row.size:
            self._now(Round(ino, None, pieces, size))

    # compaction

    def replace_rows(self, round_: Round, layer: int, start: int, end: int, before: list[Extent]) -> bool:
        """Point a window of a layer at the staged bytes of `round_`, where its rows are still `before`."""
        staged: Staged = round_.staged  # type: ignore[assignment]

        def act(c: Connection) -> bool:
            self._may_write(c, [round_.ino])
            row = self._lock(c, [round_.ino]).get(round_.ino)
            if row is None or row.layer != layer or rows_in(c, layer, start, end) != before:
                return False
            based = bool(layer_row(c, layer).base)
            gone, come, live = overlay(before, whole(round_, staged.extents), based)
            replace_rows(c, layer, gone, come)
            use_packs(c, live, staged.sizes)
            return True

        try:
            done = self.database.transact(act, durable=True)
        except PacksGoneError:
            return False
        if done:
            self.maps.changed(round_.ino, [(start, end)])
        return done

    def flatten(self, ino: int, layer: int, stop: Callable[[], bool]) -> bool:
        """Copy the rows that a file shows of the layers below into its own, which then stands on none. No byte moves.

        A window is a transaction. Whether it came to the end; else what was copied does no harm.
        """
        base = self.database.query(lambda c: layer_row(c, layer))

        def mine(c: Connection) -> bool:
            self._may_write(c, [ino])
            row = self._lock(c, [ino]).get(ino)
            return row is not None and row.layer == layer and layer_row(c, layer).base == base.base

        def window(c: Connection, start: int, end: int) -> bool:
            if not mine(c):
                return False
            changes = whole(Round(ino, None, [Piece(start, end - start, None)]), resolve(c, layer, start, end))
            live: dict[int, int] = {}
            lay(c, layer, changes, live, self.database.sqlite)
            use_packs(c, live, {})
            return True

        def leave(c: Connection) -> list[int] | None:
            if not mine(c) or layer_row(c, layer).base_size > base.base_size:  # a clone that went on meanwhile
                return None
            c.execute(delete(extents).where(extents.c.layer == layer, extents.c.pack == HOLE))
            c.execute(update(layers).where(layers.c.layer == layer).values(base=0, base_size=0, depth=0))
            return leave_layers(c, [base.base])

        for at in range(0, base.base_size, WINDOW):
            end = min(at + WINDOW, base.base_size)
            if stop() or not self.database.transact(lambda c, at=at, end=end: window(c, at, end)):  # type: ignore[misc]
                return False
        left = self.database.transact(leave, durable=True)
        if left is None:
            return False
        self.reaper.put_layers(left)
        self.maps.changed(ino, None)
        return True

    # durability

    def sync(self, ino: int, datasync: bool = False) -> None:
        self._meet(ino)
        self.nodes.known(ino)
        self.sync_names()  # bytes are durable once they are committed

    def sync_all(self) -> None:
        self.sync_names()

    # copies

    def copy_range(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Rows are copied, never bytes; a whole file, or what continues one, becomes a layer (`_share`)."""
        self._meet(source)
        self.nodes.known(source)
        with self.writing(target):
            return self._copy_range(source, offset, target, target_offset, length)

    def _copy_range(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        spare = self.session.ids(2)
        now = time.time_ns()

        def act(c: Connection) -> Any:
            self._may_write(c, [target])
            found = self._lock(c, [source, target])
            a, b = found.get(source), found.get(target)
            if a is None or b is None:
                raise fail(errno.ESTALE)
            if not (stat.S_ISREG(a.mode) and stat.S_ISREG(b.mode)):
                raise fail(errno.EINVAL)
            n = min(length, a.size - offset)
            if n <= 0:
                return []
            if source != target and offset == target_offset and b.size <= offset:
                rows = self._share(c, a, b, offset, n, spare, now)
                if rows:
                    return [n, *rows]
            return self._copy_rows(c, a, b, offset, target_offset, n, spare, now)

        done = [0]

        def learn(answer: list[Any]) -> None:
            if answer:
                done[0] = answer[0]
                for row in answer[1:]:
                    self.maps.changed(row.ino, None)
                    self.nodes.learn(row)

        self._durable(act, learn)
        return done[0]

    def _share(self, c: Connection, a: Any, b: Any, offset: int, n: int, spare: int, now: int) -> list[Any]:
        """Let `b` stand on what `a` stands on, up to offset + n. Answers their rows; none where that cannot be."""
        if not a.layer:
            return []
        end = offset + n
        if b.layer:
            top, mine = layer_row(c, a.layer), layer_row(c, b.layer)
            any_row = select(extents.c.start).where(extents.c.layer == top.layer).limit(1)
            same = top.base and mine.base == top.base and mine.base_size == offset == b.size
            if not same or c.execute(any_row).first() is not None:
                return []
            shown = max(offset, min(end, top.base_size))
            c.execute(update(layers).where(layers.c.layer == b.layer).values(base_size=shown))
            return [self._sized(c, b, b.layer, end, n * a.bytes // max(1, a.size), now)]
        if offset:
            return []
        numbers = iter((spare, spare + 1))
        own, new = share(c, a, end, lambda: next(numbers))
        frozen = [self._sized(c, a, own, a.size, 0, None)] if own != a.layer else []
        return [*frozen, self._sized(c, b, new, end, n * a.bytes // max(1, a.size), now)]

    @staticmethod
    def _sized(c: Connection, row: Any, layer: int, size: int, more: int, now: int | None) -> Any:
        values = {
            "i": row.ino, "z": size, "b": row.bytes + more, "l": layer, "at": None, "mt": now,
            "ct": now or row.ctime_ns,
        }  # fmt: skip
        return c.execute(_SET_INODE, values).one()

    def _copy_rows(
        self, c: Connection, a: Any, b: Any, offset: int, target_offset: int, n: int, spare: int, now: int
    ) -> list[Any]:
        """Copy the map of at most so many rows; holes are copied as holes. Answers (bytes, row of `b`)."""
        shown: list[Extent] = []
        at = offset
        while at < offset + n and len(shown) < _COPY_ROWS:
            step = min(offset + n, at + WINDOW)
            shown += resolve(c, a.layer, at, step)
            at = step
        done = at - offset
        shift = target_offset - offset
        moved = [e._replace(start=e.start + shift) for e in shown]
        changes = whole(Round(b.ino, None, [Piece(target_offset, done, None)]), moved)
        layer, held, live = b.layer, b.bytes, dict[int, int]()
        if not layer:
            layer = spare
            c.execute(insert(layers).values(layer=layer, base=0, base_size=0, users=1, depth=0))
        held += lay(c, layer, changes, live, self.database.sqlite)
        use_packs(c, live, dict.fromkeys({e.pack for e in moved}))
        size = max(b.size, target_offset + done)
        return [done, self._sized(c, b, layer, size, held - b.bytes, now)]
