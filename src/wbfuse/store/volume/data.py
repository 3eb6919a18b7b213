"""The bytes of files: read through map and frame cache, staged in packs, committed in one transaction.

Locks of a commit: the session, the inodes ascending, the packs ascending. Everything that it says of a file is in that
one transaction, so a crash leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from wbfuse.store.contract import Buffer, FencedError, Piece, Progress, Round
from wbfuse.store.volume.clone import VolumeClones, share
from wbfuse.store.volume.compact import Compactor
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.frames import FrameCache, Place, Wanted
from wbfuse.store.volume.layout import HOLE, Extent, cut, decode_frames, overlay, pack_key, without_gaps
from wbfuse.store.volume.maps import WINDOW, Maps, layer_row, resolve, rows_in, rows_touched
from wbfuse.store.volume.names import fail, path_of
from wbfuse.store.volume.nodes import Nodes
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.packer import Compress, Pack, pack_rounds, whole
from wbfuse.store.volume.readahead import Streams
from wbfuse.store.volume.schema import LIVE, PENDING, extents, inodes, layers, packs
from wbfuse.store.volume.sessions import Session
from wbfuse.wire.constants import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE

MAX_SIZE = (1 << 63) - 1
_UPLOADS = 8
_RESERVE = 16
_KEEP_STREAMS = 256
_COPY_ROWS = 4096
"""The most rows that one call copies."""

_ADD_PACKS = insert(packs)
_MAKE_LIVE = (
    update(packs)
    .where(packs.c.pack == bindparam("p"), packs.c.state.in_((PENDING, LIVE)))
    .values(state=LIVE, size=func.coalesce(bindparam("z"), packs.c.size))
)
_USE = update(packs).where(packs.c.pack == bindparam("p")).values(live=packs.c.live + bindparam("d"))
_ADD_EXTENTS = insert(extents)
_DROP_EXTENTS = delete(extents).where(extents.c.layer == bindparam("l"), extents.c.start == bindparam("s"))
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


class PacksGoneError(Exception):
    """Packs that a commit was to point at are not there any more."""


@dataclass(slots=True)
class Staged:
    """What `Round.staged` is here: where the bytes of a round are."""

    extents: list[Extent] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of the packs in which they are."""


class VolumeData(VolumeClones):
    """Part of VolumeStore."""

    database: Database
    session: Session
    nodes: Nodes
    objects: Objects
    frames: FrameCache
    pack_size: int
    compress: Compress | None
    compactor: Compactor

    def _init_data(self, readahead: int) -> None:
        self.maps = Maps()
        self._readahead = readahead
        self._streams: dict[int, Streams] = {}
        self._stock: list[int] = []
        self._stock_lock = threading.Lock()
        """Guards `_stock`; the transaction that fills it runs under it."""
        self._uploads = ThreadPoolExecutor(_UPLOADS, "upload")

    def _close_data(self) -> None:
        self._uploads.shutdown()
        self.frames.close()

    # open files

    def hold(self, ino: int) -> None:
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

    # reading

    def _map(self, ino: int, start: int, end: int, nowait: bool) -> list[Extent]:
        if self.leases is not None:
            self.maps.at_version(ino, self.nodes.version(ino))
        found = self.maps.get(ino, start, end)
        if found is not None:
            return found
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "the map must be read")
        for number in range(start // WINDOW, -(-end // WINDOW)):
            if self.maps.get(ino, number * WINDOW, number * WINDOW + 1) is None:
                stamp = self.maps.stamp(ino)
                self.maps.put(ino, stamp, number, self._load(ino, number))
        return self.maps.get(ino, start, end) or self.database.query(lambda c: self._resolved(c, ino, start, end))

    def _load(self, ino: int, number: int) -> list[Extent]:
        return self.database.query(lambda c: self._resolved(c, ino, number * WINDOW, (number + 1) * WINDOW))

    @staticmethod
    def _resolved(c: Connection, ino: int, start: int, end: int) -> list[Extent]:
        layer = c.execute(select(inodes.c.layer).where(inodes.c.ino == ino)).scalar_one_or_none()
        if layer is None:
            raise fail(errno.ESTALE)
        return resolve(c, layer, start, end)

    def read(self, ino: int, offset: int, buffer: memoryview, nowait: bool = False) -> int:
        row = self.nodes.fresh(ino)
        if row is None:
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "the database must be asked")
            row = self._row(ino)
        n: int = min(len(buffer), row.size - offset)
        if n <= 0:
            return 0
        for last in (False, True):
            try:
                self._fill(ino, offset, buffer[:n], row.size, nowait)
                break
            except FileNotFoundError:  # its pack was collected: somebody has rewritten that part of the file
                if last:
                    raise fail(errno.EIO, f"a pack of node {ino} is missing") from None
                self.maps.changed(ino, None)
        return n

    def _fill(self, ino: int, offset: int, buffer: memoryview, size: int, nowait: bool) -> None:
        end = offset + len(buffer)
        plan = list(without_gaps(self._map(ino, offset, end, nowait), offset, end))
        wanted = [w for _, _, extent in plan if extent is not None for w in _wanted(extent)]
        if nowait:
            raw = self.frames.peek(wanted)
            if raw is None:
                raise BlockingIOError(errno.EAGAIN, "must be fetched")
        else:
            raw = None
        self._read_ahead(ino, offset, len(buffer), size)
        found = raw if raw is not None else self.frames.get(wanted)
        for start, stop, extent in plan:
            part = buffer[start - offset : stop - offset]
            if extent is None:
                part[:] = bytes(stop - start)
            else:
                _copy(extent, found, part)

    def _read_ahead(self, ino: int, offset: int, length: int, size: int) -> None:
        if not self._readahead:
            return
        streams = self._streams.get(ino)
        if streams is None:
            if len(self._streams) >= _KEEP_STREAMS:
                self._streams.pop(next(iter(self._streams)), None)
            streams = self._streams.setdefault(ino, Streams(self._readahead))
        ahead = streams.read(offset, length)
        if ahead is not None and ahead[0] < size:
            start, end = ahead[0], min(ahead[1], size)
            known = self.maps.get(ino, start, end)
            if known is None:
                self._uploads.submit(self._prefetch, ino, start, end)
            else:
                self._fetch_ahead(known, start, end)

    def _prefetch(self, ino: int, start: int, end: int) -> None:
        try:
            self._fetch_ahead(self._map(ino, start, end, False), start, end)
        except OSError:
            return  # who reads it will be told

    def _fetch_ahead(self, known: list[Extent], start: int, end: int) -> None:
        self.frames.prefetch([w for _, _, e in without_gaps(known, start, end) if e is not None for w in _wanted(e)])

    def read_rows(self, rows: list[Extent], offset: int, buffer: memoryview) -> None:
        """The bytes that these rows show, for compaction."""
        plan = list(without_gaps(rows, offset, offset + len(buffer)))
        found = self.frames.get([w for _, _, e in plan if e is not None for w in _wanted(e)])
        for start, stop, extent in plan:
            if extent is not None:
                _copy(extent, found, buffer[start - offset : stop - offset])

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
            c.execute(_DROP_EXTENTS, [{"l": layer, "s": s} for s in gone])
            c.execute(_ADD_EXTENTS, [_as_row(layer, e) for e in come])
            self._count(c, live, staged.sizes)
            return True

        try:
            done = self.database.transact(act, durable=True)
        except PacksGoneError:
            return False
        if done:
            self.maps.changed(round_.ino, [(start, end)])
        return done

    # staging

    def _new_pack(self) -> int:
        """The number of a pack whose row is there, pending, so that gc knows of it whatever happens."""
        with self._stock_lock:
            if not self._stock:
                first = self.session.ids(_RESERVE)
                rows = [
                    {"pack": first + i, "state": PENDING, "session": self.session.number, "size": 0, "live": 0}
                    for i in range(_RESERVE)
                ]

                def act(c: Connection) -> None:
                    self.session.guard(c)
                    c.execute(_ADD_PACKS, rows)

                self.database.transact(act)
                self._stock = [first + i for i in range(_RESERVE)]
            return self._stock.pop()

    def _upload(self, pack: Pack, progress: Progress) -> int:
        """Put a pack under a new number. A number whose key turned out to be taken is given up."""
        for _ in range(3):
            number = self._new_pack()
            try:
                self.objects.put(pack_key(number), pack.buffers)
            except FileExistsError:
                self._abandon([number])  # an answer was lost on the way, perhaps
                continue
            except BaseException:
                self._abandon([number])
                raise
            for offset, parts in pack.raw:
                self.frames.put(number, offset, b"".join(parts))
            self.frames.put_stored(number, pack.buffers)
            progress(sum(e.length for _, e in pack.extents))
            return number
        raise OSError(errno.EAGAIN, "the store says again and again that a new key is taken")

    def stage(self, rounds: Sequence[Round], progress: Progress) -> None:
        staged = [Staged() for _ in rounds]
        waiting: list[tuple[Pack, Callable[[], int]]] = []
        last: Pack | None = None
        for pack in pack_rounds(rounds, self.pack_size, self.compress):
            if last is not None:
                waiting.append((last, self._uploads.submit(self._upload, last, progress).result))
            last = pack
        if last is not None:
            waiting.append((last, lambda: self._upload(last, progress)))
        error: Exception | None = None
        made: list[int] = []
        for pack, result in reversed(waiting):  # the last one goes in this thread
            try:
                number = result()
            except Exception as e:  # noqa: BLE001 - raised below, once nobody uses the buffers any more
                error = e
                continue
            made.append(number)
            for i, extent in pack.extents:
                staged[i].extents.append(extent._replace(pack=number))
                staged[i].sizes[number] = pack.size
        if error is not None:
            self._abandon(made)
            raise error
        for round_, s in zip(rounds, staged, strict=True):
            s.extents.sort()
            round_.staged = s
            for piece in round_.pieces:
                piece.buffers = None

    def unstage(self, round_: Round) -> None:
        if isinstance(round_.staged, Staged):
            # A pack that other rounds share stays: once they have committed, gc finds what is dead in it.
            self._abandon({e.pack for e in round_.staged.extents})
            round_.staged = None

    def _abandon(self, numbers: Iterable[int]) -> None:
        """Packs that no commit will name: gc takes them (their rows are still pending)."""
        self.abandoned(list(numbers))

    def abandoned(self, numbers: list[int]) -> None:
        """Delete these packs where they are pending. (store)"""
        raise NotImplementedError

    # committing

    def commit(self, rounds: Sequence[Round], progress: Progress) -> None:
        fresh = [r for r in rounds if r.staged is None]
        if fresh:
            self.stage(fresh, progress)
        try:
            self._commit_staged(rounds)
        except PacksGoneError:
            with self._stock_lock:
                self._stock.clear()  # whoever took these may have taken those as well
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
            self._count(c, live, sizes)
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
        self.maps.changed(row.ino, ranges)
        self.maps.is_version(row.ino, row.version)
        self.nodes.learn(row)
        if round_.pieces:
            self.compactor.wrote(row.ino)

    @staticmethod
    def _count(c: Connection, live: dict[int, int], used: Mapping[int, int | None]) -> None:
        """Set `used` packs live (with their size, where it is new), and change how much of each is used.

        PacksGoneError where one is not there.
        """
        for pack, size in sorted(used.items()):
            if c.execute(_MAKE_LIVE, {"p": pack, "z": size}).rowcount != 1:
                raise PacksGoneError
        changes = [{"p": p, "d": d} for p, d in sorted(live.items()) if d and p != HOLE]
        if changes:
            c.execute(_USE, changes)

    def _apply(self, c: Connection, row: Any, round_: Round, spare: int, live: dict[int, int], now: int) -> Any:
        """Bring one round to the rows of its file, whose inode is locked. `live` collects the use of packs."""
        staged: Staged = round_.staged  # type: ignore[assignment]
        layer, held = row.layer, row.bytes
        changes = whole(round_, staged.extents)
        if round_.lowest is not None and round_.lowest < row.size and layer:
            held += self._clear(c, layer, round_.lowest, MAX_SIZE, live)
            below = update(layers).where(layers.c.layer == layer, layers.c.base_size > round_.lowest)
            c.execute(below.values(base_size=round_.lowest))
        if changes and (layer or staged.extents):
            if not layer:
                layer = spare
                c.execute(insert(layers).values(layer=layer, base=0, base_size=0, users=1, depth=0))
            held += self._lay(c, layer, changes, live)
        size = round_.size
        if size is None:
            size = max(row.size, changes[-1].end if changes else 0)
        values = {
            "i": row.ino, "z": size, "b": max(0, held), "l": layer, "at": round_.atime_ns, "mt": round_.mtime_ns,
            "ct": now,
        }  # fmt: skip
        return c.execute(_SET_INODE, values).one()

    def _lay(self, c: Connection, layer: int, changes: list[Extent], live: dict[int, int]) -> int:
        """Lay `changes` over the rows of a layer. Answers how many more bytes its rows hold."""
        base = layer_row(c, layer)
        held = 0
        wide = [e for e in changes if e.pack == HOLE and e.length > WINDOW]
        for e in wide:  # rows inside go without being read
            held += self._clear(c, layer, e.start, e.end, live)
        based = bool(base.base)
        if based:  # of wide holes only what hides the base
            changes = [e if e not in wide else cut(e, e.start, base.base_size) for e in changes
                       if e not in wide or e.start < base.base_size]  # fmt: skip
        else:
            changes = [e for e in changes if e not in wide]
        old = rows_touched(c, layer, _merged(changes), self.database.sqlite)
        gone, come, used = overlay(old, changes, based)
        # Beyond what the base shows a hole needs no row.
        come = [cut(e, 0, base.base_size) if e.pack == HOLE else e for e in come
                if e.pack != HOLE or e.start < base.base_size]  # fmt: skip
        if gone:
            c.execute(_DROP_EXTENTS, [{"l": layer, "s": s} for s in gone])
        if come:
            c.execute(_ADD_EXTENTS, [_as_row(layer, e) for e in come])
        for pack, change in used.items():
            live[pack] = live.get(pack, 0) + change
        return held + sum(used.values())

    @staticmethod
    def _clear(c: Connection, layer: int, start: int, end: int, live: dict[int, int]) -> int:
        """Remove the rows of a layer in [start, end). Answers (not above 0) how many more bytes its rows hold."""
        held = 0
        edges = {
            e.start: e for at in (start, end) for e in rows_in(c, layer, at, min(at + 1, MAX_SIZE)) if e.start < at
        }
        inside = (extents.c.layer == layer) & (extents.c.start >= start) & (extents.c.start < end)
        use = select(extents.c.pack, func.sum(extents.c.length)).where(inside).group_by(extents.c.pack)
        for pack, length in c.execute(use):
            if pack != HOLE:
                live[pack] = live.get(pack, 0) - int(length)
                held -= int(length)
        c.execute(delete(extents).where(inside))
        for e in edges.values():
            kept = [cut(e, e.start, start)] if e.start < start else []
            kept += [cut(e, end, e.end)] if e.end > end else []
            if e.start < start:
                c.execute(_DROP_EXTENTS, [{"l": layer, "s": e.start}])
            c.execute(_ADD_EXTENTS, [_as_row(layer, k) for k in kept]) if kept else None
            if e.pack != HOLE:
                # One that begins inside was counted with those that went; what is kept of it comes back.
                change = sum(k.length for k in kept) - (e.length if e.start < start else 0)
                live[e.pack] = live.get(e.pack, 0) + change
                held += change
        return held

    def _now(self, round_: Round) -> None:
        """Commit a change that somebody waits for."""
        round_.mtime_ns = time.time_ns()
        with self._writing(round_.ino):
            self.commit([round_], lambda _n: None)

    @contextlib.contextmanager
    def _writing(self, ino: int) -> Iterator[None]:
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

    # durability

    def sync(self, ino: int, datasync: bool = False) -> None:
        self.nodes.known(ino)
        self.sync_names()  # bytes are durable once they are committed

    def sync_all(self) -> None:
        self.sync_names()

    # holes

    def seek(self, ino: int, offset: int, whence: int) -> int:
        size: int = self._row(ino).size
        if offset >= size:
            raise fail(errno.ENXIO)
        if whence == os.SEEK_DATA:
            at = self.database.query(lambda c: self._next_data(c, ino, offset, size))
            if at is None:
                raise fail(errno.ENXIO)
            return at
        at = offset
        while at < size:
            step = min(size, (at // WINDOW + 1) * WINDOW)
            for start, _, extent in without_gaps(self._map(ino, at, step, False), at, step):
                if extent is None:
                    return start
            at = step
        return size

    @staticmethod
    def _next_data(c: Connection, ino: int, offset: int, size: int) -> int | None:
        """The first byte at or after `offset` that a row shows."""
        layer = c.execute(select(inodes.c.layer).where(inodes.c.ino == ino)).scalar_one_or_none()
        if not layer:
            return None
        at = offset
        while at < size:
            shown = resolve(c, layer, at, min(size, at + WINDOW))
            if shown:
                return shown[0].start
            at = min(size, at + WINDOW)
            candidates: list[int | None] = []
            walk = layer
            while walk:
                after = select(func.min(extents.c.start)).where(
                    extents.c.layer == walk, extents.c.start >= at, extents.c.pack != HOLE
                )
                candidates.append(c.execute(after).scalar_one_or_none())
                reaching = [e.start for e in rows_in(c, walk, at, at + 1) if e.pack != HOLE]
                candidates += [at] if reaching else []
                walk = layer_row(c, walk).base
            following = [n for n in candidates if n is not None]
            if not following:
                return None
            at = max(at, min(following))
        return None

    # copies

    def copy_range(self, source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Rows are copied, never bytes; a whole file, or what continues one, becomes a layer (`_share`)."""
        self.nodes.known(source)
        with self._writing(target):
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
        held += self._lay(c, layer, changes, live)
        self._count(c, live, dict.fromkeys({e.pack for e in moved}))
        size = max(b.size, target_offset + done)
        return [done, self._sized(c, b, layer, size, held - b.bytes, now)]


def _merged(changes: list[Extent]) -> list[tuple[int, int]]:
    """Ranges that changes touch, neighbours as one."""
    out: list[tuple[int, int]] = []
    for e in changes:
        if out and out[-1][1] == e.start:
            out[-1] = out[-1][0], e.end
        else:
            out.append((e.start, e.end))
    return out


def _as_row(layer: int, e: Extent) -> dict[str, Any]:
    return {
        "layer": layer, "start": e.start, "length": e.length, "pack": e.pack, "offset": e.offset, "skip": e.skip,
        "frames": e.frames,
    }  # fmt: skip


def _wanted(extent: Extent) -> list[Wanted]:
    out, at = [], extent.offset
    for frame in decode_frames(extent.frames):
        out.append(Wanted(extent.pack, at, frame))
        at += frame.stored
    return out


def _copy(extent: Extent, raw: dict[Place, bytes], buffer: memoryview) -> None:
    """The bytes of an extent, from its frames."""
    at, skip, done = extent.offset, extent.skip, 0
    for frame in decode_frames(extent.frames):
        part = memoryview(raw[extent.pack, at])[skip : skip + extent.length - done]
        buffer[done : done + len(part)] = part
        done += len(part)
        skip = 0
        at += frame.stored
